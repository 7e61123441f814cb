"""Laws of the targets: which supports are drawn, what they average to, and which shortcuts are not allowed.

Unbiasedness is counted out, not sampled, wherever the data are few: given x_t the source is member k with probability
w_k, so E[target | x_t] is a finite sum over sources and draws.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations, permutations, product

import pytest
import torch
from torch import Tensor

from stablefield import (
    VE,
    VP,
    Banded,
    Cosine,
    Flow,
    FullDataset,
    NearestNeighbours,
    Perturbed,
    Pool,
    Posterior,
    Process,
    PrunedDataset,
    ReferenceBatch,
    SingleSample,
    SubVP,
    TargetEstimator,
    posterior,
    stable_target,
)
from stablefield.posterior import chunk_size
from stablefield.reference import ALL, distinct

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0, 0, 1, 0])
QUERIES = torch.tensor([[0.2, 0.1], [0.7, 0.4], [-0.3, -0.2], [2.0, 2.0]], dtype=torch.float64)


def weights(x_t: Tensor, data: Tensor, sigma: float) -> Tensor:
    """p(source = k | x_t), (B, N), by differences."""
    return torch.softmax(-(x_t[:, None] - data).square().sum(2) / (2 * sigma**2), 1)


def rows(x_t: Tensor, data: Tensor, index: Tensor, sigma: float, label: Tensor | None = None) -> Perturbed:
    """The record of a batch that came to lie at x_t, whatever its sources."""
    level = torch.full((len(x_t),), sigma, dtype=x_t.dtype)
    x = data[index]
    return Perturbed(x, (x_t - x) / sigma, level, torch.ones_like(level), level, x_t, label, index)


def batch(process: Process, data: Tensor, n: int = 9, labels: Tensor | None = None, seed: int = 0) -> Perturbed:
    """A batch of a data set on its way, from sources that repeat now and then."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data), (n,), generator=g)
    t = torch.linspace(0.05, 0.95, n).to(data)
    noise = torch.randn(n, *data.shape[1:], generator=g).to(data)
    return process.perturb(data[index], t, noise, index=index, label=None if labels is None else labels[index])


def same(a: Posterior, b: Posterior, tolerance: float = 1e-9) -> None:
    for name in ("mean", "ess", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def cloud(n: int = 40, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


# ---- the ends of the scale: one member is DSM, all members are exact


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_member_is_denoising_score_matching_bit_for_bit(
    process: Process, labelled: bool, dtype: torch.dtype
) -> None:
    data, labels = cloud(dtype=dtype)
    noisy = batch(process, data, labels=labels if labelled else None)
    single = SingleSample()(noisy)
    assert torch.equal(single.mean, noisy.x)
    for one in (ReferenceBatch(Pool(data, labels), 1), NearestNeighbours(Pool(data, labels), 1)):
        found = one(noisy, generator=torch.Generator().manual_seed(1))
        assert torch.equal(found.ess, torch.ones_like(found.ess))
        if isinstance(one, ReferenceBatch):
            assert torch.equal(found.mean, single.mean)
            assert torch.equal(stable_target(noisy, found.mean, process, head="noise"), noisy.noise)
    assert torch.equal(stable_target(noisy, single.mean, process, head="noise"), noisy.noise)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_all_members_are_the_exact_target_however_they_are_asked_for(process: Process, labelled: bool) -> None:
    data, labels = cloud()
    pool = Pool(data, labels)
    noisy = batch(process, data, labels=labels if labelled else None)
    exact = FullDataset(pool)(noisy)
    for seed in range(3):
        same(ReferenceBatch(pool, len(pool))(noisy, generator=torch.Generator().manual_seed(seed)), exact)
    same(NearestNeighbours(pool, len(pool))(noisy), exact)
    allowed = labels[noisy.index][:, None] == labels if labelled else None
    same(posterior(noisy.x_t, data, sigma=noisy.sigma, alpha=noisy.alpha, allowed=allowed), exact)


def test_bytes_and_the_numbers_they_stand_for_are_one_data_set() -> None:
    stored = torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = stored.float() / 127.5 - 1
    noisy = batch(VE(), data)
    for of_pool in (FullDataset, lambda p: ReferenceBatch(p, 7), lambda p: NearestNeighbours(p, 4)):
        by_bytes, by_numbers = (
            of_pool(Pool(d))(noisy, generator=torch.Generator().manual_seed(0)) for d in (stored, data)
        )
        same(by_bytes, by_numbers, 1e-6)


def test_a_data_set_of_many_blocks_is_one_data_set() -> None:
    data = torch.randn(3000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = batch(VE(), data, n=1200)
    assert chunk_size(noisy.x_t) < 1000
    pool, distance = Pool(data), (noisy.x_t - data.T).abs()
    energy = -(distance**2) / (2 * noisy.sigma[:, None] ** 2)
    exact = torch.softmax(energy, 1) @ data
    torch.testing.assert_close(FullDataset(pool)(noisy).mean, exact)
    torch.testing.assert_close(ReferenceBatch(pool, 3000)(noisy).mean, exact)
    near = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, distance.topk(40, largest=False)[1], True)
    inside = near.gather(1, noisy.index[:, None])
    assert inside.any()
    assert not inside.all()
    wanted = torch.where(inside, torch.softmax(energy.masked_fill(~near, -math.inf), 1) @ data, noisy.x)
    torch.testing.assert_close(NearestNeighbours(pool, 40)(noisy).mean, wanted)


# ---- the draw


def support_of(draw: Iterable[int], source: int) -> frozenset[int]:
    """The support of a row, as the design has it: r_1 .. r_n if the source is among r_1 .. r_(n-1), else with it."""
    *shared, last = draw
    return frozenset([*shared, last if source in shared else source])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_a_row_has_its_source_and_every_choice_of_others_equally_often(n: int) -> None:
    for source in range(6):
        counted = Counter(support_of(draw, source) for draw in permutations(range(6), n))
        others = [k for k in range(6) if k != source]
        wanted = {frozenset([source, *chosen]) for chosen in combinations(others, n - 1)}
        assert set(counted) == wanted
        assert set(counted.values()) == {math.perm(6, n) // math.comb(5, n - 1)}


class Drawn(Pool):
    """A pool whose next draw is known."""

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Tensor:
        draw: Tensor = self.__dict__["next"]
        assert len(draw) == n
        return draw


def known_draw(data: Tensor, draw: Iterable[int]) -> Pool:
    pool = Drawn(data)
    object.__setattr__(pool, "next", torch.tensor(list(draw)))
    return pool


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_reference_batch_uses_the_support_of_the_design(n: int) -> None:
    source = torch.arange(6)
    x_t = QUERIES[:1].expand(6, 2)
    noisy = rows(x_t, SIX, source, 0.8)
    for draw in list(permutations(range(6), n))[:: 7 if n > 3 else 1]:
        found = ReferenceBatch(known_draw(SIX, draw), n)(noisy)
        supports = torch.stack([SIX[sorted(support_of(draw, k))] for k in range(6)])
        same(found, posterior(x_t, supports, sigma=0.8))


@pytest.mark.parametrize(("total", "n"), [(5, 2), (5, 3), (6, 1), (7, 7), (60, 2), (40, 3)])
def test_a_draw_is_distinct_and_every_ordered_choice_is_equally_likely(total: int, n: int) -> None:
    # (5, 2), (6, 1), (60, 2), (40, 3) take what is first seen; (5, 3), (7, 7) shuffle. Seven shuffled is too many
    # orders to count: there, which number comes where is
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([distinct(total, n, g) for _ in range(6000)])
    assert (draws.sort(1).values.diff(dim=1) > 0).all()
    assert draws.min() == 0
    assert draws.max() == total - 1
    for statistic, cells in ((lambda d: d, total), (lambda d: (d[:, :1] > d[:, -1:]).long(), 2 if n > 1 else 1)):
        for column in statistic(draws).T:
            observed = torch.bincount(column, minlength=cells).double()
            wanted = len(draws) / cells
            excess = ((observed - wanted).square() / wanted).sum() - (cells - 1)
            assert excess < 4.5 * math.sqrt(2 * max(cells - 1, 1))
    if math.perm(total, n) <= 100:
        observed = torch.tensor([c for c in Counter(map(tuple, draws.tolist())).values()]).double()
        assert len(observed) == math.perm(total, n)
        wanted = len(draws) / len(observed)
        excess = ((observed - wanted).square() / wanted).sum() - (len(observed) - 1)
        assert excess < 4.5 * math.sqrt(2 * len(observed))


def test_a_draw_follows_from_its_generator() -> None:
    for total, n in ((100, 3), (100, 90)):
        one, again = (distinct(total, n, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(one, again)
        assert not torch.equal(one, distinct(total, n, torch.Generator().manual_seed(8)))


# ---- the cell law, counted out


def averaged(x_t: Tensor, sigma: float, target: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean over sources of a target, the exact mean, E||target - exact||^2 relative to DSM's), for each x_t."""
    w = weights(x_t, SIX, sigma)
    exact = w @ SIX
    found = torch.stack([target(torch.full((len(x_t),), k)) for k in range(len(SIX))], 1)
    spread = (w * (found - exact[:, None]).square().sum(2)).sum(1)
    dsm = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    return (w[:, :, None] * found).sum(1), exact, spread / dsm


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_the_reference_batch_is_exactly_unbiased_with_less_variance(n: int, sigma: float) -> None:
    w = weights(QUERIES, SIX, sigma)
    exact = w @ SIX
    dsm = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    mean, spread, draws = torch.zeros_like(QUERIES), torch.zeros_like(dsm), list(permutations(range(6), n))
    source = torch.arange(6).repeat(len(QUERIES))
    noisy = rows(QUERIES.repeat_interleave(6, 0), SIX, source, sigma)
    for draw in draws:
        target = ReferenceBatch(known_draw(SIX, draw), n)(noisy).mean.view(len(QUERIES), 6, 2)
        mean += (w[:, :, None] * target).sum(1) / len(draws)
        spread += (w * (target - exact[:, None]).square().sum(2)).sum(1) / len(draws)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (spread <= dsm * (1 + 1e-9)).all()
    if n == 6:
        assert spread.max() < 1e-20


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_the_nearest_neighbours_are_exactly_unbiased_with_less_variance(k: int, sigma: float) -> None:
    estimator = NearestNeighbours(Pool(SIX), k)
    mean, exact, ratio = averaged(QUERIES, sigma, lambda source: estimator(rows(QUERIES, SIX, source, sigma)).mean)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("estimator", [lambda p: NearestNeighbours(p, 2), FullDataset, lambda p: ReferenceBatch(p, 6)])
def test_classes_are_cells(estimator: Callable[[Pool], TargetEstimator], sigma: float) -> None:
    # a target that sees the source's class averages, over sources of all classes, to the mean over all data
    def target(source: Tensor) -> Tensor:
        noisy = rows(QUERIES, SIX, source, sigma, LABELS[source])
        return estimator(Pool(SIX, LABELS))(noisy, generator=torch.Generator().manual_seed(0)).mean

    mean, exact, ratio = averaged(QUERIES, sigma, target)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
def test_within_a_class_the_exact_target_is_the_conditional_mean(sigma: float) -> None:
    for label in (0, 1):
        of_class = SIX[label == LABELS]
        source = (label == LABELS).nonzero()[0].expand(len(QUERIES))
        found = FullDataset(Pool(SIX, LABELS))(rows(QUERIES, SIX, source, sigma, LABELS[source])).mean
        torch.testing.assert_close(found, weights(QUERIES, of_class, sigma) @ of_class, rtol=0, atol=1e-12)


def isolated() -> Tensor:
    """Which of the six are far from all others: a cell that does not look at the source."""
    distance = torch.cdist(SIX, SIX).fill_diagonal_(math.inf).amin(1)
    return distance > 0.75


def nearest_to(x_t: Tensor, k: int) -> Tensor:
    return torch.zeros(len(x_t), 6, dtype=torch.bool).scatter_(1, torch.cdist(x_t, SIX).topk(k, largest=False)[1], True)


def within(support: Tensor, sigma: float) -> Tensor:
    return posterior(QUERIES, SIX, sigma=sigma, allowed=support).mean


def source_isolated_else_everything(source: Tensor, sigma: float) -> Tensor:
    alone = isolated()[source][:, None]
    return torch.where(alone, SIX[source], within(torch.ones(4, 6, dtype=torch.bool), sigma))


def source_isolated_else_those_that_are_not(source: Tensor, sigma: float) -> Tensor:
    alone = isolated()[source][:, None]
    return torch.where(alone, SIX[source], within(~isolated().expand(4, 6), sigma))


def nearest_and_the_source(source: Tensor, sigma: float) -> Tensor:
    return within(nearest_to(QUERIES, 2).scatter(1, source[:, None], True), sigma)


def nearest_if_the_source_is_one(source: Tensor, sigma: float) -> Tensor:
    inside = nearest_to(QUERIES, 2).gather(1, source[:, None])
    return torch.where(inside, within(nearest_to(QUERIES, 2), sigma), SIX[source])


def references_only(source: Tensor, sigma: float) -> Tensor:
    supports = [torch.tensor(chosen) for chosen in combinations(range(6), 2)]
    return sum(posterior(QUERIES, SIX[s], sigma=sigma).mean for s in supports) / len(supports)


def repeats_of_the_source_dropped(source: Tensor, sigma: float) -> Tensor:
    """Two references drawn with replacement: repeats of each other stay, those of the source go."""
    total = torch.zeros_like(QUERIES)
    for draw in product(range(6), repeat=2):
        for row, k in enumerate(source.tolist()):
            kept = SIX[[k, *(r for r in draw if r != k)]]
            total[row] += posterior(QUERIES[row : row + 1], kept, sigma=sigma).mean[0] / 36
    return total


def repeats_all_kept(source: Tensor, sigma: float) -> Tensor:
    total = torch.zeros_like(QUERIES)
    for draw in product(range(6), repeat=2):
        total += posterior(QUERIES, SIX[list(draw)], sigma=sigma, source=SIX[source]).mean / 36
    return total


def test_some_of_the_six_points_are_isolated_and_some_are_not() -> None:
    assert isolated().any()
    assert not isolated().all()


@pytest.mark.parametrize("sigma", [0.4, 0.7])
@pytest.mark.parametrize(
    "cell", [source_isolated_else_those_that_are_not, nearest_if_the_source_is_one, repeats_all_kept]
)
def test_a_cell_that_does_not_look_at_the_source_is_unbiased(
    cell: Callable[[Tensor, float], Tensor], sigma: float
) -> None:
    mean, exact, ratio = averaged(QUERIES, sigma, lambda source: cell(source, sigma))
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("shortcut", "least"),
    [
        (source_isolated_else_everything, 0.05),
        (nearest_and_the_source, 0.05),
        (repeats_of_the_source_dropped, 0.005),
        (references_only, 0.2),
    ],
)
def test_a_shortcut_that_looks_at_the_source_or_leaves_it_out_is_biased(
    shortcut: Callable[[Tensor, float], Tensor], least: float
) -> None:
    mean, exact, _ = averaged(QUERIES, 0.7, lambda source: shortcut(source, 0.7))
    assert (mean - exact).norm(dim=1).max() > least


# ---- the same with many members, sampled


@pytest.mark.parametrize("n", [2, 16, 256])
def test_the_mean_over_draws_is_the_exact_target_and_its_variance_less_than_a_single_sample_s(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    data = torch.randn(300, 2, generator=g, dtype=torch.float64)
    sigma, trials, per_draw = 0.5, 400, 50
    x_t = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    w = weights(x_t, data, sigma)
    exact = (w @ data)[0]
    dsm = float((w[0] * (data - exact).square().sum(1)).sum())
    pool, means, spread = Pool(data), [], 0.0
    for _ in range(trials):
        source = torch.multinomial(w[0], per_draw, replacement=True, generator=g)
        found = ReferenceBatch(pool, n)(rows(x_t.expand(per_draw, 2), data, source, sigma), generator=g).mean
        means.append(found.mean(0))
        spread += float((found - exact).square().sum(1).mean()) / trials
    means_ = torch.stack(means)
    standard_error = means_.std(0) / math.sqrt(trials)
    assert ((means_.mean(0) - exact).abs() < 4 * standard_error).all()
    assert spread < dsm * (1.05 if n == 2 else 0.5)


def test_without_the_source_in_its_support_the_bias_is_visible() -> None:
    g = torch.Generator().manual_seed(1)
    data = torch.randn(300, 2, generator=g, dtype=torch.float64)
    x_t = torch.tensor([[1.5, -1.0]], dtype=torch.float64)
    exact = weights(x_t, data, 0.3) @ data
    drawn = torch.stack([posterior(x_t, data[distinct(300, 4, g)], sigma=0.3).mean[0] for _ in range(500)])
    standard_error = drawn.std(0) / math.sqrt(500)
    assert ((drawn.mean(0) - exact[0]).abs() > 10 * standard_error).all()


def test_the_variance_reported_is_the_variance_of_a_single_sample() -> None:
    w = weights(QUERIES, SIX, 0.7)
    exact = w @ SIX
    found = FullDataset(Pool(SIX))(rows(QUERIES, SIX, torch.zeros(4, dtype=torch.int64), 0.7))
    torch.testing.assert_close(found.variance, (w * (SIX - exact[:, None]).square().sum(2)).sum(1))


# ---- labels


ESTIMATORS: list[Callable[[Pool], TargetEstimator]] = [
    FullDataset,
    lambda p: ReferenceBatch(p, 6),
    lambda p: NearestNeighbours(p, 6),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_other_classes_look_like_changes_nothing(estimator: Callable[[Pool], TargetEstimator]) -> None:
    data, labels = cloud()
    noisy = batch(Flow(), data, labels=labels)
    noisy = noisy.rows((noisy.label == 1).nonzero().flatten())
    assert len(noisy) > 1
    other = data.clone()
    other[labels != 1] += 0.1
    found, moved = (
        estimator(Pool(d, labels))(noisy, generator=torch.Generator().manual_seed(0)).mean for d in (data, other)
    )
    assert torch.equal(found, moved)


@pytest.mark.parametrize("estimator", [SingleSample, *ESTIMATORS])
def test_a_row_of_which_nothing_is_told_uses_everything(estimator: Callable[..., TargetEstimator]) -> None:
    data, labels = cloud()
    noisy = batch(VP(), data)
    untold = batch(VP(), data, labels=torch.full_like(labels, ALL))
    target = estimator() if estimator is SingleSample else estimator(Pool(data, labels))
    found, wanted = (target(b, generator=torch.Generator().manual_seed(0)) for b in (untold, noisy))
    same(found, wanted, 0.0)


@pytest.mark.parametrize("estimator", [lambda _: SingleSample(), *ESTIMATORS])
def test_several_steps_are_answered_as_each_would_be(estimator: Callable[[Pool], TargetEstimator]) -> None:
    data, labels = cloud()
    noisy = batch(VP(), data, n=30, labels=labels)
    steps = [noisy.rows(slice(0, 11)), noisy.rows(slice(11, 12)), noisy.rows(slice(12, 30))]
    target = estimator(Pool(data, labels))
    found = target.several(steps, [torch.Generator().manual_seed(step) for step in range(3)])
    for step, (rows, together) in enumerate(zip(steps, found, strict=True)):
        same(together, target(rows, generator=torch.Generator().manual_seed(step)), 1e-6)


def test_no_rows_at_once_and_more_than_can_be_waited_for_are_refused() -> None:
    for target in (FullDataset, PrunedDataset, Banded):
        for rows in (0, -3, 10**6):
            with pytest.raises(ValueError, match=f"at_once is a number of rows, from 1 to 65,536, and not {rows:,}"):
                target(Pool(SIX), at_once=rows)


def test_steps_of_which_not_the_same_is_known_are_not_answered_together() -> None:
    data, labels = cloud()
    noisy = batch(VE(), data, n=4, labels=labels)
    for steps in ([noisy, replace(noisy, label=None)], [replace(noisy, label=None), noisy]):
        with pytest.raises(TypeError):
            FullDataset(Pool(data, labels)).several(steps, [None, None])


def test_what_a_row_is_taught_does_not_depend_on_the_other_rows() -> None:
    # so ranks that hold parts of a batch, and draw from equal generators, teach what one rank would
    data, labels = cloud()
    labels[0] = 3  # a class of one
    noisy = batch(VE(), data, n=20, labels=labels)
    noisy.label[::4] = ALL
    for size in (1, 5, 30):
        estimator = ReferenceBatch(Pool(data, labels), size)
        whole = estimator(noisy, generator=torch.Generator().manual_seed(0))
        for rows in (slice(0, 7), torch.tensor([19, 3, 4]), noisy.label == 1):
            rows = rows if isinstance(rows, slice) or rows.dtype == torch.int64 else rows.nonzero().flatten()
            part = estimator(noisy.rows(rows), generator=torch.Generator().manual_seed(0))
            same(part, whole.rows(rows), 1e-12)


def test_a_class_smaller_than_the_batch_is_used_whole() -> None:
    data, labels = cloud()
    noisy = batch(VE(), data, labels=labels)
    pool = Pool(data, labels)
    largest = int(torch.bincount(labels).max())
    same(ReferenceBatch(pool, largest)(noisy), FullDataset(pool)(noisy))


# ---- what a user is told


def test_what_cannot_be_answered_is_said() -> None:
    data, labels = cloud()
    labelled, plain = Pool(data, labels), Pool(data)
    noisy = batch(VE(), data, labels=labels)
    strange = batch(VE(), data, labels=torch.full_like(labels, 7))
    nowhere = rows(noisy.x_t, data, noisy.index, 1.0)
    beyond = Perturbed(**(vars(nowhere) | {"index": torch.full((9,), 40)}))
    nowhere = Perturbed(**(vars(nowhere) | {"index": None}))
    for of_pool in ESTIMATORS:
        with pytest.raises(ValueError, match="no member of the pool has label 7; there are 0 to 2"):
            of_pool(labelled)(strange)
        with pytest.raises(ValueError, match="the pool has none"):
            of_pool(plain)(noisy)
    for of_pool in ESTIMATORS[1:]:
        with pytest.raises(ValueError, match="give it an index"):
            of_pool(plain)(nowhere)
        with pytest.raises(ValueError, match="no member 40: the pool has 40"):
            of_pool(plain)(beyond)
    for of_pool in ESTIMATORS:
        with pytest.raises(ValueError, match=r"3,?\).*3, 1\)"):
            of_pool(Pool(torch.zeros(40, 3, 1)))(batch(VE(), data))
    for size in (0, -1, 41):
        with pytest.raises(ValueError, match=f"between 1 and the pool's 40 members, not {size}"):
            ReferenceBatch(plain, size)
        with pytest.raises(ValueError, match=f"between 1 and the pool's 40 members, not {size}"):
            NearestNeighbours(plain, size)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("data", "labels", "told"),
    [
        (torch.zeros(0, 3), None, r"\(0, 3\)"),
        (torch.zeros(4), None, r"\(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), None, "int64"),
        (torch.full((4, 2), math.nan), None, "not finite"),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), r"4 members.*\(3,\)"),
        (torch.zeros(4, 2), torch.tensor([0, 1, -1, 2]), "count from 0; the least is -1"),
    ],
)
def test_data_that_are_no_pool_are_refused(data: Tensor, labels: Tensor | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Pool(data, labels)
