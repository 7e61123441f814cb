"""Distances between data sets: closed forms, independent float64 computations, and torch-fidelity's results."""

import pickle
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from stablefield.data import Digits
from stablefield.evaluate import (
    Estimate,
    ExportedNetwork,
    Features,
    FeatureSet,
    Inception,
    NearestMatches,
    Pixels,
    Statistics,
    StatisticsAccumulator,
    cached_classifier,
    compute_scores,
    find_classifier,
    find_nearest,
    frechet_distance,
    kernel_distance,
    memorisation_scores,
    precision_recall,
    sample_size_notes,
    summarise,
    train_classifier,
)
from stablefield.evaluate.frechet import merge_all
from stablefield.pool import Pool


def features(n: int, dimension: int, *, seed: int, mean: float = 0.0, decay: float = 1.0) -> torch.Tensor:
    """Correlated features whose standard deviations fall over `decay` decades."""
    source = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=source))[0]
    scale = torch.logspace(0, -decay, dimension)
    return torch.randn(n, dimension, generator=source) * scale @ rotation + mean


def exact_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Frechet distance computed from the features themselves, without covariances and their square roots."""
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    traces = a.square().sum() + b.square().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * torch.linalg.svdvals(a @ b.T).sum())


PAIRS = [(400, 300, 32, 1.0), (40, 30, 64, 1.0), (90, 60, 128, 4.0), (2, 3, 16, 1.0), (300, 20, 64, 2.0)]


@pytest.mark.parametrize(("n", "m", "dimension", "decay"), PAIRS)
def test_frechet_distance_is_exact_for_singular_covariances_too(n, m, dimension, decay):
    x, y = features(n, dimension, seed=1, decay=decay), features(m, dimension, seed=2, mean=0.1, decay=decay)
    a, b = Statistics.from_features(x), Statistics.from_features(y)
    traces = float(a.covariance.trace() + b.covariance.trace())
    assert abs(frechet_distance(a, b) - exact_distance(x, y)) < 1e-12 * traces
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-12 * traces
    assert frechet_distance(a, a) < 1e-12 * traces


@pytest.mark.parametrize(("n", "m", "dimension", "decay"), PAIRS)
def test_statistics_and_frechet_distance_equal_torch_fidelitys(fidelity, n, m, dimension, decay):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(n, dimension, seed=1, decay=decay), features(m, dimension, seed=2, mean=0.1, decay=decay)
    a, b = Statistics.from_features(x), Statistics.from_features(y)
    theirs = [fid_features_to_statistics(z.double()) for z in (x, y)]
    assert np.allclose(a.mean, theirs[0]["mu"], rtol=0, atol=1e-14)
    assert np.allclose(a.covariance, theirs[0]["sigma"], rtol=0, atol=1e-14)
    found = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert abs(frechet_distance(a, b) - found) < 1e-6 * float(a.covariance.trace() + b.covariance.trace())


def test_frechet_distance_of_axis_aligned_gaussians_is_that_of_their_standard_deviations():
    a, b = (Statistics(torch.full((3,), m).double(), torch.diag(torch.tensor(s).double() ** 2), 9)
            for m, s in ((0.0, [1.0, 2.0, 0.0]), (0.5, [3.0, 2.0, 1.0])))  # fmt: skip
    assert frechet_distance(a, b) == pytest.approx(3 * 0.25 + 4 + 0 + 1, abs=1e-12)
    with pytest.raises(ValueError, match="of 3 and of 2 features"):
        frechet_distance(a, Statistics.from_features(torch.randn(4, 2)))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_of_many_features_are_those_of_float64(offset):
    x = features(1500, 300, seed=5, mean=offset)  # several blocks of rows and of columns
    found, exact = Statistics.from_features(x), x.double().numpy()
    assert np.allclose(found.mean, exact.mean(0), rtol=1e-14, atol=1e-14)
    assert np.allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-11)
    assert torch.equal(found.covariance, found.covariance.T)


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [56, 1], [10, 20, 27]])
def test_statistics_do_not_depend_on_how_the_features_are_split(sizes):
    x = features(57, 8, seed=3, mean=1e5)  # a mean at which raw second moments lose their digits
    parts = merge_all([StatisticsAccumulator.from_features(part) for part in x.split(sizes)]).statistics()
    exact = x.double().numpy()
    assert parts.n == 57
    assert np.allclose(parts.mean, exact.mean(0), rtol=1e-15, atol=0)
    assert np.allclose(parts.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="at least 2 features, not 1"):
        Statistics.from_features(x[:1])


def test_statistics_are_read_from_our_files_and_from_published_ones(tmp_path):
    whole = Statistics.from_features(features(20, 5, seed=4))
    replace(whole, features="pixels", data="abc").save(tmp_path / "ours.npz")
    back = Statistics.read(tmp_path / "ours.npz")
    assert torch.equal(back.mean, whole.mean)
    assert torch.equal(back.covariance, whole.covariance)
    assert (back.n, back.features, back.data) == (20, "pixels", "abc")
    np.savez(tmp_path / "theirs.npz", mu=whole.mean, sigma=whole.covariance)
    theirs = Statistics.read(tmp_path / "theirs.npz")
    assert (theirs.n, theirs.features) == (None, "")
    assert frechet_distance(theirs, whole) < 1e-12
    np.savez(tmp_path / "none.npz", mu=whole.mean)
    with pytest.raises(ValueError, match="sigma is missing"):
        Statistics.read(tmp_path / "none.npz")
    np.savez(tmp_path / "odd.npz", mu=whole.mean, sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"odd\.npz .*are not a mean and a covariance"):
        Statistics.read(tmp_path / "odd.npz")


def spoiled(name: str, **arrays: object) -> dict[str, object]:
    """Arrays of valid statistics of five features, with some replaced; `name` matches the error."""
    good = Statistics.from_features(features(20, 5, seed=4))
    return {"name": name} | {"mu": good.mean.numpy(), "sigma": good.covariance.numpy()} | arrays


def sigma(**entries: object) -> np.ndarray:
    """A covariance of five features with one entry replaced."""
    found = np.eye(5) + 0.1
    for place, value in entries.items():
        found[int(place[1]), int(place[2])] = value
    return found


SPOILED = [
    spoiled("mu holds 5 .*not finite", mu=np.full(5, np.nan)),
    spoiled("mu holds 1 .*not finite", mu=np.array([0, 0, np.inf, 0, 0])),
    spoiled("sigma holds 1 .*not finite", sigma=sigma(_23=np.nan)),
    spoiled("sigma holds 25 .*not finite", sigma=np.full((5, 5), -np.inf)),
    spoiled("sigma is not positive semi-definite", sigma=-np.eye(5)),
    spoiled("sigma is not positive semi-definite", sigma=sigma(_00=-1e-3)),
    spoiled("sigma is not positive semi-definite", sigma=sigma(_01=2.0, _10=2.0)),
    spoiled("sigma is not positive semi-definite", sigma=np.diag([1e-9, 0, 0, 0, -1e-9])),
    spoiled("sigma is not positive semi-definite", sigma=np.eye(5)[::-1].copy()),
    spoiled("sigma is not symmetric: .* 0.5", sigma=sigma(_34=0.6)),
    spoiled("sigma is not symmetric", sigma=np.triu(np.ones((5, 5)))),
    spoiled("sigma must hold real numbers, not complex128", sigma=np.eye(5) + 1j),
    spoiled("mu must hold real numbers, not complex64", mu=np.zeros(5, np.complex64)),
    spoiled("mu must hold real numbers, not <U1", mu=np.array(list("abcde"))),
    spoiled("contains Python objects", mu=np.array([None] * 5)),
    spoiled(r"mu \(4,\) and sigma \(5, 5\)", mu=np.zeros(4)),
    spoiled(r"mu \(5, 1\) and sigma", mu=np.zeros((5, 1))),
    spoiled("mu in .* contains no data", mu=np.zeros(0), sigma=np.zeros((0, 0))),
    spoiled(r"mu \(\) and sigma", mu=np.array(1.0), sigma=np.array(1.0)),
    *(spoiled("n must be at least 2", n=n) for n in (0, 1, -2, -50_000)),
    *(spoiled("n must be a whole number", n=n) for n in (2.5, np.nan, np.inf, [5, 6], "many", 3j)),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("arrays", SPOILED)
def test_invalid_statistics_are_refused_and_the_error_names_file_and_reason(tmp_path, arrays):
    arrays = dict(arrays)
    reason = arrays.pop("name")
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^[^\n]*theirs\.npz holds no usable statistics: [^\n]*{reason}[^\n]*\Z"):
        Statistics.read(tmp_path / "theirs.npz")
    given = [arrays[name] for name in ("mu", "sigma")]
    if "n" not in arrays and all(array.dtype.kind in "fc" for array in given):
        with pytest.raises(ValueError, match=r"mu|sigma"):  # also when they are constructed
            Statistics(*map(torch.from_numpy, given))


def test_every_truncated_file_of_statistics_is_refused_with_one_line(tmp_path):
    Statistics.from_features(features(9, 3, seed=4)).save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.npz holds no usable statistics: it is not an \.npz archive"):
            Statistics.read(tmp_path / "cut.npz")
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.npz holds no usable statistics"):
        Statistics.read(tmp_path / "damaged.npz")


def rounded(x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance as they are published: stored as float32, or computed in float32 in two ways."""
    single = x.astype(np.float32)
    mean = single.mean(0)
    raw = (single.T @ single / np.float32(len(x)) - np.outer(mean, mean)) * np.float32(len(x) / (len(x) - 1))
    return [
        (x.mean(0).astype(np.float32), np.cov(x, rowvar=False).astype(np.float32)),
        (mean, np.cov(single, rowvar=False, dtype=np.float32)),
        (mean, raw),
    ]


@pytest.mark.parametrize(("n", "dimension", "decay"), [(400, 64, 1.0), (300, 128, 5.0), (40, 96, 2.0), (3, 16, 1.0)])
def test_valid_statistics_are_accepted_however_they_were_rounded(tmp_path, n, dimension, decay):
    x = features(n, dimension, seed=1, mean=0.1, decay=decay)
    exact = Statistics.from_features(x)
    for mean, covariance in rounded(x.double().numpy()):
        np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
        theirs = Statistics.read(tmp_path / "theirs.npz")
        assert frechet_distance(theirs, exact) < 0.02 * float(exact.covariance.trace())
    skewed = exact.covariance.numpy() + 1e-12 * np.triu(np.ones((dimension, dimension)), 1)
    np.savez(tmp_path / "skewed.npz", mu=exact.mean, sigma=skewed)
    assert frechet_distance(Statistics.read(tmp_path / "skewed.npz"), exact) < 1e-8
    for scale in (0.0, 1e-200, 1e200):  # the scale of the features does not matter
        np.savez(tmp_path / "scaled.npz", mu=exact.mean, sigma=exact.covariance * scale)
        Statistics.read(tmp_path / "scaled.npz")


def test_integer_statistics_are_accepted_and_n_may_be_unknown(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.arange(3), sigma=np.eye(3, dtype=np.uint8), n=-1)
    found = Statistics.read(tmp_path / "whole.npz")
    assert (found.n, found.mean.tolist(), found.covariance.tolist()) == (None, [0, 1, 2], np.eye(3).tolist())
    np.savez(tmp_path / "floating.npz", mu=np.zeros(3), sigma=np.eye(3), n=np.array([50_000.0]))
    assert Statistics.read(tmp_path / "floating.npz").n == 50_000


def test_every_score_refuses_values_that_are_not_finite():
    x, bad = features(30, 4, seed=1), features(30, 4, seed=2)
    pool = Pool(x.clone())
    near = find_nearest(x, pool, exclude=torch.arange(30))
    for value in (torch.nan, torch.inf):
        bad[3, 1] = value
        for score in (kernel_distance, precision_recall):
            for pair in ((bad, x), (x, bad)):
                with pytest.raises(ValueError, match="features must be finite, but 1 of these numbers"):
                    score(*pair)
        with pytest.raises(ValueError, match="samples must be finite"):
            find_nearest(bad, pool)
        with pytest.raises(ValueError, match=r"distances must be finite"):
            NearestMatches(near.distance.clone().index_fill_(0, torch.tensor(2), value), near.index)
        with pytest.raises(ValueError, match="not finite"):
            Statistics.from_features(bad)
        with pytest.raises(ValueError, match=r"some features \(pixels\) are not finite"):
            Pixels()(bad)
        for values in ([value, 1.0], [1.0, value], [value]):
            with pytest.raises(ValueError, match="kernel: a score is not finite"):
                summarise([{"frechet": 1.0, "kernel": kernel} for kernel in values])
    far = Statistics(torch.full((2,), 1e300, dtype=torch.float64), torch.eye(2).double())
    with pytest.raises(ValueError, match="distance of these statistics is not finite, but inf"):
        frechet_distance(far, Statistics(torch.zeros(2).double(), torch.eye(2).double()))


class TwoFeatures(Features):
    """Two features of each data point, which do not depend on the others in the batch."""

    name = identity = "two"

    def compute(self, x):
        return torch.stack([x.flatten(1)[:, 0], x.flatten(1).square().sum(1)], 1)


def test_a_feature_set_does_not_depend_on_batches_ranks_or_their_order():
    x, keep = features(50, 6, seed=5), torch.tensor([3, 8, 40])

    def feature_set(index, size):
        return FeatureSet.compute(
            TwoFeatures(), ((part, x[part]) for part in torch.tensor(index).split(size)), keep=keep
        )

    whole = feature_set(range(50), 50)
    odd, even = feature_set(range(1, 50, 2), 4), feature_set(range(0, 50, 2), 9)
    for other in (feature_set(range(50), 7), odd.merge(even)):
        assert torch.equal(other.features, whole.features)
        assert other.index.tolist() == [3, 8, 40]
        assert torch.allclose(other.statistics.covariance, whole.statistics.covariance, rtol=1e-12)
    same = whole.merge(FeatureSet.compute(TwoFeatures(), []))  # a rank without any data
    assert torch.equal(same.statistics.mean, whole.statistics.mean)
    assert torch.equal(same.features, whole.features)


def test_kernel_distance_is_the_average_over_pairs():
    x, y = features(6, 4, seed=6).double(), features(6, 4, seed=7, mean=0.5).double()

    def kernel(a, b):
        return float(a @ b / 4 + 1) ** 3

    within = [sum(kernel(z[i], z[j]) for i, j in combinations(range(6), 2)) / 15 for z in (x, y)]
    between = sum(kernel(a, b) for a in x for b in y) / 36
    found, std = kernel_distance(x, y)
    assert found == pytest.approx(sum(within) - 2 * between, abs=1e-12)
    assert std == 0


def test_kernel_distance_of_similar_sets_is_that_of_float64():
    # non-negative features with a large mean, such as Inception's; float32 products of them are not enough
    x, y = features(800, 256, seed=8, mean=0.5).relu().split(400)
    found = kernel_distance(x, y)[0]
    assert found == pytest.approx(kernel_distance(x.double(), y.double())[0], rel=1e-6)
    assert abs(found) < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_kernel_distance_neither_overflows_nor_underflows(scale):
    x, y = (scale * features(90, 32, seed=seed, mean=0.5) for seed in (8, 9))
    a, b = x.double(), y.double()
    aa, bb, ab = (((p @ q.T / 32 + 1) ** 3) for p, q in ((a, a), (b, b), (a, b)))
    within = sum(float(kernel.sum() - kernel.trace()) for kernel in (aa, bb)) / (90 * 89)
    rounding = 1e-14 * float(ab.abs().max())
    assert kernel_distance(x, y)[0] == pytest.approx(within - 2 * float(ab.mean()), rel=1e-6, abs=rounding)


def test_kernel_distance_equals_torch_fidelitys(fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(200, 16, seed=8), features(200, 16, seed=9, mean=0.2)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kernel_distance(x, y)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    subsets = kid_features_to_metric(x.double(), y.double(), kid_subsets=100, kid_subset_size=50, verbose=False)
    mean, std = kernel_distance(x, y, size=50)
    error = std / 100**0.5  # two independent choices of subsets
    assert abs(mean - subsets["kernel_inception_distance_mean"]) < 4 * 2**0.5 * error
    assert std == pytest.approx(subsets["kernel_inception_distance_std"], rel=0.4)


def test_precision_and_recall_equal_torch_fidelitys(fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(90, 8, seed=10), 0.7 * features(70, 8, seed=11)
    found = precision_recall(x, y)
    theirs = prc_features_to_metric(x.double(), y.double(), verbose=False)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < min(found) < max(found) < 1


def test_precision_and_recall_are_fractions_within_the_distance_of_the_third_neighbour():
    x, y = features(40, 3, seed=12), 0.7 * features(30, 3, seed=13)

    def fraction(a, b):
        radius = [sorted(float((p - q).double().norm()) for q in b)[3] for p in b]
        return sum(any(float((p - q).double().norm()) <= r for q, r in zip(b, radius, strict=True)) for p in a) / len(a)

    assert precision_recall(x, y) == pytest.approx((fraction(x, y), fraction(y, x)))
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 features"):
        precision_recall(x[:3], y)


def test_precision_distinguishes_near_neighbours_far_from_the_origin():
    # near-duplicates whose distances are smaller than the float32 rounding of their squared norm
    y = torch.full((12, 4), 1000.0).double() + 1e-4 * features(12, 4, seed=14).double()
    assert precision_recall(y + 1e-2, y)[0] == 0
    assert precision_recall(y.clone(), y) == (1.0, 1.0)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_in_blocks_are_those_of_all_float64_distances(monkeypatch, k):
    # blocks that do not divide the sets, duplicates, and points nearer to each other than float32 can tell
    monkeypatch.setattr("stablefield.evaluate.pairs._BLOCK", 16)
    x, y = features(70, 8, seed=15), features(45, 8, seed=16)
    x[3], x[40:52], y[5] = x[60], x[20] + 1e-6 * features(12, 8, seed=17), y[30]
    one, two, cross = ((a.double()[:, None] - b.double()).norm(dim=2) for a, b in ((x, x), (y, y), (x, y)))
    radii = [within.sort(1).values[:, k] for within in (one, two)]
    expected = ((cross <= radii[1]).any(1), (cross <= radii[0][:, None]).any(0))
    assert precision_recall(x, y, k=k) == tuple(float(inside.double().mean()) for inside in expected)


@pytest.fixture
def pool():
    return Pool(torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_find_nearest_finds_the_nearest_two_of_all_pairs(pool, monkeypatch):
    monkeypatch.setattr("stablefield.kernel.nearest.chunk_size", lambda x: 7)
    data = pool.take(torch.arange(60)).double().flatten(1)
    x = features(20, 9, seed=15).view(20, 1, 3, 3)
    squares = (x.flatten(1)[:, None].double() - data).square().sum(2)
    expected = squares.sqrt().topk(2, 1, largest=False)
    found = find_nearest(x, pool)
    assert torch.equal(found.index, expected.indices)
    assert torch.allclose(found.distance, expected.values, rtol=1e-12)
    some = torch.tensor([4, 59, 7])
    left_out = find_nearest(pool.take(some), pool, exclude=some)
    others = torch.cdist(data[some], data)
    others[range(3), some] = torch.inf
    assert torch.equal(left_out.index[:, 0], others.argmin(1))


def test_a_copy_has_distance_zero_and_counts_as_one_and_a_mixture_does_not(pool):
    near = find_nearest(pool.take(torch.tensor([5, 17])), pool)
    assert near.distance[:, 0].tolist() == [0, 0]
    assert near.index[:, 0].tolist() == [5, 17]
    mixture = find_nearest(pool.take(torch.tensor([5, 17])).mean(0, keepdim=True), pool)
    assert near.copies().tolist() == [True, True]
    assert mixture.copies().tolist() == [False]
    held_out = find_nearest(pool.take(torch.arange(60)), pool, exclude=torch.arange(60))
    scores = memorisation_scores(near, held_out)
    assert (scores["nearest_ratio"], scores["copies"], scores["copies_held_out"]) == (0.0, 1.0, 0.0)
    twice = Pool(torch.cat([pool.data, pool.data]))
    assert find_nearest(pool.take(torch.arange(3)), twice).copies().all()  # both distances are zero
    with pytest.raises(ValueError, match="no two nearest neighbours"):
        find_nearest(torch.randn(2, 1, 4, 4), pool)


def test_training_data_are_as_far_from_the_other_training_data_as_held_out_data_are():
    def draw(n, seed):
        return (
            features(n, 3, seed=1) if seed is None else torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
        )

    train, held_out = Pool(draw(2000, 21)), draw(2000, 22)
    own = find_nearest(train.take(torch.arange(2000)), train, exclude=torch.arange(2000)).distance[:, 0].log()
    new = find_nearest(held_out, train).distance[:, 0].log()
    error = float((own.var() / 2000 + new.var() / 2000).sqrt())
    assert abs(float(own.mean() - new.mean())) < 4 * error


def test_scores_are_named_after_the_features(pool):
    x = pool.take(torch.arange(60))
    data = FeatureSet.compute(Pixels(), [(torch.arange(60), x)])
    found = compute_scores(Pixels(), data, data.statistics, data.features)
    assert set(found) == {"frechet", "kernel", "kernel_std", "precision", "recall"}
    assert found["frechet"] < 1e-12
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert set(compute_scores(Pixels(), data, data.statistics)) == {"frechet"}


def test_kernel_distance_does_not_depend_on_the_scale_of_the_features(pool):
    x = pool.take(torch.arange(60)).flatten(1)

    def kernel(scale):
        a, b = (FeatureSet.compute(Pixels(), [(torch.arange(30), scale * part)]) for part in x.split(30))
        return compute_scores(Pixels(), a, b.statistics, b.features)["kernel"]

    assert kernel(1e3) == pytest.approx(kernel(1.0), rel=1e-4)


def test_notes_report_too_few_samples():
    assert "singular" in sample_size_notes(64, 64, 10_000)[0]
    assert "biased upwards" in sample_size_notes(65, 64, 10_000)[0]
    assert "reference data points" in sample_size_notes(10_000, 64, 30)[0]
    assert sample_size_notes(640, 64, None) == []


def test_repeats_are_summarised_by_mean_standard_deviation_and_minimum():
    found = Estimate.from_values([3.0, 1.0, 2.0])
    assert (found.mean, found.std, found.min, found.values) == (2.0, 1.0, 1.0, (3.0, 1.0, 2.0))
    assert Estimate.from_values([3.0]).std is None


def test_a_classifier_is_trained_once_per_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path))
    whole = Digits().load()
    small = Pool(whole.data[:100], whole.labels[:100], num_levels=17)
    first = cached_classifier(small)
    monkeypatch.setattr("stablefield.evaluate.classifier.train_classifier", None)
    again = cached_classifier(small)
    x = small.take(torch.arange(8))
    assert again.identity == first.identity
    assert again.accuracy == first.accuracy
    assert torch.equal(again(x), first(x))
    assert again.metadata()["accuracy"] == first.accuracy
    with pytest.raises(TypeError):  # another seed needs another training
        cached_classifier(small, seed=1)
    with pytest.raises(ValueError, match="was not trained on this machine"):
        find_classifier("0" * 64)
    (path,) = (tmp_path / "classifiers").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        cached_classifier(small)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (2, 5, 33)])
def test_a_classifier_accepts_images_of_any_size(shape):
    pool = Pool(torch.randint(0, 256, (20, *shape), dtype=torch.uint8), torch.arange(20) % 2)
    classifier = train_classifier(pool, epochs=1)
    assert classifier(pool.take(torch.arange(20))).shape == (20, 64)
    with pytest.raises(ValueError, match="needs labelled images"):
        train_classifier(Pool(pool.data))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


def export(path, network, x):
    if path.suffix == ".pt2":
        batch = torch.export.Dim("batch", min=1, max=4096)
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=((batch, *[None] * 3),)), path)
    else:
        torch.jit.save(torch.jit.trace(network, x), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["net.pt2", "net.pt"])
def test_an_exported_network_returns_its_own_features(tmp_path, name):
    network, x = Network(), torch.randn(5, 1, 6, 6)
    export(tmp_path / name, network, x)
    found = ExportedNetwork(tmp_path / name, trusted=name == "net.pt2")
    assert torch.allclose(found(x[:3]), network(x[:3]).flatten(1), atol=1e-6)
    assert found.identity.startswith(f"{name}:")
    with pytest.raises(ValueError, match=f"{name} cannot be applied to data"):
        found(torch.randn(3, 2, 6, 6))


def test_a_file_that_is_not_a_network_is_refused(tmp_path):
    for name in ("no.pt2", "no.pt"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match="does not hold an exported network"):
            ExportedNetwork(tmp_path / name, trusted=True)
    with pytest.raises(ValueError, match="there is no file"):
        ExportedNetwork(tmp_path / "absent.pt2")


def test_features_that_are_not_finite_or_too_many_are_refused():
    with pytest.raises(ValueError, match="are not finite"):
        Pixels()(torch.tensor([[torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="20,000 features"):
        Pixels()(torch.zeros(1, 20_000))


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """Random weights of Inception, which need no download."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
        torch.manual_seed(0)
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_equal_torch_fidelitys_and_their_distance_is_called_fid(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_isc import isc_features_to_metric

    inception = Inception(weights)
    library = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    theirs, logits = library(pixels.expand(-1, 3, -1, -1))
    found = inception(pixels.float() / 127.5 - 1)
    assert torch.equal(found, theirs)
    many = torch.cat([found, theirs.flip(0), theirs.roll(1, 1)]).repeat(10, 1) + torch.rand(60, 2048)
    expected = isc_features_to_metric(many @ library.fc.weight.T)["inception_score_mean"]
    assert inception.extra_scores(many)["inception_score"] == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(theirs @ library.fc.weight.T, logits, atol=1e-5)
    assert {inception.frechet_name, inception.kernel_name} == {"fid", "kid"}
    assert inception.scale(Statistics.from_features(many[:, :4])) == 1
    with pytest.raises(ValueError, match="one or three channels"):
        inception(torch.zeros(2, 2, 8, 8))


class Bomb:
    def __reduce__(self):
        return sys.exit, ("executed",)


def test_code_in_a_weights_file_is_not_executed(fidelity, tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="does not hold weights"):
        Inception(tmp_path / "bomb.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="does not hold weights"):
        Inception(tmp_path / "old.pth")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold weights of Inception"):
        Inception(tmp_path / "other.pth")


def test_a_failed_download_names_the_way_out(fidelity, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded.*--weights FILE.*--features classifier"):
        Inception()


@pytest.mark.parametrize("error", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_torch_fidelity_the_error_says_how_to_install_it(monkeypatch, error):
    class Refuse:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "torch_fidelity":
                raise error or ImportError(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    with pytest.raises(ValueError, match="cannot be imported here" if error else r"pip install '\.\[fidelity\]'"):
        Inception()


def test_a_copy_is_at_most_a_third_as_far_away_as_the_second_nearest():
    distance = torch.tensor([[1.0, 3.0], [1.1, 3.0], [0.0, 0.0]], dtype=torch.float64)
    assert NearestMatches(distance, torch.zeros(3, 2, dtype=torch.int64)).copies().tolist() == [True, False, True]
