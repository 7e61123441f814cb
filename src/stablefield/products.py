"""The two products of a block that passes: rows with its members, and weights with its members.

Floating members are multiplied in a floating type. Bytes need no such thing: a row is written in digits,

    x = scale (256^(k - 1) d_1 + ... + 256 d_(k - 1) + d_k),     d_i in -128 .. 127

each digit is multiplied with the bytes in integers, without any rounding, and the products are put together in float64.
So k digits round x, once, to 256^(1 - k) / 254 of its largest entry, and nothing else; the bytes are read as they are
stored, a quarter of the memory of float32. Processors that multiply bytes (VNNI) do that several times faster than
numbers of either floating type.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

MIDDLE = 128  # taken from bytes, to make them signed
LONGEST = 2**17 - 1  # terms of a sum of products of a digit and a byte that surely fit 32 bits
FAINT = 2.0**-38  # a weight that nobody sees beside a weight of 1, even a million times
SINGLY = 5  # rows, at most, that are multiplied one by one
PICKED = 1 / 3  # of a block: so many members, or fewer, are picked out to be summed


class Products(ABC):
    """Products of rows that stay the same with the members of one block after another, (n, D) or (B, n, D)."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def ready(self, members: Tensor) -> Tensor:
        """The members as they are multiplied; of one block they are asked for more than once."""
        if self.last is None or self.last[0] is not members:
            self.last = members, self.prepared(members)
        return self.last[1]

    @abstractmethod
    def prepared(self, members: Tensor) -> Tensor:
        """The members of a block as they are multiplied, in memory that the next block may take."""

    @abstractmethod
    def squares(self, members: Tensor) -> Tensor:
        """Squared norms, in float64: (n,) or (B, n)."""

    @abstractmethod
    def inner(self, members: Tensor) -> Float[Tensor, "B n"]:
        """Of each row with each member."""

    @abstractmethod
    def add_sums(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], members: Tensor) -> None:
        """Add the members to the sums of each row, in float64, each with its weight between 0 and 1."""


class FloatProducts(Products):
    """In floating types, that of inner products and that of weighted sums over a block.

    float32 rounds the latter to 1e-7 of the members, whatever sigma; blocks add up in float64.
    """

    def __init__(
        self, rows: Float[Tensor, "B D"], types: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)
    ) -> None:
        self.rows, self.narrow = rows.to(types[0]), types[1]
        super().__init__()
        self.buffers = {dtype: rows.new_empty(0, dtype=dtype) for dtype in types}

    def squares(self, members: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.ready(members), dim=-1).double().square()

    def inner(self, members: Tensor) -> Float[Tensor, "B n"]:
        y = self.ready(members)
        return self.rows @ y.T if y.ndim == 2 else (y @ self.rows.unsqueeze(2)).squeeze(2)

    def add_sums(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], members: Tensor) -> None:
        y = self.ready(members)
        if self.narrow != weight.dtype:
            # without those that count for nothing: numbers too small to be normal make products many times slower
            weight = torch.nn.functional.threshold(weight, 1e-30, 0.0).to(self.narrow)
            y = y if y.dtype == self.narrow else self._widen(members, self.narrow)
        if y.ndim == 2 and y.dtype == sums.dtype:
            sums.addmm_(weight, y)
        else:
            sums.add_(weight @ y if y.ndim == 2 else (weight.unsqueeze(1) @ y).squeeze(1))

    def prepared(self, members: Tensor) -> Tensor:
        return self._widen(members, self.rows.dtype)

    def _widen(self, members: Tensor, dtype: torch.dtype) -> Tensor:
        # into memory that is used again: fresh pages would cost more than the product
        if members.dtype == dtype and members.device == self.rows.device:
            return members.detach()
        if self.buffers[dtype].numel() < members.numel():
            self.buffers[dtype] = self.rows.new_empty(members.numel(), dtype=dtype)
        return self.buffers[dtype][: members.numel()].view(members.shape).copy_(members)


class ByteProducts(Products):
    """With bytes less 128, in integers: rows and weights are rounded to so many digits, and nothing else is rounded.

    Args:
        rows: in float64.
        digits: of the rows. Weights have four, a resolution of 2^-32 of the largest in a block.
    """

    WEIGHTS = 4

    def __init__(self, rows: Float[Tensor, "B D"], digits: int) -> None:
        assert rows.shape[1] <= LONGEST
        super().__init__()
        self.digits, self.scale = in_digits(rows, digits)
        self.buffer = torch.empty(0, dtype=torch.uint8, device=rows.device)

    def squares(self, members: UInt8[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return self.ready(members).double().square().sum(1)

    def inner(self, members: UInt8[Tensor, "n D"]) -> Float[Tensor, "B n"]:
        return _joined(self.digits, self.scale, self.ready(members).T)

    def add_sums(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], members: Tensor) -> None:
        y, seen = self.ready(members), (weight.amax(0) > FAINT).nonzero().flatten()
        if len(seen) <= PICKED * len(members):
            sums.add_(weight[:, seen].float() @ y[seen].float())
            return
        for some, part in zip(weight.split(LONGEST, 1), y.split(LONGEST), strict=True):
            sums.add_(_joined(*in_digits(some, self.WEIGHTS), part))

    def prepared(self, members: UInt8[Tensor, "n D"]) -> Int8[Tensor, "n D"]:
        if self.buffer.numel() < members.numel():
            self.buffer = self.buffer.new_empty(members.numel())
        return signed(members, self.buffer[: members.numel()].view(members.shape))


def signed(members: UInt8[Tensor, "n D"], out: UInt8[Tensor, "n D"]) -> Int8[Tensor, "n D"]:
    """Bytes without their middle value, in the memory of `out`, on whatever device that is."""
    if members.device == out.device:
        return torch.bitwise_xor(members, MIDDLE, out=out).view(torch.int8)
    return out.copy_(members).bitwise_xor_(MIDDLE).view(torch.int8)


def in_digits(x: Float[Tensor, "B D"], digits: int) -> tuple[Int8[Tensor, "k B D"], Float[Tensor, "B 1"]]:
    """x, a row each, as scale times a number of so many digits to the base 256, the first of them first.

    It is off by at most half the last digit, 256^(1 - digits) / 254 of the row's largest entry (and the rounding of
    float64).

    Args:
        digits: at most 7.

    >>> x = torch.randn(3, 5, dtype=torch.float64)
    >>> digits, scale = in_digits(x, 6)
    >>> value = digits[0].double()
    >>> for digit in digits[1:]:
    ...     value = 256 * value + digit
    >>> bool((value * scale - x).abs().max() < 1e-13)
    True
    """
    scale = (x.abs().amax(1, keepdim=True) / (127 * 256 ** (digits - 1))).clamp(min=1e-300)
    whole = (x / scale).round_().to(torch.int32 if digits <= 4 else torch.int64)
    # The bytes of a whole number are between 0 and 255. With 128 added to each they are digits plus 128, and flipping
    # their highest bits takes that away again.
    middle = sum(MIDDLE * 256**place for place in range(digits - 1))
    whole.add_(middle).bitwise_xor_(middle)
    found = torch.empty(digits, *x.shape, dtype=torch.int8, device=x.device)
    for digit in reversed(found.unbind(0)):
        digit.copy_(whole)  # its last byte
        whole.bitwise_right_shift_(8)
    return found, scale


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the types that they are asked for in: float32 is not taken for TF32 or, in autocast, for less."""
    settings: list[tuple[Any, str, Any]] = [(torch.backends.cuda.matmul, "allow_tf32", False)]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9, and on a CPU too
        matmuls = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (untyped)
        settings = [(matmul, "fp32_precision", "ieee") for matmul in matmuls]
    before = [(of, name, getattr(of, name)) for of, name, _ in settings]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            for setting in settings:
                setattr(*setting)
            yield
        finally:
            for setting in before:
                setattr(*setting)


@cache
def multiplies_bytes(device: torch.device) -> bool:
    """Whether a device multiplies bytes faster than floating numbers, and rightly: it is tried out once."""
    if device.type == "cpu":
        # torch has named it differently over time, and has it on x86 only
        names = ("_is_vnni_supported", "_is_avx512_vnni_supported")
        fast = any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    else:
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not fast:
        return False
    left = (torch.arange(3 * 40, device=device).view(3, 40) * 37 % 255 - 127).to(torch.int8)
    right = (torch.arange(40 * 19, device=device).view(40, 19) * 91 % 256 - 128).to(torch.int8)
    try:
        found = integer_product(left, right)
    except (RuntimeError, AttributeError):
        return False
    return bool((found.double() == left.double() @ right.double()).all())


def _joined(digits: Int8[Tensor, "k B m"], scale: Float[Tensor, "B 1"], right: Int8[Tensor, "m n"]) -> Tensor:
    """What the digits stand for, times the right factor, (B, n) in float64."""
    parts = integer_product(digits.flatten(0, 1), right).unflatten(0, digits.shape[:2])
    found = parts[0].double()
    for part in parts[1:]:
        found.mul_(256).add_(part)
    return found.mul_(scale)


def integer_product(left: Int8[Tensor, "a m"], right: Int8[Tensor, "m n"]) -> Tensor:
    """The product, exactly, in int32 (as long as its terms fit: `LONGEST` of them surely do)."""
    if left.shape[1] == 1:  # torch 2.13 reads a right factor of one row in the wrong order
        return left.int() * right.int()
    if left.device.type == "cpu":
        if len(left) <= SINGLY and right.stride(0) == 1 and right.shape[1] > 1:
            # a matrix is repacked before it is multiplied with several rows, which costs more than a few rows alone
            # (a single column, turned, torch 2.13 would read in the wrong order)
            return torch.cat([torch._int_mm(right.T, row[:, None]).T for row in left])
        return torch._int_mm(left, right)
    # tensor units want more than 16 rows, and lengths in multiples of 8
    rows, columns = len(left), right.shape[1]
    right = torch.nn.functional.pad(right, (0, -columns % 8, 0, -len(right) % 8))
    left = torch.nn.functional.pad(left, (0, right.shape[0] - left.shape[1], 0, max(0, 24 - rows)))
    return torch._int_mm(left.contiguous(), right)[:rows, :columns]
