"""One process's shard of a data set that is distributed over several processes.

The posterior consists of sums over candidates (the smallest energy, the normaliser, the weighted sum), and sums of
parts merge (log-sum-exp). So each process sums over its own data points for the examples of all, and the sums are
gathered: equal to one process with all data, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stablefield.kernel.accumulator import PosteriorAccumulator
from stablefield.pool import Pool


def _identity(values: Tensor) -> Tensor:
    return values


def _unchanged(pool: Pool) -> Pool:
    return pool


@dataclass(frozen=True)
class Shard:
    """Rank of a process and number of processes; data point i belongs to the shard of rank i % total.

    Attributes:
        rank: number of this process, from 0.
        total: number of processes.
        gather: all-gather: concatenates equally many rows of every process, in the order of ranks, on every process
            (`Ranks.all_gather`); the identity for one process.
        keep: function applied once to the shard of a larger data set, for example to copy it to the device. The default
            leaves the view unchanged, which suits memory-mapped data: processes of one machine share the memory.

    Raises:
        ValueError: the rank is not in 0 .. total - 1.
    """

    rank: int = 0
    total: int = 1
    gather: Callable[[Tensor], Tensor] = _identity
    keep: Callable[[Pool], Pool] = _unchanged

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.total:
            raise ValueError(f"rank must be between 0 and {self.total - 1}, not {self.rank}")

    def own(self, pool: Pool) -> Pool:
        """The shard of this process; its data point i is data point rank + total * i of the whole data set.

        Args:
            pool: the whole data set. The shard is a view of it, unless `keep` copies it.

        Raises:
            ValueError: more processes than data points.
        """
        if len(pool) < self.total:
            raise ValueError(f"{len(pool)} data points cannot be sharded over {self.total} ranks; use fewer ranks")
        return pool if self.total == 1 else self.keep(pool.subset(torch.arange(self.rank, len(pool), self.total)))

    def position(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Positions of data points in this process's shard; -1 for those in other shards.

        Args:
            index: data points of the whole pool.
        """
        return torch.where(index % self.total == self.rank, index // self.total, -1)

    def broadcast(self, values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """The values of rank 0, for results that machines may compute differently in the last digit.

        Args:
            values: of the same shape on every process.
        """
        return self.gather(values[None])[0].to(values.device)

    def minimum(self, values: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Elementwise minimum over the processes.

        Args:
            values: of the same shape on every process.
        """
        return self.gather(values[None]).amin(0)

    def sum(self, values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """Elementwise sum over the processes.

        Args:
            values: of the same shape on every process.
        """
        return self.gather(values[None]).sum(0)

    def merge(self, sums: PosteriorAccumulator) -> PosteriorAccumulator:
        """The sums of all processes for the same examples.

        Args:
            sums: of this process's data points.
        """
        if self.total == 1:
            return sums
        first, *others = self.gather(sums.state()[None]).unbind(0)
        merged = sums.at(first)
        for other in others:
            merged = merged.merge(sums.at(other))
        return merged


UNSHARDED = Shard()
