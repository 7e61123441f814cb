"""Laws of the loss: its formula, common random numbers, and equal mean gradients for every unbiased target."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stablefield import (
    VE,
    VP,
    Cosine,
    Denoiser,
    DSMTarget,
    Flow,
    IdealDenoiser,
    KNNTarget,
    NoisyBatch,
    Objective,
    Pool,
    STFTarget,
    SubVP,
    TargetEstimator,
    posterior,
)
from stablefield.objective import EDMWeight, LossWeight, SNRWeight, VelocityWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.prediction import coefficients
from stablefield.process import Process, per_example
from stablefield.targets import ExactTarget
from stablefield.times import LogNormal, TimeDistribution, Uniform

SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
WEIGHTS = [EDMWeight(), EDMWeight(1.3), SNRWeight(), VelocityWeight()]


def exact_target(pool: Pool) -> TargetEstimator:
    """The exact target over all data, with nothing dropped."""
    return ExactTarget(pool, missing_mass=0.0)


class Affine(Denoiser):
    """A denoiser simple enough to be differentiated by hand, which records its inputs."""

    def __init__(self, process: Process, dimensions: int = 2) -> None:
        super().__init__()
        self.process = process
        self.matrix = nn.Parameter(torch.eye(dimensions, dtype=torch.float64) * 0.7)
        self.shift = nn.Parameter(torch.linspace(0, 1, dimensions, dtype=torch.float64))
        self.inputs: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        self.inputs.append((x_t, t, label))
        return x_t @ self.matrix + self.shift


@dataclass(frozen=True)
class At(TimeDistribution):
    """The same time for every example."""

    t: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)


@dataclass(frozen=True, eq=False)
class Pinned(VE):
    """A process that gives every source the same x_t, so that the mean over sources can be written as a sum."""

    x_t: Tensor

    def perturb(self, x: Tensor, t: Tensor, noise: Tensor, **conditions: Tensor | None) -> NoisyBatch:
        x_t = self.x_t.expand_as(x)
        return NoisyBatch(x, (x_t - x) / t[:, None], t, torch.ones_like(t), t, x_t, **conditions)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_the_loss_is_the_formula(process: Process, weight: LossWeight) -> None:
    denoiser, times, index = Affine(process), Uniform(0.05, 0.9), torch.tensor([3, 0, 5, 3])
    report = Objective(times, exact_target(Pool(SIX)), weight)(
        denoiser, SIX[index], index=index, generator=torch.Generator().manual_seed(3)
    )
    g = torch.Generator().manual_seed(3)
    t = times.draw(4, g)
    noise = torch.randn(4, 2, generator=g, dtype=torch.float64)
    alpha, sigma = process.scales(t)
    x_t = alpha[:, None] * SIX[index] + sigma[:, None] * noise
    w = torch.softmax(-(x_t[:, None] - alpha[:, None, None] * SIX).square().sum(2) / (2 * sigma[:, None] ** 2), 1)
    error = (x_t @ denoiser.matrix + denoiser.shift - w @ SIX).square().mean(1)
    factor = {
        EDMWeight: lambda w: (sigma**2 + (alpha * w.sigma_data) ** 2) / (sigma * w.sigma_data) ** 2,
        SNRWeight: lambda w: (alpha / sigma) ** 2,
        VelocityWeight: lambda w: 1 / sigma**2,
    }[type(weight)](weight)
    torch.testing.assert_close(report.losses, factor * error)
    torch.testing.assert_close(report.loss, (factor * error).mean())
    torch.testing.assert_close(report.t, t)
    torch.testing.assert_close(report.ess, 1 / w.square().sum(1))


@pytest.mark.parametrize(
    ("weight", "prediction_type", "processes"),
    [(SNRWeight(), "epsilon", PROCESSES), (VelocityWeight(), "velocity", [Flow()])],
)
def test_a_weight_is_a_unit_weight_on_errors_of_its_prediction_type(
    weight: LossWeight, prediction_type: str, processes: list[Process]
) -> None:
    t = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    for process in processes:
        a, _, c = coefficients(prediction_type, process, t)
        torch.testing.assert_close(weight(process, t), (c / a) ** 2)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 2.0])
def test_edm_weight_is_a_unit_weight_on_errors_of_the_network(process: Process, sigma_data: float) -> None:
    t = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    _, c_out, _, _ = EDMPreconditioning(sigma_data)(process, t)
    torch.testing.assert_close(EDMWeight(sigma_data)(process, t), c_out**-2)


def targets(pool: Pool) -> list[TargetEstimator]:
    return [
        DSMTarget(),
        STFTarget(pool, 1),
        STFTarget(pool, 4),
        KNNTarget(pool, 3),
        exact_target(pool),
    ]


def test_every_target_sees_the_same_times_and_noise() -> None:
    index, denoiser = torch.tensor([3, 0, 5, 3]), Affine(VE())
    for target in targets(Pool(SIX)):
        objective = Objective(LogNormal(), target, EDMWeight())
        objective(denoiser, SIX[index], index=index, generator=torch.Generator().manual_seed(0))
    first, *others = denoiser.inputs
    for x_t, t, _ in others:
        assert torch.equal(x_t, first[0])
        assert torch.equal(t, first[1])


def test_a_loss_depends_on_no_randomness_but_its_generator() -> None:
    index = torch.tensor([3, 0, 5, 3])
    objective = Objective(LogNormal(), STFTarget(Pool(SIX), 4), EDMWeight())

    def step(disturbance: int) -> Tensor:
        torch.manual_seed(disturbance)
        return objective(Affine(VE()), SIX[index], index=index, generator=torch.Generator().manual_seed(0)).losses

    assert torch.equal(step(1), step(2))


@pytest.mark.parametrize("per_example", [False, True])
def test_training_takes_the_loss_that_a_call_of_the_objective_returns(per_example: bool) -> None:
    index, denoiser = torch.tensor([3, 0, 5, 3]), Affine(VP())
    objective = Objective(Uniform(0.1, 0.9), STFTarget(Pool(SIX), 4), SNRWeight())
    draws = torch.Generator().manual_seed(0)
    called = objective(denoiser, SIX[index], index=index, generator=draws)
    again = torch.Generator().manual_seed(0)
    t = objective.times.draw(4, again)
    generators = [again] * 4 if per_example else again  # one generator draws the same numbers, one by one or together
    noisy = objective.perturb(denoiser.process, SIX[index], t=t, generators=generators, index=index)
    target = objective.target(noisy, generator=again)
    torch.testing.assert_close(objective.loss(denoiser, denoiser.process, noisy, target).losses, called.losses)


def test_generators_of_single_examples_need_given_times() -> None:
    objective = Objective(LogNormal(), DSMTarget(), EDMWeight())
    generators = (torch.Generator().manual_seed(n) for n in range(6))
    with pytest.raises(ValueError, match="give t beside one generator per example"):
        objective.perturb(VE(), SIX, generators=generators)


def test_the_denoiser_and_the_references_have_the_same_label() -> None:
    labels, index = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([1, 2, 4])
    denoiser = Affine(VE())
    report = Objective(At(50.0), exact_target(Pool(SIX, labels)), EDMWeight())(
        denoiser, SIX[index], index=index, label=labels[index]
    )
    assert denoiser.inputs[0][2] is not None
    assert torch.equal(denoiser.inputs[0][2], labels[index])
    # at this noise level all data points of the class have the same weight
    torch.testing.assert_close(report.ess, torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_exact_denoiser_has_no_loss_against_the_exact_target(process: Process) -> None:
    pool = Pool(SIX)
    report = Objective(Uniform(0.05, 0.9), exact_target(pool), SNRWeight())(IdealDenoiser(pool, process), SIX)
    assert report.loss < 1e-20  # squares of the rounding of float64


def gradients(loss: Tensor, denoiser: Affine) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(denoiser.parameters())))


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize(
    "target",
    [
        lambda pool: DSMTarget(),
        lambda pool: STFTarget(pool, 6),
        lambda pool: KNNTarget(pool, 2),
        lambda pool: KNNTarget(pool, 4),
    ],
)
def test_the_mean_gradient_over_sources_is_that_of_the_exact_target(
    target: Callable[[Pool], TargetEstimator], sigma: float
) -> None:
    x_t, index, pool = torch.tensor([[0.5, 0.2]], dtype=torch.float64), torch.arange(6), Pool(SIX)
    w = torch.softmax(-(x_t - SIX).square().sum(1) / (2 * sigma**2), 0)
    denoiser = Affine(Pinned(x_t))

    def mean_over_sources(estimator: TargetEstimator) -> tuple[Tensor, list[Tensor]]:
        loss = w @ Objective(At(sigma), estimator, SNRWeight())(denoiser, SIX, index=index).losses
        return loss, gradients(loss, denoiser)

    (loss, found), (least, exact) = mean_over_sources(target(pool)), mean_over_sources(exact_target(pool))
    for gradient, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    # the excess over the loss of the exact target is the variance of the target, which training cannot reduce
    assert loss >= least * (1 - 1e-12)
    if isinstance(target(pool), DSMTarget):
        variance = posterior(x_t, SIX, sigma=sigma).variance[0]
        torch.testing.assert_close(loss - least, variance / sigma**2 / 2)


def test_the_gradient_reaches_the_denoiser_and_stops_at_the_target() -> None:
    x = SIX.clone().requires_grad_()
    denoiser = Affine(VE())
    objective = Objective(At(0.7), exact_target(Pool(SIX)), SNRWeight())
    report = objective(denoiser, x, index=torch.arange(6), generator=torch.Generator().manual_seed(0))
    by_x, by_matrix = torch.autograd.grad(report.loss, [x, denoiser.matrix])
    x_t, t, _ = denoiser.inputs[0]
    residual = x_t @ denoiser.matrix + denoiser.shift - posterior(x_t, SIX, sigma=t).mean
    factor = per_example(t, x) ** -2 / 6  # 2 / (6 examples x 2 dimensions) of the squared error, weighted
    torch.testing.assert_close(by_x, (factor * residual @ denoiser.matrix.T).detach())
    torch.testing.assert_close(by_matrix, (x_t.T @ (factor * residual)).detach())
