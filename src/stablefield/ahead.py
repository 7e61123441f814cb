"""Data that are read while others are used.

Pages of a file that is mapped into memory are read when they are first looked at, a few at a time, and whoever looks
waits. A system that is told what will be looked at next reads megabytes of it at once, in the meantime; no thread of
ours takes part. For data that are in memory already it is told in vain, and nothing is lost.
"""

import ctypes
import mmap
from collections.abc import Iterator
from functools import cache
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

SPAN = 2**24  # bytes that are asked for at a time


def in_turn(data: Shaped[Tensor, "n *D"], size: int) -> Iterator[Shaped[Tensor, "m *D"]]:
    """The parts of `data.split(size)`; while one is used, the system reads on."""
    many = max(size, SPAN // max(1, data[:1].nbytes))
    told = 0
    for start in range(0, len(data), size):
        while told < min(len(data), start + size + many):
            soon(data[told : told + many])
            told += many
        yield data[start : start + size]


def soon(data: Shaped[Tensor, "n *D"]) -> None:
    """Tell the system that these will be looked at. It may do nothing; nothing is copied, and nothing waits."""
    if _madvise() is not None and data.device.type == "cpu" and data.is_contiguous():
        advise(data, mmap.MADV_WILLNEED)


def advise(data: Shaped[Tensor, "n *D"], advice: int) -> None:
    """Tell a system that listens what to do with the pages of data that lie in memory in one piece."""
    begin = data.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(ctypes.c_void_p(begin), ctypes.c_size_t(data.data_ptr() + data.nbytes - begin), advice)


@cache
def _madvise() -> Any:
    """The system's function, where there is one."""
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_WILLNEED") else None
    except (OSError, AttributeError, TypeError):
        return None
