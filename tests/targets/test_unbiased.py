"""Targets are unbiased, shortcuts are not.

Unbiasedness is enumerated, not sampled, wherever the data are few: given x_t, the source is data point k with
probability w_k, so E[target | x_t] is a finite sum over sources and draws.
"""

import math
from collections.abc import Callable
from itertools import combinations, permutations, product

import pytest
import torch
from noisy_data import QUERIES, SIX, batch_at, screened, streamed, with_draw
from torch import Tensor

from stablefield import DSMTarget, KNNTarget, Pool, STFTarget, TargetEstimator, posterior
from stablefield.pool import draw_without_replacement

LABELS = torch.tensor([0, 1, 0, 0, 1, 0])


def weights(x_t: Tensor, data: Tensor, sigma: float) -> Tensor:
    """p(source = k | x_t), (B, N), by differences."""
    return torch.softmax(-(x_t[:, None] - data).square().sum(2) / (2 * sigma**2), 1)


# ---- the mean over the cell of the source, enumerated


def averaged(x_t: Tensor, sigma: float, target: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean over sources of a target, the exact mean, E||target - exact||^2 relative to DSM's), for each x_t."""
    w = weights(x_t, SIX, sigma)
    exact = w @ SIX
    found = torch.stack([target(torch.full((len(x_t),), k)) for k in range(len(SIX))], 1)
    spread = (w * (found - exact[:, None]).square().sum(2)).sum(1)
    dsm = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    return (w[:, :, None] * found).sum(1), exact, spread / dsm


@pytest.mark.usefixtures("unchecked")  # the checks take longer than what they check
@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_stf_target_is_unbiased_for_every_n_with_no_more_variance_than_dsm(n: int, sigma: float) -> None:
    w = weights(QUERIES, SIX, sigma)
    exact = w @ SIX
    dsm = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    mean, spread, draws = torch.zeros_like(QUERIES), torch.zeros_like(dsm), list(permutations(range(6), n))
    source = torch.arange(6).repeat(len(QUERIES))
    noisy = batch_at(QUERIES.repeat_interleave(6, 0), SIX, source, sigma)
    for draw in draws:
        target = STFTarget(with_draw(Pool(SIX), draw), n)(noisy).mean.view(len(QUERIES), 6, 2)
        mean += (w[:, :, None] * target).sum(1) / len(draws)
        spread += (w * (target - exact[:, None]).square().sum(2)).sum(1) / len(draws)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (spread <= dsm * (1 + 1e-9)).all()
    if n == 6:
        assert spread.max() < 1e-20


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_knn_target_is_unbiased_for_every_k_with_no_more_variance_than_dsm(k: int, sigma: float) -> None:
    estimator = KNNTarget(Pool(SIX), k)
    mean, exact, ratio = averaged(QUERIES, sigma, lambda source: estimator(batch_at(QUERIES, SIX, source, sigma)).mean)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize(
    "estimator", [lambda p: KNNTarget(p, 2), streamed, screened, lambda p: STFTarget(p, 6), lambda p: STFTarget(p, 99)]
)
def test_classes_are_cells(estimator: Callable[[Pool], TargetEstimator], sigma: float) -> None:
    # targets that average within the source's class have, over sources of all classes, the mean over all data
    def target(source: Tensor) -> Tensor:
        noisy = batch_at(QUERIES, SIX, source, sigma, LABELS[source])
        return estimator(Pool(SIX, LABELS))(noisy, generator=torch.Generator().manual_seed(0)).mean

    mean, exact, ratio = averaged(QUERIES, sigma, target)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
def test_within_a_class_the_exact_target_is_the_conditional_mean(sigma: float) -> None:
    for label in (0, 1):
        of_class = SIX[label == LABELS]
        source = (label == LABELS).nonzero()[0].expand(len(QUERIES))
        found = streamed(Pool(SIX, LABELS))(batch_at(QUERIES, SIX, source, sigma, LABELS[source])).mean
        torch.testing.assert_close(found, weights(QUERIES, of_class, sigma) @ of_class, rtol=0, atol=1e-12)


def isolated() -> Tensor:
    """Mask of the points that are far from all others: a cell that does not depend on the source."""
    distance = torch.cdist(SIX, SIX).fill_diagonal_(math.inf).amin(1)
    return distance > 0.75


def nearest_to(x_t: Tensor, k: int) -> Tensor:
    return torch.zeros(len(x_t), 6, dtype=torch.bool).scatter_(1, torch.cdist(x_t, SIX).topk(k, largest=False)[1], True)


def within(support: Tensor, sigma: float) -> Tensor:
    return posterior(QUERIES, SIX, sigma=sigma, allowed=support).mean


def source_if_isolated_else_all(source: Tensor, sigma: float) -> Tensor:
    is_isolated = isolated()[source][:, None]
    return torch.where(is_isolated, SIX[source], within(torch.ones(4, 6, dtype=torch.bool), sigma))


def source_if_isolated_else_the_others_that_are_not(source: Tensor, sigma: float) -> Tensor:
    is_isolated = isolated()[source][:, None]
    return torch.where(is_isolated, SIX[source], within(~isolated().expand(4, 6), sigma))


def nearest_and_the_source(source: Tensor, sigma: float) -> Tensor:
    return within(nearest_to(QUERIES, 2).scatter(1, source[:, None], True), sigma)


def nearest_if_the_source_is_one(source: Tensor, sigma: float) -> Tensor:
    inside = nearest_to(QUERIES, 2).gather(1, source[:, None])
    return torch.where(inside, within(nearest_to(QUERIES, 2), sigma), SIX[source])


def references_only(source: Tensor, sigma: float) -> Tensor:
    supports = [torch.tensor(chosen) for chosen in combinations(range(6), 2)]
    return sum(posterior(QUERIES, SIX[s], sigma=sigma).mean for s in supports) / len(supports)


def repeats_of_the_source_dropped(source: Tensor, sigma: float) -> Tensor:
    """Two references drawn with replacement: repeats of each other are kept, those of the source dropped."""
    total = torch.zeros_like(QUERIES)
    for draw in product(range(6), repeat=2):
        for b, k in enumerate(source.tolist()):
            support = SIX[[k, *(r for r in draw if r != k)]]
            total[b] += posterior(QUERIES[b : b + 1], support, sigma=sigma).mean[0] / 36
    return total


def all_repeats_kept(source: Tensor, sigma: float) -> Tensor:
    total = torch.zeros_like(QUERIES)
    for draw in product(range(6), repeat=2):
        total += posterior(QUERIES, SIX[list(draw)], sigma=sigma, source=SIX[source]).mean / 36
    return total


def a_drawn_set_with_the_source_twice(source: Tensor, sigma: float) -> Tensor:
    """Three distinct references, and the source beside them, whether or not it is one of them."""
    total = torch.zeros_like(QUERIES)
    for draw in combinations(range(6), 3):
        total += posterior(QUERIES, SIX[list(draw)], sigma=sigma, source=SIX[source]).mean / 20
    return total


def test_some_of_the_six_points_are_isolated_and_some_are_not() -> None:
    assert isolated().any()
    assert not isolated().all()


@pytest.mark.parametrize("sigma", [0.4, 0.7])
@pytest.mark.parametrize(
    "cell", [source_if_isolated_else_the_others_that_are_not, nearest_if_the_source_is_one, all_repeats_kept]
)
def test_a_cell_that_does_not_depend_on_the_source_is_unbiased(
    cell: Callable[[Tensor, float], Tensor], sigma: float
) -> None:
    mean, exact, ratio = averaged(QUERIES, sigma, lambda source: cell(source, sigma))
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
    assert (ratio <= 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("shortcut", "least"),
    [
        (source_if_isolated_else_all, 0.05),
        (nearest_and_the_source, 0.05),
        (repeats_of_the_source_dropped, 0.005),
        (a_drawn_set_with_the_source_twice, 0.005),
        (references_only, 0.2),
    ],
)
def test_a_shortcut_that_depends_on_the_source_or_omits_it_is_biased(
    shortcut: Callable[[Tensor, float], Tensor], least: float
) -> None:
    mean, exact, _ = averaged(QUERIES, 0.7, lambda source: shortcut(source, 0.7))
    assert (mean - exact).norm(dim=1).max() > least


@pytest.mark.parametrize("sigma", [0.4, 0.7])
def test_a_mixture_of_targets_is_unbiased_unless_the_source_decides_which(sigma: float) -> None:
    pool = Pool(SIX)
    parts = [DSMTarget(), KNNTarget(pool, 2), streamed(pool), KNNTarget(pool, 4)]

    def mixture(source: Tensor, choice: Tensor) -> Tensor:
        noisy = batch_at(QUERIES, SIX, source, sigma)
        found = torch.stack([target(noisy).mean for target in parts])
        return found[choice, torch.arange(len(QUERIES))]

    for shift in range(4):  # a choice by x_t: each query has another estimator
        choice = (torch.arange(4) + shift) % 4
        mean, exact, ratio = averaged(QUERIES, sigma, lambda source, choice=choice: mixture(source, choice))
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
        assert (ratio <= 1 + 1e-9).all()
    mean, exact, _ = averaged(QUERIES, sigma, lambda source: mixture(source, torch.where(source < 3, 0, 2)))
    assert (mean - exact).norm(dim=1).max() > 0.05


# ---- larger data, sampled


@pytest.mark.parametrize("n", [2, 16, 256])
def test_the_mean_of_stf_targets_is_exact_and_their_variance_below_that_of_dsm(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    data = torch.randn(300, 2, generator=g, dtype=torch.float64)
    sigma, trials, per_draw = 0.5, 200, 50
    x_t = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    w = weights(x_t, data, sigma)
    exact = (w @ data)[0]
    dsm = float((w[0] * (data - exact).square().sum(1)).sum())
    pool, means, spread = Pool(data), [], 0.0
    for _ in range(trials):
        source = torch.multinomial(w[0], per_draw, replacement=True, generator=g)
        found = STFTarget(pool, n)(batch_at(x_t.expand(per_draw, 2), data, source, sigma), generator=g).mean
        means.append(found.mean(0))
        spread += float((found - exact).square().sum(1).mean()) / trials
    means_ = torch.stack(means)
    standard_error = means_.std(0) / math.sqrt(trials)
    assert ((means_.mean(0) - exact).abs() < 4 * standard_error).all()
    assert spread < dsm * (1.05 if n == 2 else 0.5)


def test_references_without_the_source_are_visibly_biased() -> None:
    g = torch.Generator().manual_seed(1)
    data = torch.randn(300, 2, generator=g, dtype=torch.float64)
    x_t = torch.tensor([[1.5, -1.0]], dtype=torch.float64)
    exact = weights(x_t, data, 0.3) @ data
    drawn = torch.stack(
        [posterior(x_t, data[draw_without_replacement(300, 4, g)], sigma=0.3).mean[0] for _ in range(500)]
    )
    standard_error = drawn.std(0) / math.sqrt(500)
    assert ((drawn.mean(0) - exact[0]).abs() > 10 * standard_error).all()


def test_the_reported_variance_is_that_of_a_single_sample_target() -> None:
    w = weights(QUERIES, SIX, 0.7)
    exact = w @ SIX
    found = streamed(Pool(SIX))(batch_at(QUERIES, SIX, torch.zeros(4, dtype=torch.int64), 0.7))
    torch.testing.assert_close(found.variance, (w * (SIX - exact[:, None]).square().sum(2)).sum(1))
