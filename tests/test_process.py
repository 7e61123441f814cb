"""Laws of processes, of densities of t, and of the heads a network may have."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablefield import (
    VE,
    VP,
    Cosine,
    Flow,
    LogitNormal,
    LogNormal,
    LogUniform,
    Process,
    Stratified,
    SubVP,
    Times,
    Uniform,
    convert,
    stable_target,
)
from stablefield.parametrize import HEADS, coefficients
from stablefield.process import per_row

PROCESSES = [VE(), VP(), VP(beta_min=0.3, beta_d=5.0), SubVP(), Cosine(), Flow()]
everywhere = pytest.mark.parametrize("process", PROCESSES, ids=repr)
INSIDE = torch.cat([torch.logspace(-6, -1, 11, dtype=torch.float64), torch.linspace(0.15, 0.999, 12).double()])


def closed_form(process: Process, t: float) -> tuple[float, float]:
    """(alpha, sigma) by the textbook; near t = 0 the variance by its series, where its formula would cancel."""
    match process:
        case SubVP() | VP():
            spent = process.beta_d * t**2 / 2 + process.beta_min * t  # the integral of beta
            alpha = math.exp(-spent / 2)
            variance = 1 - math.exp(-spent) if spent > 1e-3 else spent - spent**2 / 2 + spent**3 / 6 - spent**4 / 24
            return alpha, variance if isinstance(process, SubVP) else math.sqrt(variance)
        case VE():
            return 1.0, t
        case Cosine():
            return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        case _:
            return 1 - t, t


@everywhere
def test_scales_are_the_textbook_s(process: Process) -> None:
    wanted = torch.tensor([closed_form(process, t) for t in INSIDE.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(process.scales(INSIDE), 1), wanted, rtol=1e-11, atol=0)


@everywhere
def test_scales_keep_their_digits_in_float32_at_both_ends(process: Process) -> None:
    t = torch.cat([torch.logspace(-6, -1, 30), 1 - torch.logspace(-4, -1, 30)])
    wanted = torch.tensor([closed_form(process, float(v)) for v in t.double()])
    torch.testing.assert_close(torch.stack(process.scales(t), 1), wanted, rtol=5e-6, atol=0)


@everywhere
def test_noise_grows_from_nothing(process: Process) -> None:
    alpha, sigma = process.scales(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() <= 0).all()
    assert (sigma.diff() > 0).all()
    assert ((sigma / alpha).diff() > 0).all()


@pytest.mark.parametrize("process", [VP(), VP(0.3, 5.0), Cosine()], ids=repr)
def test_variance_preserving_means_what_it_says(process: Process) -> None:
    alpha, sigma = process.scales(INSIDE)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(INSIDE), rtol=1e-14, atol=0)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_end_of_a_straight_or_circular_path_is_nothing_but_noise(process: Process, dtype: torch.dtype) -> None:
    alpha, sigma = process.scales(torch.ones(1, dtype=dtype))
    assert alpha == 0
    assert sigma == 1


@everywhere
def test_time_inverts_the_ratio_of_noise_to_data(process: Process) -> None:
    alpha, sigma = process.scales(INSIDE)
    torch.testing.assert_close(process.time(sigma / alpha), INSIDE, rtol=1e-9, atol=0)
    ratio = torch.logspace(-8, 3, 45, dtype=torch.float64)
    alpha, sigma = process.scales(process.time(ratio))
    torch.testing.assert_close(sigma / alpha, ratio, rtol=1e-9, atol=0)
    assert process.time(torch.zeros(1)) == 0


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=repr)
def test_no_data_at_all_is_the_last_time(process: Process) -> None:
    assert process.time(torch.tensor([math.inf])) == 1


@everywhere
def test_rates_are_the_slopes_of_the_scales(process: Process) -> None:
    t = INSIDE[INSIDE > 1e-3]
    step = 1e-4 * t
    earlier, later = process.scales(t - step), process.scales(t + step)
    for rate, before, after in zip(process.rates(t), earlier, later, strict=True):
        torch.testing.assert_close(rate, (after - before) / (2 * step), rtol=1e-6, atol=1e-8)


@everywhere
def test_rates_are_the_same_where_gradients_are_off(process: Process) -> None:
    wanted = process.rates(INSIDE)
    with torch.no_grad():
        off = process.rates(INSIDE)
    with torch.inference_mode():
        inferred = process.rates(INSIDE)
    for a, b, c in zip(wanted, off, inferred, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@everywhere
def test_what_was_perturbed_can_be_put_together_again(process: Process) -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 5, 3, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    noisy = process.perturb(x, t, noise, index=torch.arange(5), label=torch.arange(5))
    for b in range(5):
        alpha, sigma = closed_form(process, float(t[b]))
        torch.testing.assert_close(noisy.x_t[b], alpha * x[b] + sigma * noise[b])
    assert torch.equal(noisy.x_t[0], x[0])
    assert noisy.index is not None
    assert noisy.augmentation is None


# ---- densities of t


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def cdf(times: Times, t: float) -> float:
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


DENSITIES = [
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
of_all = pytest.mark.parametrize("times", DENSITIES, ids=repr)


@of_all
@settings(max_examples=30, deadline=None)
@given(u=st.floats(1e-6, 1 - 1e-6))
def test_a_quantile_inverts_the_closed_form_distribution(times: Times, u: float) -> None:
    t = float(times.quantile(torch.tensor([u], dtype=torch.float64)))
    assert cdf(times, t) == pytest.approx(u, rel=1e-8, abs=1e-10)


@of_all
def test_drawn_times_have_the_density(times: Times) -> None:
    t = times.draw(4000, torch.Generator().manual_seed(0)).sort().values
    assert t.dtype == torch.float64
    empirical = (torch.arange(4000) + 0.5) / 4000
    exact = torch.tensor([cdf(times, v) for v in t.tolist()])
    assert (exact - empirical).abs().max() < 2.0 / math.sqrt(4000)  # Kolmogorov: exceeded once in 1500


@of_all
def test_every_drawn_time_is_a_number_and_follows_from_its_generator(times: Times) -> None:
    one, again = (times.draw(1000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again)
    ends = times.quantile(torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64))
    assert torch.isfinite(ends).all()


@pytest.mark.parametrize("times", [t for t in DENSITIES if not isinstance(t, Stratified)], ids=repr)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_are_evenly_spread_and_each_has_the_density(times: Times, n: int) -> None:
    drawn = torch.stack([Stratified(times).draw(n, torch.Generator().manual_seed(s)) for s in range(300)])
    u = torch.tensor([[cdf(times, v) for v in row] for row in drawn.tolist()], dtype=torch.float64)
    # exactly one in each of n equal shares of the density, wherever they are cut
    gaps = u.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / n), rtol=0, atol=1e-7)
    # and a row taken alone is distributed as if drawn alone
    for row in u.T[:: max(1, n // 3)]:
        empirical = (torch.arange(300) + 0.5) / 300
        assert (row.sort().values - empirical).abs().max() < 2.0 / math.sqrt(300)


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
def test_a_density_without_a_spread_is_refused(times: type, values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"{values[0]}.*{values[1]}"):
        times(*values)


# ---- heads


def states(n: int = len(INSIDE)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, 4, generator=g, dtype=torch.float64)
    return x0, noise


def written_out(head: str, process: Process, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """A head from its definition, with slopes by differences only where the definition has slopes."""
    scales = torch.tensor([closed_form(process, v) for v in t.tolist()], dtype=torch.float64)
    alpha, sigma = scales[:, :1], scales[:, 1:]
    d_alpha, d_sigma = (rate[:, None] for rate in process.rates(t))
    return {
        "x0": x0,
        "noise": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x0 + d_sigma * noise,
        "v": alpha * noise - sigma * x0,
    }[head]


@everywhere
@pytest.mark.parametrize("head", HEADS)
def test_a_head_says_what_its_definition_says(head: str, process: Process) -> None:
    x0, noise = states()
    x_t = process.perturb(x0, INSIDE, noise).x_t
    wanted = written_out(head, process, INSIDE, x0, noise)
    a, b, c = (k[:, None] for k in coefficients(head, process, INSIDE))
    torch.testing.assert_close(a * wanted, b * x_t + c * x0, rtol=1e-9, atol=1e-11)
    # noise from x0 is a small difference over sigma: what it loses is bounded by that
    found = convert(x0, x_t, INSIDE, process, source="x0", to=head)
    bound = 1e-14 / (a.abs() / (b.abs() + c.abs()))
    assert ((found - wanted).abs() <= 1e-11 * wanted.abs() + 10 * bound).all()


@everywhere
@pytest.mark.parametrize(("head", "other"), [(h, o) for h, o in product(HEADS, HEADS) if h != o])
def test_heads_convert_there_and_back(head: str, other: str, process: Process) -> None:
    t = torch.linspace(0.05, 0.6, 12, dtype=torch.float64)
    x0, noise = states(len(t))
    x_t = process.perturb(x0, t, noise).x_t
    value = written_out(head, process, t, x0, noise)
    there = convert(value, x_t, t, process, source=head, to=other)
    torch.testing.assert_close(there, written_out(other, process, t, x0, noise), rtol=1e-10, atol=1e-10)
    back = convert(there, x_t, t, process, source=other, to=head)
    scale = value.abs() + x_t.abs() + x0.abs()
    assert ((back - value).abs() <= 1e-12 * scale / process.scales(t)[1][:, None]).all()


@everywhere
@pytest.mark.parametrize("head", [h for h in HEADS if h != "x0"])
def test_without_noise_no_head_follows_from_x0(head: str, process: Process) -> None:
    x0, _ = states(2)
    with pytest.raises(ValueError, match=f"x0 does not give '{head}' at t = 0 of"):
        convert(x0, x0, torch.tensor([0.5, 0.0], dtype=torch.float64), process, source="x0", to=head)


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=repr)
@pytest.mark.parametrize("head", ["noise", "score"])
def test_without_data_neither_noise_nor_score_give_x0(head: str, process: Process) -> None:
    x0, _ = states(2)
    with pytest.raises(ValueError, match=f"x0 cannot be had from '{head}' at t = 1 of"):
        convert(x0, x0, torch.tensor([0.5, 1.0], dtype=torch.float64), process, source=head, to="x0")


@pytest.mark.parametrize("process", [Cosine(), Flow()], ids=repr)
@pytest.mark.parametrize("head", ["velocity", "v"])
def test_without_data_velocity_and_v_still_give_x0(head: str, process: Process) -> None:
    x0, noise = states(1)
    t = torch.ones(1, dtype=torch.float64)
    x_t = process.perturb(x0, t, noise).x_t
    value = written_out(head, process, t, x0, noise)
    torch.testing.assert_close(convert(value, x_t, t, process, source=head, to="x0"), x0)


def test_a_head_nobody_knows_is_refused_by_name() -> None:
    x0, _ = states(1)
    with pytest.raises(ValueError, match="no head is called 'epsilon'; there are x0, noise"):
        convert(x0, x0, torch.ones(1, dtype=torch.float64), VE(), source="x0", to="epsilon")


@everywhere
@pytest.mark.parametrize("head", HEADS)
def test_a_stable_target_is_the_mean_seen_through_the_head(head: str, process: Process) -> None:
    x, noise = states()
    noisy = process.perturb(x, INSIDE, noise)
    mean = x + per_row(noisy.sigma, x) * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    wanted = convert(mean, noisy.x_t, INSIDE, process, source="x0", to=head)
    size = wanted.abs() + (noisy.x_t.abs() / per_row(noisy.sigma, x) ** (2 if head == "score" else 1))
    assert ((stable_target(noisy, mean, process, head=head) - wanted).abs() <= 1e-9 * size).all()


@everywhere
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stable_target_of_the_source_alone_has_the_bits_of_denoising_score_matching(
    head: str, process: Process, dtype: torch.dtype
) -> None:
    x, noise = (v.to(dtype) for v in states())
    noisy = process.perturb(x, INSIDE.to(dtype), noise)
    alpha, sigma = per_row(noisy.alpha, x), per_row(noisy.sigma, x)
    d_alpha, d_sigma = (per_row(rate, x) for rate in process.rates(noisy.t))
    single = {
        "x0": x,
        "noise": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x + d_sigma * noise,
        "v": alpha * noise - sigma * x,
    }[head]
    assert torch.equal(stable_target(noisy, x.clone(), process, head=head), single)


@everywhere
def test_without_noise_the_noise_target_is_the_noise_and_the_score_is_refused(process: Process) -> None:
    x, noise = states(2)
    noisy = process.perturb(x, torch.zeros(2, dtype=torch.float64), noise)
    assert torch.equal(stable_target(noisy, x, process, head="noise"), noise)
    with pytest.raises(ValueError, match="'score' has no target at t = 0"):
        stable_target(noisy, x, process, head="score")
    with pytest.raises(ValueError, match="'noise' has no target at t = 0"):
        stable_target(noisy, x + 1, process, head="noise")
