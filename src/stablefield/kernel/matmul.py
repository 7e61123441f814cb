"""Matrix products between the examples of a batch and a block of candidates: in floating point, or exact in int8.

Floating-point candidates are multiplied in a floating-point type. Bytes are multiplied exactly: an example is written
in digits to the base 256,

    x = scale (256^(k - 1) d_1 + ... + 256 d_(k - 1) + d_k),     d_i in -128 .. 127

each digit is multiplied with the bytes in integers, without any rounding, and the products are summed in float64.
So k digits round x once, to 256^(1 - k) / 254 of its largest entry, and nothing else is rounded; the bytes are read as
they are stored, a quarter of the memory of float32. Processors with int8 products (VNNI) do that several times faster
than either floating-point type.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from typing_extensions import override

LOGGER = logging.getLogger("stablefield")

INT8_OFFSET = 128  # subtracted from bytes to make them signed
MAX_INT32_TERMS = 2**17 - 1  # products of a digit and a byte whose sum is certain to fit 32 bits
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities: half as fast as float32
NEGLIGIBLE = 2.0**-38  # a weight that even a million times over cannot be seen beside a weight of 1
FEW_ROWS = 5  # up to this many rows are multiplied one by one
FEW_CANDIDATES = 1 / 3  # of a block: up to this share is picked out before the weighted sum


class Matmul(ABC):
    """Products of fixed examples with one block of candidates after another.

    A block is (n, D), or (G, n, D) with candidates for each of G equally large groups of consecutive examples.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def converted(self, candidates: Tensor) -> Tensor:
        """The candidates in the type in which they are multiplied; converted once per block.

        Args:
            candidates: a block of them, (n, D) or (G, n, D).
        """
        if self._last is None or self._last[0] is not candidates:
            self._last = candidates, self._convert(candidates)
        return self._last[1]

    @abstractmethod
    def _convert(self, candidates: Tensor) -> Tensor:
        """Convert a block, into memory that the next block may overwrite."""

    @abstractmethod
    def squared_norms(self, candidates: Tensor) -> Tensor:
        """Squared norms in float64, (n,) or (G, n).

        Args:
            candidates: a block of them, (n, D) or (G, n, D).
        """

    @abstractmethod
    def inner(self, candidates: Tensor) -> Float[Tensor, "B n"]:
        """Inner product of each example with each candidate.

        Args:
            candidates: a block of them, (n, D) or (G, n, D).
        """

    @abstractmethod
    def add_weighted_sum(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], candidates: Tensor) -> None:
        """Add the weighted sum of the candidates to `sums`, in place.

        Args:
            sums: float64.
            weight: between 0 and 1.
            candidates: a block of them, (n, D) or (G, n, D).
        """


class FloatMatmul(Matmul):
    """Products in floating-point types, one for inner products and one for weighted sums over a block.

    float32 rounds the latter to 1e-7 of the candidates, whatever sigma is; blocks are summed in float64.

    Args:
        examples: the examples of the batch, (B, D).
        types: types of the inner products and of the weighted sums.
    """

    def __init__(
        self, examples: Float[Tensor, "B D"], types: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)
    ) -> None:
        self.examples, self.narrow = examples.to(types[0]), types[1]
        super().__init__()
        self.buffers = {dtype: examples.new_empty(0, dtype=dtype) for dtype in types}

    @override
    def squared_norms(self, candidates: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.converted(candidates), dim=-1).double().square()

    @override
    def inner(self, candidates: Tensor) -> Float[Tensor, "B n"]:
        y = self.converted(candidates)
        if y.ndim == 2:
            return self.examples @ y.T
        return (self.examples.unflatten(0, (len(y), -1)) @ y.mT).flatten(0, 1)

    @override
    def add_weighted_sum(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], candidates: Tensor) -> None:
        y = self.converted(candidates)
        if self.narrow != weight.dtype:
            # drop negligible weights: subnormal numbers make products many times slower
            weight = torch.nn.functional.threshold(weight, 1e-30, 0.0).to(self.narrow)
            y = y if y.dtype == self.narrow else self._to(candidates, self.narrow)
        if y.ndim == 2 and y.dtype == sums.dtype:
            sums.addmm_(weight, y)
        else:
            sums.add_(weight @ y if y.ndim == 2 else (weight.unflatten(0, (len(y), -1)) @ y).flatten(0, 1))

    @override
    def _convert(self, candidates: Tensor) -> Tensor:
        return self._to(candidates, self.examples.dtype)

    def _to(self, candidates: Tensor, dtype: torch.dtype) -> Tensor:
        # reuse memory: fresh pages would cost more than the product
        if candidates.dtype == dtype and candidates.device == self.examples.device:
            return candidates.detach()
        if self.buffers[dtype].numel() < candidates.numel():
            self.buffers[dtype] = self.examples.new_empty(candidates.numel(), dtype=dtype)
        return self.buffers[dtype][: candidates.numel()].view(candidates.shape).copy_(candidates)


class DigitsMatmul(FloatMatmul):
    """Inner products by integers, for GPUs on which float64 is slow: both factors are rounded to digits.

    Seven digits hold float64's precision, and five round a candidate to 2^-40 of its largest entry. Weighted sums are
    float32, which rounds them to 1e-7 of the candidates, whatever sigma is. Candidates in float64, and those that are
    not shared by all examples, are multiplied in float64.

    Args:
        examples: the examples of the batch, (B, D), float64.
    """

    EXAMPLE_DIGITS, CANDIDATE_DIGITS = 7, 5

    def __init__(self, examples: Float[Tensor, "B D"]) -> None:
        assert examples.shape[1] <= MAX_INT32_TERMS
        super().__init__(examples, (torch.float64, torch.float32))
        self.in_float64 = FloatMatmul(examples)
        self.digits, self.scale = to_int8_digits(examples, self.EXAMPLE_DIGITS)

    @override
    def inner(self, candidates: Tensor) -> Float[Tensor, "B n"]:
        if candidates.ndim == 3 or candidates.dtype == torch.float64:
            return super().inner(candidates)
        digits, scale = to_int8_digits(self.converted(candidates), self.CANDIDATE_DIGITS)
        found = _digits_matmul(self.digits, self.scale, digits[0].T)
        for digit in digits[1:]:
            found.mul_(256).add_(_digits_matmul(self.digits, self.scale, digit.T))
        return found.mul_(scale.T)

    @override
    def add_weighted_sum(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], candidates: Tensor) -> None:
        if candidates.dtype == torch.float64:
            self.in_float64.add_weighted_sum(sums, weight, candidates)
            return
        with full_precision():
            super().add_weighted_sum(sums, weight, candidates)


class Int8Matmul(Matmul):
    """Exact integer products of bytes less 128 with examples and weights, which are rounded to digits.

    Args:
        examples: the examples of the batch, (B, D), float64.
        digits: number of digits of the examples. Weights have four, a resolution of 2^-32 of the largest in a block.
    """

    WEIGHT_DIGITS = 4

    def __init__(self, examples: Float[Tensor, "B D"], digits: int) -> None:
        assert examples.shape[1] <= MAX_INT32_TERMS
        super().__init__()
        self.digits, self.scale = to_int8_digits(examples, digits)
        self.buffer = torch.empty(0, dtype=torch.uint8, device=examples.device)

    @override
    def squared_norms(self, candidates: UInt8[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return self.converted(candidates).double().square().sum(1)

    @override
    def inner(self, candidates: UInt8[Tensor, "n D"]) -> Float[Tensor, "B n"]:
        return _digits_matmul(self.digits, self.scale, self.converted(candidates).T)

    @override
    def add_weighted_sum(self, sums: Float[Tensor, "B D"], weight: Float[Tensor, "B n"], candidates: Tensor) -> None:
        y = self.converted(candidates)
        if weight.device.type == "cpu":  # a GPU is faster than the host, which would have to wait for it
            visible = (weight.amax(0) > NEGLIGIBLE).nonzero().flatten()
            if len(visible) <= FEW_CANDIDATES * len(candidates):
                sums.add_(weight[:, visible].float() @ y[visible].float())
                return
        for some, part in zip(weight.split(MAX_INT32_TERMS, 1), y.split(MAX_INT32_TERMS), strict=True):
            sums.add_(_digits_matmul(*to_int8_digits(some, self.WEIGHT_DIGITS), part))

    @override
    def _convert(self, candidates: UInt8[Tensor, "n D"]) -> Int8[Tensor, "n D"]:
        if self.buffer.numel() < candidates.numel():
            self.buffer = self.buffer.new_empty(candidates.numel())
        return to_int8(candidates, self.buffer[: candidates.numel()].view(candidates.shape))


def to_int8(values: UInt8[Tensor, "n D"], out: UInt8[Tensor, "n D"]) -> Int8[Tensor, "n D"]:
    """Bytes less 128 as int8.

    Args:
        values: the bytes, on any device.
        out: memory for the result, on the device of the result.
    """
    if values.device == out.device:
        return torch.bitwise_xor(values, INT8_OFFSET, out=out).view(torch.int8)
    return out.copy_(values).bitwise_xor_(INT8_OFFSET).view(torch.int8)


def to_int8_digits(x: Float[Tensor, "B D"], digits: int) -> tuple[Int8[Tensor, "k B D"], Float[Tensor, "B 1"]]:
    """Rows of x as a scale times a number of k digits to the base 256, the most significant digit first.

    The error is at most half the last digit, 256^(1 - k) / 254 of the row's largest entry (and float64's rounding).

    Args:
        x: float64.
        digits: k, at most 7.

    >>> x = torch.randn(3, 5, dtype=torch.float64)
    >>> digits, scale = to_int8_digits(x, 6)
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
    middle = sum(INT8_OFFSET * 256**place for place in range(digits - 1))
    whole.add_(middle).bitwise_xor_(middle)
    found = torch.empty(digits, *x.shape, dtype=torch.int8, device=x.device)
    for digit in reversed(found.unbind(0)):
        digit.copy_(whole)  # its last byte
        whole.bitwise_right_shift_(8)
    return found, scale


def accurate_matmul(examples: Float[Tensor, "B D"], narrow: torch.dtype = torch.float64) -> Matmul:
    """Products with float64 inner products, or by digits where float64 is slow.

    Args:
        examples: the examples of the batch, (B, D), float64.
        narrow: type of the weighted sums.
    """
    device = examples.device
    if has_little_float64(device) and examples.shape[1] <= MAX_INT32_TERMS and has_int8_matmul(device):
        return DigitsMatmul(examples)
    return FloatMatmul(examples, (torch.float64, narrow))


def has_little_float64(device: torch.device) -> bool:
    """True for GPUs that are 32 or 64 times slower in float64 than in float32: all but those of data centres.

    Args:
        device: where to multiply.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64


def prepared_for_linear(x: Float[Tensor, "n D"]) -> Tensor:
    """Rows in the form in which `torch.nn.functional.linear(x, y)`, x y^T, is fastest.

    On a CPU, float32 is converted for oneDNN: its product with AVX-512 takes half the time of torch's own on an AMD
    EPYC (Zen 5). `to_dense` converts the product back, and returns any other tensor as it is.

    Args:
        x: the rows.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and torch.backends.mkldnn.is_available():
        return x.to_mkldnn()
    return x


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 and autocast out of matrix products: float32 stays float32."""
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
def has_int8_matmul(device: torch.device) -> bool:
    """True if int8 products on a device are correct and faster than floating-point ones; tried once per device.

    Args:
        device: where to multiply.
    """
    if device.type == "cpu":
        # torch has named it differently over time, and has it on x86 only
        names = ("_is_vnni_supported", "_is_avx512_vnni_supported")
        fast = any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    else:
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not fast:
        return False
    try:
        wrong = any(_int8_error(device, *shape) for shape in ((3, 40, 19), (70, 3072, 264)))
    except (RuntimeError, AttributeError) as error:
        LOGGER.warning("bytes are not multiplied as bytes on %s: %s", device, str(error).splitlines()[0])
        return False
    if wrong:
        LOGGER.warning("bytes are not multiplied as bytes on %s: the products are wrong", device)
    return not wrong


def _int8_error(device: torch.device, rows: int, inner: int, columns: int) -> bool:
    """True if a product is wrong, by a right factor in either layout."""
    left = (torch.arange(rows * inner).view(rows, inner) * 37 % 255 - 127).to(device, torch.int8)
    right = (torch.arange(inner * columns).view(inner, columns) * 91 % 256 - 128).to(device, torch.int8)
    wanted = left.double() @ right.double()
    return any(bool((int8_matmul(left, each) != wanted).any()) for each in (right, right.T.contiguous().T))


def _digits_matmul(digits: Int8[Tensor, "k B m"], scale: Float[Tensor, "B 1"], right: Int8[Tensor, "m n"]) -> Tensor:
    """The number that the digits stand for, times the right factor: (B, n) in float64."""
    parts = int8_matmul(digits.flatten(0, 1), right).unflatten(0, digits.shape[:2])
    found = parts[0].double()
    for part in parts[1:]:
        found.mul_(256).add_(part)
    return found.mul_(scale)


def int8_matmul(left: Int8[Tensor, "a m"], right: Int8[Tensor, "m n"]) -> Tensor:
    """The exact product in int32.

    Args:
        left: left factor.
        right: right factor; sums of up to `MAX_INT32_TERMS` terms are certain to fit.
    """
    if left.shape[1] == 1:  # torch 2.13 reads a right factor of one row in the wrong order
        return left.int() * right.int()
    if left.device.type == "cpu":
        if len(left) <= FEW_ROWS and right.stride(0) == 1 and right.shape[1] > 1:
            # a matrix is repacked before it is multiplied with several rows, which costs more than a few rows one by
            # one (a single column, transposed, torch 2.13 would read in the wrong order)
            return torch.cat([torch._int_mm(right.T, row[:, None]).T for row in left])
        return torch._int_mm(left, right)
    # cuBLASLt wants a column-major right factor, more than 16 rows, and lengths in multiples of 8
    rows, columns = len(left), right.shape[1]
    return torch._int_mm(_padded(left, 24), _padded(right.T).T)[:rows, :columns]


def _padded(matrix: Int8[Tensor, "a b"], least: int = 0) -> Int8[Tensor, "c d"]:
    """A row-major matrix filled up with zeros to multiples of 8, and to at least some rows."""
    rows, columns = matrix.shape
    more = max(least - rows, -rows % 8), -columns % 8
    return torch.nn.functional.pad(matrix, (0, more[1], 0, more[0])) if any(more) else matrix.contiguous()
