"""Batches of a run: one shuffled pass over the data per epoch.

Image number p of a run is a function of (seed, p), so a batch is a function of (seed, images seen): a run resumes
without any saved state of the data order, and each of several ranks can make its own part of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.pool import Pool
from stablefield.process import BatchRecord, move
from stablefield.seeding import derive_each, generator


@dataclass(frozen=True, eq=False)
class Batch(BatchRecord):
    """Clean training examples, before the noise is added.

    Attributes:
        x: the data, after augmentation.
        index: index of each example in the pool.
        image_number: number of each example in the run, counted from 0 over all ranks. Everything random about an
            example depends on this number.
        label: class of each example, `NULL_LABEL` for the null label; None if the pool has no labels.
        augment_label: augmentation label of each example; None if the network is not conditioned on augmentations.
        augment_map: affine map of each example's augmentation, as in `NoisyBatch`.

    All but x stay on the CPU, where they decide about references without a wait for a GPU.
    """

    x: Float[Tensor, "B *D"]
    index: Int[Tensor, "B"]
    image_number: Int[Tensor, "B"]
    label: Int[Tensor, "B"] | None = None
    augment_label: Float[Tensor, "B A"] | None = None
    augment_map: Float[Tensor, "B 2 3"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Batch":
        """The batch with x on another device.

        Args:
            device: the device that the network is on.
        """
        return replace(self, x=move(self.x, device))

    def generators(self, seed: int, purpose: str) -> Iterator[torch.Generator]:
        """One random generator per example, which depends only on its image number, the seed and the purpose.

        It is one object, seeded anew for each example: draw for an example before you ask for the next.

        Args:
            seed: seed of the run.
            purpose: name of the draw, so that different draws for an example are independent.
        """
        draws = torch.Generator()  # to seed a generator takes less time than to make one
        return map(draws.manual_seed, derive_each(seed, purpose, self.image_number.tolist()))


class BatchSource(ABC):
    """Base class of functions from the number of images seen to the next batch.

    Training asks for batches some steps in advance, and a run that resumes may ask for a batch again.

    Attributes:
        size: batch size, in examples per step over all ranks.
    """

    size: int

    @abstractmethod
    def __call__(self, images: int) -> Batch:
        """This rank's part of the batch of images number `images` to `images + size - 1`.

        Args:
            images: number of images that the run has seen, over all ranks.
        """


@dataclass(frozen=True)
class ShuffledBatches(BatchSource):
    """Batches in which every data point occurs once per epoch, in a new random order each time.

    Attributes:
        pool: the data.
        size: batch size, in examples per step over all ranks; it may be larger than the pool.
        seed: seed of the order.
        rank: number of this rank, from 0.
        world_size: number of ranks that share each batch.
        device: where data go, as they are stored, and are decoded; by default the device of the pool.

    Raises:
        ValueError: the batch size is not divisible by the number of ranks.
    """

    pool: Pool
    size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.size % self.world_size:
            raise ValueError(
                f"a batch of {self.size} cannot be divided evenly among {self.world_size} ranks; "
                f"choose a multiple of {self.world_size}"
            )

    @override
    def __call__(self, images: int) -> Batch:
        share = self.size // self.world_size
        number = images + self.rank * share + torch.arange(share)
        index = self.order(number)
        return Batch(self.pool.take(index, self.device), index, number, self.pool.label(index))

    def order(self, image_number: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Indices in the pool of images of the run.

        Args:
            image_number: consecutive image numbers, ascending.
        """
        total = len(self.pool)
        first, last = int(image_number[0]) // total, int(image_number[-1]) // total
        orders = [_order(self.seed, epoch, total) for epoch in range(first, last + 1)]
        # most batches lie within one epoch, whose order need not be copied
        return (orders[0] if first == last else torch.cat(orders))[image_number - first * total]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, "order", epoch))
