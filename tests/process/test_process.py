"""Laws of processes, distributions of t and prediction types."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablefield import VE, VP, Cosine, Flow, SubVP
from stablefield.objective import PredictionWeight
from stablefield.preconditioning import NoPreconditioning
from stablefield.prediction import (
    DIFFUSERS_PREDICTION_TYPES,
    PREDICTION_TYPES,
    canonical_prediction_type,
    coefficients,
    convert,
    stable_target,
)
from stablefield.process import NoisyBatch, Process, Tabulated, TabulatedVE, per_example
from stablefield.times import LogitNormal, LogNormal, LogUniform, Stratified, TimeDistribution, Uniform

PROCESSES = [VE(), VP(), VP(beta_min=0.3, beta_d=5.0), SubVP(), Cosine(), Flow()]
everywhere = pytest.mark.parametrize("process", PROCESSES, ids=repr)
STEPS = [i / 100 for i in range(1, 101)]
# tables whose interpolation is known in closed form: the noise level is tan(phi), and phi = pi t / 2 or pi t / 2.2
TABLES = [
    Tabulated((*(math.cos(math.pi * t / 2) ** 2 for t in STEPS[:-1]), 0.0)),
    TabulatedVE(tuple(math.tan(math.pi * t / 2.2) for t in STEPS)),
]
PROCESSES += TABLES
INSIDE = torch.cat([torch.logspace(-6, -1, 11, dtype=torch.float64), torch.linspace(0.15, 0.999, 12).double()])


def closed_form(process: Process, t: float) -> tuple[float, float]:
    """(alpha, sigma) by their formulas; near t = 0 the variance by its series, where its formula would cancel."""
    match process:
        case SubVP() | VP():
            beta = process.beta_d * t**2 / 2 + process.beta_min * t  # integrated from 0 to t
            alpha = math.exp(-beta / 2)
            variance = 1 - math.exp(-beta) if beta > 1e-3 else beta - beta**2 / 2 + beta**3 / 6 - beta**4 / 24
            return alpha, variance if isinstance(process, SubVP) else math.sqrt(variance)
        case VE():
            return 1.0, t
        case TabulatedVE():
            return 1.0, math.tan(math.pi * t / 2.2)
        case Cosine() | Tabulated():
            return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        case _:
            return 1 - t, t


@everywhere
def test_scales_equal_the_published_formulas(process: Process) -> None:
    wanted = torch.tensor([closed_form(process, t) for t in INSIDE.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(process.scales(INSIDE), 1), wanted, rtol=1e-11, atol=0)


@everywhere
def test_scales_are_accurate_in_float32_at_both_ends(process: Process) -> None:
    t = torch.cat([torch.logspace(-6, -1, 30), 1 - torch.logspace(-4, -1, 30)])
    wanted = torch.tensor([closed_form(process, float(v)) for v in t.double()])
    torch.testing.assert_close(torch.stack(process.scales(t), 1), wanted, rtol=5e-6, atol=0)


@everywhere
def test_noise_grows_from_zero(process: Process) -> None:
    alpha, sigma = process.scales(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() <= 0).all()
    assert (sigma.diff() > 0).all()
    assert ((sigma / alpha).diff() > 0).all()


@pytest.mark.parametrize("process", [VP(), VP(0.3, 5.0), Cosine(), TABLES[0]], ids=repr)
def test_variance_preserving_processes_preserve_the_variance(process: Process) -> None:
    alpha, sigma = process.scales(INSIDE)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(INSIDE), rtol=1e-14, atol=0)


@pytest.mark.parametrize("process", [Cosine(), Flow(), TABLES[0]], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_and_cosine_end_in_pure_noise(process: Process, dtype: torch.dtype) -> None:
    alpha, sigma = process.scales(torch.ones(1, dtype=dtype))
    assert alpha == 0
    assert sigma == 1


@everywhere
def test_time_inverts_the_noise_level(process: Process) -> None:
    alpha, sigma = process.scales(INSIDE)
    torch.testing.assert_close(process.time(sigma / alpha), INSIDE, rtol=1e-9, atol=0)
    ratio = torch.logspace(-8, 3, 45, dtype=torch.float64)
    ratio = ratio[ratio < 6] if isinstance(process, TabulatedVE) else ratio  # where its table ends
    alpha, sigma = process.scales(process.time(ratio))
    torch.testing.assert_close(sigma / alpha, ratio, rtol=1e-9, atol=0)
    assert process.time(torch.zeros(1)) == 0


@pytest.mark.parametrize("process", [Cosine(), Flow(), TABLES[0]], ids=repr)
def test_an_infinite_noise_level_is_the_last_time(process: Process) -> None:
    assert process.time(torch.tensor([math.inf])) == 1


@everywhere
def test_rates_are_the_derivatives_of_the_scales(process: Process) -> None:
    t = INSIDE[INSIDE > 1e-3]
    step = 1e-4 * t
    earlier, later = process.scales(t - step), process.scales(t + step)
    for rate, before, after in zip(process.rates(t), earlier, later, strict=True):
        torch.testing.assert_close(rate, (after - before) / (2 * step), rtol=1e-6, atol=1e-8)


@everywhere
def test_rates_are_the_same_without_gradients(process: Process) -> None:
    wanted = process.rates(INSIDE)
    with torch.no_grad():
        off = process.rates(INSIDE)
    with torch.inference_mode():
        inferred = process.rates(INSIDE)
    for a, b, c in zip(wanted, off, inferred, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
DDPM = tuple((1 - BETAS).cumprod(0).tolist())


def test_a_tabulated_process_is_exact_at_the_steps_of_its_table() -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = Tabulated(DDPM).scales(t)
    torch.testing.assert_close(alpha**2, torch.tensor(DDPM, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - torch.tensor(DDPM, dtype=torch.float64), rtol=1e-11, atol=0)
    sigmas = (0.01, 0.1, 3.0, 80.0)
    torch.testing.assert_close(
        TabulatedVE(sigmas).scales(torch.tensor([0.25, 0.5, 0.75, 1.0]).double())[1],
        torch.tensor(sigmas, dtype=torch.float64),
    )


def test_the_table_of_ddpm_is_nearly_the_vp_process_between_its_steps() -> None:
    t = torch.linspace(0.005, 0.9995, 977, dtype=torch.float64)
    (alpha, sigma), (wanted_alpha, wanted_sigma) = Tabulated(DDPM).scales(t), VP().scales(t)
    torch.testing.assert_close(alpha, wanted_alpha, rtol=0.05, atol=0)
    torch.testing.assert_close(sigma, wanted_sigma, rtol=0.05, atol=0)


@pytest.mark.parametrize("process", [Tabulated(DDPM), TabulatedVE((0.01, 0.1, 3.0, 80.0)), *TABLES], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_inverts_any_table_within_its_range(process: Process, dtype: torch.dtype) -> None:
    t = torch.linspace(0.001, 0.999, 333, dtype=dtype)
    alpha, sigma = process.scales(t)
    torch.testing.assert_close(process.time(sigma / alpha), t, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert process.time(torch.tensor([math.inf], dtype=dtype)) == 1


@pytest.mark.parametrize("table", [(), (1.0, 0.5), (0.5, 0.5), (0.5, -0.1), (0.1, 0.2), (math.nan,)])
def test_a_table_that_does_not_decrease_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod must decrease"):
        Tabulated(table)


@pytest.mark.parametrize("table", [(), (0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan,)])
def test_a_table_of_sigmas_that_does_not_increase_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sigmas must increase"):
        TabulatedVE(table)


@everywhere
def test_a_noisy_batch_is_the_weighted_sum_of_data_and_noise(process: Process) -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 3, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    noisy = process.perturb(x, t, noise, index=torch.arange(5), label=torch.arange(5))
    for b in range(5):
        alpha, sigma = closed_form(process, float(t[b]))
        torch.testing.assert_close(noisy.x_t[b], alpha * x[b] + sigma * noise[b])
    assert torch.equal(noisy.x_t[0], x[0])
    assert noisy.index is not None
    assert noisy.augment_label is None


def test_a_record_is_the_concatenation_of_its_parts() -> None:
    x, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    noisy = Flow().perturb(x, torch.linspace(0.1, 0.9, 6), noise, index=torch.arange(6))
    parts = [noisy.select(slice(0, 2)), noisy.select(torch.tensor([2, 3, 4])), noisy.select(torch.tensor([5]))]
    assert [len(part) for part in parts] == [2, 3, 1]
    joined = NoisyBatch.concatenate(parts)
    for name, value in vars(noisy).items():
        assert value is None if getattr(joined, name) is None else torch.equal(getattr(joined, name), value)
    assert NoisyBatch.concatenate([noisy]) is noisy
    doubled = noisy.map(lambda value: 2 * value)
    assert torch.equal(doubled.x_t, 2 * noisy.x_t)
    assert doubled.label is None


# ---- distributions of t


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def cdf(times: TimeDistribution, t: float) -> float:
    match times:
        case LogNormal():
            return normal_cdf((math.log(t) - times.mean) / times.std)
        case LogitNormal():
            return normal_cdf((math.log(t / (1 - t)) - times.mean) / times.std)
        case LogUniform():
            return math.log(t / times.low) / math.log(times.high / times.low)
        case Uniform():
            return (t - times.low) / (times.high - times.low)
        case Stratified():
            return cdf(times.times, t)
    raise AssertionError(times)


DISTRIBUTIONS = [
    LogNormal(),
    LogNormal(0.5, 3.0),
    LogUniform(),
    LogUniform(1e-5, 1.0),
    Uniform(),
    Uniform(0.0, 7.0),
    LogitNormal(),
    LogitNormal(-1.0, 0.5),
    Stratified(LogNormal()),
]
every_distribution = pytest.mark.parametrize("times", DISTRIBUTIONS, ids=repr)


@every_distribution
@settings(max_examples=30, deadline=None)
@given(u=st.floats(1e-6, 1 - 1e-6))
def test_the_quantile_function_inverts_the_distribution_function(times: TimeDistribution, u: float) -> None:
    t = float(times.quantile(torch.tensor([u], dtype=torch.float64)))
    assert cdf(times, t) == pytest.approx(u, rel=1e-8, abs=1e-10)


@every_distribution
def test_drawn_times_have_the_distribution(times: TimeDistribution) -> None:
    t = times.draw(4000, torch.Generator().manual_seed(0)).sort().values
    assert t.dtype == torch.float64
    empirical = (torch.arange(4000) + 0.5) / 4000
    exact = torch.tensor([cdf(times, v) for v in t.tolist()])
    assert (exact - empirical).abs().max() < 2.0 / math.sqrt(4000)  # Kolmogorov: exceeded once in 1500


@every_distribution
def test_every_drawn_time_is_finite_and_follows_from_its_generator(times: TimeDistribution) -> None:
    one, again = (times.draw(1000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again)
    ends = times.quantile(torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64))
    assert torch.isfinite(ends).all()


@pytest.mark.parametrize("times", [t for t in DISTRIBUTIONS if not isinstance(t, Stratified)], ids=repr)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_are_evenly_spread_and_each_has_the_distribution(times: TimeDistribution, n: int) -> None:
    drawn = torch.stack([Stratified(times).draw(n, torch.Generator().manual_seed(s)) for s in range(300)])
    u = torch.tensor([[cdf(times, v) for v in row] for row in drawn.tolist()], dtype=torch.float64)
    # exactly one in each of n intervals of equal probability, wherever they start
    gaps = u.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / n), rtol=0, atol=1e-7)
    # and each time by itself has the distribution
    for single in u.T[:: max(1, n // 3)]:
        empirical = (torch.arange(300) + 0.5) / 300
        assert (single.sort().values - empirical).abs().max() < 2.0 / math.sqrt(300)


@pytest.mark.parametrize(
    ("times", "values"),
    [
        (LogNormal, (0.0, 0.0)),
        (LogNormal, (math.nan, 1.0)),
        (LogitNormal, (0.0, -1.0)),
        (LogUniform, (0.0, 1.0)),
        (LogUniform, (2.0, 1.0)),
        (LogUniform, (1.0, math.inf)),
        (Uniform, (-0.1, 1.0)),
        (Uniform, (1.0, 1.0)),
        (Uniform, (0.0, math.nan)),
    ],
)
def test_a_distribution_without_spread_is_refused(times: type, values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"{values[0]}.*{values[1]}"):
        times(*values)


# ---- prediction types


def states(n: int = len(INSIDE)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, 4, generator=g, dtype=torch.float64)
    return x0, noise


def written_out(prediction_type: str, process: Process, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """A prediction from its definition."""
    scales = torch.tensor([closed_form(process, v) for v in t.tolist()], dtype=torch.float64)
    alpha, sigma = scales[:, :1], scales[:, 1:]
    d_alpha, d_sigma = (rate[:, None] for rate in process.rates(t))
    return {
        "x0": x0,
        "epsilon": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x0 + d_sigma * noise,
        "v": alpha * noise - sigma * x0,
    }[prediction_type]


@everywhere
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_coefficients_and_conversions_agree_with_the_definition(prediction_type: str, process: Process) -> None:
    x0, noise = states()
    x_t = process.perturb(x0, INSIDE, noise).x_t
    wanted = written_out(prediction_type, process, INSIDE, x0, noise)
    a, b, c = (k[:, None] for k in coefficients(prediction_type, process, INSIDE))
    torch.testing.assert_close(a * wanted, b * x_t + c * x0, rtol=1e-9, atol=1e-11)
    # epsilon from x0 is a small difference divided by sigma, which bounds its error
    found = convert(x0, x_t, INSIDE, process, source="x0", to=prediction_type)
    bound = 1e-14 / (a.abs() / (b.abs() + c.abs()))
    assert ((found - wanted).abs() <= 1e-11 * wanted.abs() + 10 * bound).all()


@everywhere
@pytest.mark.parametrize(
    ("prediction_type", "other"), [(p, o) for p, o in product(PREDICTION_TYPES, repeat=2) if p != o]
)
def test_conversions_to_another_type_and_back_return_the_prediction(
    prediction_type: str, other: str, process: Process
) -> None:
    t = torch.linspace(0.05, 0.6, 12, dtype=torch.float64)
    x0, noise = states(len(t))
    x_t = process.perturb(x0, t, noise).x_t
    value = written_out(prediction_type, process, t, x0, noise)
    there = convert(value, x_t, t, process, source=prediction_type, to=other)
    torch.testing.assert_close(there, written_out(other, process, t, x0, noise), rtol=1e-10, atol=1e-10)
    back = convert(there, x_t, t, process, source=other, to=prediction_type)
    scale = value.abs() + x_t.abs() + x0.abs()
    assert ((back - value).abs() <= 1e-12 * scale / process.scales(t)[1][:, None]).all()


@everywhere
@pytest.mark.parametrize("prediction_type", [p for p in PREDICTION_TYPES if p != "x0"])
def test_without_noise_no_other_type_follows_from_x0(prediction_type: str, process: Process) -> None:
    x0, _ = states(2)
    with pytest.raises(ValueError, match=f"'{prediction_type}' cannot be computed from x0 at t = 0 of"):
        convert(x0, x0, torch.tensor([0.5, 0.0], dtype=torch.float64), process, source="x0", to=prediction_type)


@pytest.mark.parametrize("process", [Cosine(), Flow(), TABLES[0]], ids=repr)
@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_in_pure_noise_x0_does_not_follow_from_epsilon_or_score(prediction_type: str, process: Process) -> None:
    x0, _ = states(2)
    with pytest.raises(ValueError, match=f"x0 cannot be computed from '{prediction_type}' at t = 1 of"):
        convert(x0, x0, torch.tensor([0.5, 1.0], dtype=torch.float64), process, source=prediction_type, to="x0")


@pytest.mark.parametrize("process", [Cosine(), Flow(), TABLES[0]], ids=repr)
@pytest.mark.parametrize("prediction_type", ["velocity", "v"])
def test_in_pure_noise_x0_follows_from_velocity_and_v(prediction_type: str, process: Process) -> None:
    x0, noise = states(1)
    t = torch.ones(1, dtype=torch.float64)
    x_t = process.perturb(x0, t, noise).x_t
    value = written_out(prediction_type, process, t, x0, noise)
    torch.testing.assert_close(convert(value, x_t, t, process, source=prediction_type, to="x0"), x0)


@pytest.mark.parametrize("name", ["noise", "eps", "V_prediction", ""])
def test_an_unknown_prediction_type_is_refused_by_name(name: str) -> None:
    x, noise = states(1)
    t = torch.ones(1, dtype=torch.float64)
    noisy = VE().perturb(x, t, noise)
    for use in (
        lambda: canonical_prediction_type(name),
        lambda: coefficients(name, VE(), t),
        lambda: convert(x, x, t, VE(), source="x0", to=name),
        lambda: convert(x, x, t, VE(), source=name, to="x0"),
        lambda: convert(x, x, t, VE(), source=name, to=name),
        lambda: stable_target(noisy, x, VE(), prediction_type=name),
        lambda: NoPreconditioning(name),
        lambda: PredictionWeight(name),
    ):
        with pytest.raises(ValueError, match=f"unknown prediction type '{name}': choose one of x0, epsilon, .*sample"):
            use()


@everywhere
@pytest.mark.parametrize(("name", "ours"), DIFFUSERS_PREDICTION_TYPES.items())
def test_a_prediction_type_may_be_given_by_its_name_in_diffusers(name: str, ours: str, process: Process) -> None:
    x, noise = states()
    t = INSIDE
    noisy = process.perturb(x, t, noise)
    assert canonical_prediction_type(name) == ours
    for one, other in zip(coefficients(name, process, t), coefficients(ours, process, t), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*(convert(x, noisy.x_t, t, process, source=p, to="epsilon") for p in (name, ours)))
    assert torch.equal(*(convert(x, noisy.x_t, t, process, source="score", to=p) for p in (name, ours)))
    assert convert(x, noisy.x_t, t, process, source=name, to=ours) is x
    assert torch.equal(*(stable_target(noisy, 0.9 * x, process, prediction_type=p) for p in (name, ours)))
    # the components keep our name, so that they compare equal
    assert NoPreconditioning(name) == NoPreconditioning(ours)
    assert PredictionWeight(name) == PredictionWeight(ours)


def test_diffusers_names_mean_what_they_mean_in_diffusers() -> None:
    """epsilon is the noise; v_prediction is alpha noise - sigma x, in VP; flow_prediction is noise - x, in a flow."""
    x, noise = states()

    def target(process: Process, name: str) -> tuple[NoisyBatch, Tensor]:
        noisy = process.perturb(x, INSIDE, noise)
        return noisy, stable_target(noisy, x, process, prediction_type=name)

    noisy, v = target(VP(), "v_prediction")
    assert torch.equal(v, per_example(noisy.alpha, x) * noise - per_example(noisy.sigma, x) * x)
    torch.testing.assert_close(target(Flow(), "flow_prediction")[1], noise - x)
    assert torch.equal(target(VP(), "sample")[1], x)
    assert torch.equal(target(VP(), "epsilon")[1], noise)


@everywhere
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_stable_target_is_the_mean_converted_to_the_prediction_type(prediction_type: str, process: Process) -> None:
    x, noise = states()
    noisy = process.perturb(x, INSIDE, noise)
    mean = x + per_example(noisy.sigma, x) * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    wanted = convert(mean, noisy.x_t, INSIDE, process, source="x0", to=prediction_type)
    size = wanted.abs() + (noisy.x_t.abs() / per_example(noisy.sigma, x) ** (2 if prediction_type == "score" else 1))
    assert ((stable_target(noisy, mean, process, prediction_type=prediction_type) - wanted).abs() <= 1e-9 * size).all()


@everywhere
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stable_target_of_the_source_equals_the_dsm_target_bit_for_bit(
    prediction_type: str, process: Process, dtype: torch.dtype
) -> None:
    x, noise = (v.to(dtype) for v in states())
    noisy = process.perturb(x, INSIDE.to(dtype), noise)
    alpha, sigma = per_example(noisy.alpha, x), per_example(noisy.sigma, x)
    d_alpha, d_sigma = (per_example(rate, x) for rate in process.rates(noisy.t))
    single = {
        "x0": x,
        "epsilon": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x + d_sigma * noise,
        "v": alpha * noise - sigma * x,
    }[prediction_type]
    assert torch.equal(stable_target(noisy, x.clone(), process, prediction_type=prediction_type), single)


@everywhere
def test_without_noise_the_epsilon_target_is_the_noise_and_the_score_is_refused(process: Process) -> None:
    x, noise = states(2)
    noisy = process.perturb(x, torch.zeros(2, dtype=torch.float64), noise)
    assert torch.equal(stable_target(noisy, x, process, prediction_type="epsilon"), noise)
    with pytest.raises(ValueError, match="'score' has no target at t = 0"):
        stable_target(noisy, x, process, prediction_type="score")
    with pytest.raises(ValueError, match="'epsilon' has no target at t = 0"):
        stable_target(noisy, x + 1, process, prediction_type="epsilon")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("name", ["label", "index", "image_number"])
def test_batches_with_and_without_a_field_are_not_concatenated(name: str, order: list[int]) -> None:
    x, noise = states(2)
    batch = VE().perturb(x, torch.ones(2, dtype=torch.float64), noise)
    other = replace(batch, **{name: torch.arange(2)})
    with pytest.raises(ValueError, match=f"with and without {name}: 1 of 2 have none"):
        NoisyBatch.concatenate([(batch, other)[k] for k in order])
    assert torch.equal(getattr(NoisyBatch.concatenate([other, other]), name), torch.tensor([0, 1, 0, 1]))
    assert getattr(NoisyBatch.concatenate([batch, batch]), name) is None
