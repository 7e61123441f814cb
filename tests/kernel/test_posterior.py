"""Laws of `posterior`, against sums of float64 differences written out here."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_data import assert_equal_posteriors
from torch import Tensor

from stablefield import VE, VP, Cosine, Flow, Posterior, SubVP, posterior
from stablefield.kernel.accumulator import PosteriorAccumulator, chunk_size, float64_device
from stablefield.kernel.gaussian import stream
from stablefield.prediction import stable_target
from stablefield.process import Process, per_example

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
LEVELS = [0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 100.0]


def by_differences(
    x_t: Tensor, support: Tensor, sigma: Tensor | float, alpha: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, ess, variance) in float64, from differences, one example after the other."""
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
    assert_equal_posteriors(a, b, tolerance)


def problem(
    seed: int = 0,
    examples: int = 5,
    candidates: int = 23,
    shape: tuple[int, ...] = (3, 2),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, a support, and scales at which several candidates compete."""
    g = torch.Generator().manual_seed(seed)
    support = torch.randn(candidates, *shape, generator=g, dtype=dtype)
    x_t = support[:examples] + torch.randn(examples, *shape, generator=g, dtype=dtype)
    sigma = 0.4 + 2 * torch.rand(examples, generator=g, dtype=dtype)
    return x_t, support, {"sigma": sigma, "alpha": 0.5 + torch.rand(examples, generator=g, dtype=dtype)}


def near_duplicates(dimensions: int, candidates: int = 48) -> tuple[Tensor, Tensor]:
    """Float32 data of unit variance with neighbours 0, 1e-3, 1e-2 and 0.1 apart, and the indices of those."""
    g = torch.Generator().manual_seed(dimensions)
    data = torch.randn(candidates, dimensions, generator=g)
    for k, distance in enumerate((0.0, 1e-3, 1e-2, 0.1)):
        away = torch.nn.functional.normalize(torch.randn(2, dimensions, generator=g))
        data[10 + 3 * k : 12 + 3 * k] = data[9 + 3 * k] + distance * away
    return data, torch.arange(9, 21)


# ---- the support is a set: its representation does not matter


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 1000])
def test_block_size_does_not_change_the_result(chunk: int) -> None:
    x_t, support, scales = problem()
    same(posterior(x_t, support, **scales, chunk=chunk), posterior(x_t, support, **scales))
    own = support.expand(len(x_t), *support.shape)
    same(posterior(x_t, own, **scales, chunk=chunk), posterior(x_t, support, **scales))


@pytest.mark.parametrize("sigma", LEVELS)
def test_order_of_the_support_does_not_change_the_result(sigma: float) -> None:
    data, chosen = near_duplicates(64)
    x_t = data[chosen] + sigma * torch.randn(len(chosen), 64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))
    same(posterior(x_t, data[order], sigma=sigma, chunk=7), posterior(x_t, data, sigma=sigma), 1e-5)


def test_an_example_does_not_depend_on_the_rest_of_its_batch() -> None:
    x_t, support, scales = problem(examples=9)
    whole = posterior(x_t, support, **scales)
    for index in (torch.tensor([4]), torch.tensor([8, 0, 3]), torch.arange(9).flip(0)):
        part = posterior(x_t[index], support, **{name: value[index] for name, value in scales.items()})
        same(part, whole.select(index))


def test_a_shared_support_equals_the_same_support_for_each_example() -> None:
    x_t, support, scales = problem()
    same(posterior(x_t, support.expand(5, *support.shape), **scales), posterior(x_t, support, **scales))


@pytest.mark.parametrize("candidates", [0, 1, 22])
def test_a_source_is_one_more_candidate(candidates: int) -> None:
    x_t, support, scales = problem(candidates=23)
    x, support = support[-5:], support[:candidates]
    joined = torch.cat([support.expand(5, *support.shape), x[:, None]], 1)
    same(posterior(x_t, support, **scales, source=x, chunk=4), posterior(x_t, joined, **scales))


@pytest.mark.parametrize("candidates", [0, 7])
def test_the_inputs_stay_as_they_are(candidates: int) -> None:
    x_t, support, scales = problem()
    given_ = [x_t, support[:candidates], support[:5].clone()]
    before = [value.clone() for value in given_]
    posterior(x_t, given_[1], source=given_[2], **scales).mean.mul_(0)
    assert all(torch.equal(*pair) for pair in zip(given_, before, strict=True))


def test_masks_labels_and_smaller_supports_are_equivalent() -> None:
    x_t, support, scales = problem()
    labels = torch.arange(23) % 3
    own_label = torch.tensor([0, 2, 1, 1, 0])
    by_mask = posterior(x_t, support, **scales, allowed=own_label[:, None] == labels, chunk=5)
    same(posterior(x_t, support, **scales, allowed=(own_label, labels), chunk=4), by_mask)
    own = support.expand(5, *support.shape)
    same(posterior(x_t, own, **scales, allowed=(own_label, labels), chunk=6), by_mask)
    for b in range(5):
        own_scales = {name: value[b : b + 1] for name, value in scales.items()}
        smaller = posterior(x_t[b : b + 1], support[labels == own_label[b]], **own_scales)
        same(smaller, by_mask.select(slice(b, b + 1)))


def test_a_source_joins_its_support_whatever_the_mask() -> None:
    x_t, support, scales = problem()
    nothing = torch.zeros(5, 23, dtype=torch.bool)
    found = posterior(x_t, support, **scales, allowed=nothing, source=support[:5])
    assert torch.equal(found.mean, support[:5])
    assert torch.equal(found.ess, torch.ones_like(found.ess))


@pytest.mark.parametrize("splits", [[23], [1, 22], [0, 23], [11, 12], [5, 5, 5, 5, 3], [1] * 23])
@pytest.mark.parametrize("sigma", [1e-3, 0.7, 1e3])
def test_accumulators_of_parts_merge_into_that_of_the_whole(splits: list[int], sigma: float) -> None:
    x_t, support, _ = problem()
    parts = []
    for candidates in support.split(splits):
        parts.append(PosteriorAccumulator(x_t, sigma))
        parts[-1].add(candidates)
    # from both ends, so that a heavier part is merged into a lighter one and the other way round
    first = parts[0]
    for other in parts[1:]:
        first.merge(other)
    same(first.finish(), posterior(x_t, support, sigma=sigma), 1e-9)


def test_accumulators_merge_in_either_order_and_with_an_empty_one() -> None:
    x_t, support, _ = problem()

    def part(candidates: Tensor) -> PosteriorAccumulator:
        sums = PosteriorAccumulator(x_t, 0.5)
        sums.add(candidates)
        return sums

    a, b, nothing = support[:9], support[9:], support[:0]
    whole = posterior(x_t, support, sigma=0.5)
    for first, second in ((a, b), (b, a), (support, nothing), (nothing, support)):
        same(part(first).merge(part(second)).finish(), whole)


def test_a_default_block_takes_the_documented_memory() -> None:
    for examples, dimensions in ((1, 1), (64, 3072), (4096, 2), (7, 10**7)):
        size = chunk_size(torch.empty(examples, dimensions, device="meta"))
        assert size == 1 or size * max(examples, dimensions) * 8 <= 2**23


# ---- numerics


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize(("dimensions", "sigma"), [*product((64, 3072), LEVELS), (64, 1e-4), (64, 3e-5)])
def test_near_duplicates_are_weighted_right_at_every_noise_level(dimensions: int, sigma: float, alpha: float) -> None:
    data, chosen = near_duplicates(dimensions)
    noise = torch.randn(len(chosen), dimensions, generator=torch.Generator().manual_seed(3))
    x = data[chosen]
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
def test_the_epsilon_target_is_right_to_a_ten_thousandth(dimensions: int, sigma: float) -> None:
    data, chosen = near_duplicates(dimensions)
    noise = torch.randn(len(chosen), dimensions, generator=torch.Generator().manual_seed(4))
    noisy = VE().perturb(data[chosen], torch.full((len(chosen),), sigma), noise)
    target = stable_target(noisy, posterior(noisy.x_t, data, sigma=sigma).mean, VE(), prediction_type="epsilon")
    # the weights depend on the rounded x_t, the target on the noise as it was drawn
    mean = by_differences(noisy.x_t, data, noisy.sigma)[0]
    exact = noise.double() + (noisy.x.double() - mean) / noisy.sigma[:, None].double()
    assert ((target - exact).norm(dim=1) <= 1e-4 * noise.norm(dim=1)).all()


@pytest.mark.parametrize("candidates", [1, 2, 50])
@pytest.mark.parametrize("exponent", [-30, -10, -5, -2, 0, 2, 10, 30])
def test_every_noise_level_gives_finite_results(exponent: int, candidates: int) -> None:
    g = torch.Generator().manual_seed(exponent + 30)
    support = torch.randn(candidates, 8, generator=g)
    for alpha in (0.0, 1e-6, 1.0):
        found = posterior(torch.randn(4, 8, generator=g), support, sigma=10.0**exponent, alpha=alpha)
        assert all(torch.isfinite(v).all() for v in (found.mean, found.ess, found.variance))
        assert (found.ess >= 1 - 1e-6).all()
        assert (found.ess <= candidates * (1 + 1e-6)).all()


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
def test_without_noise_the_nearest_candidate_wins(dimensions: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(5)
    support = torch.randn(40, dimensions, generator=g)
    x_t = support[:6] + 1e-3 * torch.randn(6, dimensions, generator=g)
    nearest = torch.cdist(x_t.double(), support.double()).argmin(1)
    found = posterior(x_t, support, sigma=sigma)
    torch.testing.assert_close(found.mean, support[nearest], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.variance, torch.zeros(6), rtol=0, atol=1e-9 * dimensions)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-8, 1e-6, 1e-4, 0.002])
@pytest.mark.parametrize("dimensions", [2, 64, 1024])
def test_copies_of_a_candidate_share_its_weight(dimensions: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(6)
    support = torch.randn(300, dimensions, generator=g)
    support[[100, 299]] = support[0].clone()
    x_t = support[:1] + 1e-3 * torch.randn(1, dimensions, generator=g)
    three_copies = torch.full((1,), 3.0)
    # wherever a copy is: in another block, in the support of one example, or as the source
    for found in (
        posterior(x_t, support, sigma=sigma),
        posterior(x_t, support, sigma=sigma, chunk=7),
        posterior(x_t, support[None], sigma=sigma),
        posterior(x_t, support[1:], sigma=sigma, source=support[:1]),
    ):
        torch.testing.assert_close(found.ess, three_copies, rtol=1e-2, atol=0)
        torch.testing.assert_close(found.mean, support[:1], rtol=1e-6, atol=1e-6)


def test_equally_near_candidates_share_the_weight_without_noise() -> None:
    support = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [3, 3]])
    found = posterior(torch.zeros(1, 2), support, sigma=0.0, chunk=2)
    torch.testing.assert_close(found.ess, torch.tensor([4.0]))
    torch.testing.assert_close(found.mean, torch.zeros(1, 2))
    torch.testing.assert_close(found.variance, torch.ones(1))


def test_a_single_candidate_is_returned_bit_for_bit() -> None:
    x_t, support, _ = problem(dtype=torch.float32)
    for sigma in (0.0, 1e-30, 1e-3, 1.0, 1e30):
        assert torch.equal(posterior(x_t, support[:1], sigma=sigma).mean, support[:1].expand_as(x_t))
        assert torch.equal(posterior(x_t, support[:0], sigma=sigma, source=support[:5]).mean, support[:5])


def test_an_empty_batch_has_an_empty_posterior() -> None:
    x_t, support, _ = problem(examples=0)
    assert posterior(x_t, support, sigma=1.0, source=x_t).mean.shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_do_not_depend_on_the_dtype_of_x_t(dtype: torch.dtype) -> None:
    x_t, support, scales = problem()
    x_t, support = x_t.to(dtype), support.float()
    found, wide = posterior(x_t, support, **scales), posterior(x_t.double(), support.double(), **scales)
    assert found.mean.dtype == found.ess.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.mean, wide.mean.to(found.mean.dtype), rtol=0, atol=0)
    torch.testing.assert_close(found.ess, wide.ess.to(found.ess.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_a_python_number_for_sigma_keeps_its_precision(default: torch.dtype) -> None:
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


def test_reduced_precision_of_the_caller_changes_no_bit() -> None:
    data, chosen = near_duplicates(256)
    x_t = data[chosen] + 0.05 * torch.randn(len(chosen), 256, generator=torch.Generator().manual_seed(7))
    everything: dict[str, Any] = {"sigma": 0.05, "source": data[chosen], "chunk": 10}
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


@pytest.mark.parametrize("prediction_type", ["x0", "epsilon", "score", "velocity", "v"])
def test_no_gradient_flows_into_a_target(prediction_type: str) -> None:
    x_t, support, scales = problem()
    inputs = [x_t, support, *scales.values(), support[:5].clone()]
    for tensor in inputs:
        tensor.requires_grad_()
    found = posterior(x_t, support, **scales, source=inputs[-1])
    assert not any(v.requires_grad for v in (found.mean, found.ess, found.variance))
    noisy = VP().perturb(inputs[-1], torch.full((5,), 0.3, dtype=torch.float64), torch.ones_like(x_t))
    assert noisy.x_t.requires_grad
    assert not stable_target(noisy, found.mean, VP(), prediction_type=prediction_type).requires_grad


# ---- invariances


def supports() -> st.SearchStrategy[tuple[Tensor, Tensor, float, float]]:
    """(x_t, support, sigma, alpha) of any small size."""

    def draw(
        examples: int, n: int, d: int, seed: int, sigma: float, alpha: float
    ) -> tuple[Tensor, Tensor, float, float]:
        g = torch.Generator().manual_seed(seed)
        support = torch.randn(n, d, generator=g, dtype=torch.float64).round(decimals=seed % 3)  # ties, now and then
        x_t = alpha * support[torch.randint(n, (examples,), generator=g)]
        return x_t + sigma * torch.randn(examples, d, generator=g, dtype=torch.float64), support, sigma, alpha

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
def test_the_mean_lies_within_the_support_for_any_order_origin_and_unit(
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

    scaled = posterior(8 * x_t, 8 * support, sigma=8 * sigma, alpha=alpha)
    same(Posterior(scaled.mean / 8, scaled.ess, scaled.variance / 64), found, 1e-6)


@settings(max_examples=30, deadline=None)
@given(supports())
def test_posterior_is_the_written_formula(given_: tuple[Tensor, Tensor, float, float]) -> None:
    x_t, support, sigma, alpha = given_
    written_out = Posterior(*by_differences(x_t, support, sigma, alpha))
    same(posterior(x_t, support, sigma=sigma, alpha=alpha), written_out, 1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_is_variance_exploding_after_division_by_alpha(process: Process) -> None:
    g = torch.Generator().manual_seed(8)
    support = torch.randn(30, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    noisy = process.perturb(support[:5], t, torch.randn(5, 4, generator=g, dtype=torch.float64))
    found = posterior(noisy.x_t, support, sigma=noisy.sigma, alpha=noisy.alpha)
    rescaled = noisy.x_t / per_example(noisy.alpha, noisy.x)
    variance_exploding = posterior(rescaled, support, sigma=noisy.sigma / noisy.alpha)
    same(variance_exploding, found, 1e-9)


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
    target = stable_target(noisy, mean, process, prediction_type="score")
    torch.testing.assert_close(target, score, rtol=1e-9, atol=1e-9)


def test_float64_runs_on_the_cpu_where_a_device_has_none() -> None:
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    for device in (torch.device("cpu"), torch.device("cuda", 3)):
        assert float64_device(device) == device
