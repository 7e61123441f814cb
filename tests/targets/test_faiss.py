"""Laws of the faiss search of `KNNTarget`: unbiased at any recall, and exact where the index is exhaustive."""

import pytest
import torch
from noisy_data import noisy_batch
from torch import Tensor

from stablefield import VE, VP, DSMTarget, KNNTarget, NoisyBatch, Pool
from stablefield.build import build
from stablefield.config import resolve

pytest.importorskip("faiss")


def cloud(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def batch(pool: Pool, process: VE | VP | None = None) -> NoisyBatch:
    return noisy_batch(pool, torch.linspace(0.1, 1, 30), process, seed=1, labelled=True)


def faiss_target(pool: Pool, k: int, index: str | None = None, probes: int | None = None) -> KNNTarget:
    return KNNTarget(pool, k, search="faiss", index=index, probes=probes)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize(("index", "probes"), [("Flat", 1), ("PCA2,Flat", 1), ("IVF4,Flat", 1), ("IVF4,Flat", 3)])
def test_faiss_neighbours_are_unbiased_at_any_recall(index: str, probes: int, sigma: float) -> None:
    data = cloud(200, 4)
    target = faiss_target(Pool(data), 20, index, probes)
    for x_t in cloud(4, 4, 2):
        w = torch.softmax(-(x_t - data).double().square().sum(1) / (2 * sigma**2), 0)
        level = torch.full((200,), sigma)
        noisy = NoisyBatch(
            data, (x_t - data) / sigma, level, torch.ones(200), level, x_t.expand(200, -1), index=torch.arange(200)
        )
        found = target(noisy).mean.double()
        torch.testing.assert_close(w @ found, w @ data.double(), rtol=0, atol=1e-6)
        exact = w @ data.double()
        assert (w * (found - exact).square().sum(1)).sum() < (w * (data - exact).square().sum(1)).sum()


@pytest.mark.parametrize("process", [VE(), VP()], ids=repr)
def test_an_exhaustive_index_finds_the_nearest_neighbours(process: VE | VP) -> None:
    pool = Pool(cloud(300, 5), torch.arange(300) % 3)
    noisy = batch(pool, process)
    found, nearest = faiss_target(pool, 7, "Flat")(noisy), KNNTarget(pool, 7)(noisy)
    torch.testing.assert_close(found.mean, nearest.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.ess, nearest.ess, rtol=1e-4, atol=1e-4)


def test_an_index_that_finds_too_few_neighbours_averages_over_those() -> None:
    pool = Pool(cloud(60, 3))
    target = faiss_target(pool, 50, "IVF8,Flat", probes=1)
    noisy = batch(pool)
    assert (target.nearest(noisy, -1) == -1).any()
    found = target(noisy)
    assert torch.isfinite(found.mean).all()
    inside = (target.nearest(noisy, -1) == noisy.index[:, None]).any(1)
    assert torch.equal(found.mean[~inside], DSMTarget()(noisy).mean[~inside])


def test_unusable_searches_are_refused() -> None:
    pool = Pool(cloud(10, 3))
    for make, message in (
        (lambda: faiss_target(pool, 11), "the pool's 10 data points, not 11"),
        (lambda: faiss_target(pool, 3, probes=0), "probes must be at least 1, not 0"),
        (lambda: faiss_target(pool, 3, "Nonsense7"), "faiss does not know the index 'Nonsense7'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_run_can_use_a_faiss_index() -> None:
    target = {"kind": "knn", "search": "faiss", "index": "PCA8,Flat"}
    found = build(resolve({"target": target, "network": {"kind": "mlp"}})).objective.target
    assert isinstance(found, KNNTarget)
    assert (found.search, found.neighbours, found.index) == ("faiss", 64, "PCA8,Flat")
