"""References from a rolling bank: the images that the run has seen last, for data that do not fit into memory.

`ReferenceBatch` reads n random members at each step, which is slow where each of them must come from a disk. The bank
holds the n members seen last, so that a step reads its own images and nothing else.

Why it is unbiased. Let b be the number of a step's first image. Walk backwards through the order of the run from image
b - 1: r_1, r_2, ... are the distinct members as they first appear. The order of each epoch is a permutation, all
equally likely. So what happens to a row with the source s happens to one with the source s' when s and s' are exchanged
in all of them: P(the support is S | s) = P(S | s') for all s, s' in S. Given x_t and S, then, each member of S is the
source with probability proportional to its weight, and the weighted mean over S is the mean of the source: over the
random order, the target is exactly unbiased. A rule need only know members by where they stand in the order, and have
the source in S. So it holds within an epoch (where the source is never among the last seen) and across its ends (where
it may be), and for the members of one class among r_1 .. r_n, exchanging only members of that class.

As it is for the order itself, the mean is over orders: given what has been seen in this epoch already, the next source
is one of the others, for every kind of target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.data.batches import Shuffled
from stablefield.posterior import Posterior
from stablefield.process import Perturbed
from stablefield.reference import ALL, Pool, first_seen
from stablefield.target import ByLabel, from_references


@dataclass(frozen=True)
class Rolling(ByLabel):
    """The Stable Target Field with the members seen last as references (proof at the top of this file).

    It is a function of the order and the images seen, so nothing has to be saved: a run that goes on reads its bank
    again. Before the first image stands the epoch that would have come before. All ranks have the same references, and
    each reads them from the data itself (a step's new ones have just been read by one rank or another).

    Attributes:
        order: in which the run sees its data.
        size: members of a row's support, the source counted; of a class, those that are among so many.

    Raises:
        ValueError: more than there are.
    """

    order: Shuffled
    size: int
    _bank: "_Bank" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= len(self.pool):
            raise ValueError(f"size must be between 1 and the pool's {len(self.pool)} members, not {self.size}")
        object.__setattr__(self, "_bank", _Bank(self.pool))

    @property
    def pool(self) -> Pool:
        """The data."""
        return self.order.pool

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        recent = self._bank.hold(self._first(noisy), self.recent, noisy.x.device)
        if label != ALL:
            recent = recent[torch.isin(recent, self.pool.members(label))]
        return from_references(noisy, self.pool, recent, self._bank.take)

    def recent(self, images: int) -> Int[Tensor, "{self.size}"]:
        """The last distinct members before image number `images`, the latest first."""
        # twice as many images hold enough: if not so many belong to this epoch, the rest is from the one before
        passed = self.order.order(torch.arange(images - 2 * self.size, images))
        return first_seen(passed.flip(0))[: self.size]

    def _first(self, noisy: Perturbed) -> int:
        """The number of the first image of the rows' step, on whatever rank it is."""
        if noisy.number is None:
            raise ValueError("a rolling bank must know which images of the run the rows are: give them a number")
        steps = (noisy.number // self.order.size).unique()
        if len(steps) > 1:
            raise ValueError(f"the rows belong to {len(steps)} steps of {self.order.size} images; give one step's")
        return int(steps) * self.order.size


class _Bank:
    """Some members, held as they are stored; only those that have not been held before are read."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.images: int | None = None
        self.wanted = self.index = torch.empty(0, dtype=torch.int64)
        self.rows = torch.empty(0)

    def hold(self, images: int, recent: Callable[[int], Int[Tensor, "n"]], device: torch.device) -> Int[Tensor, "n"]:
        """Hold the recent members (always as many) before an image, and no others; each class of a step asks."""
        if images != self.images:
            self.wanted = recent(images)
            self._fill(self.wanted, device)
            self.images = images
        return self.wanted

    def take(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n *D"]:
        """Members that are held, as floating data."""
        held, place = self.index.sort()
        return self.pool.decode(self.rows[place[torch.searchsorted(held, index)].to(self.rows.device)])

    def _fill(self, wanted: Int[Tensor, "n"], device: torch.device) -> None:
        if len(self.index) == 0:
            self.index, self.rows = wanted.clone(), self.pool.stored(wanted).to(device)
            return
        missing = wanted[~torch.isin(wanted, self.index)]
        free = (~torch.isin(self.index, wanted)).nonzero().flatten()
        self.rows[free.to(self.rows.device)] = self.pool.stored(missing).to(self.rows.device)
        self.index[free] = missing
