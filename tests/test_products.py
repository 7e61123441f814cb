"""Laws of the products with bytes: integers round a row once, to as many digits as are asked for, and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruned import batch, by_differences, images, seeded
from torch import Tensor

import stablefield.pruned
from stablefield import VE, Pool, PrunedDataset
from stablefield.posterior import Sums
from stablefield.products import FAINT, ByteProducts, FloatProducts, in_digits, integer_product, multiplies_bytes
from stablefield.pruned import Query


def some_bytes(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, d), generator=seeded(seed), dtype=torch.uint8)


def signed_affine(pool: Pool) -> tuple[float, float]:
    """Of bytes less 128."""
    scale, shift = pool.affine
    return scale, shift + 128 * scale


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_digits_are_off_by_less_than_their_last_place(k: int, rows: int, dim: int, power: float, seed: int) -> None:
    x = torch.randn(rows, dim, generator=seeded(seed), dtype=torch.float64) * 10**power
    x[0] = 0
    digits, scale = in_digits(x, k)
    assert digits.dtype == torch.int8
    assert digits.shape == (k, rows, dim)
    place = 256.0 ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
    off = (scale * torch.einsum("k,kbd->bd", place, digits.double()) - x).abs()
    assert (off <= x.abs().amax(1, keepdim=True) * (256.0 ** (1 - k) / 254 + 1e-15)).all()


@pytest.mark.parametrize("k", [2, 3, 5, 7])
@pytest.mark.parametrize("dim", [1, 7, 300])
def test_a_product_with_bytes_is_that_of_the_rounded_row(k: int, dim: int) -> None:
    x = 100 * torch.randn(4, dim, generator=seeded(0), dtype=torch.float64)
    members = some_bytes(50, dim)
    found = ByteProducts(x, k).inner(members)
    off = found - x @ (members.double() - 128).T
    # a byte is at most 128 from the middle, which is multiplied without rounding
    assert (off.abs() <= 128 * dim * x.abs().amax(1, keepdim=True) * (256.0 ** (1 - k) / 254 + 1e-15)).all()


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_weighted_sums_over_bytes_are_those_in_float64_whether_few_or_all_count(share: float) -> None:
    members, g = some_bytes(400, 30), seeded(1)
    weight = torch.rand(5, 400, generator=g, dtype=torch.float64) ** 3
    weight[:, int(share * 400) :] = FAINT / 2  # nobody sees those
    weight[4] = 0.0
    sums = torch.ones(5, 30, dtype=torch.float64)
    wanted = sums + weight @ (members.double() - 128)
    ByteProducts(torch.zeros(5, 30, dtype=torch.float64), 2).add_sums(sums, weight, members)
    torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-7 * 128 * float(weight.sum(1).max()))
    assert (sums[4] == 1).all()


@pytest.mark.skipif(not multiplies_bytes(torch.device("cpu")), reason="bytes are not multiplied in integers here")
@pytest.mark.parametrize("rows", [1, 3, 5, 6])
@pytest.mark.parametrize("between", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("columns", [1, 2, 17])
def test_integer_products_are_right_in_every_shape_and_order(rows: int, between: int, columns: int) -> None:
    left, right = (some_bytes(*shape).view(torch.int8) for shape in ((rows, between), (between, columns)))
    wanted = left.long() @ right.long()
    for stored in (right, right.T.contiguous().T):
        assert torch.equal(integer_product(left, stored).long(), wanted)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("members", [1, 2, 100])
def test_members_may_be_a_single_byte(rows: int, members: int) -> None:
    pool = Pool(some_bytes(members, 1))
    noisy = batch(pool, torch.full((rows,), 0.5))
    wanted = by_differences(noisy, pool.take(torch.arange(members)))
    torch.testing.assert_close(PrunedDataset(pool)(noisy).mean.double(), wanted, rtol=0, atol=1e-5)


def test_members_that_come_anew_in_the_same_place_are_read_anew() -> None:
    x = torch.randn(2, 6, generator=seeded(0), dtype=torch.float64)
    for products, middle in ((FloatProducts(x), 0), (ByteProducts(x, 7), 128)):
        for seed in range(4):
            members = some_bytes(9, 6, seed)
            torch.testing.assert_close(products.inner(members), x @ (members.double() - middle).T)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.05, 0.5, 3.0, 80.0])
def test_as_many_digits_are_taken_as_leave_the_weights_alone(sigma: float) -> None:
    pool = images(200, side=16)
    noisy = batch(pool, torch.full((8,), sigma))
    members, centre = pool.data.flatten(1), pool.take(torch.arange(200)).flatten(1).mean(0)
    query = Query.of(noisy, signed_affine(pool), centre)
    square = (pool.take(torch.arange(200)).flatten(1).double() - centre).square().sum(1)
    products = ByteProducts(query.x_t, query.digits(square))
    off = products.inner(members) - query.x_t @ (members.double() - 128).T
    off = (off - off.mean(1, keepdim=True)) * (query.alpha / query.sigma**2)[:, None]
    assert float(off.abs().max()) < 1e-5  # of a log weight


def test_less_noise_needs_more_digits() -> None:
    pool = images(50)
    square = torch.full((50,), 10.0, dtype=torch.float64)
    level = (1e-8, 0.002, 0.1, 1.0, 50.0)
    batches = [batch(pool, torch.full((3,), sigma)) for sigma in level]
    digits = [Query.of(noisy, signed_affine(pool), torch.zeros(64)).digits(square) for noisy in batches]
    assert digits == sorted(digits, reverse=True)
    assert digits[0] == 7
    assert digits[-1] < 4


@pytest.mark.parametrize("sigma", [0.0, 0.01, 1.0, 20.0])
def test_where_sums_begin_changes_nothing(sigma: float) -> None:
    pool = images(100)
    noisy = batch(pool, torch.full((10,), max(sigma, 1e-12)))
    centre = torch.zeros(64)
    query = Query.of(noisy, signed_affine(pool), centre)
    scale, shift = pool.affine
    square = (pool.data.flatten(1).double() * scale + shift).square().sum(1)
    found = query.byte_sums(square)
    plain = Sums(query.x_t, query.sigma, query.alpha)
    for part in torch.arange(100).split(33):
        found.add(pool.data[part].flatten(1), None, square[part] / query.scale**2)
        plain.add(pool.data[part].flatten(1).double() - 128, None, square[part] / query.scale**2)
    one, other = query.posterior(found), query.posterior(plain)
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.ess, other.ess, rtol=1e-5, atol=0)


@pytest.mark.parametrize("few", [0, 2**22])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.5, 2.0, 30.0])
def test_integers_and_floating_numbers_give_the_exact_target_of_near_duplicates(
    sigma: float, integers: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.pruned, "multiplies_bytes", lambda device: integers)
    monkeypatch.setattr(stablefield.pruned, "FEW", few)
    pool = images(150, side=16)
    pool.data[75:] = pool.data[:75]  # neighbours one step of one pixel apart: 0.008
    pool.data[75:, 0, 3, 3] += 1
    noisy = batch(pool, torch.full((40,), sigma))
    data = pool.take(torch.arange(150)).double()
    target = PrunedDataset(pool)
    assert target.known(-1, noisy.x_t.device).in_integers == integers
    assert ("integers" in target.arithmetic(noisy.x_t.device)) == integers
    found, wanted = target(noisy).mean.double(), by_differences(noisy, data)
    error = (found - wanted).flatten(1).norm(dim=1)
    rms = float(data.flatten(1).square().sum(1).mean().sqrt())
    assert float(error.max()) < 1e-5 * rms
    # as a target for the noise, too
    assert float(error.max()) / sigma < 1e-4 * 16


def test_a_device_is_tried_out_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    for product, trusted in ((torch._int_mm, True), (lambda a, b: torch._int_mm(a, b) + 1, False), (None, False)):
        multiplies_bytes.cache_clear()
        with monkeypatch.context() as patch:
            if product is None:
                patch.delattr(torch, "_int_mm")
            else:
                patch.setattr(torch, "_int_mm", product)
            assert multiplies_bytes(cpu) == trusted
    multiplies_bytes.cache_clear()


def test_floating_data_are_not_multiplied_as_bytes() -> None:
    pool = Pool(torch.randn(20, 5, generator=seeded(0)))
    target = PrunedDataset(pool)
    noisy = batch(pool, torch.full((4,), 0.7), VE())
    assert not target.known(-1, noisy.x_t.device).in_integers
    assert math.isfinite(float(target(noisy).mean.sum()))
