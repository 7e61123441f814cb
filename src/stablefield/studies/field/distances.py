"""Distances in a data set: at which noise only one source is possible, and at which all are about equally likely.

A data point at distance d from the source is more likely than the source with probability P(z > d / (2 sigma)),
z ~ N(0, 1): practically never below sigma = d / 10, and often for all data points above the largest distance.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import PosteriorAccumulator, chunk_size
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import Process
from stablefield.seeding import generator


@dataclass(frozen=True)
class DataDistances:
    """Smallest and largest distance found in a data set, in units of x.

    Attributes:
        nearest: smallest distance found between two different data points, over a random part of the data.
        farthest: largest distance found between two data points, by going repeatedly to the farthest data points.
    """

    nearest: float
    farthest: float

    @classmethod
    def from_pool(cls, pool: Pool, *, examples: int = 64, seed: int = 0) -> "DataDistances":
        """Distances of a random part of the data to all data, then of the farthest of these to all, and so on.

        Args:
            pool: the data.
            examples: number of data points drawn at random to start from.
            seed: seed of the random draw.

        Raises:
            ValueError: all data points are the same.
        """
        index = torch.randint(len(pool), (examples,), generator=generator(seed, "extent"))
        nearest, most, index = _extremes(pool, index)
        for _ in range(2):
            _, farthest, index = _extremes(pool, index.unique())
            most = max(most, farthest)
        if most == 0:
            raise ValueError(f"all {len(pool):,} data points are the same; distances need at least two different ones")
        return cls(min(nearest, most), most)

    def noise_levels(
        self, count: int, process: Process, *, low: float | None = None, high: float | None = None
    ) -> Float[Tensor, "{count}"]:
        """Noise levels sigma / alpha, evenly spaced in log.

        By default they are from a tenth of the nearest to the farthest distance, or to the highest noise level of the
        process if that is lower, and span at least a factor of ten.

        Args:
            count: number of noise levels.
            process: the process, which limits the highest level.
            low: the lowest level; None for the default.
            high: the highest level; None for the default.

        Raises:
            ValueError: not 0 < low < high < infinity.
        """
        alpha, sigma = process.scales(torch.tensor(min(process.t_max, 1e300), dtype=torch.float64))
        farthest = min(self.farthest, 0.999 * float(sigma / alpha))
        low = min(self.nearest / 10, farthest / 10) if low is None else low
        high = farthest if high is None else high
        if not 0 < low < high < math.inf:
            raise ValueError(f"noise levels need 0 < low < high, not {low:.3g} and {high:.3g}; change one of them")
        return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _extremes(pool: Pool, index: Int[Tensor, "B"]) -> tuple[float, float, Int[Tensor, "B"]]:
    """Smallest distance above 0 and largest distance from data points to all data, and the farthest from each."""
    x = pool.take(index).double()
    accumulator = PosteriorAccumulator(x, 1.0)
    norm = accumulator.query.square().sum(1)
    least, most = torch.full_like(norm, torch.inf), torch.zeros_like(norm)
    farthest, start = torch.zeros_like(index), 0
    for block in pool.blocks(NULL_LABEL, chunk_size(x)):
        squares = accumulator.compare(block)[2] + norm[:, None]
        differ = squares > 1e-12 * norm[:, None]  # between copies, rounding may leave 1e-15 of ||x||^2
        least = torch.minimum(least, torch.where(differ, squares, torch.inf).amin(1))
        far, position = torch.where(differ, squares, 0.0).max(1)
        farthest = torch.where((far > most).cpu(), position.cpu() + start, farthest)
        most, start = torch.maximum(most, far), start + len(block)
    return float(least.min().sqrt()), float(most.max().sqrt()), farthest
