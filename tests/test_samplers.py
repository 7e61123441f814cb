"""Laws of the samplers: orders, distributions, counts, and what an image depends on."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from analytic import PROCESSES, Gaussian, Mixture
from torch import nn

from stablefield import VE, VP, Cosine, Flow, Preconditioned
from stablefield.denoise import EDM, IDDPMScaling, Predicts, VEScaling, VPScaling, iddpm_levels
from stablefield.sample import (
    RK45,
    Ancestral,
    DPMSolver,
    EDMGrid,
    Euler,
    EulerMaruyama,
    GeometricGrid,
    Grid,
    Heun,
    IDDPMGrid,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniformGrid,
    VPGrid,
)
from stablefield.sample.adaptive import integrate, velocity
from stablefield.sample.base import Question

SDE = [Ancestral(200), EulerMaruyama(200), ReverseDiffusion(200)]
EVERY: list[Sampler] = [
    Euler(6),
    Heun(6),
    Heun(6, churn=3.0),
    DPMSolver(6),
    Ancestral(6),
    EulerMaruyama(6),
    ReverseDiffusion(6),
    PredictorCorrector(6),
]
GRIDS: list[Grid] = [EDMGrid(), GeometricGrid(), VPGrid(), IDDPMGrid(), UniformGrid(start=0.9)]


def named(part: object) -> str:
    return type(part).__name__


@dataclass(frozen=True)
class Between(Grid):
    """EDM's grid without its last step to 0: what an order is measured on."""

    high: float = 20.0
    low: float = 0.05

    def __call__(self, process, steps):
        root, share = 1 / 7, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return process.time((self.high**root + share * (self.low**root - self.high**root)) ** 7)


def flow_error(sampler, denoiser, reference) -> float:
    latents = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    *_, x = sampler.path(Question(denoiser, None), latents, [torch.Generator()] * 8)
    first, *_, last = sampler.times(denoiser)
    start = denoiser.process.scales(first)[1] * latents.double()
    return float((x - reference(start, first, last)).abs().max())


@lru_cache
def solved_as_flow():
    """Where the flow of a mixture takes the latents of `flow_error`, as x_t / alpha: for every process alike."""
    latents = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    ask, (first, last) = Question(Mixture(Flow()), None), Between()(Flow(), 1)
    x = integrate(lambda t, x: velocity(ask, x, t), first * latents, first, last, 1e-10)
    return x / (1 - last)


def reference_of(process):
    return lambda start, first, last: process.scales(last)[0] * solved_as_flow()


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolver(), 2)], ids=named)
def test_ode_samplers_reach_their_order_on_a_gaussian(sampler, order, process):
    denoiser = Gaussian(process)
    errors = [flow_error(replace(sampler, steps=n, grid=Between()), denoiser, denoiser.flow) for n in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolver(), 2)], ids=named)
def test_ode_samplers_reach_their_order_on_a_mixture(sampler, order, process):
    denoiser = Mixture(process)
    errors = [
        flow_error(replace(sampler, steps=n, grid=Between()), denoiser, reference_of(process)) for n in (80, 160, 320)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def drawn(sampler, denoiser, n, dim=2, seed=0):
    """n samples, all noise from one generator: a path as the sampler makes it, but fast."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(n, dim, generator=generator, dtype=torch.float64)

    ask, times = Question(denoiser, None), sampler.times(denoiser)
    x = ask.process.scales(times[0])[1] * draw()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = sampler.step(ask, x, t, s, draw)
    return x


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("sampler", SDE, ids=named)
@pytest.mark.parametrize("data", [Gaussian, Mixture], ids=lambda data: data.__name__)
def test_sde_samplers_reproduce_mean_and_covariance(data, sampler, process):
    denoiser = data(process)
    x = drawn(sampler, denoiser, 6000)
    # 4 standard deviations of the sum over 6000 samples, and an error of the first order in 1/200
    assert torch.allclose(x.mean(0), denoiser.mean, atol=4 * 0.5 / 6000**0.5)
    assert torch.allclose(x.T.cov(), denoiser.covariance, atol=4 * 0.25 * (2 / 6000) ** 0.5 + 3 / 200 * 0.5)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=named)
@pytest.mark.parametrize("sampler", SDE, ids=named)
def test_sde_samplers_may_begin_where_alpha_is_zero(sampler, process):
    denoiser = Gaussian(process)
    sampler = replace(sampler, grid=UniformGrid())
    assert process.scales(sampler.times(denoiser)[0])[0] == 0
    x = drawn(sampler, denoiser, 6000)
    assert torch.allclose(x.T.cov(), denoiser.covariance, atol=0.04)


@pytest.mark.parametrize("sampler", [Euler, Heun, DPMSolver, PredictorCorrector], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=named)
def test_other_samplers_may_begin_there_too(sampler, process):
    x = sampler(8, UniformGrid())(Gaussian(process), (2,), seeds=range(4)).x
    assert torch.isfinite(x).all()
    assert x.abs().max() < 5


def test_churn_leaves_pure_noise_alone():
    x = Heun(8, UniformGrid(), churn=4.0)(Gaussian(Flow()), (2,), seeds=range(4)).x
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_langevin_corrections_keep_the_distribution(process):
    dim = 256
    denoiser = Gaussian(process, torch.zeros(dim).double(), 0.25 * torch.eye(dim).double())
    x = drawn(PredictorCorrector(400, snr=0.05), denoiser, 50, dim)
    assert x.square().mean() == pytest.approx(0.25, rel=0.06)  # 4 / dim, and 8 / 400 of the predictor's


def test_a_corrector_repairs_a_wrong_noise_level():
    denoiser = Gaussian(VE(), torch.zeros(64).double(), 1e-4 * torch.eye(64).double())
    generator, ask = torch.Generator().manual_seed(0), Question(denoiser, None)
    t = torch.tensor(1.0, dtype=torch.float64)

    def draw():
        return torch.randn(100, 64, generator=generator, dtype=torch.float64)

    x = 1.3 * draw()
    x = PredictorCorrector(corrections=100).step(ask, x, t, t, draw)  # to where it is: the predictor does nothing
    assert x.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("sampler", [Euler(12), DPMSolver(12), Ancestral(12)], ids=named)
def test_all_processes_give_the_same_samples_at_the_same_noise_levels(sampler):
    made = [sampler(Mixture(process), (2,), seeds=range(8)).x for process in PROCESSES]
    for other in made[1:]:
        assert torch.allclose(other, made[0], atol=1e-9)


@pytest.mark.parametrize("sampler", [Heun(200), RK45()], ids=named)
def test_all_processes_give_the_same_samples_up_to_the_error_of_a_solver(sampler):
    made = [sampler(Mixture(process), (2,), seeds=range(8)).x for process in PROCESSES]
    for other in made[1:]:
        assert torch.allclose(other, made[0], atol=2e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_the_error_of_rk45_follows_its_tolerance(process):
    denoiser = Gaussian(process)
    seeds = range(8)
    latents = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()
    start = EDMGrid()(process, 1)[0]
    truth = denoiser.flow(process.scales(start)[1] * latents, start, torch.zeros_like(start))
    found = [RK45(tolerance=tolerance, sigma_min=1e-5)(denoiser, (2,), seeds=seeds) for tolerance in (1e-3, 1e-5, 1e-7)]
    errors = [float((samples.x - truth).abs().max()) for samples in found]
    assert all(error < 20 * tolerance for error, tolerance in zip(errors, (1e-3, 1e-5, 1e-7), strict=True))
    counts = [samples.evaluations for samples in found]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


class Counting(Gaussian):
    count = 0

    def forward(self, *args, **kwargs):
        self.count += 1
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("sampler", [*EVERY, RK45()], ids=named)
def test_evaluations_are_counted_for_each_batch(sampler):
    denoiser = Counting(VP())
    first = sampler(denoiser, (2,), seeds=range(3)).evaluations
    assert first == denoiser.count
    assert sampler(denoiser, (2,), seeds=range(3)).evaluations == first


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (Heun(18), 35),
        (Heun(18, churn=40.0), 35),
        (Euler(18), 18),
        (DPMSolver(18), 18),
        (Ancestral(18), 18),
        (EulerMaruyama(18), 18),
        (ReverseDiffusion(18), 18),
        (PredictorCorrector(18), 36),
        (PredictorCorrector(18, corrections=2), 54),
        pytest.param(PredictorCorrector(1000), 2000, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_samplers_ask_as_often_as_they_should(sampler, evaluations):
    assert sampler(Gaussian(VE()), (2,), seeds=[0]).evaluations == evaluations


@pytest.mark.parametrize("sampler", EVERY, ids=named)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler):
    together = sampler(Mixture(VE()), (2,), seeds=[5, 1, 9]).x
    for row, seed in enumerate([5, 1, 9]):
        alone = sampler(Mixture(VE()), (2,), seeds=[seed]).x
        assert torch.allclose(alone[0], together[row], rtol=1e-12)


def test_an_image_of_rk45_depends_on_its_batch_only_within_the_tolerance():
    together = RK45(tolerance=1e-5)(Mixture(VP()), (2,), seeds=range(16)).x
    alone = RK45(tolerance=1e-5)(Mixture(VP()), (2,), seeds=[7]).x
    assert torch.allclose(alone[0], together[7], atol=1e-4)


def test_rk45_may_stop_on_its_way():
    latents = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    denoiser = Gaussian(VP())
    sampler = RK45(steps=5, tolerance=1e-7)
    states = list(sampler.path(Question(denoiser, None), latents, [torch.Generator()] * 4))
    times = sampler.times(denoiser)
    start = denoiser.process.scales(times[0])[1] * latents.double()
    assert len(states) == 5
    for state, t in zip(states, times[1:], strict=True):
        assert torch.allclose(state, denoiser.flow(start, times[0], t), atol=1e-5)


def test_ancestral_sampling_without_fresh_noise_is_ddim():
    denoiser = Mixture(VP())
    ddim, ancestral = (sampler(denoiser, (2,), seeds=range(4)).x for sampler in (Euler(10), Ancestral(10, eta=0.0)))
    assert torch.allclose(ddim, ancestral, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_an_ancestral_step_draws_from_the_posterior(process):
    """By Bayes' rule, from x_s ~ N(alpha_s x0, sigma_s^2) and x_t = a x_s + sqrt(v) noise."""
    x0, x_t = torch.tensor([[0.3]]).double(), torch.tensor([[0.9]]).double()
    t, s = process.time(torch.tensor([2.0, 0.7]).double())
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(t), process.scales(s)
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2
    precision = 1 / sigma_s**2 + a**2 / v
    mean = (alpha_s * x0 / sigma_s**2 + a * x_t / v) / precision

    class Certain(Gaussian):
        def forward(self, x_t, t, label=None, augment_label=None):
            return x0

    ask = Question(Certain(process), None)
    at = [Ancestral().step(ask, x_t, t, s, lambda z=z: torch.full_like(x_t, z)) for z in (0.0, 1.0)]
    assert torch.allclose(at[0], mean)
    assert torch.allclose(at[1] - at[0], precision.rsqrt())


# --- grids, and the range of a denoiser ------------------------------------------------------------------------------


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, noise, **told):
        return self.weight * x


SCALINGS = [EDM(), VPScaling(), VEScaling(), IDDPMScaling(), Predicts("noise"), Predicts("velocity")]


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_samplers_stop_only_where_the_denoiser_has_an_answer(scaling, process, grid):
    denoiser = Preconditioned(Silent(), process, scaling)
    times = Euler(20, grid).times(denoiser)
    alpha, sigma = process.scales(times[:-1])
    low, high = scaling.levels
    assert len(times) == 21
    assert times[-1] == 0
    assert (times.diff() <= 0).all()
    assert (sigma / alpha >= low * (1 - 1e-9)).all()
    assert (sigma / alpha <= high * (1 + 1e-9)).all()


def test_an_iddpm_denoiser_is_asked_only_about_its_table_even_when_churned():
    asked = []

    class Listening(Preconditioned):
        def forward(self, x_t, t, label=None, augment_label=None):
            asked.append(t[0])
            return super().forward(x_t, t, label, augment_label)

    denoiser = Listening(Silent(), VE(), IDDPMScaling())
    Heun(10, churn=5.0)(denoiser, (1, 2, 2), seeds=[0])
    table = torch.tensor(iddpm_levels(), dtype=torch.float64)
    assert len(asked) == 19
    assert torch.isin(torch.stack(asked), table).all()


def test_grids_are_the_published_ones():
    ve, n = VE(), 11
    i = torch.arange(n, dtype=torch.float64) / (n - 1)
    vp = 1 + i * (1e-3 - 1)
    sigma_of = ((19.9 / 2 * vp**2 + 0.1 * vp).exp() - 1).sqrt()
    table = torch.tensor(iddpm_levels(), dtype=torch.float64)
    expected = {
        GeometricGrid(): 100.0 * (0.02 / 100.0) ** i,
        VPGrid(): sigma_of,
        IDDPMGrid(): table[(8 + (999 - 8) * i + 0.5).long()],
        UniformGrid(3.0): 3 * (1 - torch.arange(n, dtype=torch.float64) / n),
    }
    for grid, levels in expected.items():
        assert torch.allclose(grid(ve, n)[:-1], levels, rtol=1e-9), grid
        assert grid(ve, n)[-1] == 0
        assert len(grid(ve, 1)) == 2


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_a_grid_that_knows_no_ends_is_clipped(process):
    class Three(Grid):
        def __call__(self, process, steps):
            return process.time(torch.tensor([200.0, 1.0, 1e-3, 0.0], dtype=torch.float64))

    expected = process.time(torch.tensor([100.0, 1.0, 0.02, 0.0], dtype=torch.float64))
    assert torch.allclose(Three().within(process, 3, VEScaling().levels), expected)
    assert torch.equal(Three().within(process, 3, (0.0, math.inf)), Three()(process, 3))


def test_a_grid_that_misses_the_denoiser_says_so():
    with pytest.raises(ValueError, match="do not meet"):
        EDMGrid(0.002, 0.01).within(VE(), 5, VEScaling().levels)
    with pytest.raises(ValueError, match="begins below"):
        UniformGrid(0.01).within(VE(), 5, VEScaling().levels)
    with pytest.raises(ValueError, match="no noise level between"):
        IDDPMGrid().within(VE(), 5, (200.0, 300.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Euler(0),
        lambda: Ancestral(eta=1.5),
        lambda: PredictorCorrector(snr=0.0),
        lambda: RK45(tolerance=0.0),
        lambda: GeometricGrid(1.0, 0.5),
        lambda: VPGrid(end=2.0),
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"need|must"):
        wrong()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", EVERY, ids=named)
@pytest.mark.parametrize("scaling", SCALINGS, ids=named)
def test_the_host_never_waits_for_the_gpu(scaling, sampler):
    denoiser = Preconditioned(Silent(), VE(), scaling).cuda()
    sampler(denoiser, (1, 2, 2), seeds=[0])  # what is made once is made here
    generators = [torch.Generator("cuda").manual_seed(0)]
    latents = torch.randn(1, 1, 2, 2, device="cuda")
    with torch.no_grad():
        path = sampler.path(Question(denoiser, None), latents, generators)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in path:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
