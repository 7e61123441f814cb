"""Laws of the distances to nearest neighbours and of the noise levels up to which data points are isolated."""

import math

import pytest
import torch
from noisy_data import images, seeded

import stablefield.targets.isolation
from stablefield import Pool
from stablefield.targets.isolation import isolation_level, nearest_distances


def test_up_to_its_isolation_level_a_source_keeps_all_but_the_missing_mass() -> None:
    g, missing_mass = seeded(0), 0.05
    data = torch.randn(60, 3, generator=g, dtype=torch.float64)
    level = isolation_level(nearest_distances(Pool(data)), 59, missing_mass)
    for source in range(0, 60, 6):
        for share, holds in ((1.0, True), (4.0, False)):
            sigma = share * float(level[source])
            x_t = data[source] + sigma * torch.randn(4000, 3, generator=g, dtype=torch.float64)
            w = torch.softmax(-torch.cdist(x_t, data).square() / (2 * sigma**2), 1)
            outside = 1 - w[:, source]
            error = 4 * float(outside.std()) / 4000**0.5
            assert (float(outside.mean()) <= missing_mass + error) == holds


def test_the_isolation_level_bounds_the_summed_mass_of_all_others() -> None:
    distances = torch.tensor([[1.0, 2.0, 2.5], [0.0, 1.0, 1.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    level = isolation_level(distances, 10, 1e-4)
    assert level[1] == 0  # a data point with a duplicate is never isolated
    for k in (0, 2):
        mass = torch.erfc(distances[k] / (8**0.5 * level[k]))
        assert float((mass * torch.tensor([1, 1, 8])).sum()) == pytest.approx(1e-4, rel=1e-6)
    assert torch.isinf(isolation_level(torch.zeros(1, 0, dtype=torch.float64), 0, 1e-4)).all()


# ---- distances


@pytest.mark.parametrize("k", [1, 5, 99, 500])
def test_nearest_distances_are_those_of_all_differences(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stablefield.targets.isolation, "_QUERIES", 40)
    data = torch.randn(100, 6, generator=seeded(0), dtype=torch.float64)
    data[7], data[8] = data[3], data[3] + 1e-7
    wanted = (
        torch.cdist(data, data, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf).sort(1).values
    )
    found = nearest_distances(Pool(data), k=k)
    torch.testing.assert_close(found, wanted[:, : min(k, 99)], rtol=0, atol=1e-12)


def test_nearest_distances_of_bytes_are_those_of_all_differences() -> None:
    pool = images(120)
    pool.data[5] = pool.data[9]
    pool.data[7], pool.data[8] = 0, 255  # as far from each other as bytes can be
    x = pool.take(torch.arange(120)).flatten(1).double()
    wanted = (x[:, None] - x).norm(dim=2).fill_diagonal_(math.inf).sort(1).values[:, :10]
    torch.testing.assert_close(nearest_distances(pool, k=10), wanted, rtol=0, atol=1e-9)


def test_distances_of_a_class_are_within_it_and_report_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stablefield.targets.isolation, "_QUERIES", 10)
    pool, reports = images(90), []
    of_class = pool.indices(1)
    found = nearest_distances(pool, 1, k=3, progress=lambda done, total: reports.append((done, total)))
    torch.testing.assert_close(found, nearest_distances(Pool(pool.data[of_class]), k=3), rtol=0, atol=1e-9)
    assert reports[-1] == (len(of_class), len(of_class))
    assert len(reports) > 1
    classes_of_one = Pool(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert nearest_distances(classes_of_one, 1).shape == (1, 0)
