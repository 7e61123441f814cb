"""How much a training target varies, against the noise level.

    V(t) = E ||target - E[x | x_t]||^2,      over x, noise and references

Every unbiased target has the exact posterior mean as its own mean, so its variance is the mean squared distance to
it: Tr Cov[x | x_t] for a single sample, less for a reference batch (Xu et al. 2023, eq. 3 and 7).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.process import Process
from stablefield.reference import Pool
from stablefield.seeding import generator
from stablefield.target import FullDataset, TargetEstimator


@dataclass(frozen=True, eq=False)
class TargetVariance:
    """The variance of a target at some times, in units of x squared, summed over the dimensions.

    Attributes:
        t: the times.
        variance: at each.
        error: its standard error.
    """

    t: Float[Tensor, "T"]
    variance: Float[Tensor, "T"]
    error: Float[Tensor, "T"]


def target_variance(
    targets: Sequence[TargetEstimator],
    pool: Pool,
    process: Process,
    t: Float[Tensor, "T"],
    *,
    draws: int = 64,
    rows: int = 16,
    seed: int = 0,
) -> list[TargetVariance]:
    """The variance of each target, all measured on the same x_t.

    Args:
        targets: what to compare.
        pool: data to draw x from, and to take the exact mean over.
        process: how x becomes x_t.
        t: where to measure.
        draws: independent batches a time, each with references of its own; standard errors are over these.
        rows: x_t in each of them.
        seed: decides all draws.
    """
    exact, source = FullDataset(pool), generator(seed, "variance")
    squares = torch.empty(len(targets), len(t), draws, dtype=torch.float64)
    for column, time in enumerate(t):
        for draw in range(draws):
            index = torch.randint(len(pool), (rows,), generator=source)
            x = pool.take(index)
            noise = torch.randn(x.shape, generator=source, dtype=x.dtype)
            noisy = process.perturb(x, time.to(x).expand(rows), noise.to(x), index=index)
            mean = exact(noisy).mean
            for row, target in enumerate(targets):
                error = target(noisy, generator=source).mean - mean
                squares[row, column, draw] = error.double().square().flatten(1).sum(1).mean()
    error = squares.std(2) / draws**0.5
    return [TargetVariance(t, *both) for both in zip(squares.mean(2), error, strict=True)]
