"""Arithmetic of networks: float32, TF32, bfloat16 or float16, set in this one place.

    with arithmetic("bfloat16"), autocast("bfloat16", device):
        x0 = denoiser(x_t, t)

GPUs can multiply float32 numbers in TF32, with 10 bits of mantissa instead of 23, and PyTorch does so in convolutions
unless this is turned off. `float32` turns this off everywhere, as EDM does. In the half-precision types only matrix
products and convolutions are computed, by autocast; weights, averages and sums stay float32. Targets depend on none of
these: their weights are computed in float64 or exactly (see `stablefield.kernel`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def dtype_of(precision: str) -> torch.dtype:
    """The type in which products are computed; float32 for "tf32", which rounds float32 numbers inside a product.

    Args:
        precision: name of the precision.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    dtype: torch.dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    return dtype


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context in which products on a device are computed in the half-precision types; without effect for others.

    Args:
        precision: name of the precision.
        device: device of the tensors.

    Raises:
        ValueError: there is no such precision.
    """
    dtype = dtype_of(precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def arithmetic(precision: str = "float32", *, deterministic: bool = False) -> Iterator[None]:
    """Context in which TF32 is allowed for "tf32" only, and cuDNN looks for the fastest convolutions.

    All settings are restored at its end. On a CPU without TF32 nothing changes.

    Args:
        precision: name of the precision.
        deterministic: refuse operations whose results are not reproducible bit for bit, and use the same convolutions
            in every process instead of those that were fastest in a trial.

    Raises:
        ValueError: there is no such precision.
    """
    dtype_of(precision)
    before, benchmark = _read(), torch.backends.cudnn.benchmark
    refuses = deterministic and not torch.are_deterministic_algorithms_enabled()
    try:
        _allow_tf32(precision == "tf32")
        torch.backends.cudnn.benchmark = not deterministic
        if refuses:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        if refuses:
            torch.use_deterministic_algorithms(False)
        _restore(before)
        torch.backends.cudnn.benchmark = benchmark


# PyTorch has two interfaces to these settings. Since 2.9, `fp32_precision` is set for each kind of operation and is
# inherited from more general settings where it is "none". The older ones raise an error when they are read after the
# newer ones were set to something that they cannot express. So both are set, and both are restored.


def _operations() -> list[Any]:
    """Operations with an `fp32_precision`: those of GPUs, and products on CPUs; none before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]


def _allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    for operation in _operations():
        if not allowed and operation.fp32_precision not in ("none", "ieee"):  # inherited from a more general setting
            operation.fp32_precision = "ieee"


def _read() -> tuple[str | None, bool | None, list[str]]:
    """The settings of matrix products, of convolutions, and of each operation; None for one that cannot be read."""
    matmul: str | None = None
    convolutions: bool | None = None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return matmul, convolutions, [operation.fp32_precision for operation in _operations()]


def _restore(settings: tuple[str | None, bool | None, list[str]]) -> None:
    matmul, convolutions, each = settings
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    for operation, precision in zip(_operations(), each, strict=True):
        if operation.fp32_precision != precision:
            operation.fp32_precision = precision
