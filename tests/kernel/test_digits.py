"""Targets on GPUs on which float64 is slow: inner products by digits, to the accuracy of float64."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from noisy_data import images, mean_by_differences, noisy_batch, seeded
from pretend_gpu import CUDA, PretendGPU
from torch import Tensor

from stablefield import ExactTarget, KNNTarget, NoisyBatch, Pool, STFTarget
from stablefield.kernel.accumulator import PosteriorAccumulator
from stablefield.kernel.matmul import DigitsMatmul, FloatMatmul, accurate_matmul, has_int8_matmul, has_little_float64
from stablefield.targets import TargetEstimator

CPU = torch.device("cpu")
LEVELS = [0.002, 0.02, 0.5, 20.0, 100.0]


@pytest.fixture(autouse=True)
def other_cards() -> Iterator[None]:
    """Forget what was tried on another card of the same number."""
    has_int8_matmul.cache_clear()
    yield
    has_int8_matmul.cache_clear()


def near_duplicates(data_points: int, side: int) -> Pool:
    """Float32 images of which the second half differs from the first by 0.01 in one pixel."""
    pool = images(data_points, side=side)
    data = pool.take(torch.arange(data_points))
    half = data_points // 2
    data[half:] = data[: data_points - half]
    data[half:, 0, 1, 2] += 0.01
    return Pool(data, pool.labels)


def error_of(mean: Tensor, noisy: NoisyBatch, pool: Pool, wanted: Tensor) -> tuple[float, float]:
    """The largest error of a mean relative to the norm of the data, and that of the target for the noise."""
    error = (mean.double() - wanted).flatten(1).norm(dim=1)
    rms = pool.data.double().flatten(1).square().sum(1).mean().sqrt()
    return float((error / rms).max()), float((error / noisy.sigma / noisy.noise.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize(("side", "sigma"), [*product((8, 32), LEVELS)])
def test_digits_weigh_near_duplicates_right_at_every_noise_level(side: int, sigma: float) -> None:
    pool = near_duplicates(60, side)
    noisy = noisy_batch(pool, torch.full((8,), sigma))
    sums = PosteriorAccumulator(noisy.x_t, noisy.sigma, noisy.alpha, DigitsMatmul)
    for block in pool.data.split(23):
        sums.add(block)
    found, epsilon = error_of(sums.finish().mean, noisy, pool, mean_by_differences(noisy, pool.data))
    assert found < 1e-5
    assert epsilon < 1e-4


def test_inner_products_by_digits_are_those_of_float64() -> None:
    x = torch.randn(5, 3072, generator=seeded(0), dtype=torch.float64) * torch.logspace(-3, 3, 5).double()[:, None]
    y = torch.randn(17, 3072, generator=seeded(1))
    found, wanted = DigitsMatmul(x).inner(y), x @ y.double().T
    scale = x.norm(dim=1, keepdim=True) * y.double().norm(dim=1)
    assert float(((found - wanted) / scale).abs().max()) < 2.0**-40
    double = y.double()  # and float64 candidates keep their bits
    torch.testing.assert_close(DigitsMatmul(x).inner(double), FloatMatmul(x).inner(double), rtol=0, atol=0)


def test_values_that_are_not_finite_stay_visible() -> None:
    pool = near_duplicates(20, 4)
    noisy = noisy_batch(pool, torch.full((4,), 0.5))
    for x_t, data in ((noisy.x_t * torch.inf, pool.data), (noisy.x_t, pool.data * torch.nan)):
        sums = PosteriorAccumulator(x_t, noisy.sigma, noisy.alpha, DigitsMatmul)
        sums.add(data)
        assert not sums.finish().mean.isfinite().any()


CARDS = {
    (6, 1): True,
    (7, 0): False,
    (7, 5): True,
    (8, 0): False,
    (8, 6): True,
    (8, 9): True,
    (9, 0): False,
    (10, 0): False,
    (10, 3): True,
    (12, 0): True,
}


@pytest.mark.parametrize(("capability", "little"), CARDS.items())
def test_cards_without_fast_float64_are_known_by_their_capability(capability: tuple[int, int], little: bool) -> None:
    with PretendGPU(capability):
        assert has_little_float64(CUDA) == little
        way = accurate_matmul(torch.ones(2, 3, dtype=torch.float64).to(CUDA))
        assert isinstance(way, DigitsMatmul) == (little and capability >= (8, 0))
    assert not has_little_float64(CPU)


TARGETS = {
    "stf": lambda pool: STFTarget(pool, 64),
    "knn": lambda pool: KNNTarget(pool, 8),
    "exact": ExactTarget,
    "exact, streamed": lambda pool: ExactTarget(pool, missing_mass=0),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("values", [torch.uint8, torch.float32])
def test_targets_on_a_card_without_fast_float64_are_those_of_the_cpu(name: str, values: torch.dtype) -> None:
    pool = images(120) if values == torch.uint8 else near_duplicates(120, 8)
    noisy = noisy_batch(pool, torch.logspace(-2.5, 1.5, 24))
    here = TARGETS[name](pool)(noisy, generator=seeded(0)).mean
    found: dict[tuple[int, int], Tensor] = {}
    products: dict[tuple[int, int], int] = {}
    waits: dict[tuple[int, int], int] = {}
    for capability in ((8, 6), (9, 0)):
        with PretendGPU(capability) as gpu:
            target: TargetEstimator = TARGETS[name](pool.to(CUDA))
            moved = {each: getattr(noisy, each).to(CUDA) for each in ("x", "noise", "t", "alpha", "sigma", "x_t")}
            batch = NoisyBatch(**moved, index=noisy.index)
            target(batch)
            gpu.clear()
            gpu.clear()
            found[capability] = target(batch, generator=seeded(0)).mean.cpu().clone()
        assert not gpu.mistakes
        waits[capability] = sum(gpu.waits.values())
        products[capability] = sum(count for line, count in gpu.float64.items() if line.startswith("kernel/matmul.py"))
    torch.testing.assert_close(found[8, 6], here, rtol=0, atol=2e-6)
    assert waits[8, 6] == waits[9, 0]
    # what is left are products with candidates of one example only
    own = {"knn": 8}.get(name, 0)
    assert products[8, 6] == 24 * 64 * own
