"""Distances between sets of data: closed forms, independent computations in float64, and torch-fidelity's numbers."""

import pickle
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from stablefield.data import Digits
from stablefield.evaluate import (
    Cloud,
    Exported,
    Features,
    Inception,
    Nearest,
    Pixels,
    Statistics,
    Summary,
    Sums,
    cached_classifier,
    frechet_distance,
    kernel_distance,
    known_classifier,
    memorised,
    nearest,
    precision_recall,
    remarks,
    scores,
    summarised,
    train_classifier,
)
from stablefield.evaluate.frechet import merged
from stablefield.reference import Pool


def features(n: int, dimension: int, *, seed: int, mean: float = 0.0, decay: float = 1.0) -> torch.Tensor:
    """Correlated ones, with a spectrum that falls over `decay` decades."""
    source = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=source))[0]
    scale = torch.logspace(0, -decay, dimension)
    return torch.randn(n, dimension, generator=source) * scale @ rotation + mean


def exact_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """From the features themselves: no covariance, and so no square root of one, is ever formed."""
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    traces = a.square().sum() + b.square().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * torch.linalg.svdvals(a @ b.T).sum())


PAIRS = [(400, 300, 32, 1.0), (40, 30, 64, 1.0), (90, 60, 128, 4.0), (2, 3, 16, 1.0), (300, 20, 64, 2.0)]


@pytest.mark.parametrize(("n", "m", "dimension", "decay"), PAIRS)
def test_the_distance_is_exact_for_singular_covariances_too(n, m, dimension, decay):
    x, y = features(n, dimension, seed=1, decay=decay), features(m, dimension, seed=2, mean=0.1, decay=decay)
    a, b = Statistics.of(x), Statistics.of(y)
    traces = float(a.covariance.trace() + b.covariance.trace())
    assert abs(frechet_distance(a, b) - exact_distance(x, y)) < 1e-12 * traces
    assert abs(frechet_distance(a, b) - frechet_distance(b, a)) < 1e-12 * traces
    assert frechet_distance(a, a) < 1e-12 * traces


@pytest.mark.parametrize(("n", "m", "dimension", "decay"), PAIRS)
def test_statistics_and_distance_are_torch_fidelitys(fidelity, n, m, dimension, decay):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(n, dimension, seed=1, decay=decay), features(m, dimension, seed=2, mean=0.1, decay=decay)
    a, b = Statistics.of(x), Statistics.of(y)
    theirs = [fid_features_to_statistics(z.double()) for z in (x, y)]
    assert np.allclose(a.mean, theirs[0]["mu"], rtol=0, atol=1e-14)
    assert np.allclose(a.covariance, theirs[0]["sigma"], rtol=0, atol=1e-14)
    found = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert abs(frechet_distance(a, b) - found) < 1e-6 * float(a.covariance.trace() + b.covariance.trace())


def test_the_distance_of_axis_aligned_gaussians_is_that_of_their_deviations():
    a, b = (Statistics(torch.full((3,), m).double(), torch.diag(torch.tensor(s).double() ** 2), 9)
            for m, s in ((0.0, [1.0, 2.0, 0.0]), (0.5, [3.0, 2.0, 1.0])))  # fmt: skip
    assert frechet_distance(a, b) == pytest.approx(3 * 0.25 + 4 + 0 + 1, abs=1e-12)
    with pytest.raises(ValueError, match="of 3 and of 2 features"):
        frechet_distance(a, Statistics.of(torch.randn(4, 2)))


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [56, 1], [10, 20, 27]])
def test_statistics_do_not_depend_on_how_the_features_are_divided(sizes):
    x = features(57, 8, seed=3, mean=1e5)  # a mean that raw second moments would drown in
    parts = merged([Sums.of(part) for part in x.split(sizes)]).statistics()
    exact = x.double().numpy()
    assert parts.n == 57
    assert np.allclose(parts.mean, exact.mean(0), rtol=1e-15, atol=0)
    assert np.allclose(parts.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="at least 2 features, not 1"):
        Statistics.of(x[:1])


def test_statistics_come_back_from_the_disk_and_from_others_files(tmp_path):
    whole = Statistics.of(features(20, 5, seed=4))
    whole.save(tmp_path / "ours.npz", features="pixels", data="abc")
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
    with pytest.raises(ValueError, match=r"odd\.npz .*are no mean and covariance"):
        Statistics.read(tmp_path / "odd.npz")


def spoiled(name: str, **arrays: object) -> dict[str, object]:
    """Statistics of five features, with some arrays replaced."""
    good = Statistics.of(features(20, 5, seed=4))
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
    spoiled("Object arrays", mu=np.array([None] * 5)),
    spoiled(r"mu \(4,\) and sigma \(5, 5\)", mu=np.zeros(4)),
    spoiled(r"mu \(5, 1\) and sigma", mu=np.zeros((5, 1))),
    spoiled(r"mu \(0,\) and sigma \(0, 0\)", mu=np.zeros(0), sigma=np.zeros((0, 0))),
    spoiled(r"mu \(\) and sigma", mu=np.array(1.0), sigma=np.array(1.0)),
    *(spoiled("n must be at least 2", n=n) for n in (0, 1, -2, -50_000)),
    *(spoiled("n must be a whole number", n=n) for n in (2.5, np.nan, np.inf, [5, 6], "many", 3j)),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("arrays", SPOILED)
def test_statistics_that_are_not_a_mean_and_a_covariance_are_refused_by_file_and_fault(tmp_path, arrays):
    arrays = dict(arrays)
    fault = arrays.pop("name")
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^[^\n]*theirs\.npz holds no usable statistics: [^\n]*{fault}[^\n]*\Z"):
        Statistics.read(tmp_path / "theirs.npz")
    made = [arrays[name] for name in ("mu", "sigma")]
    if "n" not in arrays and all(array.dtype.kind in "fc" for array in made):
        with pytest.raises(ValueError, match=r"mu|sigma"):  # and no less where they are made
            Statistics(*map(torch.from_numpy, made))


def test_every_cut_of_a_file_of_statistics_is_refused_in_a_line(tmp_path):
    Statistics.of(features(9, 3, seed=4)).save(tmp_path / "whole.npz", features="pixels", data="")
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
    """Mean and covariance of features as people publish them: stored as float32, or computed in it in two ways."""
    single = x.astype(np.float32)
    mean = single.mean(0)
    raw = (single.T @ single / np.float32(len(x)) - np.outer(mean, mean)) * np.float32(len(x) / (len(x) - 1))
    return [
        (x.mean(0).astype(np.float32), np.cov(x, rowvar=False).astype(np.float32)),
        (mean, np.cov(single, rowvar=False, dtype=np.float32)),
        (mean, raw),
    ]


@pytest.mark.parametrize(("n", "dimension", "decay"), [(400, 64, 1.0), (300, 128, 5.0), (40, 96, 2.0), (3, 16, 1.0)])
def test_honest_statistics_are_accepted_however_they_were_rounded(tmp_path, n, dimension, decay):
    x = features(n, dimension, seed=1, mean=0.1, decay=decay)
    exact = Statistics.of(x)
    for mean, covariance in rounded(x.double().numpy()):
        np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
        theirs = Statistics.read(tmp_path / "theirs.npz")
        assert frechet_distance(theirs, exact) < 0.02 * float(exact.covariance.trace())
    skewed = exact.covariance.numpy() + 1e-12 * np.triu(np.ones((dimension, dimension)), 1)
    np.savez(tmp_path / "skewed.npz", mu=exact.mean, sigma=skewed)
    assert frechet_distance(Statistics.read(tmp_path / "skewed.npz"), exact) < 1e-8
    for scale in (0.0, 1e-200, 1e200):  # the units of features do not matter
        np.savez(tmp_path / "scaled.npz", mu=exact.mean, sigma=exact.covariance * scale)
        Statistics.read(tmp_path / "scaled.npz")


def test_whole_numbers_are_statistics_too_and_a_number_of_features_may_be_unknown(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.arange(3), sigma=np.eye(3, dtype=np.uint8), n=-1)
    found = Statistics.read(tmp_path / "whole.npz")
    assert (found.n, found.mean.tolist(), found.covariance.tolist()) == (None, [0, 1, 2], np.eye(3).tolist())
    np.savez(tmp_path / "floating.npz", mu=np.zeros(3), sigma=np.eye(3), n=np.array([50_000.0]))
    assert Statistics.read(tmp_path / "floating.npz").n == 50_000


def test_no_score_makes_a_number_of_what_is_not_finite():
    x, bad = features(30, 4, seed=1), features(30, 4, seed=2)
    pool = Pool(x.clone())
    near = nearest(x, pool, itself=torch.arange(30))
    for value in (torch.nan, torch.inf):
        bad[3, 1] = value
        for score in (kernel_distance, precision_recall):
            for pair in ((bad, x), (x, bad)):
                with pytest.raises(ValueError, match="features must be finite, but 1 of these numbers"):
                    score(*pair)
        with pytest.raises(ValueError, match="points must be finite"):
            nearest(bad, pool)
        with pytest.raises(ValueError, match=r"distances must be finite"):
            Nearest(near.distance.clone().index_fill_(0, torch.tensor(2), value), near.index)
        with pytest.raises(ValueError, match="not finite"):
            Statistics.of(bad)
        with pytest.raises(ValueError, match=r"some features \(pixels\) are not finite"):
            Pixels()(bad)
        for each in ([value, 1.0], [1.0, value], [value]):
            with pytest.raises(ValueError, match="kernel: a score is not finite"):
                summarised([{"frechet": 1.0, "kernel": one} for one in each])
    far = Statistics(torch.full((2,), 1e300, dtype=torch.float64), torch.eye(2).double())
    with pytest.raises(ValueError, match="distance of these statistics is not finite, but inf"):
        frechet_distance(far, Statistics(torch.zeros(2).double(), torch.eye(2).double()))


class Halves(Features):
    """Something of each row, and of no other."""

    name = identity = "halves"

    def of(self, x):
        return torch.stack([x.flatten(1)[:, 0], x.flatten(1).square().sum(1)], 1)


def test_a_cloud_does_not_depend_on_batches_ranks_or_their_order():
    x, keep = features(50, 6, seed=5), torch.tensor([3, 8, 40])

    def cloud(rows, size):
        return Cloud.of(Halves(), ((part, x[part]) for part in torch.tensor(rows).split(size)), keep=keep)

    whole = cloud(range(50), 50)
    for other in (cloud(range(50), 7), cloud(range(1, 50, 2), 4).merge(cloud(range(0, 50, 2), 9))):
        assert torch.equal(other.features, whole.features)
        assert other.index.tolist() == [3, 8, 40]
        assert torch.allclose(other.statistics.covariance, whole.statistics.covariance, rtol=1e-12)
    alone = whole.merge(Cloud.of(Halves(), []))  # a rank without any work
    assert torch.equal(alone.statistics.mean, whole.statistics.mean)
    assert torch.equal(alone.features, whole.features)


def test_the_kernel_distance_is_the_average_over_pairs():
    x, y = features(6, 4, seed=6).double(), features(6, 4, seed=7, mean=0.5).double()

    def kernel(a, b):
        return float(a @ b / 4 + 1) ** 3

    within = [sum(kernel(z[i], z[j]) for i, j in combinations(range(6), 2)) / 15 for z in (x, y)]
    between = sum(kernel(a, b) for a in x for b in y) / 36
    found, deviation = kernel_distance(x, y)
    assert found == pytest.approx(sum(within) - 2 * between, abs=1e-12)
    assert deviation == 0


def test_the_kernel_distance_is_torch_fidelitys(fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(200, 16, seed=8), features(200, 16, seed=9, mean=0.2)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kernel_distance(x, y)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    subsets = kid_features_to_metric(x.double(), y.double(), kid_subsets=100, kid_subset_size=50, verbose=False)
    mean, deviation = kernel_distance(x, y, size=50)
    error = deviation / 100**0.5  # two independent choices of subsets
    assert abs(mean - subsets["kernel_inception_distance_mean"]) < 4 * 2**0.5 * error
    assert deviation == pytest.approx(subsets["kernel_inception_distance_std"], rel=0.4)


def test_precision_and_recall_are_torch_fidelitys_and_those_of_all_pairs(fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(90, 8, seed=10), 0.7 * features(70, 8, seed=11)
    found = precision_recall(x, y)
    theirs = prc_features_to_metric(x.double(), y.double(), verbose=False)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < min(found) < max(found) < 1


def test_precision_and_recall_are_shares_within_the_third_neighbour():
    x, y = features(40, 3, seed=12), 0.7 * features(30, 3, seed=13)

    def share(a, b):
        radius = [sorted(float((p - q).double().norm()) for q in b)[3] for p in b]
        return sum(any(float((p - q).double().norm()) <= r for q, r in zip(b, radius, strict=True)) for p in a) / len(a)

    assert precision_recall(x, y) == pytest.approx((share(x, y), share(y, x)))
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 features"):
        precision_recall(x[:3], y)


def test_precision_tells_neighbours_apart_far_from_the_origin():
    # three clusters of near-duplicates: in float32 their distances drown in the square of their norm
    y = torch.full((12, 4), 1000.0).double() + 1e-4 * features(12, 4, seed=14).double()
    assert precision_recall(y + 1e-2, y)[0] == 0
    assert precision_recall(y.clone(), y) == (1.0, 1.0)


@pytest.fixture
def pool():
    return Pool(torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_the_nearest_two_are_those_of_all_pairs(pool, monkeypatch):
    monkeypatch.setattr("stablefield.evaluate.memorisation.BLOCK", 7)
    data = pool.take(torch.arange(60)).double().flatten(1)
    x = features(20, 9, seed=15).view(20, 1, 3, 3)
    squares = (x.flatten(1)[:, None].double() - data).square().sum(2)
    expected = squares.sqrt().topk(2, 1, largest=False)
    found = nearest(x, pool)
    assert torch.equal(found.index, expected.indices)
    assert torch.allclose(found.distance, expected.values, rtol=1e-12)
    some = torch.tensor([4, 59, 7])
    left_out = nearest(pool.take(some), pool, itself=some)
    others = torch.cdist(data[some], data)
    others[range(3), some] = torch.inf
    assert torch.equal(left_out.index[:, 0], others.argmin(1))


def test_a_copy_is_at_distance_zero_and_counted_and_a_mixture_is_neither(pool):
    near = nearest(pool.take(torch.tensor([5, 17])), pool)
    assert near.distance[:, 0].tolist() == [0, 0]
    assert near.index[:, 0].tolist() == [5, 17]
    mixture = nearest(pool.take(torch.tensor([5, 17])).mean(0, keepdim=True), pool)
    assert near.copies().tolist() == [True, True]
    assert mixture.copies().tolist() == [False]
    fresh = nearest(pool.take(torch.arange(60)), pool, itself=torch.arange(60))
    said = memorised(near, fresh)
    assert (said["nearest_ratio"], said["copies"], said["copies_held_out"]) == (0.0, 1.0, 0.0)
    twice = Pool(torch.cat([pool.data, pool.data]))
    assert nearest(pool.take(torch.arange(3)), twice).copies().all()  # of what is there twice
    with pytest.raises(ValueError, match="have no two nearest"):
        nearest(torch.randn(2, 1, 4, 4), pool)


def test_training_images_left_out_are_as_far_from_the_others_as_fresh_ones():
    def draw(n, seed):
        return (
            features(n, 3, seed=1) if seed is None else torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
        )

    train, fresh = Pool(draw(2000, 21)), draw(2000, 22)
    own = nearest(train.take(torch.arange(2000)), train, itself=torch.arange(2000)).distance[:, 0].log()
    new = nearest(fresh, train).distance[:, 0].log()
    error = float((own.var() / 2000 + new.var() / 2000).sqrt())
    assert abs(float(own.mean() - new.mean())) < 4 * error


def test_scores_are_named_after_the_features(pool):
    x = pool.take(torch.arange(60))
    cloud = Cloud.of(Pixels(), [(torch.arange(60), x)])
    found = scores(Pixels(), cloud, cloud.statistics, cloud.features)
    assert set(found) == {"frechet", "kernel", "kernel_deviation", "precision", "recall"}
    assert found["frechet"] < 1e-12
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert set(scores(Pixels(), cloud, cloud.statistics)) == {"frechet"}


def test_the_kernel_distance_does_not_depend_on_the_unit_of_the_features(pool):
    x = pool.take(torch.arange(60)).flatten(1)

    def kernel(unit):
        a, b = (Cloud.of(Pixels(), [(torch.arange(30), unit * part)]) for part in x.split(30))
        return scores(Pixels(), a, b.statistics, b.features)["kernel"]

    assert kernel(1e3) == pytest.approx(kernel(1.0), rel=1e-4)


def test_too_few_samples_are_said():
    assert "singular" in remarks(64, 64, 10_000)[0]
    assert "biased upwards" in remarks(65, 64, 10_000)[0]
    assert "members of the reference" in remarks(10_000, 64, 30)[0]
    assert remarks(640, 64, None) == []


def test_repeats_have_mean_deviation_and_least():
    found = Summary.of([3.0, 1.0, 2.0])
    assert (found.mean, found.deviation, found.least, found.each) == (2.0, 1.0, 1.0, (3.0, 1.0, 2.0))
    assert Summary.of([3.0]).deviation is None


def test_a_classifier_is_trained_once_for_the_same_data(monkeypatch, tmp_path):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path))
    whole = Digits().load()
    small = Pool(whole.data[:100], whole.labels[:100], levels=17)
    first = cached_classifier(small)
    monkeypatch.setattr("stablefield.evaluate.classifier.train_classifier", None)
    again = cached_classifier(small)
    x = small.take(torch.arange(8))
    assert again.identity == first.identity
    assert again.accuracy == first.accuracy
    assert torch.equal(again(x), first(x))
    assert again.about()["accuracy"] == first.accuracy
    with pytest.raises(TypeError):  # other data, or another seed, would be trained for
        cached_classifier(small, seed=1)
    with pytest.raises(ValueError, match="was not trained here"):
        known_classifier("0" * 64)
    (place,) = (tmp_path / "classifiers").iterdir()
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        cached_classifier(small)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (2, 5, 33)])
def test_a_classifier_looks_at_images_of_any_size(shape):
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


def exported(path, network, x):
    if path.suffix == ".pt2":
        rows = torch.export.Dim("rows", min=1, max=4096)
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=((rows, *[None] * 3),)), path)
    else:
        torch.jit.save(torch.jit.trace(network, x), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["net.pt2", "net.pt"])
def test_a_network_from_a_file_gives_its_own_features(tmp_path, name):
    network, x = Network(), torch.randn(5, 1, 6, 6)
    exported(tmp_path / name, network, x)
    found = Exported(tmp_path / name, trusted=name == "net.pt2")
    assert torch.allclose(found(x[:3]), network(x[:3]).flatten(1), atol=1e-6)
    assert found.identity.startswith(f"{name}:")
    with pytest.raises(ValueError, match=f"{name} cannot be asked about data"):
        found(torch.randn(3, 2, 6, 6))


def test_a_file_that_is_no_network_is_refused(tmp_path):
    for name in ("no.pt2", "no.pt"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match="holds no exported network"):
            Exported(tmp_path / name, trusted=True)
    with pytest.raises(ValueError, match="there is no file"):
        Exported(tmp_path / "absent.pt2")


def test_features_that_are_not_finite_or_too_many_are_refused():
    with pytest.raises(ValueError, match="are not finite"):
        Pixels()(torch.tensor([[torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="20,000 features"):
        Pixels()(torch.zeros(1, 20_000))


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """Weights of Inception as they are made: no download, and of no use but for the plumbing."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
        torch.manual_seed(0)
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys_and_names_its_distance_fid(weights):
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
    assert inception.scores(many)["inception_score"] == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(theirs @ library.fc.weight.T, logits, atol=1e-5)
    assert {inception.frechet, inception.kernel} == {"fid", "kid"}
    assert inception.unit(Statistics.of(many[:, :4])) == 1
    with pytest.raises(ValueError, match="one or three channels"):
        inception(torch.zeros(2, 2, 8, 8))


class Bomb:
    def __reduce__(self):
        return sys.exit, ("executed",)


def test_weights_that_hold_a_program_are_not_executed(fidelity, tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        Inception(tmp_path / "bomb.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="holds no weights"):
        Inception(tmp_path / "old.pth")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights of Inception"):
        Inception(tmp_path / "other.pth")


def test_what_cannot_be_had_names_the_way_out(fidelity, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded.*--weights FILE.*--features classifier"):
        Inception()


@pytest.mark.parametrize("error", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_the_library_it_is_said_how_to_get_it(monkeypatch, error):
    class Refuse:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "torch_fidelity":
                raise error or ImportError(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    with pytest.raises(ValueError, match="cannot be imported here" if error else r"stablefield\[fidelity\]"):
        Inception()


def test_copies_are_at_most_a_third_as_far_as_the_second():
    distance = torch.tensor([[1.0, 3.0], [1.1, 3.0], [0.0, 0.0]], dtype=torch.float64)
    assert Nearest(distance, torch.zeros(3, 2, dtype=torch.int64)).copies().tolist() == [True, False, True]
