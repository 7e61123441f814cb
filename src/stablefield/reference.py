"""Where references come from: a pool of data, its draws, and its classes.

A `Pool` holds the data as they are stored (bytes stay bytes until a block of them is used), and answers three
questions: which members carry a label, which n distinct ones a draw picks, and what some of them look like.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stablefield.ahead import in_turn

Values = Literal["image", "float"]

ALL = -1  # the label of a row of which the network is told nothing: every member may be its source


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """Data to draw references from.

    A pool may be a view: `subset` and `mirrored` copy no data, but say where the members are found in them.

    Attributes:
        data: (N, *D), floating, or uint8 with values 0 .. levels - 1 that stand for [-1, 1].
        labels: the class of each member, (n,), or None.
        levels: how many values a byte takes; 256 for photographs.
        places: of a view, which of the data each member is: k, or N + k for the mirror image of k. None: all, in order.
        values: what the data are: "image" (one or three channels, in [-1, 1]) or "float" (any numbers, never clipped
            or drawn). By default bytes of one or three channels are images, and everything else is floats.

    Raises:
        ValueError: no data, another type, a floating number that is not finite, labels that do not fit, or images of
            another shape or beyond [-1, 1].
    """

    data: Tensor
    labels: Int[Tensor, "n"] | None = None
    levels: int = 256
    places: Int[Tensor, "n"] | None = None
    values: Values | None = None
    _members: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.data.ndim < 2 or len(self) == 0:
            raise ValueError(f"data must be (N, *D) with N and D at least 1, not {(len(self), *self.shape)}")
        if self.data.dtype != torch.uint8 and not self.data.is_floating_point():
            raise ValueError(f"data must be uint8 or floating, not {self.data.dtype}")
        # in parts: data mapped from a file may be larger than memory (and what is viewed has been looked at before)
        unseen = () if self.places is not None or self.data.dtype == torch.uint8 else self.data.split(1024)
        if not all(torch.isfinite(part).all() for part in unseen):
            raise ValueError("data holds numbers that are not finite")
        object.__setattr__(self, "values", values_of(self.values, self.data.dtype == torch.uint8, self.shape))
        if self.images and unseen:
            _refuse_beyond(unseen)
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(f"{len(self)} members need as many labels, not {tuple(self.labels.shape)}")
        if self.labels is not None and int(self.labels.min()) < 0:
            raise ValueError(f"labels count from 0; the least is {int(self.labels.min())}")

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", {self.classes} classes"
        return f"Pool({(len(self), *self.shape)} {str(self.data.dtype).removeprefix('torch.')}{labels})"

    def __len__(self) -> int:
        return len(self.data if self.places is None else self.places)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one member, D."""
        return tuple(self.data.shape[1:])

    @property
    def images(self) -> bool:
        """Whether the data are images in [-1, 1], to be drawn and written as bytes."""
        return self.values == "image"

    @property
    def nbytes(self) -> int:
        """What the data take that the members are found in; what a view leaves out does not count."""
        return len(self._kept()) * self.data[0].nbytes

    @property
    def classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def subset(self, index: Int[Tensor, "m"]) -> "Pool":
        """Some of the members, in this order, as a pool; no data are copied."""
        return replace(self, labels=self.label(index), places=self._places()[index.cpu()])

    def mirrored(self) -> "Pool":
        """All members and then their mirror images, flipped along the last dimension; no data are copied.

        Raises:
            ValueError: these are no images (C, H, W).
        """
        if len(self.shape) != 3:
            raise ValueError(f"only images (C, H, W) have mirror images; these data are {self.shape}")
        here, total = self._places(), len(self.data)
        labels = None if self.labels is None else self.labels.repeat(2)
        return replace(self, labels=labels, places=torch.cat([here, (here + total) % (2 * total)]))

    def to(self, device: torch.device) -> "Pool":
        """The same members with memory of their own on a device, for `nbytes` of data and no more."""
        total, places = len(self.data), self._places()
        kept = self._kept()
        data = torch.empty(len(kept), *self.shape, dtype=self.data.dtype, device=device)
        for part in torch.arange(len(kept)).split(4096):  # what is mapped may be larger than memory
            data[part[0] : part[-1] + 1] = self.data.index_select(0, kept[part].to(self.data.device))
        places = torch.searchsorted(kept, places % total) + len(kept) * (places // total)
        labels = None if self.labels is None else self.labels.to(device)
        whole = torch.equal(places, torch.arange(len(kept)))
        return replace(self, data=data, labels=labels, places=None if whole else places)

    def members(self, label: int) -> Int[Tensor, "m"]:
        """Where the members of a class stand; all of them for the label -1.

        Raises:
            ValueError: the pool has no labels, or no member with this one.
        """
        if label not in self._members:
            self._members[label] = self._find(label)
        return self._members[label]

    def label(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n"] | None:
        """The labels of members, if the pool has any."""
        return None if self.labels is None else self.labels[index.to(self.labels.device)]

    def take(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n *D"]:
        """Members as floating data (bytes decoded to [-1, 1] in float32), on the pool's device."""
        return self.decode(self.stored(index))

    def stored(self, index: Int[Tensor, "n"]) -> Shaped[Tensor, "n *D"]:
        """Members as they are stored: bytes, or floating data."""
        # index_select copies whole members, several times faster than self.data[index]
        if self.places is None:
            return self.data.index_select(0, index.to(self.data.device))
        place, total = self.places[index.cpu()].to(self.data.device), len(self.data)
        found = self.data.index_select(0, place % total)
        mirrored = (place >= total).nonzero().flatten()
        if len(mirrored):
            found[mirrored] = found[mirrored].flip(-1)
        return found

    @property
    def affine(self) -> tuple[float, float]:
        """(scale, shift) such that a stored value stands for scale * value + shift."""
        return (1.0, 0.0) if self.data.is_floating_point() else (2 / (self.levels - 1), -1.0)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored values as floating data."""
        return stored if stored.is_floating_point() else stored.float().div_((self.levels - 1) / 2).sub_(1)

    def blocks(self, label: int, size: int) -> Iterator[Float[Tensor, "n *D"]]:
        """All members that carry a label (-1: all there are), `size` at a time."""
        return map(self.decode, self.stored_blocks(label, size))

    def stored_blocks(self, label: int, size: int) -> Iterator[Shaped[Tensor, "n *D"]]:
        """The same as they are stored."""
        if label == ALL and self.places is None:
            return in_turn(self.data, size)
        return map(self.stored, self.members(label).split(size))

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Int[Tensor, "n"]:
        """An ordered draw of n distinct members that carry a label (-1: of all). A smaller class is drawn whole."""
        members = self.members(label)
        return members[distinct(len(members), min(n, len(members)), generator)]

    def _places(self) -> Int[Tensor, "n"]:
        return torch.arange(len(self.data)) if self.places is None else self.places

    def _kept(self) -> Int[Tensor, "_"]:
        """Which of the data the members are found in, ascending."""
        return torch.arange(len(self.data)) if self.places is None else (self.places % len(self.data)).unique()

    def _find(self, label: int) -> Tensor:
        if label == ALL:
            return torch.arange(len(self))
        if self.labels is None:
            raise ValueError(f"rows carry labels (here {label}), but the pool has none to compare with")
        members = (self.labels == label).nonzero().flatten().cpu()
        if len(members) == 0:
            raise ValueError(f"no member of the pool has label {label}; there are 0 to {self.classes - 1}")
        return members


def values_of(declared: str | None, in_bytes: bool, shape: tuple[int, ...]) -> Values:
    """What data are, as declared; by default bytes of one or three channels are images, and everything else is floats.

    Raises:
        ValueError: a declaration that does not exist, or images of a shape that cannot be drawn.
    """
    drawable = len(shape) == 3 and shape[0] in (1, 3)
    if declared is None:
        return "image" if in_bytes and drawable else "float"
    if declared not in get_args(Values):
        raise ValueError(f"values of data are {' or '.join(get_args(Values))}, not {declared!r}")
    if declared == "image" and not drawable:
        last = "; channels that come last need channels_last=true" if len(shape) == 3 and shape[-1] in (1, 3) else ""
        raise ValueError(f"values=image needs images (1 or 3, H, W), and these data are {shape}{last}")
    return "image" if declared == "image" else "float"


def _refuse_beyond(parts: Sequence[Tensor], rounding: float = 1e-3) -> None:
    """Raises:
    ValueError: numbers beyond [-1, 1] by more than rounding, which images would lose.
    """
    low, high = torch.stack([torch.stack(part.aminmax()) for part in parts]).double().unbind(1)
    least, most = float(low.min()), float(high.max())
    if least < -1 - rounding or most > 1 + rounding:
        raise ValueError(
            f"values=image needs floats in [-1, 1], and these are {least:.4g} to {most:.4g}: bring them to that range, "
            "or leave them as values=float"
        )


def distinct(total: int, n: int, generator: torch.Generator | None = None) -> Int[Tensor, "n"]:
    """n different numbers below `total`, in random order: every ordered choice equally likely.

    A long shuffle for a short draw would cost O(total); numbers drawn with replacement and taken when first seen
    have the same law.
    """
    if 2 * n >= total:
        return torch.randperm(total, generator=generator)[:n]
    seen = torch.empty(0, dtype=torch.int64)
    while len(seen) < n:
        more = torch.randint(total, (n + 16,), generator=generator)
        seen = first_seen(torch.cat([seen, more]))
    return seen[:n]


def first_seen(numbers: Int[Tensor, "n"]) -> Int[Tensor, "m"]:
    """Each number once, in the order in which they first appear."""
    ordered, where = numbers.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return numbers[where[first].sort().values]
