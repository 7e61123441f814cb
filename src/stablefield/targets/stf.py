"""The Stable Target Field: the source joined by a reference batch (Xu, Tong & Jaakkola 2023, algorithm 1).

One ordered draw r_1 .. r_n without replacement serves all examples of a step. An example whose source is among
r_1 .. r_(n-1) uses all n; any other uses r_1 .. r_(n-1) and its source. So every support holds the source and n - 1
other data points, each choice of others equally likely; n = 1 is DSM bit for bit, n = N the exact target. (Drawing with
replacement and dropping the source's repeats would be biased.)

The draw is random or, for data that are slow to read at random, consists of the n data points that the run has seen
last.

Why recent data points are unbiased references. Let b be the number of a step's first image. Walk backwards through the
order of the run from image b - 1: r_1, r_2, ... are the distinct data points as they first appear. The order of each
epoch is a uniformly random permutation. So exchanging s and s' in all of them shows P(support is S | source s) =
P(support is S | source s') for all s, s' in S. Given x_t and S, then, each element of S is the source with probability
proportional to its weight, and the weighted mean over S is the conditional mean of the source: over the random order
the target is exactly unbiased. The rule may use positions in the order only, and must have the source in S. So it holds
within an epoch (where the source is never among the last seen) and across its ends (where it may be), and for the data
points of one class among r_1 .. r_n, exchanging only those of that class. As for the order itself, the mean is over
orders: given what was seen in this epoch already, the next source is one of the others, for every kind of target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior
from stablefield.pool import NULL_LABEL, Pool, first_of
from stablefield.process import NoisyBatch, move
from stablefield.seeding import generator
from stablefield.targets.base import PoolTarget, indices_of, keep_source, labels_of
from stablefield.targets.grouped import Take, mean_over
from stablefield.targets.mapped import mean_through_maps

_Mean = Callable[[NoisyBatch, Tensor, Tensor, Tensor, Take], Posterior]  # such as `mean_over`


@runtime_checkable
class ImageOrder(Protocol):
    """The order in which a run sees its data, such as `stablefield.data.ShuffledBatches`."""

    @property
    def size(self) -> int:
        """Images per step, over all ranks."""

    def order(self, number: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Data points that are these images of the run.

        Args:
            number: consecutive numbers of images; negative ones are before the first image.
        """


@dataclass(frozen=True)
class STFTarget(PoolTarget):
    """The Stable Target Field: the weighted mean over the source and size - 1 references. Unbiased for every size.

    Attributes:
        pool: the data.
        size: number of candidates in the support, including the source. Clamped to the number of data points, and to
            the size of the class for examples with a label.
        references: "dataset" draws references anew for every step; "recent" uses the data points that the run has seen
            last, so that a step reads only its own images. The latter needs `order`, and `image_number` in the batch.
        order: the order in which the run sees its data; only for recent references.
        augmented_size: the same number for examples under augmentation maps that do not permute pixels, which need
            references of their own, transformed as they are; of recent ones there are at most `size`. 1 (the source
            alone) costs nothing.

    Raises:
        ValueError: a size below 1, unknown references, or recent references without an order.
    """

    pool: Pool
    size: int = 1024
    references: Literal["dataset", "recent"] = "dataset"
    order: ImageOrder | None = field(default=None, repr=False)
    augmented_size: int = 1
    _bank: "_Bank" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, size in (("size", self.size), ("augmented_size", self.augmented_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1 (the source alone), not {size}")
        if self.references not in ("dataset", "recent"):
            raise ValueError(f'references must be "dataset" or "recent", not {self.references!r}')
        if self.references == "recent" and self.order is None:
            raise ValueError('references="recent" needs the order in which the run sees its data: pass order=')
        object.__setattr__(self, "_bank", _Bank(self.pool))

    @override
    def average(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: Int[Tensor, "B"], seed: int) -> Posterior:
        return self._mean(noisy, index, label, seed, self.size, mean_over)

    @override
    def average_through_maps(self, noisy: NoisyBatch, seed: int) -> Posterior:
        if self.keeps_source(noisy).all():
            return keep_source(noisy)
        index, label = indices_of(noisy, self.pool), labels_of(noisy)
        return self._mean(noisy, index, label, seed, self.augmented_size, mean_through_maps)

    @override
    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        sees_through = self.augmented_size > 1 and noisy.augment_map is not None
        return torch.zeros(len(noisy), dtype=torch.bool) if sees_through else super().keeps_source(noisy)

    def _mean(
        self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: Int[Tensor, "B"], seed: int, size: int, mean: "_Mean"
    ) -> Posterior:
        """Posterior mean over draws of a size; examples with and without labels have different draws."""
        null = label == NULL_LABEL
        unlabelled = bool(null.all())
        if not unlabelled and null.any():
            parts = [null.nonzero().flatten(), (~null).nonzero().flatten()]
            found = [self._mean(noisy.select(part), index[part], label[part], seed, size, mean) for part in parts]
            return Posterior.concatenate(found).select(torch.cat(parts).argsort())
        labels, group = label.unique(return_inverse=True)
        if self.references == "recent":
            recent = self._bank.hold(self._first_image(noisy), self.recent, noisy.x.device)
            drawn = recent[None] if unlabelled else _of_labels(recent, labels, self.pool)
            return mean(noisy, index, group, drawn[:, :size], self._bank.take)
        if unlabelled:
            drawn = self.pool.draw(size, NULL_LABEL, generator(seed, NULL_LABEL))[None]
        else:
            drawn = self.pool.draw_by_class(size, labels, seed)
        return mean(noisy, index, group, drawn, self.pool.take)

    def recent(self, images: int) -> Int[Tensor, "n"]:
        """The last `size` distinct data points seen before image number `images`, the latest first.

        The result is a function of the order alone, so that a resumed run needs no saved state. Before the first image
        of the run, the order continues backwards with the epoch that would have preceded it.

        Args:
            images: number of images seen before, which is the number of the next image.
        """
        assert self.order is not None
        size = min(self.size, len(self.pool))
        # twice as many images suffice: at least half of them are in one epoch, which has no repeats
        order = self.order.order(torch.arange(images - 2 * size, images)).flip(0)
        return order[first_of(order)][:size]

    def _first_image(self, noisy: NoisyBatch) -> int:
        """Number of the first image of the examples' step, on whatever rank it is."""
        assert self.order is not None
        if noisy.image_number is None:
            raise ValueError(
                "recent references need to know which images of the run the examples are: set image_number"
            )
        steps = (noisy.image_number // self.order.size).unique()
        if len(steps) > 1:
            raise ValueError(
                f"the examples belong to {len(steps)} steps of {self.order.size} images; pass those of one step"
            )
        return int(steps) * self.order.size


def _of_labels(recent: Int[Tensor, "n"], labels: Int[Tensor, "G"], pool: Pool) -> Int[Tensor, "G m"]:
    """The recent data points of each label in their order, filled up with -1."""
    assert pool.labels is not None
    fits = pool.labels[recent] == labels[:, None]
    order = (~fits).byte().argsort(stable=True)[:, : max(1, int(fits.sum(1).max()))]
    return recent[order].where(fits.gather(1, order), -1)


class _Bank:
    """The recent data points, held as they are stored; a step reads only those that are new."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.images: int | None = None
        self.wanted = self.index = torch.empty(0, dtype=torch.int64)
        self.stored = torch.empty(0)

    def hold(self, images: int, recent: Callable[[int], Int[Tensor, "n"]], device: torch.device) -> Int[Tensor, "n"]:
        """Hold the recent data points before an image, and return their indices."""
        if images != self.images:
            self.wanted = recent(images)
            self._fill(self.wanted, device)
            self.images = images
        return self.wanted

    def take(self, index: Int[Tensor, "n"], device: torch.device) -> Float[Tensor, "n *D"]:
        """Held data points as floating data, on the device that they are held on."""
        held, position = self.index.sort()
        return self.pool.decode(self.stored[move(position[torch.searchsorted(held, index)], self.stored.device)])

    def _fill(self, wanted: Int[Tensor, "n"], device: torch.device) -> None:
        """Read the data points that are not held yet into the memory of those that are not wanted any more."""
        if len(self.index) == 0:
            self.index, self.stored = wanted.clone(), move(self.pool.stored(wanted), device)
            return
        missing = wanted[~torch.isin(wanted, self.index)]
        free = (~torch.isin(self.index, wanted)).nonzero().flatten()
        self.stored[move(free, self.stored.device)] = move(self.pool.stored(missing), self.stored.device)
        self.index[free] = missing
