"""Means over seeds with confidence intervals, differences between paired runs, and properties of training curves.

An interval is Student's t interval, mean +- t_(n-1) s / sqrt(n): correct for normally distributed seeds, and wide for
few of them. Runs with the same seed share their initial weights, order of images and noise, so differences between two
arms are taken seed by seed before they are averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, inf, isfinite, isnan, log, nan, sqrt
from statistics import fmean, stdev

__all__ = [
    "Estimate",
    "images_to_reach",
    "paired_difference",
    "paired_log_ratio",
    "roughness",
    "student_quantile",
    "value_at",
]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with a 95 % confidence interval, mean +- half_width.

    Attributes:
        mean: mean of the values; nan if there are none.
        half_width: half the width of the interval; infinite for fewer than two values.
        std: sample standard deviation of the values; nan for fewer than two.
        n: number of values.
    """

    mean: float
    half_width: float
    std: float
    n: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Estimate":
        """Estimate from one value per seed.

        Args:
            values: independent values.
        """
        n = len(values)
        if n < 2:
            return cls(values[0] if values else nan, inf, nan, n)
        std = stdev(values) if all(map(isfinite, values)) else nan
        return cls(fmean(values), student_quantile(n - 1) * std / sqrt(n), std, n)

    def shifted(self, offset: float) -> "Estimate":
        """Estimate of the values plus a constant.

        Args:
            offset: the constant.
        """
        return replace(self, mean=self.mean + offset)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def significant(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Quantile of Student's t distribution for a two-sided interval.

    Args:
        degrees: degrees of freedom.
        confidence: probability that the interval covers the mean.
    """
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Estimate of arm - baseline over the seeds that both have.

    Args:
        arm: values of an arm by seed.
        baseline: values of the baseline by seed.
    """
    return Estimate.from_values([arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())])


def paired_log_ratio(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Estimate of log(arm / baseline) over the seeds that both have; its mean is the log of the geometric mean.

    Args:
        arm: positive values of an arm by seed.
        baseline: positive values of the baseline by seed.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    return Estimate.from_values([log(arm[seed] / baseline[seed]) for seed in seeds])


def images_to_reach(quality: float, images: Sequence[int], values: Sequence[float]) -> float:
    """Number of images at which a curve first falls to a value, interpolated linearly in log(images).

    Args:
        quality: the value to reach.
        images: image counts of the evaluations, increasing.
        values: the curve at these image counts; lower is better.

    Returns:
        The number of images. It is inf if the curve never falls that far; the first image count if the curve starts
        below, which is then an upper bound; nan if the quality, or a value before it is reached, is nan.
    """
    if isnan(quality):
        return nan
    before: tuple[int, float] | None = None
    for count, value in zip(images, values, strict=True):
        if isnan(value):
            return nan
        if value <= quality:
            if before is None:
                return float(count)
            fraction = (before[1] - quality) / (before[1] - value)
            return exp(log(before[0]) + fraction * (log(count) - log(before[0])))
        before = count, value
    return inf


def value_at(at: float, images: Sequence[int], values: Sequence[float]) -> float:
    """Value of a curve between two evaluations, interpolated linearly in log(images).

    Args:
        at: number of images; the result is nan before the first and after the last evaluation.
        images: image counts of the evaluations, increasing.
        values: the curve at these image counts.
    """
    for (before, left), (after, right) in pairwise(zip(images, values, strict=True)):
        if before <= at <= after:
            fraction = log(at / before) / log(after / before)
            return left + fraction * (right - left)
    return nan


def roughness(values: Sequence[float]) -> float:
    """Relative scatter of a curve between evaluations over its last half, from its second differences.

    With y the logarithms of the values, it is

        sqrt(mean (y_(i-1) - 2 y_i + y_(i+1))^2 / 6)

    This is the standard deviation of independent errors around a straight line, such as a power law of the images when
    evaluation points grow by equal factors. Curvature contributes too.

    Args:
        values: the curve, positive; the result is nan for fewer than four values.
    """
    if len(values) < 4:
        return nan
    y = [log(value) for value in values[len(values) // 2 - 1 :]]
    bends = [before - 2 * here + after for before, here, after in zip(y, y[1:], y[2:], strict=False)]
    return sqrt(fmean(bend * bend for bend in bends) / 6)
