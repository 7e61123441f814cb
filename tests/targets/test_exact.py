"""Laws of the exact target: it is unbiased for any missing mass, drops no more than that, and is exact to rounding."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_data import (
    CPU,
    QUERIES,
    SIX,
    batch_at,
    images,
    mean_by_differences,
    noisy_batch,
    on_ranks,
    own_part,
    seeded,
    streamed,
)
from torch import Tensor

import stablefield.targets.cells
import stablefield.targets.exact
import stablefield.targets.query
from stablefield import VE, VP, ExactTarget, Flow, NoisyBatch, Pool
from stablefield.kernel.accumulator import PosteriorAccumulator
from stablefield.pool import NULL_LABEL
from stablefield.process import Process
from stablefield.targets import Shard, Sharded
from stablefield.targets.cells import Class, _heaviest
from stablefield.targets.isolation import nearest_distances
from stablefield.targets.lockstep import run_together
from stablefield.targets.query import Examples, Query


def exact_target(pool: Pool, **options: float) -> ExactTarget:
    """The exact target with the distances between the data points."""
    return ExactTarget(pool, lambda label: nearest_distances(pool, label), **options)


def survivors(known: Class, noisy: NoisyBatch, missing_mass: float) -> Tensor:
    """Which data points pass the screen."""
    examples = Examples(noisy.x_t, noisy.sigma, noisy.alpha, (noisy.sigma.double() / noisy.alpha.double()))
    return run_together([known.survivors(examples, Shard(), missing_mass)])[0][1]


# ---- unbiased, by enumeration


@pytest.mark.parametrize("sigma", [0.2, 0.4, 0.7, 3.0])
@pytest.mark.parametrize("missing_mass", [0.9, 0.5, 0.1, 1e-8, 0])
@pytest.mark.parametrize("dims", [1, 2])
def test_exact_target_is_unbiased_for_every_missing_mass(sigma: float, missing_mass: float, dims: int) -> None:
    energy = (QUERIES[:, None] - SIX).square().sum(2) / (2 * sigma**2)
    w = torch.softmax(-energy, 1)
    exact = w @ SIX
    target = exact_target(Pool(SIX), missing_mass=missing_mass, projection_dims=dims)
    found = torch.stack([target(batch_at(QUERIES, SIX, torch.full((4,), k), sigma)).mean for k in range(6)], 1)
    torch.testing.assert_close((w[:, :, None] * found).sum(1), exact, rtol=0, atol=1e-10)
    spread = (w * (found - exact[:, None]).square().sum(2)).sum(1)
    single = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    assert (spread <= single * (1 + 1e-9) + 1e-15).all()


def test_much_is_dropped_in_those_cases() -> None:
    # otherwise the test above would only enumerate the target over all data
    known = exact_target(Pool(SIX), missing_mass=0.5, projection_dims=1)._class(NULL_LABEL, CPU)
    assert [int((known.level <= sigma).sum()) for sigma in (0.1, 0.2, 0.4)] == [0, 2, 6]
    inside = survivors(known, batch_at(QUERIES, SIX, torch.arange(4), 0.4), 0.5 / 3)
    assert inside.sum(1).tolist() == [5, 4, 4, 1]


# ---- the missing mass


@pytest.mark.parametrize("dims", [1, 3, 8])
def test_the_mass_dropped_by_the_screen_is_on_average_that_of_the_projected_posterior(dims: int) -> None:
    # the tower property: E[sum of w outside S | P x_t] = sum of q outside S, for any S that depends on P x_t alone
    g, missing_mass, sigma = seeded(1), 0.3, 1.0
    data = torch.randn(200, 8, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 1, 0.5, 0.5, 0.5])
    known = ExactTarget(Pool(data), projection_dims=dims)._class(NULL_LABEL, CPU)
    screen = known.screen
    source = torch.randint(200, (4000,), generator=g)
    x_t = data[source] + sigma * torch.randn(4000, 8, generator=g, dtype=torch.float64)
    inside = screen.in_pool_order(survivors(known, batch_at(x_t, data, source, sigma), missing_mass))
    w = torch.softmax(-torch.cdist(x_t, data).square() / (2 * sigma**2), 1)
    q = torch.softmax(-torch.cdist(screen.projection(x_t), screen.projection(data)).square() / (2 * sigma**2), 1)
    dropped, projected = ((weight * ~inside).sum(1).double() for weight in (w, q))
    difference = dropped - projected
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 4000**0.5 + 1e-6
    assert float(projected.max()) <= missing_mass
    assert 1 < float(inside.sum(1).double().mean()) < 150
    missed = (~inside.gather(1, source[:, None])).double()
    assert float(missed.mean()) <= missing_mass


def test_at_most_a_share_missing_mass_over_p_of_examples_misses_more_than_p() -> None:
    pool, missing_mass = images(), 1e-3
    data = pool.take(torch.arange(len(pool))).double().flatten(1)
    for sigma in (0.1, 0.3, 1.0, 3.0):
        noisy = noisy_batch(pool, torch.full((400,), sigma), seed=3)
        found = exact_target(pool, missing_mass=missing_mass, projection_dims=4)(noisy).mean.double()
        error = (found - mean_by_differences(noisy, data.view(-1, 1, 8, 8))).flatten(1).norm(dim=1)
        diameter = float(torch.cdist(data, data).max())
        for p in (0.01, 0.1):
            assert float((error > p * diameter).double().mean()) <= missing_mass / p


# ---- exact to rounding


@pytest.mark.parametrize("process", [VE(), VP(), Flow()], ids=repr)
@pytest.mark.parametrize("labelled", [False, True])
def test_exact_target_is_exact_at_every_noise_level(process: Process, labelled: bool) -> None:
    pool = images()
    data = pool.take(torch.arange(len(pool)))
    level = torch.logspace(-3, 2, 60, dtype=torch.float64)
    noisy = noisy_batch(pool, process.time(level), process, labelled=labelled)
    found, exact = exact_target(pool)(noisy), streamed(pool)(noisy)
    rms = float(data.square().flatten(1).sum(1).mean().sqrt())
    error = (found.mean.double() - mean_by_differences(noisy, data, pool.labels)).flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5 * rms
    torch.testing.assert_close(found.ess, exact.ess, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.variance, exact.variance, rtol=1e-3, atol=1e-4 * rms**2)


@pytest.mark.parametrize("dims", [2, 64])
def test_mirror_images_are_data_points_and_neighbours(dims: int) -> None:
    pool = images(150)
    both = pool.mirrored()
    copied = Pool(torch.cat([pool.data, pool.data.flip(-1)]), pool.labels.repeat(2))
    torch.testing.assert_close(nearest_distances(both), nearest_distances(copied), rtol=0, atol=1e-4)
    noisy = noisy_batch(both, torch.logspace(-2, 1.5, 40), labelled=True)
    found, exact = exact_target(both, projection_dims=dims)(noisy), streamed(copied)(noisy)
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=1e-5)


def test_targets_without_distances_are_the_same() -> None:
    pool = images()
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, 64))
    torch.testing.assert_close(ExactTarget(pool)(noisy).mean, exact_target(pool)(noisy).mean, rtol=0, atol=1e-5)


def test_the_exact_target_of_an_example_does_not_depend_on_the_rest_of_its_batch() -> None:
    pool, target = images(), exact_target(images())
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, 48))
    whole = target(noisy)
    for part in (slice(0, 1), slice(20, 48), slice(47, 48)):
        torch.testing.assert_close(target(noisy.select(part)).mean, whole.mean[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("small_data", [0, 2**22])
@pytest.mark.parametrize("heaviest", [1, 40, 512])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 30.0])
def test_the_chosen_precision_does_not_change_the_target(
    sigma: float, heaviest: int, small_data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.targets.cells, "SMALL_DATA", small_data)
    monkeypatch.setattr(stablefield.targets.cells, "HEAVIEST", heaviest)
    pool = images(400, side=16)
    noisy = noisy_batch(pool, torch.full((16,), sigma))
    exact = mean_by_differences(noisy, pool.take(torch.arange(400)))
    torch.testing.assert_close(ExactTarget(pool)(noisy).mean.double(), exact, rtol=0, atol=1e-5)


def test_float64_is_used_where_sigma_is_small_and_float32_where_it_is_large() -> None:
    energy = torch.tensor([[3.0, 1.0, math.inf, 2.0]] * 2)
    wanted = [[False] * 4, [True, True, False, True]]
    assert _heaviest(energy, energy < math.inf, torch.tensor([1e-7, 1e-4])).tolist() == wanted
    data = torch.randn(50, 3072, generator=seeded(0))
    pool, square = Pool(data), data.double().square().sum(1)
    for sigma, low, high in ((0.01, 1e-5, math.inf), (30.0, 0.0, 1e-6)):
        query = Query.of(noisy_batch(pool, torch.full((4,), sigma)), pool.affine, torch.zeros(3072))
        assert ((low < query.rounding(square)) & (query.rounding(square) < high)).all()


# ---- on several ranks


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("total", [2, 3, 5])
def test_sharded_exact_targets_equal_those_of_one_rank(total: int, labelled: bool) -> None:
    pool = images(301)
    pool.labels[0] = 3  # a class of one: most ranks hold no data point of it
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, 30), labelled=labelled)
    noisy.index[0], noisy.x[0] = 0, pool.take(torch.zeros(1, dtype=torch.int64))[0]
    if labelled:
        noisy.label[0] = 3
    unsharded = exact_target(pool)(noisy)

    def compute(shard: Shard) -> Tensor:
        return Sharded(exact_target(pool), shard)(own_part(shard, noisy)).mean

    torch.testing.assert_close(torch.cat(on_ranks(total, compute)), unsharded.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("total", [1, 2])
def test_the_sizes_of_screened_and_summed_parts_do_not_change_the_target(
    total: int, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, summed = images(), list[int]()
    sums_of = stablefield.targets.cells._sums

    def counted(query: Query, inside: Tensor, *known: Any, **options: bool) -> PosteriorAccumulator:
        summed.append(len(inside))
        return sums_of(query, inside, *known, **options)

    monkeypatch.setattr(stablefield.targets.cells, "_sums", counted)
    monkeypatch.setattr(stablefield.targets.query, "has_int8_matmul", lambda device: int8)

    def targets() -> Tensor:
        return torch.cat(on_ranks(total, lambda shard: Sharded(exact_target(pool), shard)(own_part(shard, noisy)).mean))

    # sigma ascends, so that the first examples are screened among fewer data points than the last
    noisy = noisy_batch(pool, torch.logspace(-1, 1.5, 32))
    whole = targets()
    ways = 1 if int8 else 2  # floating-point data are multiplied in two precisions
    assert len(summed) == total * ways
    uncertain = summed[0]
    for screened, summed_at_once, parts in (
        (1, 32, 1),
        (3, 32, 1),
        (100, 5, -(-uncertain // 5)),
        (2, 4, -(-uncertain // 4)),
    ):
        summed.clear()
        monkeypatch.setattr(stablefield.targets.cells, "SCREENED_AT_ONCE", screened * 300)
        monkeypatch.setattr(stablefield.targets.exact, "SUMMED_AT_ONCE", summed_at_once * 300)
        torch.testing.assert_close(targets(), whole, rtol=0, atol=1e-5)
        assert len(summed) == total * parts * ways


# ---- data of all kinds


@st.composite
def data_sets(draw: st.DrawFn) -> Tensor:
    """Clusters, outliers, duplicates, lines, constants: (N, D) in float64."""
    n, d, seed = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    g = seeded(seed)
    kind = draw(st.sampled_from(["cloud", "clusters", "outlier", "duplicates", "near-duplicates", "constant", "line"]))
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    match kind:
        case "clusters":
            x = 0.01 * x + 5 * torch.randn(3, d, generator=g, dtype=torch.float64)[torch.randint(3, (n,), generator=g)]
        case "outlier":
            x[0] += 1000
        case "duplicates":
            x = x[torch.randint(max(1, n // 3), (n,), generator=g)]
        case "near-duplicates":
            x = x[:1] + 1e-3 * x
        case "constant":
            x = torch.zeros_like(x)
        case "line":
            x = x[:, :1] * torch.ones(d, dtype=torch.float64)
    return x


@given(data_sets(), st.floats(1e-3, 1e3), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_exact_target_is_exact_for_any_data(data: Tensor, sigma: float, dims: int, seed: int) -> None:
    pool = Pool(data)
    noisy = noisy_batch(pool, torch.full((7,), sigma), seed=seed)
    found = exact_target(pool, missing_mass=1e-12, projection_dims=dims)(noisy)
    scale = float(data.norm(dim=1).max()) + 1e-9
    assert float((found.mean - mean_by_differences(noisy, data)).norm(dim=1).max()) < 1e-5 * scale
    assert torch.isfinite(found.mean).all()
    assert ((found.ess >= 1 - 1e-9) & (found.ess <= len(data) + 1e-9)).all()


@given(data_sets(), st.floats(1e-3, 30), st.floats(1e-6, 0.9), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_exact_target_is_unbiased_for_any_data_labels_and_missing_mass(
    data: Tensor, sigma: float, missing_mass: float, seed: int
) -> None:
    g = seeded(seed)
    labels = torch.randint(int(torch.randint(1, 5, (), generator=g)), (len(data),), generator=g)
    target = exact_target(Pool(data, labels), missing_mass=missing_mass, projection_dims=1)
    label = int(labels[0])
    of_class = (labels == label).nonzero().flatten()
    x_t = data[of_class[:1]] + sigma * torch.randn(1, data.shape[1], generator=g, dtype=torch.float64)
    energy = (x_t - data[of_class]).square().sum(1) / (2 * sigma**2)
    w = torch.softmax(-energy, 0)
    own_label = torch.full((len(of_class),), label)
    found = target(batch_at(x_t.expand(len(of_class), -1), data, of_class, sigma, own_label)).mean
    scale = float(data.norm(dim=1).max()) + 1e-9
    torch.testing.assert_close(w @ found, w @ data[of_class], rtol=0, atol=1e-7 * scale)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(0, 1000), st.floats(0.05, 20))
@settings(max_examples=20, deadline=None)
def test_examples_of_any_labels_and_the_null_label_have_their_exact_targets(
    label: list[int], seed: int, sigma: float
) -> None:
    # classes of one data point, one that is common, and classes without examples; -1 is the null label
    g = seeded(seed)
    labels = torch.cat([torch.tensor([0, 1, 1, 2, 3]), torch.full((30,), 3)])[torch.randperm(35, generator=g)]
    pool = Pool(images(35, seed).data, labels)
    candidates = [pool.indices(one) for one in label]
    index = torch.stack([some[torch.randint(len(some), (), generator=g)] for some in candidates])
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=g)
    noisy = VE().perturb(x, torch.full((len(label),), sigma), noise, index=index, label=torch.tensor(label))
    found = exact_target(pool)(noisy).mean.double()
    wanted = mean_by_differences(noisy, pool.take(torch.arange(35)), labels)
    assert float((found - wanted).abs().max()) < 1e-5


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pool: ExactTarget(pool, missing_mass=-1e-9), "missing_mass must be at least 0 and below 1, not -1e-09"),
        (lambda pool: ExactTarget(pool, missing_mass=1.0), "missing_mass .* not 1.0"),
        (lambda pool: ExactTarget(pool, missing_mass=1.5), "missing_mass .* not 1.5"),
        (lambda pool: ExactTarget(pool, projection_dims=0), "projection_dims must be at least 1, not 0"),
        (lambda pool: ExactTarget(pool, lambda label: torch.zeros(3, 2)), r"300 data points.*\(3, 2\)"),
    ],
)
def test_unusable_options_and_distances_are_refused(make: Callable[[Pool], ExactTarget], message: str) -> None:
    pool = images()
    with pytest.raises(ValueError, match=message):
        make(pool)(noisy_batch(pool, torch.ones(2)))


def test_unusable_examples_are_refused() -> None:
    pool = images()
    noisy = noisy_batch(pool, torch.ones(3), labelled=True)
    with pytest.raises(ValueError, match="does not have the label of its example"):
        exact_target(pool)(replace(noisy, label=(noisy.label + 1) % 3))
    with pytest.raises(ValueError, match="set index"):
        exact_target(pool)(replace(noisy, index=None))
    broken = noisy.x_t.clone()
    broken[1] = math.nan
    for target in (exact_target, streamed):
        with pytest.raises(ValueError, match="x_t is not finite in example 1"):
            target(pool)(replace(noisy, x_t=broken, label=None))


# ---- the caller's precision


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_caller_s_matmul_precision_changes_no_target(
    precision: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.targets.query, "has_int8_matmul", lambda device: int8)
    pool = images(400, side=16)
    noisy = noisy_batch(pool, torch.logspace(-1.5, 1.5, 24))
    wanted = exact_target(pool)(noisy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = exact_target(pool)(noisy)
            assert (noisy.x_t.flatten(1) @ noisy.x_t.flatten(1).T).dtype == torch.bfloat16  # as the caller had it
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for name in ("mean", "ess", "variance"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
