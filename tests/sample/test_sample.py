"""Laws of sampling: where it ends, how fast it converges, and what a sample depends on."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stablefield import VE, VP, Cosine, Denoiser, Flow, Heun, IdealDenoiser, Pool, Preconditioned, Sampler, SubVP
from stablefield.networks import UNet
from stablefield.preconditioning import EDMPreconditioning
from stablefield.process import Process
from stablefield.sample import EDMGrid, Euler, TimeGrid, UniformGrid

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
everywhere = pytest.mark.parametrize("process", PROCESSES, ids=repr)
MEAN = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
DEVIATION = torch.tensor([0.5, 1.0, 0.1], dtype=torch.float64)


class Gaussian(Denoiser):
    """The exact E[x | x_t] for x ~ N(mean, deviation^2) with independent coordinates."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        alpha, sigma = (v[:, None] for v in self.process.scales(t))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        return MEAN + alpha * DEVIATION**2 / variance * (x_t - alpha * MEAN)


def solution(process: Process, latents: Tensor, t: Tensor) -> Tensor:
    """Solution of the probability-flow ODE from sigma_t latents: it ends at mean + s z, with constant z."""
    alpha, sigma = process.scales(t)
    z = (sigma * latents - alpha * MEAN) / ((alpha * DEVIATION) ** 2 + sigma**2).sqrt()
    return MEAN + DEVIATION * z


def latents(seeds: range, shape: tuple[int, ...] = (3,)) -> Tensor:
    """The latents of seeds: float32 normal draws, each from its own generator."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()


@dataclass(frozen=True)
class Cubes(TimeGrid):
    """Noise levels 5 (1 - i/n)^3: smooth down to 0, so that no last step hides the order of a sampler."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        return process.time(5 * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 3)


def trained_unet(num_classes: int = 0) -> Preconditioned:
    """A small U-Net without the zero weights of its initialization."""
    g = torch.Generator().manual_seed(0)
    network = UNet((1, 8, 8), channels=8, blocks=1, num_classes=num_classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return Preconditioned(network, VE(), EDMPreconditioning(), num_classes).eval()


def pixels(x: Tensor) -> Tensor:
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


# ---- where it ends


@everywhere
@pytest.mark.parametrize("sampler", [Heun(18), Euler(40), Heun(18, churn=20.0)], ids=repr)
def test_the_exact_denoiser_leads_to_points_of_the_data(process: Process, sampler: Sampler) -> None:
    data = torch.randn(10, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = sampler(IdealDenoiser(Pool(data), process), (2,), seeds=range(40)).x
    distance, nearest = torch.cdist(made, data).min(1)
    assert distance.max() < 1e-6
    assert len(nearest.unique()) >= 5


@pytest.mark.parametrize("process", [VP(), SubVP(), Cosine(), Flow()], ids=repr)
@pytest.mark.parametrize("sampler", [Heun, Euler])
def test_sampling_may_start_in_pure_noise(process: Process, sampler: type[Sampler]) -> None:
    data = torch.randn(10, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = sampler(60, UniformGrid())(IdealDenoiser(Pool(data), process), (2,), seeds=range(20)).x
    assert torch.cdist(made, data).amin(1).max() < 1e-6


def test_the_exact_denoiser_of_a_class_leads_to_points_of_the_class() -> None:
    g = torch.Generator().manual_seed(1)
    data, labels = torch.randn(12, 2, generator=g, dtype=torch.float64), torch.arange(12) % 3
    denoiser = IdealDenoiser(Pool(data, labels), VE())
    for label in (0, 2, torch.arange(20) % 3):
        made = Heun()(denoiser, (2,), seeds=range(20), label=label)
        assert torch.equal(labels[torch.cdist(made.x, data).argmin(1)], torch.as_tensor(label).expand(20))
        assert made.label is not None
        assert torch.equal(made.label, torch.as_tensor(label).expand(20))
    drawn = Heun()(denoiser, (2,), seeds=range(20))
    assert torch.equal(labels[torch.cdist(drawn.x, data).argmin(1)], drawn.label)
    unconditional = Heun()(denoiser, (2,), seeds=range(20), label=-1)
    torch.testing.assert_close(unconditional.x, Heun()(IdealDenoiser(Pool(data), VE()), (2,), seeds=range(20)).x)


# ---- how fast it converges


@everywhere
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2)])
def test_a_sampler_converges_to_the_solution_with_its_order(
    process: Process, sampler: type[Sampler], order: int
) -> None:
    start = Cubes()(process, 1)[0]
    exact = solution(process, latents(range(8)), start)
    errors = []
    for steps in (32, 64, 128):
        made = sampler(steps, Cubes())(Gaussian(process), (3,), seeds=range(8)).x
        errors.append(float((made - exact).norm()))
    assert errors[-1] < (0.1 if order == 1 else 1e-3)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


@everywhere
def test_churn_changes_samples_but_not_their_distribution(process: Process) -> None:
    seeds = range(1500)
    made = Heun(40, churn=30.0)(Gaussian(process), (3,), seeds=seeds).x
    plain = Heun(40)(Gaussian(process), (3,), seeds=seeds).x
    assert not torch.allclose(made, plain)
    z = (made - MEAN) / DEVIATION
    assert (z.mean(0).abs() < 4 / 1500**0.5 + 0.02).all()
    assert ((z.std(0) - 1).abs() < 4 / 3000**0.5 + 0.02).all()


# ---- what it costs, and what it depends on


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_evaluations_are_counted(steps: int) -> None:
    twice = 2 * steps - 1  # once in the last step, at whose end the predicted noise is not defined
    for sampler, wanted in ((Heun(steps), twice), (Heun(steps, churn=1.0), twice), (Euler(steps), steps)):
        assert sampler(Gaussian(VE()), (3,), seeds=[0, 1, 2]).evaluations == wanted


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("sampler", [Heun(4), Heun(4, churn=4.0), Euler(4)], ids=repr)
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(sampler: Sampler, num_classes: int) -> None:
    denoiser = trained_unet(num_classes)
    seeds = [5, 0, 17, 3, 2**31, 8, 1]
    together = sampler(denoiser, (1, 8, 8), seeds=seeds)
    assert together.x.std() > 0.1
    assert len(pixels(together.x).flatten(1).unique(dim=0)) == 7
    for b, seed in list(enumerate(seeds))[::3]:
        single = sampler(denoiser, (1, 8, 8), seeds=[seed])
        torch.testing.assert_close(single.x[0], together.x[b], rtol=1e-4, atol=1e-4)
        assert torch.equal(pixels(single.x[0]), pixels(together.x[b]))
        if num_classes:
            assert single.label is not None
            assert together.label is not None
            assert single.label[0] == together.label[b]


def test_the_label_reaches_the_network() -> None:
    denoiser = trained_unet(4)
    images = [Heun(3)(denoiser, (1, 8, 8), seeds=[0], label=label).x for label in (-1, 0, 1, 2, 3)]
    assert len(torch.cat(images).flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_the_same_seeds_make_the_same_samples_whatever_was_drawn_before(churn: float) -> None:
    torch.manual_seed(1)
    one = Heun(9, churn=churn)(Gaussian(VE()), (3,), seeds=range(4)).x
    torch.manual_seed(2)
    assert torch.equal(one, Heun(9, churn=churn)(Gaussian(VE()), (3,), seeds=range(4)).x)


def test_without_churn_a_sample_is_a_function_of_its_latent() -> None:
    class Deterministic(Heun):
        def step(self, denoiser, x, t, s, draw_noise):  # type: ignore[no-untyped-def]
            return super().step(denoiser, x, t, s, lambda: pytest.fail("a deterministic sampler drew noise"))

    Deterministic(5)(Gaussian(VE()), (3,), seeds=[0])


def test_latents_and_then_classes_come_from_the_seed_s_own_generator() -> None:
    data, labels = torch.randn(12, 3), torch.arange(12) % 3
    evaluated: list[Tensor] = []

    class Recording(Gaussian):
        num_classes = 3

        def forward(self, x_t, t, label=None, augment_label=None):  # type: ignore[no-untyped-def]
            evaluated.append(x_t)
            return super().forward(x_t, t)

    made = Euler(1)(Recording(VE()), (3,), seeds=range(30))
    torch.testing.assert_close(evaluated[0], 80 * latents(range(30)), rtol=1e-12, atol=0)
    wanted = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        torch.randn(3, generator=g)
        wanted.append(torch.randint(3, (1,), generator=g))
    assert made.label is not None
    assert torch.equal(made.label, torch.cat(wanted))
    assert IdealDenoiser(Pool(data, labels), VE()).num_classes == 3


# ---- times


@everywhere
@pytest.mark.parametrize("steps", [1, 2, 18, 250])
@pytest.mark.parametrize("grid", [EDMGrid(), EDMGrid(0.01, 10.0, 3.0), UniformGrid(0.9)], ids=repr)
def test_a_grid_decreases_strictly_to_zero(process: Process, grid: TimeGrid, steps: int) -> None:
    times = grid(process, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times[-1] == 0


@everywhere
def test_edm_s_noise_levels_are_the_same_for_every_process(process: Process) -> None:
    alpha, sigma = process.scales(EDMGrid()(process, 18)[:-1])
    levels = (80 ** (1 / 7) + torch.arange(18).double() / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma / alpha, levels, rtol=1e-9, atol=0)


# ---- errors


def test_wrong_steps_labels_and_grids_are_refused() -> None:
    for sampler in (Euler, Heun):
        for steps in (0, -3):
            with pytest.raises(ValueError, match=f"at least 1 step, not {steps}"):
                sampler(steps)
    denoiser = IdealDenoiser(Pool(torch.randn(6, 2), torch.arange(6) % 3), VE())
    for label in (3, -2, torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"unknown class (3|-2|5).*3 classes"):
            Heun()(denoiser, (2,), seeds=[0, 1], label=label)
    with pytest.raises(ValueError, match=r"unknown class 0.*0 classes"):
        Heun()(Gaussian(VE()), (3,), seeds=[0], label=0)
    with pytest.raises(ValueError, match="start"):
        Heun(3, UniformGrid())(Gaussian(VE()), (3,), seeds=[0])
    with pytest.raises(ValueError, match="start"):
        Heun(3, UniformGrid(1.5))(Gaussian(Flow()), (3,), seeds=[0])
    for levels in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="sigma_min"):
            EDMGrid(*levels)


def test_a_network_is_never_given_an_unknown_class() -> None:
    denoiser = trained_unet(4)
    for label in (4, -2):
        with pytest.raises(ValueError, match=f"unknown class {label}.*4 classes"):
            denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([label]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heun(churn=-1.0), "churn"),
        (lambda: Heun(churn=float("nan")), "churn"),
        (lambda: Heun(churn_min=2.0, churn_max=1.0), "churn_min"),
        (lambda: EDMGrid(rho=0.0), "rho"),
        (lambda: EDMGrid(sigma_max=1e9)(VP(), 5), "starts at noise level 1e"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
