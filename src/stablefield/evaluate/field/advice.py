"""What a measured field means for a training: where the variance is, how much of it the training meets, what to expect.

Training draws t from its density and weighs squared errors by w(t), so that of a target it meets

    E_t w(t) V(t) / D

beside what the network itself has yet to learn. V is taken between the levels measured by straight lines of V in noise
units over log(sigma / alpha); below the lowest level as 0, above the highest as it is there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.evaluate.field.linear import Linear
from stablefield.evaluate.field.record import Field
from stablefield.objective import Weight
from stablefield.process import Process
from stablefield.times import Times

Range = tuple[float, float]
POINTS = 8192  # levels that stand for the density of training


@dataclass(frozen=True)
class Advice:
    """What follows from a field, for a density of times and a weight; levels are sigma / alpha.

    Attributes:
        phases: up to the first level one member explains most rows, from the second on the posterior is near the
            prior; between the two several compete. None where that is outside the levels measured.
        high: where a single sample varies at least half as much as at most, in noise units.
        share_high: of the training noise, what falls there.
        share_competing: of the training noise, what falls where several compete.
        carries: where the middle 90 % of the variance that training meets lies; None if it meets none.
        share_carries: of the training noise, what falls there.
        met: V_DSM as training meets it, weighted, per dimension.
        left: V_STF of each size, the same way.
        loss: what a linear denoiser leaves of the loss (variance included), the same way.
        share_of_levels: what share V_DSM is of the linear denoiser's loss at a level, on average over training noise.
            Weights that make much of small noise hide in the sum what happens at large; here each level counts alike.
    """

    phases: tuple[float | None, float | None]
    high: Range
    share_high: float
    share_competing: float
    carries: Range | None
    share_carries: float
    met: float
    left: dict[int, float]
    loss: float
    share_of_levels: float
    members: int
    times: str

    @classmethod
    def of(cls, field: Field, process: Process, times: Times, weight: Weight, linear: Linear) -> "Advice":
        """The advice for a training that draws `times` and weighs by `weight`."""
        t = times.quantile((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        factor = weight(process, t) / field.dim
        variance, left = _between(field, field.dsm.value, level), linear.variance(level)
        met = factor * variance
        high, phases = _high(field), phases_of(field)
        carries = _middle(level, met)
        return cls(
            phases,
            high,
            _share(level, high),
            _share(level, (phases[0] or 0.0, phases[1] or math.inf)),
            carries,
            _share(level, carries) if carries else 0.0,
            float(met.mean()),
            {n: float((factor * _between(field, s.variance.value, level)).mean()) for n, s in field.stable.items()},
            float((factor * left).mean()),
            float((variance / left).mean()),
            field.members,
            repr(times),
        )

    @property
    def share_of_loss(self) -> float:
        """What share V_DSM is of the whole loss of a linear denoiser."""
        return self.met / self.loss

    def size_for(self, factor: float) -> tuple[float, bool]:
        """How large n must be for V_STF to be so many times less than V_DSM, and whether that was measured.

        Between sizes by straight lines of log V over log n. Beyond the largest the last line goes on, times
        (N - n) / (N - 1), the share of members left out: where V ~ 1 / (n - 1) this is the law of draws without
        replacement, and with all members nothing is left.
        """
        goal = self.met / factor
        points = [(1, self.met), *((n, v) for n, v in self.left.items() if n > 1)]
        for (n, v), (m, u) in pairwise(points):
            if u <= goal:
                return n * (m / n) ** (math.log(v / goal) / math.log(v / max(u, 1e-300))), True
        (n, v), (m, u) = points[-2:] if len(points) > 1 else (points[0], (2, self.met))
        slope = math.log(v / u) / math.log(m / n)
        beyond = torch.logspace(math.log10(m), math.log10(self.members), 2000, dtype=torch.float64)
        enough = u * (beyond / m) ** -slope * (self.members - beyond) / (self.members - m) <= goal
        return float(beyond[int(enough.long().argmax())]) if enough.any() else float(self.members), False

    def lines(self) -> list[str]:
        """In words."""
        return [*self._where(), *self._training(), *self._sizes(), *self._verdict()]

    def summary(self) -> list[str]:
        """In a few words: what is to be had of stable targets."""
        one, prior = (f"{place:.2g}" if place else "?" for place in self.phases)
        lines = [f"several sources compete at sigma = {one} to {prior}, {self.share_competing:.1%} of this noise"]
        for n, left in self.left.items():
            taken = f", of which {n:,} references take {1 - left / self.met:.0%} away" if self.met > 0 else ""
            share = _percent(self.share_of_loss)
            lines.append(f"single samples' variance is {share} of a linear denoiser's loss{taken}")
        return lines

    def _where(self) -> Iterator[str]:
        one, prior = self.phases
        yield f"Single samples vary most at sigma = {_span(self.high)} (half the peak or more, in noise units)."
        if one is not None:
            yield f"Below sigma = {one:.2g} most x_t have one likely source: there is nothing to average."
        if prior is not None:
            yield f"Above sigma = {prior:.2g} the posterior is near the prior: any few references will do."

    def _training(self) -> Iterator[str]:
        yield f"Of the training noise, {self.times}, {self.share_high:.1%} falls where they vary most,"
        yield f"  and {self.share_competing:.1%} where several sources compete."
        if self.carries:
            yield f"Of the variance that it meets 90 % comes from sigma = {_span(self.carries)},"
            yield f"  where {self.share_carries:.1%} of the noise falls."

    def _sizes(self) -> Iterator[str]:
        if not self.met > 0:
            return
        yield f"The variance of targets in the weighted loss, per dimension: {self.met:.3g} with single samples,"
        for n, left in self.left.items():
            yield f"  {left:.3g} with {n:,} references ({_times_less(self.met, left)}),"
        yield "  0 with all data (target.kind=full)."
        size, measured = self.size_for(10)
        beyond = "" if measured else ", as far as can be told from smaller ones"
        if size > 0.9 * self.members:
            yield "For 10 times less nothing will do but all data."
        else:
            yield f"For 10 times less: about {_rounded(size):,} references{beyond}."

    def _verdict(self) -> Iterator[str]:
        yield f"The variance of single samples is {_percent(self.share_of_loss)} of the loss of a linear denoiser,"
        levels = _percent(self.share_of_levels)
        yield f"  {self.loss:.3g}; of that loss level by level, averaged over the training noise, {levels}."
        yield "  A network's loss is less, so its shares are more; what else makes gradients vary is not measured."
        if max(self.share_of_loss, self.share_of_levels) < 0.01:
            yield "Expect no gain from stable targets in this training: almost every x_t has one likely source."
        elif self.left:
            taken = 1 - min(self.left.values()) / self.met
            yield f"{max(self.left):,} references take {taken:.0%} of that variance away, all data all of it."


def _between(field: Field, variance: Float[Tensor, "L"], level: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """The variance, in units of x squared, at other levels than those measured."""
    at, order = field.level.log().sort()
    noise = (variance / field.level.square())[order]
    where = level.log().clamp(at[0], at[-1])
    right = (
        torch.searchsorted(at, where.contiguous()).clamp(1, len(at) - 1)
        if len(at) > 1
        else torch.zeros_like(where).long()
    )
    left = (right - 1).clamp(min=0)
    step = at[right] - at[left]
    share = torch.where(step > 0, (where - at[left]) / step.clamp(min=1e-300), torch.ones_like(step))
    found = (noise[left] + share * (noise[right] - noise[left])) * level.square().clamp(max=float(at[-1].exp()) ** 2)
    return torch.where(level.log() < at[0], 0.0, found)


def _high(field: Field) -> Range:
    values = field.in_noise(field.dsm).value
    inside = field.level[values >= values.max() / 2]
    return float(inside.min()), float(inside.max())


def phases_of(field: Field) -> tuple[float | None, float | None]:
    """After which sigma / alpha fewer than half the rows have one likely member, and after which the effective number
    of members is more than half of all; None where that is outside the levels measured."""
    order = field.level.argsort()
    log_level = field.level.log()[order]
    several, alike = 1 - field.one_point.value[order], field.ess_share.value[order]
    return _crossing(log_level, several), _crossing(log_level, alike)


def _crossing(log_level: Float[Tensor, "L"], rising: Float[Tensor, "L"]) -> float | None:
    """The level at which a share passes a half, by straight lines; None where it does not."""
    beyond = rising > 0.5
    if bool(beyond[0]) or not bool(beyond.any()):
        return None
    after = int(beyond.long().argmax())
    step = (0.5 - rising[after - 1]) / (rising[after] - rising[after - 1])
    return float(torch.lerp(log_level[after - 1], log_level[after], step).exp())


def _middle(level: Float[Tensor, "P"], amount: Float[Tensor, "P"], share: float = 0.9) -> Range | None:
    """Between which levels the middle of an amount lies."""
    level, order = level.sort()
    below = amount[order].cumsum(0)
    if not below[-1] > 0:
        return None
    ends = torch.searchsorted(below, below[-1] * torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64))
    low, high = level[ends.clamp(max=len(level) - 1)].tolist()
    return low, high


def _share(level: Float[Tensor, "P"], ends: Range) -> float:
    return float(((level >= ends[0]) & (level <= ends[1])).double().mean())


def _percent(share: float) -> str:
    return f"{share:.2%}" if share > 1e-4 or share == 0 else f"{share:.1g}"


def _span(ends: Range) -> str:
    return f"{ends[0]:.2g} to {ends[1]:.2g}"


def _times_less(before: float, after: float) -> str:
    return f"{before / after:.3g} times less" if after > 0 else "nothing left"


def _rounded(n: float) -> int:
    """Two digits of a size are more than is known."""
    digits = max(0, math.floor(math.log10(n)) - 1)
    return math.ceil(n / 10**digits) * 10**digits
