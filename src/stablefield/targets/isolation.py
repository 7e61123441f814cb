"""Distances from each data point to its nearest others, and the noise levels up to which it is isolated.

For a source s and x_t = alpha x_s + sigma noise, the weight of another data point j at distance d satisfies

    log (w_j / w_s) ~ Normal(-a^2 / 2, a^2),      a = alpha d / sigma

so E min(1, w_j / w_s) = 2 Phi(-a / 2), and the posterior mass outside the source is at most sum_j 2 Phi(-a_j / 2) on
average over the noise. This depends on the data and on sigma / alpha alone: it is known before anything is drawn.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.kernel.nearest import k_nearest
from stablefield.pool import NULL_LABEL, Pool

Progress = Callable[[int, int], None]  # (done, total)

_QUERIES = 4096  # data points whose nearest others are searched together


def nearest_distances(
    pool: Pool,
    label: int = NULL_LABEL,
    *,
    k: int = 16,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Float[Tensor, "m k"]:
    """Distances from each data point of a class to its k nearest others, ascending, in float64.

    All pairs are compared, in 2 m^2 D operations.

    Args:
        pool: the data; decoded block by block, so that they may be larger than memory.
        label: the class; all data for `NULL_LABEL`. Each of its data points has a row, in the order of `pool.indices`.
        k: number of neighbours; fewer where the class has fewer, none in a class of one.
        device: where to compute.
        progress: called with (data points done, total).
    """
    indices = pool.indices(label)
    k = min(k, len(indices) - 1)
    found = [torch.empty(0 if k else len(indices), k, dtype=torch.float64)]
    for rows in torch.arange(len(indices)).split(_QUERIES) if k else ():
        x = pool.take(indices[rows], torch.device(device))
        take = lambda index: pool.take(indices[index])  # noqa: E731
        found.append(k_nearest(x, partial(pool.blocks, label), take, k, exclude=rows)[0].cpu())
        progress(int(rows[-1]) + 1, len(indices))
    return torch.cat(found)


def isolation_level(
    distances: Float[Tensor, "m k"], others: int, missing_mass: float, steps: int = 50
) -> Float[Tensor, "m"]:
    """Noise level sigma / alpha up to which each data point is isolated, so that as a source it has almost all mass.

    Below it, sum_j 2 Phi(-a_j / 2) <= missing_mass: with x_t made from this data point, all others together have at
    most that posterior mass, on average over the noise. Those beyond the k nearest count as if they were at the k-th's
    distance. The level is 0 for a data point with a duplicate, and infinite for one without others.

    Args:
        distances: distances to the k nearest others, ascending; all further ones are at least at the last column's.
        others: number of others, m - 1.
        missing_mass: posterior mass that may be dropped.
        steps: number of bisections.
    """
    if distances.shape[1] == 0:
        return torch.full((len(distances),), math.inf, dtype=torch.float64)
    count = torch.ones(distances.shape[1], dtype=torch.float64)
    count[-1] += others - len(count)
    # in units of the nearest distance, in which the level is lowest if all others are equally near, highest if one is
    least = distances.double().amin(1)
    ratio = distances / least[:, None].clamp(min=1e-300)
    low = torch.full((len(ratio),), 0.5 / _quantile(missing_mass / (2 * others)), dtype=torch.float64)
    high = torch.full_like(low, 0.5 / _quantile(missing_mass / 2))
    for _ in range(steps):
        middle = (low + high) / 2
        mass = (torch.erfc(ratio / (8**0.5 * middle[:, None])) * count).sum(1)  # 2 Phi(-z) = erfc(z / sqrt 2)
        low, high = torch.where(mass <= missing_mass, middle, low), torch.where(mass <= missing_mass, high, middle)
    return low * least


def _quantile(p: float) -> float:
    """The z that a standard normal variable exceeds with probability p."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / 2**0.5) / 2 > p else (low, middle)
    return high
