"""Posterior weights of all data points at given x_t, and stable targets computed from them.

One pass over the data gives the weight w_k of every data point for an x_t. The weights of a reference batch are a
subset of them, so that its stable target costs only a lookup and a matrix product.

Given x_t, data point k is the source with probability w_k, whichever one x_t was made from. So every reference batch is
combined with two sources: the most likely one, which counts by its weight, and one drawn from the posterior over the
others, which counts by their total weight. At small noise, where a second source is rare and yet causes all of the
variance, it is then never missed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import PosteriorAccumulator
from stablefield.process import BatchRecord

SINGLE_SOURCE = 0.99  # posterior probability from which a data point counts as the only likely source


class EnergyRecorder(PosteriorAccumulator):
    """Posterior accumulator that keeps the energies of all candidates, from which it returns their weights.

    Args:
        x_t: noisy data, (B, *D).
        sigma: noise level of each example.
        alpha: scale of the data of each example.
        num_candidates: number of candidates that will be added.

    Attributes:
        energies: energies of the candidates, (B, num_candidates).
        count: number of candidates added so far.
    """

    def __init__(
        self, x_t: Float[Tensor, "B *D"], sigma: Float[Tensor, "B"], alpha: Float[Tensor, "B"], num_candidates: int
    ) -> None:
        super().__init__(x_t, sigma, alpha)
        self.energies, self.count = self.query.new_empty(len(x_t), num_candidates), 0

    @override
    def compare(self, candidates: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        result = super().compare(candidates, square)
        self.energies[:, self.count : self.count + len(candidates)] = result[2]
        self.count += len(candidates)
        return result

    def log_weights(self) -> Float[Tensor, "B N"]:
        """Logarithm of the weight of every candidate, normalized over all of them; overwrites the energies."""
        relative = self.energies.sub_(self.lowest[:, None]).mul_(-self.sharpness[:, None])
        return relative.sub_(self.total.log()[:, None])


@dataclass(frozen=True, eq=False)
class Sources(BatchRecord):
    """Possible sources of each x_t.

    Attributes:
        first: the most likely candidate, (B,).
        others: candidates drawn from the posterior over all others, one column for each draw, (B, S).
        other_weight: posterior probability of all others together, (B,).
    """

    first: Int[Tensor, "B"]
    others: Int[Tensor, "B S"]
    other_weight: Float[Tensor, "B"]


@dataclass(frozen=True, eq=False)
class PosteriorStatistics(BatchRecord):
    """Statistics of the posterior of each x_t over N candidates.

    Attributes:
        ess_share: effective sample size 1 / sum w^2, divided by N, (B,).
        kl: KL divergence of the posterior from the prior, sum w log(N w), in nats: at most log N, (B,).
        divergence: the paper's D, sum w f(1 / (N w)): at most about N^2 (Xu et al. 2023, section 4), (B,).
        single_source: 1 where one candidate has at least 99 % of the posterior, else 0, (B,).
    """

    ess_share: Float[Tensor, "B"]
    kl: Float[Tensor, "B"]
    divergence: Float[Tensor, "B"]
    single_source: Float[Tensor, "B"]


def posterior_statistics(log_w: Float[Tensor, "B N"], w: Float[Tensor, "B N"]) -> PosteriorStatistics:
    """Statistics of posteriors from their weights.

    Args:
        log_w: logarithm of the weight of every data point.
        w: the weights, which may be 0.
    """
    count = w.shape[1]
    share = w * count
    # f(y) = (1 / y - 1)^2 below y = 1 / share = 1.5, and 8 y / 27 - 1 / 3 above
    terms = torch.where(share > 1 / 1.5, w * (share - 1).square(), 8 / 27 / count - w / 3)
    return PosteriorStatistics(
        1 / w.square().sum(1) / count,
        (w * log_w).sum(1) + math.log(count),
        terms.sum(1),
        (w.max(1).values >= SINGLE_SOURCE).double(),
    )


def draw_sources(w: Float[Tensor, "B N"], uniform: Float[Tensor, "B S"]) -> Sources:
    """Possible sources of each x_t.

    Args:
        w: posterior probability of every data point; overwritten.
        uniform: numbers in [0, 1), one for each draw.
    """
    first = w.max(1).indices
    below = w.scatter_(1, first[:, None], 0.0).cumsum(1)
    others = torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp(max=w.shape[1] - 1)
    return Sources(first, others, below[:, -1].contiguous())


def stable_means(
    log_w: Float[Tensor, "B N"],
    support: Float[Tensor, "n D"],
    drawn: Int[Tensor, "n"],
    sources: Sequence[tuple[Int[Tensor, "B"], Float[Tensor, "B D"]]],
) -> list[Float[Tensor, "B D"]]:
    """Means over r_1 .. r_n and each of the sources, by the rule of `STFTarget`; and, last, without a source.

    The weights are normalized over all data; only their ratios within the support matter.

    Args:
        log_w: logarithm of the weight of every data point.
        support: the drawn data points r_1 .. r_n.
        drawn: their indices.
        sources: pairs of indices and data points, each a possible source of every example.
    """
    log_drawn = log_w[:, drawn]
    shared = log_drawn[:, :-1]
    total = shared.logsumexp(1)
    weight = (shared - torch.where(total == -torch.inf, 0.0, total)[:, None]).exp_()
    mean = weight @ support[:-1]

    def mean_with(x: Tensor, log_weight: Tensor) -> Tensor:
        return torch.lerp(mean, x, torch.sigmoid(log_weight - total)[:, None])

    targets = []
    for source, x in sources:
        is_shared = torch.isin(source, drawn[:-1])
        log_weight = torch.where(is_shared, log_drawn[:, -1], log_w.gather(1, source[:, None]).squeeze(1))
        targets.append(mean_with(torch.where(is_shared[:, None], support[-1], x), log_weight))
    return [*targets, mean_with(support[-1].expand_as(mean), log_drawn[:, -1])]
