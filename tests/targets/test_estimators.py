"""Laws of the target estimators: their limits, draws, labels and errors (`test_unbiased` has their means)."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noisy_data import QUERIES, SIX, assert_equal_posteriors, batch_at, screened, streamed, with_draw
from torch import Tensor

from stablefield import (
    VE,
    VP,
    Cosine,
    DSMTarget,
    Flow,
    KNNTarget,
    NoisyBatch,
    Pool,
    STFTarget,
    SubVP,
    TargetEstimator,
    posterior,
)
from stablefield.kernel.accumulator import chunk_size
from stablefield.pool import NULL_LABEL, draw_without_replacement
from stablefield.prediction import stable_target
from stablefield.process import Process
from stablefield.targets.grouped import _among

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
LABELS = torch.tensor([0, 1, 0, 0, 1, 0])


def batch(process: Process, data: Tensor, n: int = 9, labels: Tensor | None = None, seed: int = 0) -> NoisyBatch:
    """A noisy batch of a data set, with sources that repeat now and then."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data), (n,), generator=g)
    t = torch.linspace(0.05, 0.95, n).to(data)
    noise = torch.randn(n, *data.shape[1:], generator=g).to(data)
    return process.perturb(data[index], t, noise, index=index, label=None if labels is None else labels[index])


def cloud(n: int = 40, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


# ---- the limits: a support of one is DSM, a support of all data is exact


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_support_of_one_is_denoising_score_matching_bit_for_bit(
    process: Process, labelled: bool, dtype: torch.dtype
) -> None:
    data, labels = cloud(dtype=dtype)
    noisy = batch(process, data, labels=labels if labelled else None)
    single = DSMTarget()(noisy)
    assert torch.equal(single.mean, noisy.x)
    for one in (STFTarget(Pool(data, labels), 1), KNNTarget(Pool(data, labels), 1)):
        found = one(noisy, generator=torch.Generator().manual_seed(1))
        assert torch.equal(found.ess, torch.ones_like(found.ess))
        if isinstance(one, STFTarget):
            assert torch.equal(found.mean, single.mean)
            assert torch.equal(stable_target(noisy, found.mean, process, prediction_type="epsilon"), noisy.noise)
    assert torch.equal(stable_target(noisy, single.mean, process, prediction_type="epsilon"), noisy.noise)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_support_of_all_data_is_the_exact_target_for_every_estimator(process: Process, labelled: bool) -> None:
    data, labels = cloud()
    pool = Pool(data, labels)
    noisy = batch(process, data, labels=labels if labelled else None)
    exact = streamed(pool)(noisy)
    for seed in range(3):
        for size in (len(pool), len(pool) + 1, 10**6):
            assert_equal_posteriors(STFTarget(pool, size)(noisy, generator=torch.Generator().manual_seed(seed)), exact)
    assert_equal_posteriors(KNNTarget(pool, len(pool))(noisy), exact)
    assert_equal_posteriors(screened(pool)(noisy), exact, 1e-6)
    allowed = labels[noisy.index][:, None] == labels if labelled else None
    assert_equal_posteriors(posterior(noisy.x_t, data, sigma=noisy.sigma, alpha=noisy.alpha, allowed=allowed), exact)


def test_bytes_and_their_decoded_values_are_the_same_data_set() -> None:
    stored = torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = stored.float() / 127.5 - 1
    noisy = batch(VE(), data)
    for estimator in (streamed, screened, lambda p: STFTarget(p, 7), lambda p: KNNTarget(p, 4)):
        from_bytes, from_floats = (
            estimator(Pool(d))(noisy, generator=torch.Generator().manual_seed(0)) for d in (stored, data)
        )
        assert_equal_posteriors(from_bytes, from_floats, 1e-5 if estimator is screened else 1e-6)


def test_a_data_set_of_many_blocks_has_the_same_targets() -> None:
    data = torch.randn(3000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = batch(VE(), data, n=1200)
    assert chunk_size(noisy.x_t) < 1000
    pool, distance = Pool(data), (noisy.x_t - data.T).abs()
    energy = -(distance**2) / (2 * noisy.sigma[:, None] ** 2)
    exact = torch.softmax(energy, 1) @ data
    torch.testing.assert_close(streamed(pool)(noisy).mean, exact)
    torch.testing.assert_close(STFTarget(pool, 3000)(noisy).mean, exact)
    near = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, distance.topk(40, largest=False)[1], True)
    inside = near.gather(1, noisy.index[:, None])
    assert inside.any()
    assert not inside.all()
    wanted = torch.where(inside, torch.softmax(energy.masked_fill(~near, -math.inf), 1) @ data, noisy.x)
    torch.testing.assert_close(KNNTarget(pool, 40)(noisy).mean, wanted)


# ---- the draw


def support_of(draw: Iterable[int], source: int) -> frozenset[int]:
    """The support of an example: r_1 .. r_(n-1) and the source, and r_n where the source is one of these."""
    *shared, last = draw
    return frozenset([*shared, last if source in shared else source])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_every_support_has_the_source_and_each_choice_of_others_equally_often(n: int) -> None:
    for source in range(6):
        counted = Counter(support_of(draw, source) for draw in permutations(range(6), n))
        others = [k for k in range(6) if k != source]
        wanted = {frozenset([source, *chosen]) for chosen in combinations(others, n - 1)}
        assert set(counted) == wanted
        assert set(counted.values()) == {math.perm(6, n) // math.comb(5, n - 1)}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_stf_target_averages_over_the_source_and_the_drawn_references(n: int) -> None:
    source = torch.arange(6)
    x_t = QUERIES[:1].expand(6, 2)
    noisy = batch_at(x_t, SIX, source, 0.8)
    for draw in list(permutations(range(6), n))[:: 7 if n > 3 else 1]:
        found = STFTarget(with_draw(Pool(SIX), draw), n)(noisy)
        supports = torch.stack([SIX[sorted(support_of(draw, k))] for k in range(6)])
        assert_equal_posteriors(found, posterior(x_t, supports, sigma=0.8))


@pytest.mark.parametrize(("total", "n"), [(5, 2), (5, 3), (6, 1), (7, 7), (60, 2), (40, 3)])
def test_a_draw_is_distinct_and_every_ordered_choice_equally_likely(total: int, n: int) -> None:
    # (5, 2), (6, 1), (60, 2), (40, 3) draw with replacement and drop repeats; (5, 3), (7, 7) shuffle. Seven have too
    # many orders to count, so that only the numbers at each place are
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_without_replacement(total, n, g) for _ in range(6000)])
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


def test_a_draw_is_a_function_of_its_generator() -> None:
    for total, n in ((100, 3), (100, 90)):
        one, again = (draw_without_replacement(total, n, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(one, again)
        assert not torch.equal(one, draw_without_replacement(total, n, torch.Generator().manual_seed(8)))


# ---- labels


ESTIMATORS: list[Callable[[Pool], TargetEstimator]] = [
    streamed,
    screened,
    lambda p: STFTarget(p, 6),
    lambda p: KNNTarget(p, 6),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_data_of_other_classes_do_not_change_a_target(estimator: Callable[[Pool], TargetEstimator]) -> None:
    data, labels = cloud()
    noisy = batch(Flow(), data, labels=labels)
    noisy = noisy.select((noisy.label == 1).nonzero().flatten())
    assert len(noisy) > 1
    other = data.clone()
    other[labels != 1] += 0.1
    found, moved = (
        estimator(Pool(d, labels))(noisy, generator=torch.Generator().manual_seed(0)).mean for d in (data, other)
    )
    if estimator is screened:  # its rounding depends on the centre of all data
        torch.testing.assert_close(found, moved, rtol=0, atol=1e-9)
    else:
        assert torch.equal(found, moved)


@pytest.mark.parametrize("estimator", [DSMTarget, *ESTIMATORS])
def test_the_null_label_averages_over_all_classes(estimator: Callable[..., TargetEstimator]) -> None:
    data, labels = cloud()
    noisy = batch(VP(), data)
    unlabelled = batch(VP(), data, labels=torch.full_like(labels, NULL_LABEL))
    target = estimator() if estimator is DSMTarget else estimator(Pool(data, labels))
    found, wanted = (target(b, generator=torch.Generator().manual_seed(0)) for b in (unlabelled, noisy))
    assert_equal_posteriors(found, wanted, 0.0)


def test_the_target_of_an_example_does_not_depend_on_the_rest_of_its_batch() -> None:
    # so ranks that hold parts of a batch, and draw from equal generators, have the targets of a single rank
    data, labels = cloud()
    labels[0] = 3  # a class of one
    noisy = batch(VE(), data, n=20, labels=labels)
    noisy.label[::4] = NULL_LABEL
    for size in (1, 5, 30):
        estimator = STFTarget(Pool(data, labels), size)
        whole = estimator(noisy, generator=torch.Generator().manual_seed(0))
        for index in (slice(0, 7), torch.tensor([19, 3, 4]), (noisy.label == 1).nonzero().flatten()):
            part = estimator(noisy.select(index), generator=torch.Generator().manual_seed(0))
            assert_equal_posteriors(part, whole.select(index), 1e-12)


def test_a_call_advances_the_generator_by_the_same_amount_for_every_batch_and_estimator() -> None:
    # so a run draws the same numbers afterwards, whichever labels a batch has
    data, labels = cloud()
    pool, states = Pool(data, labels), []
    for estimator in (
        streamed,
        screened,
        lambda p: STFTarget(p, 6),
        lambda p: STFTarget(p, 40),
        lambda p: KNNTarget(p, 6),
    ):
        for noisy in (batch(VE(), data), batch(VE(), data, n=3, labels=labels), batch(VE(), data, n=20, labels=labels)):
            g = torch.Generator().manual_seed(5)
            estimator(pool)(noisy, generator=g)
            states.append(g.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_class_smaller_than_the_reference_batch_is_used_whole() -> None:
    data, labels = cloud()
    noisy = batch(VE(), data, labels=labels)
    pool = Pool(data, labels)
    largest = int(torch.bincount(labels).max())
    assert_equal_posteriors(STFTarget(pool, largest)(noisy), streamed(pool)(noisy))


# ---- errors


def test_unusable_batches_and_sizes_are_refused() -> None:
    data, labels = cloud()
    labelled, plain = Pool(data, labels), Pool(data)
    noisy = batch(VE(), data, labels=labels)
    strange = batch(VE(), data, labels=torch.full_like(labels, 7))
    unlabelled = batch_at(noisy.x_t, data, noisy.index, 1.0)
    beyond = replace(unlabelled, index=torch.full((9,), 40))
    without_index = replace(unlabelled, index=None)
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match="label 7"):
            estimator(labelled)(strange)
        with pytest.raises(ValueError, match="the pool has no labels"):
            estimator(plain)(noisy)
        with pytest.raises(ValueError, match=r"shape \(3,\).*pool \(3, 1\)"):
            estimator(Pool(torch.zeros(40, 3, 1)))(batch(VE(), data))
        with pytest.raises(ValueError, match="index 40 is out of range: the pool has 40 data points"):
            estimator(plain)(beyond)
    for estimator in ESTIMATORS[1:]:  # streaming needs no index
        with pytest.raises(ValueError, match="set index"):
            estimator(plain)(without_index)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"size must be at least 1.*not {size}"):
            STFTarget(plain, size)
    for k in (0, -1, 41):
        with pytest.raises(ValueError, match=f"neighbours must be between 1 and the pool's 40 data points, not {k}"):
            KNNTarget(plain, k)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (torch.zeros(0, 3), None, r"\(0, 3\)"),
        (torch.zeros(4), None, r"\(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), None, "int64"),
        (torch.full((4, 2), math.nan), None, "not finite"),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64), r"shape \(4,\), .*not \(3,\)"),
        (torch.zeros(4, 2), torch.tensor([0, 1, -1, 2]), "count from 0; the smallest is -1"),
    ],
)
def test_unusable_data_are_refused_by_a_pool(data: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pool(data, labels)


@pytest.mark.parametrize("options", [{"index": "Flat"}, {"probes": 4}, {"index": "PCA64,Flat", "probes": 4}])
def test_index_and_probes_are_refused_without_faiss_search(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='index and probes belong to search="faiss"'):
        KNNTarget(Pool(SIX), 2, **options)


def test_a_faiss_search_without_faiss_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        KNNTarget(Pool(SIX), 2, search="faiss")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(ValueError, match='"exhaustive" or "faiss", not \'annoy\''):
        KNNTarget(Pool(SIX), 2, search="annoy")


@given(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 9), max_size=6, unique=True))
def test_membership_is_that_of_isin(index: list[int], some: list[int]) -> None:
    both = torch.tensor(index, dtype=torch.int64), torch.tensor(some, dtype=torch.int64)
    assert torch.equal(_among(*both), torch.isin(*both))
