"""Adaptation of the noise distribution to the run: more of the noise levels at which gradients are large.

The base distribution is divided into K ranges of equal probability 1 / K. Range k gets the probability

    q_k = (0.1 + 0.9 K s_k / sum_j s_j) / K

with a statistic s_k of the run, so that importance weights 1 / (K q_k) are at most 10. With `reweight`, s_k is the root
mean square of the gradient of the loss with respect to the network's output, weight * c_out * ||D - target||, and every
loss is multiplied by its importance weight: the objective stays what it is, and the variance of the gradient falls (it
is smallest with q proportional to the root mean square). Without, s_k is the excess of the network over the floor of
its loss (`engine.probing`), and the objective changes knowingly (cf. arXiv 2506.13763, 2602.18647).

Intervals of `every` images have one distribution each. What is measured in one interval is in force two intervals
later, so that it is known when the targets of several steps are computed together. The state is part of the checkpoint,
and measurements of all ranks are summed, so that resumed runs and any number of ranks have the same distribution.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from stablefield.distributed import Ranks
from stablefield.objective import LossReport, LossWeight
from stablefield.process import Process
from stablefield.times import Adaptive, Stratified, TimeDistribution

RANGES = 8  # as many as the ranges by which a run reports its loss
LEAST = 0.1  # of the base density everywhere
SMOOTHING = 0.5  # weight of the newest measurement


@dataclass(frozen=True, eq=False)
class AdaptedTimes(TimeDistribution):
    """A distribution of t with other probabilities for ranges that are equally likely in the base distribution.

    Attributes:
        base: the base distribution.
        shares: probability of each range, (K,).
    """

    base: TimeDistribution
    shares: Float[Tensor, "K"]

    @override
    def quantile(self, u: Tensor) -> Tensor:
        count, ends = len(self.shares), torch.cat([self.shares.new_zeros(1), self.shares.cumsum(0)])
        k = torch.bucketize(u.contiguous(), ends[1:-1].contiguous(), right=True)
        inside = ((u - ends[k]) / self.shares[k]).clamp(2.0**-54, 1 - 2.0**-53)
        return self.base.quantile((k + inside) / count)


class Adaptation:
    """The adapted distribution of a run, with its state.

    Args:
        times: the configured distribution, maybe stratified.

    Attributes:
        adaptive: the configured distribution.
        shares: probabilities of the ranges in the previous, the current and the next interval, (3, K).
        sums: sum of squared statistics and number of examples of each range in the current interval, (2, K).
        level: the smoothed statistic of each range, (K,); zeros before the first measurement.
    """

    def __init__(self, times: TimeDistribution) -> None:
        self.stratified = isinstance(times, Stratified)
        inner = times.times if isinstance(times, Stratified) else times
        assert isinstance(inner, Adaptive)
        self.adaptive = inner
        self.shares = torch.full((3, RANGES), 1 / RANGES, dtype=torch.float64)
        self.sums = torch.zeros(2, RANGES, dtype=torch.float64)
        self.level = torch.zeros(RANGES, dtype=torch.float64)
        self.edges = inner.quantile(torch.arange(1, RANGES, dtype=torch.float64) / RANGES)

    @staticmethod
    def of(times: TimeDistribution) -> "Adaptation | None":
        """The adaptation of a distribution; None for one that does not adapt.

        Args:
            times: the distribution of a run.
        """
        inner = times.times if isinstance(times, Stratified) else times
        return Adaptation(times) if isinstance(inner, Adaptive) else None

    def times(self, images: int, seen: int) -> TimeDistribution:
        """The distribution of a step.

        Args:
            images: images seen before the step.
            seen: images seen now, at most one interval before or after.
        """
        adapted = AdaptedTimes(self.adaptive.base_times, self._shares(images, seen))
        return Stratified(adapted) if self.stratified else adapted

    def importance(self, t: Float[Tensor, "B"], images: int) -> Float[Tensor, "B"] | None:
        """Importance weight of each example of the current step; None if losses are not reweighted.

        Args:
            t: time of each example.
            images: images seen before the step.
        """
        if not self.adaptive.reweight:
            return None
        weights = 1 / (RANGES * self._shares(images, images))
        return weights.to(t)[self._ranges(t)]

    def add(
        self,
        report: LossReport,
        process: Process,
        weight: LossWeight,
        denoiser: nn.Module,
        images: int,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        """Record a step, and begin the next interval if the step ends one; must be called on all ranks.

        Args:
            report: losses of this rank's examples, without importance weights.
            process: the process of the denoiser.
            weight: the loss weight.
            denoiser: the denoiser, for the scale of its output.
            images: images seen before the step.
            batch_size: images of the step, over all ranks.
            ranks: this process and those it trains with.
        """
        if self.adaptive.reweight:
            scale = weight(process, report.t)
            if (preconditioning := getattr(denoiser, "preconditioning", None)) is not None:
                scale = scale * preconditioning(process, report.t)[1].square()
            squares = report.losses * scale.to(report.losses)
            values = torch.stack([squares, torch.ones_like(squares)], 1)
            values = torch.where(torch.isfinite(squares)[:, None], values, 0.0)
            own = values.new_zeros(RANGES, 2).index_add_(0, self._ranges(report.t), values)
            self.sums = self.sums.to(own.device) + ranks.all_gather(own[None]).double().sum(0).T
        every = self.adaptive.every
        if (images + batch_size) // every > images // every:
            self._advance()

    def follow(self, excess: Float[Tensor, "K"]) -> None:
        """Use the excess of the network in each range as the statistic, where losses are not reweighted.

        Args:
            excess: the excess in each range.
        """
        if not self.adaptive.reweight:
            self.sums = torch.stack([excess.double().clamp(min=0).square(), torch.ones(RANGES).double()])

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        return {name: getattr(self, name).cpu().clone() for name in ("shares", "sums", "level")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by a saved one.

        Args:
            tensors: as returned by `tensors`.
        """
        for name in ("shares", "sums", "level"):
            setattr(self, name, tensors[name].double().clone())

    def _advance(self) -> None:
        sums, count = self.sums.cpu()
        self.sums = torch.zeros_like(self.sums)
        if count.sum() > 0:
            measured = torch.where(count > 0, (sums / count.clamp(min=1)).sqrt(), self.level)
            self.level = measured if not self.level.any() else self.level.lerp(measured, SMOOTHING)
        total = self.level.sum()
        share = self.level / total if total > 0 else torch.full_like(self.level, 1 / RANGES)
        # rounded, so that the order in which ranks are summed does not matter
        found = (LEAST / RANGES + (1 - LEAST) * share).mul(2**20).round().div(2**20)
        self.shares = torch.stack([self.shares[1], self.shares[2], found / found.sum()])

    def _shares(self, images: int, seen: int) -> Float[Tensor, "K"]:
        """Probabilities of the ranges in a step, from those of the intervals around the current one."""
        return self.shares[1 + images // self.adaptive.every - seen // self.adaptive.every]

    def _ranges(self, t: Float[Tensor, "B"]) -> Tensor:
        return torch.bucketize(t.detach().contiguous(), self.edges.to(t))
