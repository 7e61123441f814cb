"""A data set that no rank holds alone: each has every G-th member, and they answer all rows together.

The posterior is made of sums over members (the lowest energy, the normaliser, the weighted sum), and sums of parts
merge (`posterior.Sums.merge`, log-sum-exp). So each rank takes the rows of all, sums over its own members, and the sums
are gathered: equal to one rank with all members, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stablefield.posterior import Sums
from stablefield.process import Perturbed
from stablefield.reference import Pool


def _alone(rows: Tensor) -> Tensor:
    return rows


def _as_it_is(pool: Pool) -> Pool:
    return pool


@dataclass(frozen=True)
class Shards:
    """One rank's place among those that share a data set.

    Attributes:
        rank: its number, from 0.
        total: how many there are.
        gather: the rows of all ranks, in their order, on every rank; each gives equally many (`Ranks.gather`).
        keep: what is done with the members that this rank holds, once: such as bringing them to its device, without
            the others'. Data mapped from a file may stay there: processes of one machine share its pages, and none
            holds them.
    """

    rank: int = 0
    total: int = 1
    gather: Callable[[Tensor], Tensor] = _alone
    keep: Callable[[Pool], Pool] = _as_it_is

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.total:
            raise ValueError(f"rank {self.rank} is none of {self.total}, which count from 0")

    def own(self, pool: Pool) -> Pool:
        """What this rank holds of a pool: member i is rank + total * i of all. Nothing is copied, unless to be kept.

        Raises:
            ValueError: there are more ranks than members.
        """
        if len(pool) < self.total:
            raise ValueError(f"{len(pool)} members cannot be shared out among {self.total} ranks: use fewer")
        return pool if self.total == 1 else self.keep(pool.subset(torch.arange(self.rank, len(pool), self.total)))

    def place(self, index: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Where members of the pool stand in this rank's; -1 for those that others hold."""
        return torch.where(index % self.total == self.rank, index // self.total, -1)

    def first(self, values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """What the first rank says: of what each finds out for itself, and machines may differ in the last digit."""
        return self.gather(values[None])[0].to(values.device)

    def least(self, values: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The smallest of what the ranks say of each row."""
        return self.gather(values[None]).amin(0)

    def sum(self, values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
        """The sum of what the ranks say."""
        return self.gather(values[None]).sum(0)

    def merge(self, sums: Sums) -> Sums:
        """The sums of all ranks, for the same rows, as one."""
        if self.total == 1:
            return sums
        first, *others = self.gather(sums.state()[None]).unbind(0)
        merged = sums.at(first)
        for other in others:
            merged = merged.merge(sums.at(other))
        return merged

    def everyone(self, noisy: Perturbed) -> Perturbed:
        """The rows of all ranks.

        Raises:
            ValueError: some ask about more than others, on all ranks.
        """
        each = self.gather(torch.tensor([len(noisy)], device=noisy.x_t.device)).tolist()
        if len(set(each)) > 1:
            raise ValueError(f"ranks that share the data out must ask about equally many rows, and not {each}")
        # back to where they were: members of the data are looked up on the CPU
        return noisy.each(lambda values: self.gather(values).to(values.device))

    def mine(self, rows: int) -> slice:
        """Which of everyone's rows are this rank's."""
        each = rows // self.total
        return slice(each * self.rank, each * (self.rank + 1))


ALONE = Shards()
