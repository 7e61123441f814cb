"""How far apart data lie: which noise leaves one member alone possible, and which all of them alike.

A member at distance d from the source is likelier than it with probability P(z > d / (2 sigma)), z ~ N(0, 1): below
sigma = d / 10 never in a training, and above the greatest distance often for all.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.posterior import Sums, chunk_size
from stablefield.process import Process
from stablefield.reference import ALL, Pool
from stablefield.seeding import generator


@dataclass(frozen=True)
class Extent:
    """Distances in data, in units of x.

    Attributes:
        nearest: from one of some members to the nearest other that differs from it: the least found.
        farthest: between two members: the greatest found, by going from members to those farthest from them.
    """

    nearest: float
    farthest: float

    @classmethod
    def of(cls, pool: Pool, *, rows: int = 64, sweeps: int = 3, seed: int = 0) -> "Extent":
        """Distances from some members to all, then from the farthest of these to all, and so on.

        Raises:
            ValueError: all members are the same.
        """
        index = torch.randint(len(pool), (rows,), generator=generator(seed, "extent"))
        nearest, farthest, index = _ends(pool, index)
        least, most = nearest, farthest
        for _ in range(sweeps - 1):
            _, farthest, index = _ends(pool, index.unique())
            most = max(most, farthest)
        if most == 0:
            raise ValueError(f"the {len(pool):,} members of the data are all the same")
        return cls(min(least, most), most)

    def levels(self, count: int, process: Process) -> Float[Tensor, "{count}"]:
        """sigma / alpha from a tenth of the nearest to the farthest distance, as far as the process goes."""
        low, high = (torch.tensor(value, dtype=torch.float64) for value in (self.nearest / 10, self.farthest))
        alpha, sigma = process.scales(torch.tensor(min(process.limit, 1e300), dtype=torch.float64))
        high = torch.minimum(high, 0.999 * sigma / alpha)
        return torch.logspace(float(torch.minimum(low, high / 10).log10()), float(high.log10()), count).double()


def _ends(pool: Pool, index: Int[Tensor, "B"]) -> tuple[float, float, Int[Tensor, "B"]]:
    """The least distance above 0 from these members to any, the greatest, and to which member each is farthest."""
    x = pool.take(index).double()
    sums = Sums(x, 1.0)
    own = sums.query.square().sum(1)
    least, most = torch.full_like(own, torch.inf), torch.zeros_like(own)
    where, passed = torch.zeros_like(index), 0
    for block in pool.blocks(ALL, chunk_size(x)):
        squares = sums.compare(block)[2] + own[:, None]  # rounding may leave 1e-15 of ||x||^2 between copies
        differ = squares > 1e-12 * own[:, None]
        least = torch.minimum(least, torch.where(differ, squares, torch.inf).amin(1))
        far, position = torch.where(differ, squares, 0.0).max(1)
        where = torch.where((far > most).cpu(), position.cpu() + passed, where)
        most, passed = torch.maximum(most, far), passed + len(block)
    return float(least.min().sqrt()), float(most.max().sqrt()), where
