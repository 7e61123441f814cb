"""Noisy examples at which a loss is examined.

Noise levels are stratified: K ranges that the loss visits equally often, with m times spread evenly over each. The
sources of a range are spread evenly over the data in the order of their labels. Everything follows from a seed, and
each example from its own number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.floor.loss import SquaredError
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch, draw_noise
from stablefield.seeding import generator


def noise_levels_of_bins(loss: SquaredError, bins: int) -> Float[Tensor, "ends"]:
    """Noise levels sigma / alpha at the ends of ranges that a loss visits equally often, (bins + 1,).

    Args:
        loss: the loss.
        bins: number of ranges.
    """
    alpha, sigma = loss.process.scales(loss.quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)))
    return sigma / alpha


def draw_points(
    pool: Pool,
    loss: SquaredError,
    *,
    bins: int,
    per_bin: int,
    seed: int = 0,
    label_dropout: float = 0.0,
    only: Int[Tensor, "b"] | None = None,
) -> NoisyBatch:
    """Noisy examples, those of a range of the noise level after one another; their numbers are `image_number`.

    Args:
        pool: the data that sources are drawn from.
        loss: the loss, for its process and noise levels.
        bins: number K of ranges.
        per_bin: number m of examples of each range.
        seed: seed of all draws.
        label_dropout: probability that an example has no label.
        only: numbers of the examples to return, between 0 and K m; all by default.
    """
    count = bins * per_bin
    only = torch.arange(count) if only is None else only
    draws = generator(seed, "floor", "points", bins, per_bin)
    spread = torch.rand(4, count, generator=draws, dtype=torch.float64)
    u = (torch.arange(count) + spread[0].clamp(min=2.0**-40)) / count
    place = spread[1].reshape(bins, per_bin).argsort(1)  # so that sources are independent of the noise levels
    share = (place + spread[2].reshape(bins, per_bin)).flatten() / per_bin
    order = torch.arange(len(pool)) if pool.labels is None else pool.labels.cpu().argsort(stable=True)
    index = order[(share * len(pool)).long().clamp(max=len(pool) - 1)][only]
    x, label = pool.take(index).cpu(), pool.label(index)
    if label is not None:
        label = torch.where(spread[3][only] < label_dropout, NULL_LABEL, label.cpu())
    noise = draw_noise(x, (generator(seed, "floor", "noise", n) for n in only.tolist()))
    t = loss.quantile(u)[only].to(x.dtype)
    return loss.process.perturb(x, t, noise, label=label, index=index, image_number=only)
