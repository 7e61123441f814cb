"""In which order data are seen: epoch after epoch, each in its own random order.

Image number p of a run is a function of (seed, p), so a batch is a function of (seed, images seen): nothing has to be
remembered to continue where a run stopped.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.reference import Pool
from stablefield.seeding import generator


@dataclass(frozen=True, eq=False)
class Batch:
    """Clean data, which members of the pool they are (on the CPU), and their classes if the pool has any."""

    x: Float[Tensor, "B *D"]
    index: Int[Tensor, "B"]
    label: Int[Tensor, "B"] | None


@dataclass(frozen=True)
class Shuffled:
    """The batch that follows after so many images.

    Attributes:
        pool: the data.
        size: images a batch; it may be larger than the pool.
        seed: decides the order.
    """

    pool: Pool
    size: int
    seed: int = 0

    def __call__(self, images: int) -> Batch:
        """Images number `images` to `images + size - 1` of the run."""
        total = len(self.pool)
        first, last = images // total, (images + self.size - 1) // total
        order = torch.cat([_order(self.seed, epoch, total) for epoch in range(first, last + 1)])
        index = order[images - first * total :][: self.size]
        labels = self.pool.labels
        label = None if labels is None else labels[index.to(labels.device)]
        return Batch(self.pool.take(index), index, label)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, "order", epoch))
