"""Data sets that are yet to be read or written: their size and labels, and the data themselves in blocks.

Everything that writes data (a store, a ZIP file, an array archive) consumes these blocks, so that a data set is never
in memory as a whole. The hash and the summary of a data set are computed in blocks too.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from stablefield.pool import NULL_LABEL, Pool, Values

Progress = Callable[[int, int], None]  # called with (done, total)
StageProgress = Callable[[str], AbstractContextManager[Progress]]  # title of a stage -> its progress callback

_BLOCK = 256  # data points per block
_SAMPLE = 512  # data points whose range of values is looked at
_SIGMA_DATA = 0.5  # the standard deviation that networks and noise levels are made for


def silent(done: int, total: int) -> None:
    """Progress callback that does nothing.

    Args:
        done: number of items that are done.
        total: number of items in all.
    """


def silent_stage(title: str) -> AbstractContextManager[Progress]:
    """Progress of a stage that displays nothing.

    Args:
        title: ignored.
    """
    return nullcontext(silent)


@dataclass(frozen=True, eq=False)
class Contents:
    """Data set that is read in blocks, anew on each use.

    Attributes:
        count: number of data points, N.
        blocks: returns an iterator over the data in order, as uint8 or float32 arrays (n, *D); it may be called more
            than once.
        labels: class of each data point, counted from 0; None for data without labels.
        classes: names of the classes, as far as they are known.
        num_levels: number of values of quantized (uint8) data; 256 for photographs.
        values: "image" or "float", as in `Pool`; by default the type and shape decide.
        notes: lines that say what was changed or passed over; complete when all blocks have been read.
    """

    count: int
    blocks: Callable[[], Iterator[Shaped[np.ndarray, "n *D"]]]
    labels: Int64[np.ndarray, "N"] | None = None
    classes: tuple[str, ...] = field(default=())
    num_levels: int = 256
    values: Values | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_pool(cls, pool: Pool, classes: tuple[str, ...] = ()) -> "Contents":
        """The data of a pool.

        Args:
            pool: the data, or a view of them.
            classes: names of the classes, if they are known.
        """
        labels = None if pool.labels is None else pool.labels.cpu().numpy()

        def blocks() -> Iterator[Shaped[np.ndarray, "n *D"]]:
            return (block.cpu().numpy() for block in pool.stored_blocks(NULL_LABEL, _BLOCK))

        return cls(len(pool), blocks, labels, classes, pool.num_levels, pool.values)

    def checked_blocks(self) -> Iterator[Shaped[np.ndarray, "n *D"]]:
        """The blocks.

        Raises:
            ValueError: blocks differ in type or shape, or values are not finite.
        """
        first, done = None, 0
        for block in self.blocks():
            kind = f"{block.dtype} {block.shape[1:]}"
            first = first or kind
            if kind != first:
                raise ValueError(
                    f"all data must have the same type and shape, but data point {done} is {kind}, the first {first}"
                )
            if block.dtype.kind == "f" and not np.isfinite(block).all():
                raise ValueError("data contains values that are not finite")
            yield block
            done += len(block)

    def array(self, progress: Progress = silent) -> Shaped[np.ndarray, "N *D"]:
        """The data as one array in memory.

        Args:
            progress: called with (data points read, total).

        Raises:
            ValueError: as for `checked_blocks`.
        """
        blocks = self.checked_blocks()
        first, done = next(blocks), 0
        data = np.empty((self.count, *first.shape[1:]), first.dtype)
        for block in chain([first], blocks):
            data[done : done + len(block)] = block
            done += len(block)
            progress(done, self.count)
        return data


def content_hash(pool: Pool) -> str:
    """SHA-256 of the data and their labels: equal data have equal hashes, whatever file they were read from.

    The type, the shape and num_levels are part of it. Whether data are images or floats is not.

    Args:
        pool: the data, or a view of them.
    """
    contents, dtype = Contents.from_pool(pool), np.dtype(str(pool.data.dtype).removeprefix("torch."))
    return hash_blocks(contents, (len(pool), *pool.shape), dtype, contents.blocks())


def hash_blocks(
    contents: Contents, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[Shaped[np.ndarray, "n *D"]]
) -> str:
    """`content_hash` of data that are read block by block for another purpose, too.

    Args:
        contents: the data, for their labels and number of levels.
        shape: (N, *D).
        dtype: type of the data.
        blocks: all data, in order.
    """
    digest = hashlib.sha256(f"{dtype.name} {tuple(shape)} {contents.num_levels}".encode())
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    labels = contents.labels
    digest.update(b"no labels" if labels is None else b"labels" + labels.astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class DataSummary:
    """Mean and spread of data as networks see them: bytes in [-1, 1], floats as they are.

    Attributes:
        mean: mean of all values.
        std: standard deviation of all values around it, an estimate of `sigma_data`.
        minimum: smallest value.
        maximum: largest value.
        class_counts: number of data points of each class; empty for data without labels.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    class_counts: tuple[int, ...]

    @classmethod
    def from_pool(cls, pool: Pool) -> "DataSummary":
        """The summary of a pool, in one pass over the data; sums are in float64.

        Args:
            pool: the data, or a view of them.
        """
        moments, ends = zip(*(_moments(block.double()) for block in pool.blocks(NULL_LABEL, _BLOCK)), strict=True)
        total = len(pool) * math.prod(pool.shape)
        first, second = (float(moment) / total for moment in torch.stack(moments).sum(0))
        counts = () if pool.labels is None else _class_counts(pool.labels)
        low, high = float(torch.stack(ends)[:, 0].min()), float(torch.stack(ends)[:, 1].max())
        return cls(first, max(0.0, second - first**2) ** 0.5, low, high, counts)


def _class_counts(labels: Tensor, most: int = 2**20) -> tuple[int, ...]:
    """Number of data points of each class; labels are refused that would need more memory than data."""
    if int(labels.max()) >= most:
        raise ValueError(f"labels must be below {most:,}, not {int(labels.max()):,}; number the classes from 0")
    return tuple(torch.bincount(labels).tolist())


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the values and their squares, and the smallest and largest value."""
    return torch.stack([values.sum(), values.square().sum()]), torch.stack(values.aminmax())


def range_question(pool: Pool, sigma_data: float | None = None) -> str | None:
    """One line about values that may be on another scale than the user thinks; None if there is nothing to ask.

    Questioned are constant data, bytes that use less than an eighth of their levels, floats in [0, 1], and a standard
    deviation that is more than three times larger or smaller than `sigma_data`. Evenly spaced data points are looked
    at, as many as it takes to see this.

    Args:
        pool: the data.
        sigma_data: standard deviation of the data that the configuration assumes; by default 0.5.
    """
    stored = pool.stored(pool.evenly_spaced(_SAMPLE))
    values = pool.decode(stored).double()
    low, high = stored.min().item(), stored.max().item()
    std = float(values.std(correction=0)) if values.numel() > 1 else 0.0
    found = f"range of values {low:.4g} to {high:.4g}, standard deviation {std:.3g}"
    if low == high:
        return f"{found}: all values are equal; are these the right data?" if values.numel() > 1 else None
    if not stored.is_floating_point() and pool.num_levels > 8 and high < pool.num_levels // 8:
        return (
            f"{found}: bytes use few of their {pool.num_levels} levels, of which 0 stands for -1 and "
            f"{pool.num_levels - 1} for 1; multiply them, or store num_levels={high + 1} beside them in an .npz file"
        )
    sigma = _SIGMA_DATA if sigma_data is None else sigma_data
    expected = f"but {'about 0.5 is expected' if sigma_data is None else f'sigma_data is {sigma_data:g}'}"
    advice = f"rescale them, or set preconditioning.sigma_data={std:.2g} if they are meant to be so"
    if stored.is_floating_point() and low >= 0 and high <= 1 and abs(sigma - _SIGMA_DATA) < 0.05:
        return f"{found}, {expected}: images in [0, 1]? Those of [-1, 1] are expected; {advice}"
    if not sigma / 3 <= std <= 3 * sigma:
        return f"{found}, {expected}; {advice}"
    return None
