"""Laws of the loss: what it is, what is paired, and that every unbiased target teaches the same."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stablefield import (
    EDM,
    VE,
    VP,
    Cosine,
    Denoiser,
    EDMWeight,
    Flow,
    FullDataset,
    Ideal,
    LogNormal,
    NearestNeighbours,
    NoiseWeight,
    Objective,
    Perturbed,
    Pool,
    Process,
    ReferenceBatch,
    SingleSample,
    SubVP,
    TargetEstimator,
    Times,
    Uniform,
    VelocityWeight,
    posterior,
)
from stablefield.objective import Weight
from stablefield.parametrize import coefficients
from stablefield.process import per_row

SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
WEIGHTS = [EDMWeight(), EDMWeight(1.3), NoiseWeight(), VelocityWeight()]


class Affine(Denoiser):
    """A denoiser simple enough to be differentiated by hand, that remembers what it was asked."""

    def __init__(self, process: Process, dimensions: int = 2) -> None:
        super().__init__()
        self.process = process
        self.matrix = nn.Parameter(torch.eye(dimensions, dtype=torch.float64) * 0.7)
        self.shift = nn.Parameter(torch.linspace(0, 1, dimensions, dtype=torch.float64))
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        self.asked.append((x_t, t, label))
        return x_t @ self.matrix + self.shift


@dataclass(frozen=True)
class At(Times):
    """One time for all."""

    t: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)


@dataclass(frozen=True, eq=False)
class Pinned(VE):
    """Whatever the sources are, they came to lie at x_t: so that sources can be counted out."""

    x_t: Tensor

    def perturb(self, x: Tensor, t: Tensor, noise: Tensor, **told: Tensor | None) -> Perturbed:
        x_t = self.x_t.expand_as(x)
        return Perturbed(x, (x_t - x) / t[:, None], t, torch.ones_like(t), t, x_t, **told)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_the_loss_is_the_formula(process: Process, weight: Weight) -> None:
    denoiser, times, index = Affine(process), Uniform(0.05, 0.9), torch.tensor([3, 0, 5, 3])
    report = Objective(times, FullDataset(Pool(SIX)), weight)(
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
        NoiseWeight: lambda w: (alpha / sigma) ** 2,
        VelocityWeight: lambda w: 1 / sigma**2,
    }[type(weight)](weight)
    torch.testing.assert_close(report.each, factor * error)
    torch.testing.assert_close(report.loss, (factor * error).mean())
    torch.testing.assert_close(report.t, t)
    torch.testing.assert_close(report.ess, 1 / w.square().sum(1))


@pytest.mark.parametrize(
    ("weight", "head", "processes"),
    [(NoiseWeight(), "noise", PROCESSES), (VelocityWeight(), "velocity", [Flow()])],
)
def test_a_weight_makes_errors_of_its_head_count_alike(weight: Weight, head: str, processes: list[Process]) -> None:
    t = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    for process in processes:
        a, _, c = coefficients(head, process, t)
        torch.testing.assert_close(weight(process, t), (c / a) ** 2)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 2.0])
def test_edm_s_weight_makes_errors_of_the_network_count_alike(process: Process, sigma_data: float) -> None:
    t = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    _, c_out, _, _ = EDM(sigma_data)(process, t)
    torch.testing.assert_close(EDMWeight(sigma_data)(process, t), c_out**-2)


def targets(pool: Pool) -> list[TargetEstimator]:
    return [
        SingleSample(),
        ReferenceBatch(pool, 1),
        ReferenceBatch(pool, 4),
        NearestNeighbours(pool, 3),
        FullDataset(pool),
    ]


def test_every_target_sees_the_same_times_and_noise() -> None:
    index, denoiser = torch.tensor([3, 0, 5, 3]), Affine(VE())
    for target in targets(Pool(SIX)):
        objective = Objective(LogNormal(), target, EDMWeight())
        objective(denoiser, SIX[index], index=index, generator=torch.Generator().manual_seed(0))
    first, *others = denoiser.asked
    for x_t, t, _ in others:
        assert torch.equal(x_t, first[0])
        assert torch.equal(t, first[1])


def test_a_step_follows_from_its_generator_alone() -> None:
    index = torch.tensor([3, 0, 5, 3])
    objective = Objective(LogNormal(), ReferenceBatch(Pool(SIX), 4), EDMWeight())

    def step(disturbance: int) -> Tensor:
        torch.manual_seed(disturbance)
        return objective(Affine(VE()), SIX[index], index=index, generator=torch.Generator().manual_seed(0)).each

    assert torch.equal(step(1), step(2))


def test_the_denoiser_and_the_references_are_told_the_same_label() -> None:
    labels, index = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([1, 2, 4])
    denoiser = Affine(VE())
    report = Objective(At(50.0), FullDataset(Pool(SIX, labels)), EDMWeight())(
        denoiser, SIX[index], index=index, label=labels[index]
    )
    assert denoiser.asked[0][2] is not None
    assert torch.equal(denoiser.asked[0][2], labels[index])
    # at such noise every member of the class counts alike
    torch.testing.assert_close(report.ess, torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_exact_denoiser_has_no_loss_against_the_exact_target(process: Process) -> None:
    pool = Pool(SIX)
    report = Objective(Uniform(0.05, 0.9), FullDataset(pool), NoiseWeight())(Ideal(pool, process), SIX)
    assert report.loss == 0


def gradients(loss: Tensor, denoiser: Affine) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(denoiser.parameters())))


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize(
    "target",
    [
        lambda pool: SingleSample(),
        lambda pool: ReferenceBatch(pool, 6),
        lambda pool: NearestNeighbours(pool, 2),
        lambda pool: NearestNeighbours(pool, 4),
    ],
)
def test_over_its_sources_every_target_teaches_what_the_exact_one_does(
    target: Callable[[Pool], TargetEstimator], sigma: float
) -> None:
    x_t, index, pool = torch.tensor([[0.5, 0.2]], dtype=torch.float64), torch.arange(6), Pool(SIX)
    w = torch.softmax(-(x_t - SIX).square().sum(1) / (2 * sigma**2), 0)
    denoiser = Affine(Pinned(x_t))

    def taught(estimator: TargetEstimator) -> tuple[Tensor, list[Tensor]]:
        loss = w @ Objective(At(sigma), estimator, NoiseWeight())(denoiser, SIX, index=index).each
        return loss, gradients(loss, denoiser)

    (loss, found), (least, exact) = taught(target(pool)), taught(FullDataset(pool))
    for gradient, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    # what a loss has beyond the exact one's is its target's variance, which nothing can learn away
    assert loss >= least * (1 - 1e-12)
    if isinstance(target(pool), SingleSample):
        variance = posterior(x_t, SIX, sigma=sigma).variance[0]
        torch.testing.assert_close(loss - least, variance / sigma**2 / 2)


def test_the_gradient_reaches_the_denoiser_and_stops_at_the_target() -> None:
    x = SIX.clone().requires_grad_()
    denoiser = Affine(VE())
    objective = Objective(At(0.7), FullDataset(Pool(SIX)), NoiseWeight())
    report = objective(denoiser, x, index=torch.arange(6), generator=torch.Generator().manual_seed(0))
    by_x, by_matrix = torch.autograd.grad(report.loss, [x, denoiser.matrix])
    x_t, t, _ = denoiser.asked[0]
    residual = x_t @ denoiser.matrix + denoiser.shift - posterior(x_t, SIX, sigma=t).mean
    factor = per_row(t, x) ** -2 / 6  # 2 / (6 rows x 2 dimensions) of the squared error, weighted
    torch.testing.assert_close(by_x, (factor * residual @ denoiser.matrix.T).detach())
    torch.testing.assert_close(by_matrix, (x_t.T @ (factor * residual)).detach())
