"""Laws of the samplers: orders, distributions, numbers of evaluations, and what a sample depends on."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from analytic import PROCESSES, Gaussian, Mixture
from torch import nn

from stablefield import VE, VP, Cosine, Flow, Preconditioned
from stablefield.preconditioning import (
    EDMPreconditioning,
    IDDPMPreconditioning,
    NoPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
    iddpm_noise_levels,
)
from stablefield.sample import (
    RK45,
    Ancestral,
    DPMSolver,
    EDMGrid,
    Euler,
    EulerMaruyama,
    GeometricGrid,
    Heun,
    IDDPMGrid,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    TimeGrid,
    UniformGrid,
    VPGrid,
)
from stablefield.sample.adaptive import integrate, velocity
from stablefield.sample.base import BoundDenoiser

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
GRIDS: list[TimeGrid] = [EDMGrid(), GeometricGrid(), VPGrid(), IDDPMGrid(), UniformGrid(start=0.9)]


def named(part: object) -> str:
    return type(part).__name__


@dataclass(frozen=True)
class Between(TimeGrid):
    """EDM's grid without its last step to 0, which would hide the order of a sampler."""

    high: float = 20.0
    low: float = 0.05

    def __call__(self, process, steps):
        root, share = 1 / 7, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return process.time((self.high**root + share * (self.low**root - self.high**root)) ** 7)


def flow_error(sampler, denoiser, reference) -> float:
    latents = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    *_, (_, x) = sampler.path(BoundDenoiser(denoiser), latents, None)
    first, *_, last = sampler.times(denoiser)
    start = denoiser.process.scales(first)[1] * latents.double()
    return float((x - reference(start, first, last)).abs().max())


@lru_cache
def solved_as_flow():
    """Solution of the ODE for a mixture from the latents of `flow_error`, as x_t / alpha, for every process."""
    latents = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    denoiser, (first, last) = BoundDenoiser(Mixture(Flow())), Between()(Flow(), 1)
    x = integrate(lambda t, x: velocity(denoiser, x, t), first * latents, first, last, 1e-10)
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
    """n samples whose noise comes from one generator: the same steps as the sampler's, but fast."""
    generator = torch.Generator().manual_seed(seed)

    def draw_noise():
        return torch.randn(n, dim, generator=generator, dtype=torch.float64)

    bound, times = BoundDenoiser(denoiser), sampler.times(denoiser)
    x = bound.process.scales(times[0])[1] * draw_noise()
    with torch.no_grad():
        for t, s in pairwise(times):
            x = sampler.step(bound, x, t, s, draw_noise)
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
def test_sde_samplers_may_start_where_alpha_is_zero(sampler, process):
    denoiser = Gaussian(process)
    sampler = replace(sampler, grid=UniformGrid())
    assert process.scales(sampler.times(denoiser)[0])[0] == 0
    x = drawn(sampler, denoiser, 6000)
    assert torch.allclose(x.T.cov(), denoiser.covariance, atol=0.04)


@pytest.mark.parametrize("sampler", [Euler, Heun, DPMSolver, PredictorCorrector], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=named)
def test_other_samplers_may_start_there_too(sampler, process):
    x = sampler(8, UniformGrid())(Gaussian(process), (2,), seeds=range(4)).x
    assert torch.isfinite(x).all()
    assert x.abs().max() < 5


def test_churn_is_finite_where_alpha_is_zero():
    x = Heun(8, UniformGrid(), churn=4.0)(Gaussian(Flow()), (2,), seeds=range(4)).x
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_langevin_corrections_preserve_the_distribution(process):
    dim = 256
    denoiser = Gaussian(process, torch.zeros(dim).double(), 0.25 * torch.eye(dim).double())
    x = drawn(PredictorCorrector(400, snr=0.05), denoiser, 50, dim)
    assert x.square().mean() == pytest.approx(0.25, rel=0.06)  # 4 / dim, and 8 / 400 of the predictor's


def test_a_corrector_restores_the_right_noise_level():
    denoiser = Gaussian(VE(), torch.zeros(64).double(), 1e-4 * torch.eye(64).double())
    generator, bound = torch.Generator().manual_seed(0), BoundDenoiser(denoiser)
    t = torch.tensor(1.0, dtype=torch.float64)

    def draw_noise():
        return torch.randn(100, 64, generator=generator, dtype=torch.float64)

    x = 1.3 * draw_noise()
    x = PredictorCorrector(corrections=100).step(bound, x, t, t, draw_noise)  # s = t: the predictor does nothing
    assert x.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("sampler", [Euler(12), DPMSolver(12), Ancestral(12)], ids=named)
def test_all_processes_give_the_same_samples_at_the_same_noise_levels(sampler):
    made = [sampler(Mixture(process), (2,), seeds=range(8)).x for process in PROCESSES]
    for other in made[1:]:
        assert torch.allclose(other, made[0], atol=1e-9)


@pytest.mark.parametrize("sampler", [Heun(200), RK45()], ids=named)
def test_all_processes_give_the_same_samples_up_to_the_error_of_the_solver(sampler):
    made = [sampler(Mixture(process), (2,), seeds=range(8)).x for process in PROCESSES]
    for other in made[1:]:
        assert torch.allclose(other, made[0], atol=2e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_the_error_of_rk45_follows_its_tolerance(process):
    denoiser = Gaussian(process)
    seeds = range(8)
    latents = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()
    start = EDMGrid()(process, 1)[0]
    exact = denoiser.flow(process.scales(start)[1] * latents, start, torch.zeros_like(start))
    found = [RK45(tolerance=tolerance, sigma_min=1e-5)(denoiser, (2,), seeds=seeds) for tolerance in (1e-3, 1e-5, 1e-7)]
    errors = [float((samples.x - exact).abs().max()) for samples in found]
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
def test_samplers_cost_their_published_number_of_evaluations(sampler, evaluations):
    assert sampler(Gaussian(VE()), (2,), seeds=[0]).evaluations == evaluations


@pytest.mark.parametrize("sampler", EVERY, ids=named)
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(sampler):
    together = sampler(Mixture(VE()), (2,), seeds=[5, 1, 9]).x
    for position, seed in enumerate([5, 1, 9]):
        single = sampler(Mixture(VE()), (2,), seeds=[seed]).x
        assert torch.allclose(single[0], together[position], rtol=1e-12)


def test_a_sample_of_rk45_depends_on_its_batch_only_within_the_tolerance():
    together = RK45(tolerance=1e-5)(Mixture(VP()), (2,), seeds=range(16)).x
    single = RK45(tolerance=1e-5)(Mixture(VP()), (2,), seeds=[7]).x
    assert torch.allclose(single[0], together[7], atol=1e-4)


def test_rk45_stops_at_the_times_of_its_grid():
    latents = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    denoiser = Gaussian(VP())
    sampler = RK45(steps=5, tolerance=1e-7)
    states = list(sampler.path(BoundDenoiser(denoiser), latents, None))
    times = sampler.times(denoiser)
    start = denoiser.process.scales(times[0])[1] * latents.double()
    assert len(states) == 5
    for (t, state), wanted in zip(states, times[1:], strict=True):
        assert t == wanted
        assert torch.allclose(state, denoiser.flow(start, times[0], t), atol=1e-5)


def test_ancestral_sampling_with_eta_zero_is_ddim():
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

    bound = BoundDenoiser(Certain(process))
    at = [Ancestral().step(bound, x_t, t, s, lambda z=z: torch.full_like(x_t, z)) for z in (0.0, 1.0)]
    assert torch.allclose(at[0], mean)
    assert torch.allclose(at[1] - at[0], precision.rsqrt())


# --- latents and callbacks ------------------------------------------------------------------------------------------


class Conditional(Mixture):
    """The denoiser of a mixture whose classes are its shifted copies."""

    num_classes = 4

    def forward(self, x_t, t, label=None, augment_label=None):
        return super().forward(x_t, t) + 0.1 * label.to(x_t)[:, None]


SEEDS = [5, 1, 2**33 + 9]
ADDS_NOISE = {Heun(6, churn=3.0), Ancestral(6), EulerMaruyama(6), ReverseDiffusion(6), PredictorCorrector(6)}


def latents_of(seeds, shape=(2,)):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s % 2**32)) for s in seeds])


@pytest.mark.parametrize("denoiser", [Mixture(VE()), Conditional(VP()), Mixture(Flow())], ids=named)
@pytest.mark.parametrize("sampler", [*EVERY, RK45()], ids=named)
def test_latents_that_equal_the_seeds_own_give_the_same_samples_bit_for_bit(sampler, denoiser):
    wanted, latents = sampler(denoiser, (2,), seeds=SEEDS), latents_of(SEEDS)
    found = sampler(denoiser, (2,), seeds=SEEDS, latents=latents)
    assert torch.equal(found.x, wanted.x)
    assert found.evaluations == wanted.evaluations
    assert denoiser.num_classes == 0 or torch.equal(found.label, wanted.label)
    assert torch.equal(sampler(denoiser, seeds=SEEDS, latents=latents).x, wanted.x)  # the shape is that of the latents
    if sampler not in ADDS_NOISE:
        assert torch.equal(sampler(denoiser, latents=latents, label=wanted.label).x, wanted.x)
        assert torch.equal(sampler(denoiser, latents=latents.double(), label=wanted.label).x, wanted.x)


@pytest.mark.parametrize("sampler", [*EVERY, RK45()], ids=named)
def test_latents_decide_the_sample_and_seeds_the_noise_and_the_class(sampler):
    denoiser, latents = Conditional(VE()), latents_of([7, 8, 9])
    one = sampler(denoiser, seeds=SEEDS, latents=latents)
    assert torch.equal(one.label, sampler(denoiser, (2,), seeds=SEEDS).label)
    assert not torch.equal(one.x, sampler(denoiser, (2,), seeds=SEEDS).x)
    others = sampler(denoiser, seeds=[0, 3, 4], latents=latents, label=one.label)
    assert torch.equal(others.x, one.x) == (sampler not in ADDS_NOISE)


@pytest.mark.parametrize("sampler", ADDS_NOISE, ids=named)
def test_samplers_that_add_noise_need_seeds_beside_latents(sampler):
    with pytest.raises(ValueError, match=f"{named(sampler)} adds noise: give seeds, one per latent"):
        sampler(Mixture(VE()), latents=latents_of(SEEDS))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a shape and at least one seed, or at least one latent"),
        ({"shape": (2,)}, "a shape and at least one seed, or at least one latent"),
        ({"seeds": [0]}, "a shape and at least one seed, or at least one latent"),
        ({"shape": (2,), "seeds": []}, "a shape and at least one seed, or at least one latent"),
        ({"latents": torch.zeros(0, 2)}, "a shape and at least one seed, or at least one latent"),
        ({"latents": torch.zeros(3, 2), "seeds": [0, 1]}, r"= \(2, 2\), not \(3, 2\)"),
        ({"latents": torch.zeros(3, 2), "seeds": []}, r"= \(0, 2\), not \(3, 2\)"),
        ({"latents": torch.zeros(3, 2), "shape": (3,)}, r"= \(3, 3\), not \(3, 2\)"),
        ({"latents": torch.zeros(3, 2)}, "4 classes: give a label, or seeds to draw one from"),
        ({"latents": torch.zeros(3, 2), "label": torch.tensor([0, 1])}, "3 samples need one label or one per sample"),
    ],
)
def test_latents_seeds_shapes_and_labels_that_do_not_match_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Euler(2)(Conditional(VE()), **arguments)


@pytest.mark.parametrize("sampler", [*EVERY, RK45(), RK45(4)], ids=named)
def test_a_callback_sees_every_step_and_changes_nothing(sampler):
    denoiser, seen = Mixture(VP()), []
    wanted = sampler(denoiser, (2,), seeds=SEEDS)
    found = sampler(denoiser, (2,), seeds=SEEDS, callback=lambda step, t, x_t: seen.append((step, t, x_t)))
    assert torch.equal(found.x, wanted.x)
    assert found.evaluations == wanted.evaluations
    steps, times, states = zip(*seen, strict=True)
    assert steps == tuple(range(sampler.steps))
    assert torch.equal(torch.stack(times), sampler.times(denoiser)[1:])
    assert torch.equal(states[-1], wanted.x)
    # the states that it keeps are those after each step, whatever happens later
    generators = [torch.Generator().manual_seed(s % 2**32) for s in SEEDS]
    latents = torch.stack([torch.randn(2, generator=g) for g in generators])
    for kept, (_, state) in zip(states, sampler.path(BoundDenoiser(denoiser), latents, generators), strict=True):
        assert torch.equal(kept, state)


def test_a_callback_may_stop_the_sampler_by_an_exception():
    denoiser = Counting(VE())

    def stop(step, t, x_t):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Euler(6)(denoiser, (2,), seeds=[0], callback=stop)
    assert denoiser.count == 3


# --- grids, and the noise range of a denoiser ------------------------------------------------------------------------


class ZeroNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, **conditions):
        return self.weight * x


PRECONDITIONINGS = [
    EDMPreconditioning(),
    VPPreconditioning(),
    VEPreconditioning(),
    IDDPMPreconditioning(),
    NoPreconditioning("epsilon"),
    NoPreconditioning("velocity"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=named)
def test_grids_stay_inside_the_noise_range_of_the_denoiser(preconditioning, process, grid):
    denoiser = Preconditioned(ZeroNetwork(), process, preconditioning)
    times = Euler(20, grid).times(denoiser)
    alpha, sigma = process.scales(times[:-1])
    low, high = preconditioning.noise_range
    assert len(times) == 21
    assert times[-1] == 0
    assert (times.diff() <= 0).all()
    assert (sigma / alpha >= low * (1 - 1e-9)).all()
    assert (sigma / alpha <= high * (1 + 1e-9)).all()


def test_an_iddpm_denoiser_is_evaluated_only_at_the_levels_of_its_table_even_with_churn():
    evaluated = []

    class Recording(Preconditioned):
        def forward(self, x_t, t, label=None, augment_label=None):
            evaluated.append(t[0])
            return super().forward(x_t, t, label, augment_label)

    denoiser = Recording(ZeroNetwork(), VE(), IDDPMPreconditioning())
    Heun(10, churn=5.0)(denoiser, (1, 2, 2), seeds=[0])
    table = torch.tensor(iddpm_noise_levels(), dtype=torch.float64)
    assert len(evaluated) == 19
    assert torch.isin(torch.stack(evaluated), table).all()


def test_grids_are_the_published_ones():
    ve, n = VE(), 11
    i = torch.arange(n, dtype=torch.float64) / (n - 1)
    vp = 1 + i * (1e-3 - 1)
    sigma_of = ((19.9 / 2 * vp**2 + 0.1 * vp).exp() - 1).sqrt()
    table = torch.tensor(iddpm_noise_levels(), dtype=torch.float64)
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
def test_a_grid_without_a_range_of_its_own_is_clamped(process):
    class Three(TimeGrid):
        def __call__(self, process, steps):
            return process.time(torch.tensor([200.0, 1.0, 1e-3, 0.0], dtype=torch.float64))

    expected = process.time(torch.tensor([100.0, 1.0, 0.02, 0.0], dtype=torch.float64))
    assert torch.allclose(Three().within(process, 3, VEPreconditioning().noise_range), expected)
    assert torch.equal(Three().within(process, 3, (0.0, math.inf)), Three()(process, 3))


def test_a_grid_outside_the_noise_range_of_the_denoiser_is_refused():
    with pytest.raises(ValueError, match="do not overlap"):
        EDMGrid(0.002, 0.01).within(VE(), 5, VEPreconditioning().noise_range)
    with pytest.raises(ValueError, match="below the denoiser's lowest time"):
        UniformGrid(0.01).within(VE(), 5, VEPreconditioning().noise_range)
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
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=named)
def test_the_host_never_waits_for_the_gpu(preconditioning, sampler):
    denoiser = Preconditioned(ZeroNetwork(), VE(), preconditioning).cuda()
    sampler(denoiser, (1, 2, 2), seeds=[0])  # fills the caches
    generators = [torch.Generator("cuda").manual_seed(0)]
    latents = torch.randn(1, 1, 2, 2, device="cuda")
    with torch.no_grad():
        path = sampler.path(BoundDenoiser(denoiser), latents, generators)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in path:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
