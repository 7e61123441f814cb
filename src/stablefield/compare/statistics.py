"""Means over seeds and how sure they are, differences between paired runs, and images needed to get somewhere.

A band is Student's t interval, mean +- t_(n-1) s / sqrt(n): right if seeds scatter normally, wide with few of them.
Runs with one seed share their weights, order and noise, so the difference of two arms is taken seed by seed first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log, nan, sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of n numbers; nan of none.
        half: half the width of its interval; infinite for one number.
        deviation: of the numbers; nan for one.
        n: how many.
    """

    mean: float
    half: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of numbers from independent seeds."""
        n = len(values)
        if n < 2:
            return cls(values[0] if values else nan, inf, nan, n)
        deviation = stdev(values)
        return cls(fmean(values), student(n - 1) * deviation / sqrt(n), deviation, n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sure(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def student(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The quantile of Student's t that a two-sided interval needs."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """arm - baseline, over the seeds that both have."""
    return Estimate.of([arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())])


def paired_ratio(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """log(arm / baseline), over the seeds that both have: its mean is the logarithm of the geometric mean."""
    seeds = sorted(arm.keys() & baseline.keys())
    return Estimate.of([log(arm[seed] / baseline[seed]) for seed in seeds])


def images_to_reach(quality: float, images: Sequence[int], values: Sequence[float]) -> float:
    """When a curve first comes down to a quality: between two looks on a line in the logarithm of images.

    inf if it never does; the first look's images if it is there from the start, which then is an upper bound.
    """
    before: tuple[int, float] | None = None
    for seen, value in zip(images, values, strict=True):
        if value <= quality:
            if before is None:
                return float(seen)
            share = (before[1] - quality) / (before[1] - value)
            return exp(log(before[0]) + share * (log(seen) - log(before[0])))
        before = seen, value
    return inf


def roughness(images: Sequence[int], values: Sequence[float]) -> float:
    """How much a curve jumps from look to look: its deviation around a line in log images, over its last half.

    nan with fewer than three looks there.
    """
    x, y = ([log(value) for value in part[len(part) // 2 - 1 :]] for part in (images, values))
    if len(x) < 3 or len(images) < 4:
        return nan
    slope = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y, strict=True)) / sum(
        (a - fmean(x)) ** 2 for a in x
    )
    rest = [b - fmean(y) - slope * (a - fmean(x)) for a, b in zip(x, y, strict=True)]
    return sqrt(sum(r * r for r in rest) / (len(x) - 2))
