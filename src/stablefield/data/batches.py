"""In which order data are seen: epoch after epoch, each in its own random order.

Image number p of a run is a function of (seed, p), so a batch is a function of (seed, images seen): nothing has to be
remembered to continue where a run stopped, and each of several ranks can make its own rows of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.process import Rows
from stablefield.reference import Pool
from stablefield.seeding import generator


@dataclass(frozen=True, eq=False)
class Batch(Rows):
    """Clean data, and what is known of them.

    Attributes:
        x: the data, as the network shall see them before the noise.
        index: which members of the pool they are (on the CPU).
        number: which images of the run they are, counted from 0 over all ranks (on the CPU): what is drawn for a row
            is drawn for this number.
        label: their classes (-1: not to be told), if the pool has any.
        augmentation: how they were transformed, if the network is told.
    """

    x: Float[Tensor, "B *D"]
    index: Int[Tensor, "B"]
    number: Int[Tensor, "B"]
    label: Int[Tensor, "B"] | None = None
    augmentation: Float[Tensor, "B A"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Batch":
        """What a network sees of it, on another device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return replace(
            self,
            x=self.x.to(device, non_blocking=True),
            label=moved(self.label),
            augmentation=moved(self.augmentation),
        )

    def generators(self, seed: int, purpose: str) -> Iterator[torch.Generator]:
        """A generator for each row, which depends on its number and on nothing else."""
        return (generator(seed, purpose, number) for number in self.number.tolist())


class Batches(ABC):
    """The batch that follows after so many images.

    Attributes:
        size: images a step, over all ranks.
    """

    size: int

    @abstractmethod
    def __call__(self, images: int) -> Batch:
        """This rank's rows of images number `images` to `images + size - 1`."""


@dataclass(frozen=True)
class Shuffled(Batches):
    """Every member once an epoch, in an order of its own.

    Attributes:
        pool: the data.
        size: images a step, over all ranks; it may be larger than the pool.
        seed: decides the order.
        rank: which rank's rows.
        ranks: how many ranks share a step.

    Raises:
        ValueError: ranks cannot share a step evenly.
    """

    pool: Pool
    size: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.size % self.ranks:
            raise ValueError(f"a batch of {self.size} cannot be shared evenly by {self.ranks} ranks")

    def __call__(self, images: int) -> Batch:
        share = self.size // self.ranks
        number = images + self.rank * share + torch.arange(share)
        index = self.order(number)
        return Batch(self.pool.take(index), index, number, self.pool.label(index))

    def order(self, number: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Which members of the pool are these (consecutive) images of the run."""
        total = len(self.pool)
        first, last = int(number[0]) // total, int(number[-1]) // total
        orders = [_order(self.seed, epoch, total) for epoch in range(first, last + 1)]
        # most batches lie within one epoch, whose order need not be copied
        return (orders[0] if first == last else torch.cat(orders))[number - first * total]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, "order", epoch))
