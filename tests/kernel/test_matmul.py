"""Laws of the matrix products with bytes: an example is rounded once, to k digits, and nothing else is rounded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_data import CPU, images, mean_by_differences, noisy_batch, seeded
from torch import Tensor

import stablefield.targets.cells
import stablefield.targets.query
from stablefield import ExactTarget, Pool
from stablefield.kernel.accumulator import PosteriorAccumulator
from stablefield.kernel.matmul import (
    NEGLIGIBLE,
    FloatMatmul,
    Int8Matmul,
    has_int8_matmul,
    int8_matmul,
    to_int8_digits,
)
from stablefield.targets.query import Query, uses_int8


def random_bytes(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, d), generator=seeded(seed), dtype=torch.uint8)


def signed_affine(pool: Pool) -> tuple[float, float]:
    """(scale, shift) of bytes less 128."""
    scale, shift = pool.affine
    return scale, shift + 128 * scale


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_digits_differ_by_less_than_their_last_place(k: int, examples: int, dim: int, power: float, seed: int) -> None:
    x = torch.randn(examples, dim, generator=seeded(seed), dtype=torch.float64) * 10**power
    x[0] = 0
    digits, scale = to_int8_digits(x, k)
    assert digits.dtype == torch.int8
    assert digits.shape == (k, examples, dim)
    place = 256.0 ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
    error = (scale * torch.einsum("k,kbd->bd", place, digits.double()) - x).abs()
    assert (error <= x.abs().amax(1, keepdim=True) * (256.0 ** (1 - k) / 254 + 1e-15)).all()


@pytest.mark.parametrize("k", [2, 3, 5, 7])
@pytest.mark.parametrize("dim", [1, 7, 300])
def test_a_product_with_bytes_is_that_of_the_rounded_example(k: int, dim: int) -> None:
    x = 100 * torch.randn(4, dim, generator=seeded(0), dtype=torch.float64)
    candidates = random_bytes(50, dim)
    found = Int8Matmul(x, k).inner(candidates)
    error = found - x @ (candidates.double() - 128).T
    # a byte less 128 is at most 128, and is multiplied without rounding
    assert (error.abs() <= 128 * dim * x.abs().amax(1, keepdim=True) * (256.0 ** (1 - k) / 254 + 1e-15)).all()


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_weighted_sums_over_bytes_equal_those_in_float64_for_few_or_all_weights(share: float) -> None:
    candidates, g = random_bytes(400, 30), seeded(1)
    weight = torch.rand(5, 400, generator=g, dtype=torch.float64) ** 3
    weight[:, int(share * 400) :] = NEGLIGIBLE / 2
    weight[4] = 0.0
    sums = torch.ones(5, 30, dtype=torch.float64)
    wanted = sums + weight @ (candidates.double() - 128)
    Int8Matmul(torch.zeros(5, 30, dtype=torch.float64), 2).add_weighted_sum(sums, weight, candidates)
    torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-7 * 128 * float(weight.sum(1).max()))
    assert (sums[4] == 1).all()


@pytest.mark.skipif(not has_int8_matmul(torch.device("cpu")), reason="this processor has no fast int8 products")
@pytest.mark.parametrize("examples", [1, 3, 5, 6])
@pytest.mark.parametrize("dim", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("columns", [1, 2, 17])
def test_int8_products_are_right_in_every_shape_and_memory_order(examples: int, dim: int, columns: int) -> None:
    left, right = (random_bytes(*shape).view(torch.int8) for shape in ((examples, dim), (dim, columns)))
    wanted = left.long() @ right.long()
    for stored in (right, right.T.contiguous().T):
        assert torch.equal(int8_matmul(left, stored).long(), wanted)


@pytest.mark.parametrize("examples", [1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 100])
def test_data_points_may_be_a_single_byte(examples: int, n: int) -> None:
    pool = Pool(random_bytes(n, 1))
    noisy = noisy_batch(pool, torch.full((examples,), 0.5))
    wanted = mean_by_differences(noisy, pool.take(torch.arange(n)))
    torch.testing.assert_close(ExactTarget(pool)(noisy).mean.double(), wanted, rtol=0, atol=1e-5)


def test_a_new_block_in_the_same_memory_is_converted_anew() -> None:
    x = torch.randn(2, 6, generator=seeded(0), dtype=torch.float64)
    for matmul, offset in ((FloatMatmul(x), 0), (Int8Matmul(x, 7), 128)):
        for seed in range(4):
            candidates = random_bytes(9, 6, seed)
            torch.testing.assert_close(matmul.inner(candidates), x @ (candidates.double() - offset).T)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.05, 0.5, 3.0, 80.0])
def test_enough_digits_are_used_to_keep_the_log_weights(sigma: float) -> None:
    pool = images(200, side=16)
    noisy = noisy_batch(pool, torch.full((8,), sigma))
    candidates, centre = pool.data.flatten(1), pool.take(torch.arange(200)).flatten(1).mean(0)
    query = Query.of(noisy, signed_affine(pool), centre)
    square = (pool.take(torch.arange(200)).flatten(1).double() - centre).square().sum(1)
    error = (
        Int8Matmul(query.x_t, int(query.digits(square).max())).inner(candidates)
        - query.x_t @ (candidates.double() - 128).T
    )
    log_weight_error = (error - error.mean(1, keepdim=True)) * (query.alpha / query.sigma**2)[:, None]
    assert float(log_weight_error.abs().max()) < 1e-5


def test_less_noise_needs_more_digits() -> None:
    pool = images(50)
    square = torch.full((50,), 10.0, dtype=torch.float64)
    levels = (1e-8, 0.002, 0.1, 1.0, 50.0)
    batches = [noisy_batch(pool, torch.full((3,), sigma)) for sigma in levels]
    digits = [Query.of(noisy, signed_affine(pool), torch.zeros(64)).digits(square).max().item() for noisy in batches]
    assert digits == sorted(digits, reverse=True)
    assert digits[0] == 7
    assert digits[-1] < 4


@pytest.mark.parametrize("sigma", [0.0, 0.01, 1.0, 20.0])
def test_sums_that_start_relative_to_the_source_are_the_same(sigma: float) -> None:
    pool = images(100)
    noisy = noisy_batch(pool, torch.full((10,), max(sigma, 1e-12)))
    centre = torch.zeros(64)
    query = Query.of(noisy, signed_affine(pool), centre)
    scale, shift = pool.affine
    square = (pool.data.flatten(1).double() * scale + shift).square().sum(1)
    found = query.int8_accumulator(int(query.digits(square).max()))
    plain = PosteriorAccumulator(query.x_t, query.sigma, query.alpha)
    for part in torch.arange(100).split(33):
        found.add(pool.data[part].flatten(1), None, square[part] / query.scale**2)
        plain.add(pool.data[part].flatten(1).double() - 128, None, square[part] / query.scale**2)
    one, other = query.posterior(found), query.posterior(plain)
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.ess, other.ess, rtol=1e-5, atol=0)


@pytest.mark.parametrize("small_data", [0, 2**22])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.5, 2.0, 30.0])
def test_int8_and_floating_point_give_the_exact_target_of_near_duplicates(
    sigma: float, int8: bool, small_data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.targets.query, "has_int8_matmul", lambda device: int8)
    monkeypatch.setattr(stablefield.targets.cells, "SMALL_DATA", small_data)
    pool = images(150, side=16)
    pool.data[75:] = pool.data[:75]  # neighbours one step of one pixel apart: 0.008
    pool.data[75:, 0, 3, 3] += 1
    noisy = noisy_batch(pool, torch.full((40,), sigma))
    data = pool.take(torch.arange(150)).double()
    assert uses_int8(pool, CPU) == int8
    found, wanted = ExactTarget(pool)(noisy).mean.double(), mean_by_differences(noisy, data)
    error = (found - wanted).flatten(1).norm(dim=1)
    rms = float(data.flatten(1).square().sum(1).mean().sqrt())
    assert float(error.max()) < 1e-5 * rms
    # and as a target for epsilon
    assert float(error.max()) / sigma < 1e-4 * 16


def test_int8_products_of_a_device_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    for product, trusted in ((torch._int_mm, True), (lambda a, b: torch._int_mm(a, b) + 1, False), (None, False)):
        has_int8_matmul.cache_clear()
        with monkeypatch.context() as patch:
            if product is None:
                patch.delattr(torch, "_int_mm")
            else:
                patch.setattr(torch, "_int_mm", product)
            assert has_int8_matmul(CPU) == trusted
    has_int8_matmul.cache_clear()


def test_floating_point_data_are_not_multiplied_as_bytes() -> None:
    pool = Pool(torch.randn(20, 5, generator=seeded(0)))
    noisy = noisy_batch(pool, torch.full((4,), 0.7))
    assert not uses_int8(pool, CPU)
    assert math.isfinite(float(ExactTarget(pool)(noisy).mean.sum()))
