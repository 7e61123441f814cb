"""Means over seeds and how sure they are, differences between paired runs, and images needed to get somewhere.

A band is Student's t interval, mean +- t_(n-1) s / sqrt(n): right if seeds scatter normally, wide with few of them.
Runs with one seed share their weights, order and noise, so the difference of two arms is taken seed by seed first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, inf, isfinite, isnan, log, nan, sqrt
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
        deviation = stdev(values) if all(map(isfinite, values)) else nan
        return cls(fmean(values), student(n - 1) * deviation / sqrt(n), deviation, n)

    def moved(self, by: float) -> "Estimate":
        """The same of numbers that are all so much greater."""
        return replace(self, mean=self.mean + by)

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

    inf if it never does; the first look's images if it is there from the start, which then is an upper bound. nan if
    the quality or a look before that is nan.
    """
    if isnan(quality):
        return nan
    before: tuple[int, float] | None = None
    for seen, value in zip(images, values, strict=True):
        if isnan(value):
            return nan
        if value <= quality:
            if before is None:
                return float(seen)
            share = (before[1] - quality) / (before[1] - value)
            return exp(log(before[0]) + share * (log(seen) - log(before[0])))
        before = seen, value
    return inf


def value_at(at: float, images: Sequence[int], values: Sequence[float]) -> float:
    """A curve between two looks, on a line in the logarithm of images; nan before the first look and after the last."""
    for (before, left), (after, right) in pairwise(zip(images, values, strict=True)):
        if before <= at <= after:
            share = log(at / before) / log(after / before)
            return left + share * (right - left)
    return nan


def roughness(values: Sequence[float]) -> float:
    """How much a curve jumps from look to look, relative, over its last half: from its second differences.

    sqrt(mean (y_(i-1) - 2 y_i + y_(i+1))^2 / 6), y the logarithms: the deviation of independent jumps around a straight
    line, such as a power of the images is where looks grow by equal factors. A bend counts too. nan below four looks.
    """
    if len(values) < 4:
        return nan
    y = [log(value) for value in values[len(values) // 2 - 1 :]]
    bends = [before - 2 * here + after for before, here, after in zip(y, y[1:], y[2:], strict=False)]
    return sqrt(fmean(bend * bend for bend in bends) / 6)
