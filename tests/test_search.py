"""Laws of neighbours that an index finds: unbiased at any recall, and the nearest themselves where it looks at all."""

import pytest
import torch
from torch import Tensor

from stablefield import VE, VP, NearestNeighbours, Perturbed, Pool, SingleSample
from stablefield.config import resolve
from stablefield.data import FoundNeighbours
from stablefield.run import assemble

pytest.importorskip("faiss")


def cloud(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def batch(pool: Pool, process: VE | VP | None = None, rows: int = 30) -> Perturbed:
    g = torch.Generator().manual_seed(1)
    index = torch.randint(len(pool), (rows,), generator=g)
    x = pool.take(index)
    return (process or VE()).perturb(
        x, torch.linspace(0.1, 1, rows), torch.randn(x.shape, generator=g), index=index, label=pool.label(index)
    )


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize(("index", "probes"), [("Flat", 1), ("PCA2,Flat", 1), ("IVF4,Flat", 1), ("IVF4,Flat", 3)])
def test_what_an_index_finds_is_a_cell_at_any_recall(index: str, probes: int, sigma: float) -> None:
    data = cloud(200, 4)
    target = FoundNeighbours(Pool(data), 20, index, probes)
    for x_t in cloud(4, 4, 2):
        w = torch.softmax(-(x_t - data).double().square().sum(1) / (2 * sigma**2), 0)
        level = torch.full((200,), sigma)
        noisy = Perturbed(
            data, (x_t - data) / sigma, level, torch.ones(200), level, x_t.expand(200, -1), index=torch.arange(200)
        )
        found = target(noisy).mean.double()
        torch.testing.assert_close(w @ found, w @ data.double(), rtol=0, atol=1e-6)
        exact = w @ data.double()
        assert (w * (found - exact).square().sum(1)).sum() < (w * (data - exact).square().sum(1)).sum()


@pytest.mark.parametrize("process", [VE(), VP()], ids=repr)
def test_an_index_that_looks_at_all_finds_the_nearest(process: VE | VP) -> None:
    pool = Pool(cloud(300, 5), torch.arange(300) % 3)
    noisy = batch(pool, process)
    found, nearest = FoundNeighbours(pool, 7, "Flat")(noisy), NearestNeighbours(pool, 7)(noisy)
    torch.testing.assert_close(found.mean, nearest.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.ess, nearest.ess, rtol=1e-4, atol=1e-4)


def test_an_index_that_finds_too_few_says_so_with_fewer() -> None:
    pool = Pool(cloud(60, 3))
    target = FoundNeighbours(pool, 50, "IVF8,Flat", probes=1)
    noisy = batch(pool)
    assert (target.found(noisy, -1) == -1).any()
    found = target(noisy)
    assert torch.isfinite(found.mean).all()
    inside = (target.found(noisy, -1) == noisy.index[:, None]).any(1)
    assert torch.equal(found.mean[~inside], SingleSample()(noisy).mean[~inside])


def test_what_cannot_be_searched_is_said() -> None:
    pool = Pool(cloud(10, 3))
    for make, told in (
        (lambda: FoundNeighbours(pool, 11), "the pool's 10 members, not 11"),
        (lambda: FoundNeighbours(pool, 3, probes=0), "at least 1, not 0"),
        (lambda: FoundNeighbours(pool, 3, "Nonsense7"), "faiss knows no index 'Nonsense7'"),
    ):
        with pytest.raises(ValueError, match=told):
            make()


def test_a_run_can_be_taught_by_an_index() -> None:
    config = resolve({"target": {"kind": "found", "index": "PCA8,Flat"}, "network": {"kind": "mlp"}})
    target = assemble(config).objective.target
    assert isinstance(target, FoundNeighbours)
    assert (target.neighbours, target.index) == (64, "PCA8,Flat")
