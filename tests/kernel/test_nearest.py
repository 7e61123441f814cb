"""The k nearest neighbours found from float32 products are those of float64 differences."""

import pytest
import torch

from stablefield.evaluate.pairs import kernel_distance, precision_recall
from stablefield.kernel.nearest import k_nearest
from stablefield.sample import RK45, EDMGrid, Euler, GeometricGrid, Heun, IDDPMGrid, PredictorCorrector, VPGrid


def cloud(n: int, seed: int, d: int = 40, offset: float = 0.0) -> torch.Tensor:
    """Points with duplicates, and with near duplicates that float32 products cannot tell apart."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=source) + offset
    x[n // 2 : n // 2 + n // 4] = x[: n // 4] + 1e-4 * torch.randn(n // 4, d, generator=source)
    x[n - n // 8 :] = x[: n // 8]
    return x


def brute_force(x: torch.Tensor, y: torch.Tensor, k: int, exclude: torch.Tensor | None = None) -> torch.Tensor:
    distance = (x.double()[:, None] - y.double()).norm(dim=2)
    if exclude is not None:
        distance[torch.arange(len(x)), exclude] = torch.inf
    return distance.topk(k, largest=False).values


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_the_nearest_neighbours_are_those_of_float64(offset, k, block):
    x, y = cloud(60, 0, offset=offset), cloud(200, 1, offset=offset)
    distance, index = k_nearest(x, lambda size, device: y.split(block), lambda at: y[at], k)
    assert torch.allclose(distance, brute_force(x, y, k), rtol=1e-12, atol=1e-12)
    assert torch.equal((x.double()[:, None] - y[index].double()).norm(dim=2), distance)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_excluded_points_are_never_neighbours(block):
    y = cloud(200, 1)
    rows = torch.arange(20, 90)
    distance, index = k_nearest(y[rows], lambda size, device: y.split(block), lambda at: y[at], 3, exclude=rows)
    assert not (index == rows[:, None]).any()
    assert torch.allclose(distance, brute_force(y[rows], y, 3, rows), rtol=1e-12, atol=1e-12)
    pair, _ = k_nearest(y[:3], lambda size, device: [y[:3]], lambda at: y[at], 2, exclude=torch.arange(3))
    assert pair.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_precision_and_recall_count_as_float64_differences_do(offset, shift):
    x, y = cloud(300, 0, 6, offset), cloud(400, 1, 6, offset) + shift
    x[:20] = y[:20]
    radii = [brute_force(z, z, 3, torch.arange(len(z)))[:, -1] for z in (x, y)]
    cross = (x.double()[:, None] - y.double()).norm(dim=2)
    expected = (cross <= radii[1]).any(1).double().mean(), (cross <= radii[0][:, None]).any(0).double().mean()
    assert precision_recall(x, y) == tuple(map(float, expected))


def test_the_kernel_distance_is_that_of_float64():
    x, y = cloud(300, 0, 50, 1.0), cloud(300, 1, 50, 1.2)
    a, b = x.double(), y.double()
    aa, bb, ab = ((p @ q.T / 50 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    expected = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (300 * 299) - 2 * ab.mean()
    assert kernel_distance(x, y)[0] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (Heun, "churn"),
        (Heun, "churn_min"),
        (Heun, "churn_noise"),
        (RK45, "tolerance"),
        (RK45, "sigma_min"),
        (PredictorCorrector, "snr"),
        (EDMGrid, "rho"),
        (EDMGrid, "sigma_max"),
        (GeometricGrid, "sigma_min"),
        (VPGrid, "beta_d"),
        (VPGrid, "beta_min"),
        (VPGrid, "end"),
        (IDDPMGrid, "c_1"),
        (IDDPMGrid, "c_2"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_where_they_enter(part, name, value):
    with pytest.raises(ValueError, match=rf"{name}|not .*{value}"):
        part(**{name: value})


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        (Heun, {"churn_max": float("nan")}),
        (Euler, {"steps": 0}),
        (Euler, {"steps": -3}),
        (VPGrid, {"beta_d": -1.0}),
        (VPGrid, {"beta_min": -0.1}),
        (IDDPMGrid, {"skip": -1}),
        (IDDPMGrid, {"skip": 1000}),
        (IDDPMGrid, {"table_steps": 0}),
    ],
)
def test_settings_without_a_meaning_are_refused_where_they_enter(part, arguments):
    with pytest.raises(ValueError, match="not"):
        part(**arguments)
    assert Heun(churn_max=float("inf")).churn_max == float("inf")
