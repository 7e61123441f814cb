"""Pool of the data that references are drawn from, with its classes and its random draws.

A `Pool` holds the data as they are stored (bytes stay bytes until a block of them is used). It gives the indices of the
data points with a label, draws n distinct ones at random, and returns data points as floating tensors.

Data that are mapped from a file are prefetched. Pages of such a file are read when they are first used, a few at a
time, while the program waits; the operating system reads megabytes at once, in the background, if it is advised of what
will be used next (`madvise`). For data in memory the advice does nothing.
"""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from stablefield.process import move
from stablefield.seeding import generator

Values = Literal["image", "float"]

NULL_LABEL = -1  # the label of an example that is trained without its label: every data point may be its source

_PREFETCH_BYTES = 2**24  # read ahead at a time


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """Data set, or a view of one, that references are drawn from.

    `subset` and `mirrored` return views, which share the data and hold the indices of their data points in them.

    Attributes:
        data: (N, *D), floating, or uint8 with values 0 .. num_levels - 1 that stand for [-1, 1].
        labels: class of each data point, (n,), counted from 0; None for data without labels.
        num_levels: number of values of quantized (uint8) data; 256 for photographs.
        view_index: for a view, the index in `data` of each data point: k, or N + k for the mirror image of k. None
            means all data, in order.
        values: "image" (one or three channels, in [-1, 1]) or "float" (any numbers, never clipped or drawn). By default
            bytes of one or three channels are images and everything else is floats.

    Raises:
        ValueError: the data are empty, of another type or not finite; the labels do not fit; or images of another
            shape or outside [-1, 1].
    """

    data: Tensor
    labels: Int[Tensor, "n"] | None = None
    num_levels: int = 256
    view_index: Int[Tensor, "n"] | None = None
    values: Values | None = None
    _indices: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.data.ndim < 2 or len(self) == 0:
            raise ValueError(f"data must be (N, *D) with N and D at least 1, not {(len(self), *self.shape)}")
        if self.data.dtype != torch.uint8 and not self.data.is_floating_point():
            raise ValueError(f"data must be uint8 or floating, not {self.data.dtype}")
        # In parts, because data mapped from a file may be larger than memory. The data of a view were checked before.
        unchecked = () if self.view_index is not None or self.data.dtype == torch.uint8 else self.data.split(1024)
        for number, part in enumerate(unchecked):
            if not torch.isfinite(part).all():
                first = 1024 * number + int((~part.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(f"data contains values that are not finite, first in data point {first}")
        object.__setattr__(self, "values", values_of(self.values, self.data.dtype == torch.uint8, self.shape))
        if self.images and unchecked:
            _refuse_beyond(unchecked)
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(
                f"labels must have the shape {(len(self),)}, one per data point, not {tuple(self.labels.shape)}"
            )
        if self.labels is not None and int(self.labels.min()) < 0:
            raise ValueError(f"labels must count from 0; the smallest is {int(self.labels.min())}")

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", {self.num_classes} classes"
        return f"Pool({(len(self), *self.shape)} {str(self.data.dtype).removeprefix('torch.')}{labels})"

    def __len__(self) -> int:
        return len(self.data if self.view_index is None else self.view_index)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape D of one data point."""
        return tuple(self.data.shape[1:])

    @property
    def images(self) -> bool:
        """True for images in [-1, 1], which are displayed and written as bytes."""
        return self.values == "image"

    @property
    def nbytes(self) -> int:
        """Bytes of the data that the pool refers to; what a view leaves out does not count."""
        return len(self._used()) * self.data[0].nbytes

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def subset(self, index: Int[Tensor, "m"]) -> "Pool":
        """View of some of the data points, in this order; no data are copied.

        Args:
            index: indices in this pool.
        """
        return replace(self, labels=self.label(index), view_index=self._view_index()[index.cpu()])

    def mirrored(self) -> "Pool":
        """View of all data points followed by their mirror images, flipped along the last dimension.

        Raises:
            ValueError: the data are not images (C, H, W).
        """
        if len(self.shape) != 3:
            raise ValueError(f"only images (C, H, W) can be mirrored, not data of shape {self.shape}")
        index, total = self._view_index(), len(self.data)
        labels = None if self.labels is None else self.labels.repeat(2)
        return replace(self, labels=labels, view_index=torch.cat([index, (index + total) % (2 * total)]))

    def to(self, device: torch.device) -> "Pool":
        """Copy of the data points on a device, which takes `nbytes` of memory; the labels stay on the CPU.

        Args:
            device: device of the copy.
        """
        total, view_index, used = len(self.data), self._view_index(), self._used()
        data = torch.empty(len(used), *self.shape, dtype=self.data.dtype, device=device)
        for part in torch.arange(len(used)).split(4096):  # data mapped from a file may be larger than memory
            data[part[0] : part[-1] + 1] = self.data.index_select(0, used[part].to(self.data.device))
        view_index = torch.searchsorted(used, view_index % total) + len(used) * (view_index // total)
        whole = torch.equal(view_index, torch.arange(len(used)))
        return replace(self, data=data, view_index=None if whole else view_index)

    def indices(self, label: int) -> Int[Tensor, "m"]:
        """Indices of the data points with a label, on the CPU.

        Args:
            label: a class, or `NULL_LABEL` for all data points.

        Raises:
            ValueError: the pool has no labels, or no data point with this one.
        """
        if label not in self._indices:
            self._indices[label] = self._find(label)
        return self._indices[label]

    def label(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n"] | None:
        """Labels of some data points; None for a pool without labels.

        Args:
            index: indices in this pool.
        """
        return None if self.labels is None else self.labels[index.to(self.labels.device)]

    def take(self, index: Int[Tensor, "n"], device: torch.device | None = None) -> Float[Tensor, "n *D"]:
        """Some data points as floating data (bytes decoded to [-1, 1] in float32).

        Args:
            index: indices in this pool.
            device: where they go, as they are stored, and are decoded; the pool's device by default.
        """
        return self.decode(move(self.stored(index), device or self.data.device))

    def stored(self, index: Int[Tensor, "n"]) -> Shaped[Tensor, "n *D"]:
        """Some data points as they are stored: bytes, or floating data.

        Args:
            index: indices in this pool.
        """
        # index_select copies whole data points, several times faster than self.data[index]
        device, total = self.data.device, len(self.data)
        if self.view_index is None:
            return self.data.index_select(0, move(index, device))
        source = self.view_index[index.cpu()]
        stored = self.data.index_select(0, move(source % total, device))
        if len(mirrored := (source >= total).nonzero().flatten()):
            mirrored = move(mirrored, device)
            stored[mirrored] = stored[mirrored].flip(-1)
        return stored

    @property
    def affine(self) -> tuple[float, float]:
        """Scale and shift of the decoding: a stored value v stands for scale * v + shift."""
        return (1.0, 0.0) if self.data.is_floating_point() else (2 / (self.num_levels - 1), -1.0)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored values as floating data, in [-1, 1] for bytes.

        Args:
            stored: values as `stored` returns them.
        """
        return stored if stored.is_floating_point() else stored.float().div_((self.num_levels - 1) / 2).sub_(1)

    def blocks(self, label: int, size: int, device: torch.device | None = None) -> Iterator[Float[Tensor, "n *D"]]:
        """Data points with a label as floating data, in blocks.

        Args:
            label: a class, or `NULL_LABEL` for all data points.
            size: data points per block.
            device: where they go, as they are stored, and are decoded; the pool's device by default.
        """
        device = device or self.data.device
        return (self.decode(move(block, device)) for block in self.stored_blocks(label, size))

    def stored_blocks(self, label: int, size: int) -> Iterator[Shaped[Tensor, "n *D"]]:
        """Data points with a label as they are stored, in blocks.

        Args:
            label: a class, or `NULL_LABEL` for all data points.
            size: data points per block.
        """
        if label == NULL_LABEL and self.view_index is None:
            return _prefetched_blocks(self.data, size)
        return map(self.stored, self.indices(label).split(size))

    def evenly_spaced(self, most: int) -> Int[Tensor, "n"]:
        """Indices of evenly spaced data points, which represent a data set that is ordered by class.

        Args:
            most: number of data points, of a pool with fewer all.
        """
        n = min(most, len(self))
        return torch.arange(n) * len(self) // n

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Int[Tensor, "n"]:
        """Indices of n distinct random data points with a label, in random order.

        Args:
            n: number of data points; a class with fewer is drawn completely.
            label: a class, or `NULL_LABEL` for all data points.
            generator: source of randomness; None for torch's default.
        """
        candidates = self.indices(label)
        return candidates[draw_without_replacement(len(candidates), min(n, len(candidates)), generator)]

    def draw_by_class(self, n: int, labels: Int[Tensor, "G"], seed: int) -> Int[Tensor, "G m"]:
        """Indices of n distinct random data points of each of some classes, in random order.

        The draw of a class depends on the seed and the class alone. A class of at most n data points is drawn
        completely, in its own order, and its row is filled up with -1. Larger classes of up to 2^k data points share
        one random order of the numbers below 2^k, of which each takes those below its size, so that each of its ordered
        draws is equally likely.

        Args:
            n: number of data points.
            labels: the classes.
            seed: seed of the draws.

        Raises:
            ValueError: as for `indices`.
        """
        if self.labels is None:
            raise ValueError(f"label {int(labels[0])} was given, but the pool has no labels")
        ordered, ends = self._sorted_by_class
        sizes = ends.diff(prepend=ends.new_zeros(1))
        if len(unknown := labels[(labels >= len(sizes)) | (sizes[labels.clamp(max=len(sizes) - 1)] == 0)]):
            self._find(int(unknown[0]))
        size, first = sizes[labels], (ends - sizes)[labels]
        # exponent of the smallest power of 2 that is not below the size; -1 for classes that are drawn completely
        bits = torch.frexp((size - 1).double()).exponent.where(size > n, -1)
        found = torch.full((len(labels), min(n, int(size.max()))), -1)
        for k in bits.unique().tolist():
            if k < 0:
                order = torch.arange(found.shape[1])
            else:  # at least half of the numbers are below the size of each class: in four times as many, n of them are
                order = draw_without_replacement(2**k, min(2**k, 4 * n + 64), generator(seed, "classes", k))
            alike = (bits == k).nonzero().flatten()
            below = order < size[alike, None]
            place = below.cumsum(1)
            row, column = (below & (place <= n)).nonzero().unbind(1)
            found[alike[row], place[row, column] - 1] = ordered[first[alike][row] + order[column]]
        return found

    @cached_property
    def _sorted_by_class(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "C"]]:
        """Indices of all data points, sorted by class, and where the data points of each class end."""
        assert self.labels is not None
        return self.labels.cpu().argsort(stable=True), self.labels.cpu().bincount().cumsum(0)

    def _view_index(self) -> Int[Tensor, "n"]:
        return torch.arange(len(self.data)) if self.view_index is None else self.view_index

    def _used(self) -> Int[Tensor, "_"]:
        """Indices in `data` that the pool refers to, ascending."""
        return torch.arange(len(self.data)) if self.view_index is None else (self.view_index % len(self.data)).unique()

    def _find(self, label: int) -> Tensor:
        if label == NULL_LABEL:
            return torch.arange(len(self))
        if self.labels is None:
            raise ValueError(f"label {label} was given, but the pool has no labels")
        index = (self.labels == label).nonzero().flatten().cpu()
        if len(index) == 0:
            raise ValueError(f"no data point has label {label}; the labels are 0 to {self.num_classes - 1}")
        return index


def values_of(declared: str | None, in_bytes: bool, shape: tuple[int, ...]) -> Values:
    """Kind of the data: as declared; by default, bytes of one or three channels are images and others floats.

    Args:
        declared: "image", "float" or None.
        in_bytes: True for uint8 data.
        shape: shape of one data point.

    Raises:
        ValueError: an unknown declaration, or images of a shape that cannot be displayed.
    """
    displayable = len(shape) == 3 and shape[0] in (1, 3)
    if declared is None:
        return "image" if in_bytes and displayable else "float"
    if declared not in get_args(Values):
        raise ValueError(f"values must be {' or '.join(get_args(Values))}, not {declared!r}")
    if declared == "image" and not displayable:
        last = "; set channels_last=true if the channels come last" if len(shape) == 3 and shape[-1] in (1, 3) else ""
        raise ValueError(f"values=image needs data of shape (1 or 3, H, W), not {shape}{last}")
    return "image" if declared == "image" else "float"


def _refuse_beyond(parts: Sequence[Tensor], rounding: float = 1e-3) -> None:
    """Refuse images outside [-1, 1] by more than rounding, which would be clipped."""
    low, high = torch.stack([torch.stack(part.aminmax()) for part in parts]).double().unbind(1)
    least, most = float(low.min()), float(high.max())
    if least < -1 - rounding or most > 1 + rounding:
        raise ValueError(
            f"values=image needs floats in [-1, 1], but these are {least:.4g} to {most:.4g}: rescale them, or set "
            "values=float"
        )


def draw_without_replacement(total: int, n: int, generator: torch.Generator | None = None) -> Int[Tensor, "n"]:
    """Random draw of n distinct integers below `total`, every ordered draw equally likely.

    Shuffling all integers for a short draw would cost O(total); integers drawn with replacement, of which only the
    first occurrences are kept, have the same distribution.

    Args:
        total: number of integers to draw from.
        n: number of integers drawn, at most `total`.
        generator: source of randomness; None for torch's default.
    """
    if 2 * n >= total:
        return torch.randperm(total, generator=generator)[:n]
    seen = torch.empty(0, dtype=torch.int64)
    while len(seen) < n:
        seen = torch.cat([seen, torch.randint(total, (n + 16,), generator=generator)])
        seen = seen[first_of(seen)]
    return seen[:n]


def first_of(numbers: Int[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Mask of the first occurrence of each number.

    Args:
        numbers: integers.
    """
    ordered, position = numbers.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(is_first).scatter_(0, position, is_first)


def _prefetched_blocks(data: Shaped[Tensor, "n *D"], size: int) -> Iterator[Shaped[Tensor, "m *D"]]:
    """The parts of `data.split(size)`; while one is used, the operating system reads the next."""
    ahead, advised = max(size, _PREFETCH_BYTES // max(1, data[:1].nbytes)), 0
    for start in range(0, len(data), size):
        while advised < min(len(data), start + size + ahead):
            _prefetch(data[advised : advised + ahead])
            advised += ahead
        yield data[start : start + size]


def _prefetch(data: Shaped[Tensor, "n *D"]) -> None:
    """Advise the operating system that data will be used soon; this copies nothing and does not wait."""
    if _madvise() is not None and data.device.type == "cpu" and data.is_contiguous():
        _advise(data, mmap.MADV_WILLNEED)


def _advise(data: Shaped[Tensor, "n *D"], advice: int) -> None:
    """Call `madvise` for the pages of contiguous data."""
    begin = data.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(ctypes.c_void_p(begin), ctypes.c_size_t(data.data_ptr() + data.nbytes - begin), advice)


@cache
def _madvise() -> Any:
    """The C library's `madvise`, or None where there is none."""
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_WILLNEED") else None
    except (OSError, AttributeError, TypeError):
        return None
