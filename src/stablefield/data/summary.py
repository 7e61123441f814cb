"""What data are like, in a few numbers; one look at each value, summed in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.reference import ALL, Pool


@dataclass(frozen=True)
class Summary:
    """Mean and spread of data as networks see them: bytes in [-1, 1], other numbers as they are.

    Attributes:
        mean: over all values.
        std: their standard deviation around it: what `sigma_data` stands for.
        least: the smallest value.
        most: the largest value.
        counts: members of each class; none without labels.
    """

    mean: float
    std: float
    least: float
    most: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, pool: Pool) -> "Summary":
        """The summary of a pool."""
        moments, ends = zip(*(_moments(block.double()) for block in pool.blocks(ALL, 256)), strict=True)
        total = len(pool) * math.prod(pool.shape)
        first, second = (float(moment) / total for moment in torch.stack(moments).sum(0))
        counts = () if pool.labels is None else tuple(torch.bincount(pool.labels).tolist())
        low, high = float(torch.stack(ends)[:, 0].min()), float(torch.stack(ends)[:, 1].max())
        return cls(first, max(0.0, second - first**2) ** 0.5, low, high, counts)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([values.sum(), values.square().sum()]), torch.stack(values.aminmax())
