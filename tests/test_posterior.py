"""Laws of the kernel, against sums of float64 differences written out here."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablefield import VE, VP, Cosine, Flow, Perturbed, Posterior, Process, SubVP, posterior, stable_target
from stablefield.posterior import Sums, chunk_size, exact, stream
from stablefield.process import per_row

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
LEVELS = [0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 100.0]


def by_differences(
    x_t: Tensor, support: Tensor, sigma: Tensor | float, alpha: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, ess, variance): float64, differences written out, each row by itself, and nothing streamed."""
    sigma, alpha = (torch.as_tensor(v, dtype=torch.float64).expand(len(x_t)) for v in (sigma, alpha))
    means, sizes, variances = [], [], []
    y = support.double().flatten(1)
    for b, query in enumerate(x_t.double().flatten(1)):
        w = torch.softmax(-(query - alpha[b] * y).square().sum(1) / (2 * sigma[b] ** 2), 0)
        mean = w @ y
        means.append(mean)
        sizes.append(1 / w.square().sum())
        variances.append(w @ (y - mean).square().sum(1))
    return torch.stack(means).view(x_t.shape), torch.stack(sizes), torch.stack(variances)


def same(a: Posterior, b: Posterior, tolerance: float = 1e-10) -> None:
    for name in ("mean", "ess", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def problem(
    seed: int = 0, rows: int = 5, members: int = 23, shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, a support, and scales at which several members compete."""
    g = torch.Generator().manual_seed(seed)
    support = torch.randn(members, *shape, generator=g, dtype=dtype)
    x_t = support[:rows] + torch.randn(rows, *shape, generator=g, dtype=dtype)
    sigma = 0.4 + 2 * torch.rand(rows, generator=g, dtype=dtype)
    return x_t, support, {"sigma": sigma, "alpha": 0.5 + torch.rand(rows, generator=g, dtype=dtype)}


def planted(dimensions: int, members: int = 48) -> tuple[Tensor, Tensor]:
    """Float32 data of unit variance with neighbours 0, 1e-3, 1e-2 and 0.1 apart, and the members that have them."""
    g = torch.Generator().manual_seed(dimensions)
    data = torch.randn(members, dimensions, generator=g)
    for k, distance in enumerate((0.0, 1e-3, 1e-2, 0.1)):
        away = torch.nn.functional.normalize(torch.randn(2, dimensions, generator=g))
        data[10 + 3 * k : 12 + 3 * k] = data[9 + 3 * k] + distance * away
    return data, torch.arange(9, 21)


# ---- the support is a set: nothing depends on how it is written down


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 1000])
def test_block_size_changes_nothing(chunk: int) -> None:
    x_t, support, scales = problem()
    same(posterior(x_t, support, **scales, chunk=chunk), posterior(x_t, support, **scales))
    own = support.expand(len(x_t), *support.shape)
    same(posterior(x_t, own, **scales, chunk=chunk), posterior(x_t, support, **scales))


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_order_of_the_references_changes_nothing(sigma: float) -> None:
    data, members = planted(64)
    x_t = data[members] + sigma * torch.randn(len(members), 64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))
    same(posterior(x_t, data[order], sigma=sigma, chunk=7), posterior(x_t, data, sigma=sigma), 1e-5)


def test_a_row_does_not_see_the_batch_it_is_in() -> None:
    x_t, support, scales = problem(rows=9)
    whole = posterior(x_t, support, **scales)
    for rows in (torch.tensor([4]), torch.tensor([8, 0, 3]), torch.arange(9).flip(0)):
        part = posterior(x_t[rows], support, **{name: value[rows] for name, value in scales.items()})
        same(part, Posterior(whole.mean[rows], whole.ess[rows], whole.variance[rows]))


def test_a_shared_support_is_every_row_s_own_support() -> None:
    x_t, support, scales = problem()
    same(posterior(x_t, support.expand(5, *support.shape), **scales), posterior(x_t, support, **scales))


@pytest.mark.parametrize("members", [0, 1, 22])
def test_a_source_is_one_more_member(members: int) -> None:
    x_t, support, scales = problem(members=23)
    x, support = support[-5:], support[:members]
    joined = torch.cat([support.expand(5, *support.shape), x[:, None]], 1)
    same(posterior(x_t, support, **scales, source=x, chunk=4), posterior(x_t, joined, **scales))


def test_a_mask_a_label_and_leaving_out_are_the_same() -> None:
    x_t, support, scales = problem()
    labels = torch.arange(23) % 3
    rows = torch.tensor([0, 2, 1, 1, 0])
    by_mask = posterior(x_t, support, **scales, allowed=rows[:, None] == labels, chunk=5)
    same(posterior(x_t, support, **scales, allowed=(rows, labels), chunk=4), by_mask)
    own = support.expand(5, *support.shape)
    same(posterior(x_t, own, **scales, allowed=(rows, labels), chunk=6), by_mask)
    for b in range(5):
        row = {name: value[b : b + 1] for name, value in scales.items()}
        alone = posterior(x_t[b : b + 1], support[labels == rows[b]], **row)
        same(alone, Posterior(by_mask.mean[b : b + 1], by_mask.ess[b : b + 1], by_mask.variance[b : b + 1]))


def test_a_source_joins_whatever_is_allowed() -> None:
    x_t, support, scales = problem()
    nothing = torch.zeros(5, 23, dtype=torch.bool)
    found = posterior(x_t, support, **scales, allowed=nothing, source=support[:5])
    assert torch.equal(found.mean, support[:5])
    assert torch.equal(found.ess, torch.ones_like(found.ess))


@pytest.mark.parametrize("splits", [[23], [1, 22], [0, 23], [11, 12], [5, 5, 5, 5, 3], [1] * 23])
@pytest.mark.parametrize("sigma", [1e-3, 0.7, 1e3])
def test_sums_of_parts_merge_into_the_sum_of_the_whole(splits: list[int], sigma: float) -> None:
    x_t, support, _ = problem()
    parts = []
    for members in support.split(splits):
        parts.append(Sums(x_t, sigma))
        parts[-1].add(members)
    # from both ends, so that a heavier part is merged into a lighter one and the other way round
    first = parts[0]
    for other in parts[1:]:
        first.merge(other)
    same(first.finish(), posterior(x_t, support, sigma=sigma), 1e-9)


def test_sums_merge_in_either_order_and_with_nothing() -> None:
    x_t, support, _ = problem()

    def part(members: Tensor) -> Sums:
        sums = Sums(x_t, 0.5)
        sums.add(members)
        return sums

    a, b, nothing = support[:9], support[9:], support[:0]
    whole = posterior(x_t, support, sigma=0.5)
    for first, second in ((a, b), (b, a), (support, nothing), (nothing, support)):
        same(part(first).merge(part(second)).finish(), whole)


def test_a_default_block_takes_the_memory_it_is_said_to_take() -> None:
    for rows, dimensions in ((1, 1), (64, 3072), (4096, 2), (7, 10**7)):
        members = chunk_size(torch.empty(rows, dimensions, device="meta"))
        assert members == 1 or members * max(rows, dimensions) * 8 <= 2**23


# ---- numerics


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize(("dimensions", "sigma"), [*product((64, 3072), LEVELS), (64, 1e-4), (64, 3e-5)])
def test_near_duplicates_are_told_apart_at_every_noise_level(dimensions: int, sigma: float, alpha: float) -> None:
    data, members = planted(dimensions)
    noise = torch.randn(len(members), dimensions, generator=torch.Generator().manual_seed(3))
    x = data[members]
    x_t = alpha * x + sigma * noise
    mean, ess, variance = by_differences(x_t, data, sigma, alpha)
    rms = data.double().square().sum(1).mean().sqrt()
    for found in (
        posterior(x_t, data, sigma=sigma, alpha=alpha),
        posterior(x_t, data.expand(len(x), *data.shape), sigma=sigma, alpha=alpha, chunk=17),
    ):
        error = (found.mean.double() - mean).norm(dim=1)
        assert (error <= 1e-5 * rms).all()
        torch.testing.assert_close(found.ess.double(), ess, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.variance.double(), variance, rtol=1e-4, atol=1e-13 * float(rms) ** 2)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("dimensions", [64, 3072])
def test_the_noise_target_is_right_to_a_ten_thousandth(dimensions: int, sigma: float) -> None:
    data, members = planted(dimensions)
    noise = torch.randn(len(members), dimensions, generator=torch.Generator().manual_seed(4))
    noisy = VE().perturb(data[members], torch.full((len(members),), sigma), noise)
    target = stable_target(noisy, posterior(noisy.x_t, data, sigma=sigma).mean, VE(), head="noise")
    # the weights depend on x_t as it was rounded; the noise is what was drawn
    mean = by_differences(noisy.x_t, data, noisy.sigma)[0]
    exact = noise.double() + (noisy.x.double() - mean) / noisy.sigma[:, None].double()
    assert ((target - exact).norm(dim=1) <= 1e-4 * noise.norm(dim=1)).all()


@pytest.mark.parametrize("members", [1, 2, 50])
@pytest.mark.parametrize("exponent", [-30, -10, -5, -2, 0, 2, 10, 30])
def test_every_noise_level_gives_a_number(exponent: int, members: int) -> None:
    g = torch.Generator().manual_seed(exponent + 30)
    support = torch.randn(members, 8, generator=g)
    for alpha in (0.0, 1e-6, 1.0):
        found = posterior(torch.randn(4, 8, generator=g), support, sigma=10.0**exponent, alpha=alpha)
        assert all(torch.isfinite(v).all() for v in (found.mean, found.ess, found.variance))
        assert (found.ess >= 1 - 1e-6).all()
        assert (found.ess <= members * (1 + 1e-6)).all()


@pytest.mark.parametrize("sigma", [1e30, 1e10, math.sqrt(1e300)])
def test_without_information_the_posterior_is_the_prior(sigma: float) -> None:
    x_t, support, _ = problem()
    for scales in ({"sigma": sigma}, {"sigma": 1.0, "alpha": 0.0}, {"sigma": sigma, "alpha": 0.0}):
        found = posterior(x_t, support, **scales, chunk=5)
        torch.testing.assert_close(found.mean, support.mean(0).expand_as(x_t))
        torch.testing.assert_close(found.ess, torch.full_like(found.ess, 23))
        torch.testing.assert_close(found.variance, support.var(0, correction=0).sum().expand(5))


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-10, 1e-4])
@pytest.mark.parametrize("dimensions", [1, 64, 3072])
def test_without_noise_the_nearest_member_wins(dimensions: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(5)
    support = torch.randn(40, dimensions, generator=g)
    x_t = support[:6] + 1e-3 * torch.randn(6, dimensions, generator=g)
    nearest = torch.cdist(x_t.double(), support.double()).argmin(1)
    found = posterior(x_t, support, sigma=sigma)
    torch.testing.assert_close(found.mean, support[nearest], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.variance, torch.zeros(6), rtol=0, atol=1e-9 * dimensions)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-8, 1e-6, 1e-4, 0.002])
@pytest.mark.parametrize("dimensions", [2, 64, 1024])
def test_copies_of_a_member_share_its_weight(dimensions: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(6)
    support = torch.randn(300, dimensions, generator=g)
    support[[100, 299]] = support[0].clone()
    x_t = support[:1] + 1e-3 * torch.randn(1, dimensions, generator=g)
    as_a_member = torch.full((1,), 3.0)
    # wherever a copy stands: in another block, in a row's own support, or as the source
    for found in (
        posterior(x_t, support, sigma=sigma),
        posterior(x_t, support, sigma=sigma, chunk=7),
        posterior(x_t, support[None], sigma=sigma),
        posterior(x_t, support[1:], sigma=sigma, source=support[:1]),
    ):
        torch.testing.assert_close(found.ess, as_a_member, rtol=1e-2, atol=0)
        torch.testing.assert_close(found.mean, support[:1], rtol=1e-6, atol=1e-6)


def test_points_equally_near_share_at_no_noise() -> None:
    support = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [3, 3]])
    found = posterior(torch.zeros(1, 2), support, sigma=0.0, chunk=2)
    torch.testing.assert_close(found.ess, torch.tensor([4.0]))
    torch.testing.assert_close(found.mean, torch.zeros(1, 2))
    torch.testing.assert_close(found.variance, torch.ones(1))


def test_one_member_is_returned_bit_for_bit() -> None:
    x_t, support, _ = problem(dtype=torch.float32)
    for sigma in (0.0, 1e-30, 1e-3, 1.0, 1e30):
        assert torch.equal(posterior(x_t, support[:1], sigma=sigma).mean, support[:1].expand_as(x_t))
        assert torch.equal(posterior(x_t, support[:0], sigma=sigma, source=support[:5]).mean, support[:5])


def test_an_empty_batch_has_an_empty_answer() -> None:
    x_t, support, _ = problem(rows=0)
    assert posterior(x_t, support, sigma=1.0, source=x_t).mean.shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_do_not_know_the_type_of_x_t(dtype: torch.dtype) -> None:
    x_t, support, scales = problem()
    x_t, support = x_t.to(dtype), support.float()
    found, wide = posterior(x_t, support, **scales), posterior(x_t.double(), support.double(), **scales)
    assert found.mean.dtype == found.ess.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.mean, wide.mean.to(found.mean.dtype), rtol=0, atol=0)
    torch.testing.assert_close(found.ess, wide.ess.to(found.ess.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_a_number_for_sigma_keeps_its_digits(default: torch.dtype) -> None:
    x_t, support, _ = problem()
    sigma, alpha = torch.tensor([0.1, 0.7], dtype=torch.float64)
    wide = posterior(x_t, support, sigma=sigma, alpha=alpha)
    wanted = by_differences(x_t, support, 0.1, 0.7)[0]
    torch.testing.assert_close(wide.mean, wanted, rtol=1e-9, atol=1e-9)
    torch.set_default_dtype(default)
    try:
        found = posterior(x_t, support, sigma=0.1, alpha=0.7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.mean, wide.mean)


def test_reduced_precision_switched_on_by_the_caller_changes_no_bit() -> None:
    data, members = planted(256)
    x_t = data[members] + 0.05 * torch.randn(len(members), 256, generator=torch.Generator().manual_seed(7))
    everything: dict[str, Any] = {"sigma": 0.05, "source": data[members], "chunk": 10}
    before = posterior(x_t, data, **everything)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = posterior(x_t, data, **everything)
            streamed = stream(x_t, [(data, None)], sigma=0.05)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_float32_matmul_precision("highest")
    same(after, before, 0.0)
    same(streamed, posterior(x_t, data, sigma=0.05), 0.0)


@pytest.mark.parametrize("head", ["x0", "noise", "score", "velocity", "v"])
def test_no_gradient_flows_into_a_target(head: str) -> None:
    x_t, support, scales = problem()
    inputs = [x_t, support, *scales.values(), support[:5].clone()]
    for tensor in inputs:
        tensor.requires_grad_()
    found = posterior(x_t, support, **scales, source=inputs[-1])
    assert not any(v.requires_grad for v in (found.mean, found.ess, found.variance))
    noisy = VP().perturb(inputs[-1], torch.full((5,), 0.3, dtype=torch.float64), torch.ones_like(x_t))
    assert noisy.x_t.requires_grad
    assert not stable_target(noisy, found.mean, VP(), head=head).requires_grad


# ---- invariances


def supports() -> st.SearchStrategy[tuple[Tensor, Tensor, float, float]]:
    """(x_t, support, sigma, alpha) of any small size."""

    def draw(rows: int, n: int, d: int, seed: int, sigma: float, alpha: float) -> tuple[Tensor, Tensor, float, float]:
        g = torch.Generator().manual_seed(seed)
        support = torch.randn(n, d, generator=g, dtype=torch.float64).round(decimals=seed % 3)  # ties, now and then
        x_t = alpha * support[torch.randint(n, (rows,), generator=g)]
        return x_t + sigma * torch.randn(rows, d, generator=g, dtype=torch.float64), support, sigma, alpha

    return st.builds(
        draw,
        st.integers(1, 4),
        st.integers(1, 12),
        st.integers(1, 5),
        st.integers(0, 2**31),
        st.floats(-3, 2).map(lambda e: 10.0**e),
        st.floats(0.01, 1.0),
    )


@settings(max_examples=60, deadline=None)
@given(supports(), st.randoms(use_true_random=False))
def test_a_mean_lies_within_its_support_whatever_the_order_and_the_origin(
    given_: tuple[Tensor, Tensor, float, float], random: Any
) -> None:
    x_t, support, sigma, alpha = given_
    found = posterior(x_t, support, sigma=sigma, alpha=alpha)
    assert (found.mean >= support.amin(0) - 1e-12).all()
    assert (found.mean <= support.amax(0) + 1e-12).all()
    assert ((found.ess >= 1 - 1e-12) & (found.ess <= len(support) + 1e-9)).all()
    assert (found.variance >= 0).all()

    order = list(range(len(support)))
    random.shuffle(order)
    same(posterior(x_t, support[order], sigma=sigma, alpha=alpha), found, 1e-6)

    shift = torch.linspace(-1, 2, support.shape[1], dtype=torch.float64)
    moved = posterior(x_t + alpha * shift, support + shift, sigma=sigma, alpha=alpha)
    same(Posterior(moved.mean - shift, moved.ess, moved.variance), found, 1e-6)

    # and a change of units is a change of units
    scaled = posterior(8 * x_t, 8 * support, sigma=8 * sigma, alpha=alpha)
    same(Posterior(scaled.mean / 8, scaled.ess, scaled.variance / 64), found, 1e-6)


@settings(max_examples=30, deadline=None)
@given(supports())
def test_it_is_the_formula(given_: tuple[Tensor, Tensor, float, float]) -> None:
    x_t, support, sigma, alpha = given_
    written_out = Posterior(*by_differences(x_t, support, sigma, alpha))
    same(posterior(x_t, support, sigma=sigma, alpha=alpha), written_out, 1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_is_variance_exploding_in_disguise(process: Process) -> None:
    g = torch.Generator().manual_seed(8)
    support = torch.randn(30, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    noisy = process.perturb(support[:5], t, torch.randn(5, 4, generator=g, dtype=torch.float64))
    found = posterior(noisy.x_t, support, sigma=noisy.sigma, alpha=noisy.alpha)
    twin = posterior(noisy.x_t / per_row(noisy.alpha, noisy.x), support, sigma=noisy.sigma / noisy.alpha)
    same(twin, found, 1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_score_of_the_mean_is_the_gradient_of_the_log_density(process: Process) -> None:
    g = torch.Generator().manual_seed(9)
    support = torch.randn(12, 3, generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    noisy = process.perturb(support[:3], t, torch.randn(3, 3, generator=g, dtype=torch.float64))
    x_t = noisy.x_t.clone().requires_grad_()
    distance = (x_t[:, None] - noisy.alpha[:, None, None] * support).square().sum(2)
    (score,) = torch.autograd.grad(torch.logsumexp(-distance / (2 * noisy.sigma[:, None] ** 2), 1).sum(), x_t)
    mean = posterior(noisy.x_t, support, sigma=noisy.sigma, alpha=noisy.alpha).mean
    torch.testing.assert_close(stable_target(noisy, mean, process, head="score"), score, rtol=1e-9, atol=1e-9)


# ---- what a user is told


def wrong(**changes: Any) -> dict[str, Any]:
    x_t, support, _ = problem(rows=4, members=7, dtype=torch.float32)
    return {"x_t": x_t, "support": support, "sigma": 1.0} | changes


NOT_FINITE = torch.full((4, 3, 2), float("nan"))
LABELS = torch.zeros(4, dtype=torch.int64), torch.ones(7, dtype=torch.int64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"support": torch.zeros(7, 3, 3)}, r"\(4, 3, 2\).*\(7, 3, 3\)"),
        ({"support": torch.zeros(3, 7, 3, 2)}, r"\(4, 3, 2\).*\(3, 7, 3, 2\)"),
        ({"support": torch.zeros(7, 6)}, r"\(4, 3, 2\).*\(7, 6\)"),
        ({"x_t": torch.zeros(4), "support": torch.zeros(7)}, r"at least one dimension.*\(4,\)"),
        ({"source": torch.zeros(3, 3, 2)}, r"\(4, 3, 2\).*\(3, 3, 2\)"),
        ({"support": torch.zeros(0, 3, 2)}, "support is empty"),
        ({"support": torch.zeros(4, 0, 3, 2)}, "support is empty"),
        ({"support": torch.zeros(7, 3, 2, dtype=torch.uint8)}, "support is torch.uint8"),
        ({"x_t": torch.zeros(4, 3, 2, dtype=torch.int64)}, "x_t is torch.int64"),
        ({"source": torch.zeros(4, 3, 2, dtype=torch.int32)}, "source is torch.int32"),
        ({"support": torch.zeros(7, 3, 2, device="meta")}, "support is on meta, but x_t on cpu"),
        ({"source": torch.zeros(4, 3, 2, device="meta")}, "source is on meta, but x_t on cpu"),
        ({"sigma": -0.1}, "sigma.*not negative; row 0 has -0.1"),
        ({"sigma": torch.tensor([1, 2, -3, 4.0])}, "sigma.*row 2 has -3"),
        ({"sigma": float("nan")}, "sigma must be finite.*nan"),
        ({"sigma": float("inf")}, "sigma must be finite.*inf"),
        ({"sigma": torch.ones(4, 1, 1)}, r"sigma.*\(4,\).*\(4, 1, 1\)"),
        ({"sigma": torch.ones(3)}, r"sigma.*\(4,\).*\(3,\)"),
        ({"alpha": torch.ones(1, 4)}, r"alpha.*\(4,\).*\(1, 4\)"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"x_t": NOT_FINITE}, "x_t is not finite in row 0"),
        ({"x_t": torch.zeros(4, 3, 2).index_fill_(0, torch.tensor(2), torch.inf)}, "x_t is not finite in row 2"),
        ({"support": torch.full((7, 3, 2), torch.inf)}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE, "sigma": 0.0}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE, "alpha": 0.0}, "support or the source holds numbers that are not finite"),
        ({"allowed": torch.ones(4, 6, dtype=torch.bool)}, r"\(4, 7\).*\(4, 6\)"),
        ({"allowed": torch.ones(4, 7)}, r"bool mask \(4, 7\), not torch.float32"),
        ({"allowed": (torch.zeros(3), torch.zeros(7))}, r"4 row and 7 member labels, not \(3, 7\)"),
        ({"allowed": torch.tensor([1, 1, 1, 0]).bool()[:, None].expand(4, 7)}, "row 3 is allowed"),
        ({"allowed": LABELS}, "row 0 is allowed"),
        ({"support": np.zeros((7, 3, 2))}, "support must be a tensor, not ndarray"),
        ({"x_t": [0.0]}, "x_t must be a tensor, not list"),
        ({"chunk": 0}, "chunk must be at least 1.*0"),
        ({"chunk": -1}, "chunk must be at least 1.*-1"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        posterior(**wrong(**changes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x_t", "support", "source"])
@pytest.mark.parametrize("scales", [{"sigma": 0.0}, {"sigma": 1.0, "alpha": 0.0}, {"sigma": 1e-3}, {"sigma": 1e30}])
def test_one_number_that_is_not_finite_is_never_silent(where: str, bad: float, scales: dict[str, float]) -> None:
    inputs = wrong(source=torch.zeros(4, 3, 2), **scales)
    inputs[where] = inputs[where].clone()
    inputs[where][2, 1, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        posterior(**inputs, chunk=2)


@pytest.mark.usefixtures("unchecked")
def test_blocks_of_another_shape_are_refused_even_if_their_numbers_would_fit() -> None:
    noisy: Perturbed = VE().perturb(torch.zeros(2, 3, 4), torch.ones(2), torch.zeros(2, 3, 4))
    for members in (torch.zeros(5, 4, 3), torch.zeros(5, 12), torch.zeros(2, 5, 4, 3)):
        with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
            stream(noisy.x_t, [(members, None)], sigma=1.0)


def test_what_needs_float64_is_done_where_there_is_some() -> None:
    assert exact(torch.device("mps")) == torch.device("cpu")
    for there in (torch.device("cpu"), torch.device("cuda", 3)):
        assert exact(there) == there
