"""Statistics of paired runs: intervals, tests, Holm's correction, and properties of training curves.

Runs with the same seed share their initial weights, order of images and noise, so two arms are compared seed by seed.
Intervals and tests of means are Student's t; equality of two spreads over the same seeds is tested by Pitman and Morgan
(1939): two variables have equal variances if and only if their sum and difference are uncorrelated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, isnan, log, nan, sqrt
from statistics import correlation, fmean, stdev

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
MIN_PAIRS = 5  # for the spread over seeds


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval and the p-value of zero.

    Attributes:
        mean: the estimate; nan if there is none.
        low: lower end of the interval; -inf if the values do not determine it.
        high: upper end of the interval.
        p: two-sided p-value of the hypothesis that the number is zero; nan if the values do not determine it.
        n: number of pairs of runs that it comes from.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Estimate":
        """Mean of independent values, by Student's t.

        Args:
            values: one value per seed; with one that is not finite, nothing is estimated.
        """
        n = len(values)
        if not values or not all(map(isfinite, values)):
            return cls(nan, -inf, inf, nan, n)
        mean = fmean(values)
        if n < 2:
            return cls(mean, -inf, inf, nan, n)
        error = stdev(values) / sqrt(n)
        half_width = _student_quantile(n - 1) * error
        p = _student_p(mean / error, n - 1) if error else float(mean == 0)
        return cls(mean, mean - half_width, mean + half_width, p, n)


def spread_ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Logarithm of the ratio of two standard deviations over the same seeds, by Pitman and Morgan.

    With the correlation r of the pairs, q the t quantile and K = 1 + 2 (1 - r^2) q^2 / (n - 2), the interval of the
    ratio of variances is its estimate times K -+ sqrt(K^2 - 1).

    Args:
        first: one value per seed.
        second: one value per seed, paired with the first.

    Returns:
        log(std(first) / std(second)); not measured for fewer than five pairs, whose test is too sensitive to single
        runs, or if a spread is zero.
    """
    n = len(first)
    values = [*first, *second]
    if n < MIN_PAIRS or not all(map(isfinite, values)) or not (stdev(first) and stdev(second)):
        return Estimate(nan, -inf, inf, nan, n)
    ratio = log(stdev(first) / stdev(second))
    r = min(1.0, max(-1.0, correlation(first, second)))
    k = 1 + 2 * (1 - r * r) * _student_quantile(n - 2) ** 2 / (n - 2)
    half_width = 0.5 * log(k + sqrt(k * k - 1))
    sums, differences = ([a + s * b for a, b in zip(first, second, strict=True)] for s in (1, -1))
    if not (stdev(sums) and stdev(differences)):
        return Estimate(ratio, ratio - half_width, ratio + half_width, 1.0, n)
    between = correlation(sums, differences)
    rest = 1 - between * between
    p = _student_p(between * sqrt((n - 2) / rest), n - 2) if rest > 0 else 0.0
    return Estimate(ratio, ratio - half_width, ratio + half_width, p, n)


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm (1979): at most 5 % of pages without effects have any adjusted value below 0.05.

    Args:
        p: the p-values of all tests of a page; nan, of a test that could not be done, counts as 1 and stays nan.
    """
    order = sorted(range(len(p)), key=lambda i: 1.0 if isnan(p[i]) else p[i])
    adjusted, largest = [nan] * len(p), 0.0
    for rank, i in enumerate(order):
        if not isnan(p[i]):
            largest = adjusted[i] = max(largest, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


@dataclass(frozen=True)
class Curve:
    """A quantity of one finished run at every evaluation. Its statistics are nan where a value is not positive.

    Attributes:
        images: increasing image counts of the evaluations.
        values: the quantity at each.
    """

    images: Sequence[float]
    values: Sequence[float]

    @property
    def logs(self) -> list[float]:
        """Logarithms of the values."""
        return [log(value) if value > 0 else nan for value in self.values]

    def area(self) -> float:
        """Mean of log(value) over log(images), by the trapezoidal rule: the area under the curve over its width."""
        points = [(log(count), y) for count, y in zip(self.images, self.logs, strict=True)]
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
        return area / (points[-1][0] - points[0][0])

    def end(self) -> float:
        """Logarithm of the last value."""
        return self.logs[-1]

    def at(self, images: float) -> float:
        """Logarithm of the value between two evaluations, interpolated linearly in log(images).

        Args:
            images: number of images; the result is nan before the first and after the last evaluation.
        """
        for (before, left), (after, right) in pairwise(zip(self.images, self.logs, strict=True)):
            if before <= images <= after:
                return left + log(images / before) / log(after / before) * (right - left)
        return nan

    def roughness(self) -> float:
        """Logarithm of the spread between successive evaluations over the last half, from second differences.

        With y the logarithms of the values, the spread is sqrt(mean (y_(i-1) - 2 y_i + y_(i+1))^2 / 6): the standard
        deviation of independent errors around a straight line, such as a power law of the images when evaluation points
        grow by equal factors. Curvature contributes too. Nan for fewer than four values, or without any spread.
        """
        y = self.logs[len(self.values) // 2 - 1 :]
        if len(self.values) < 4 or not all(map(isfinite, self.logs)):
            return nan
        bends = [before - 2 * here + after for before, here, after in zip(y, y[1:], y[2:], strict=False)]
        square = fmean(bend * bend for bend in bends) / 6
        return log(square) / 2 if square > 0 else nan


def _student_quantile(degrees: int) -> float:
    """Quantile of Student's t distribution for a two-sided interval."""
    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def _student_p(t: float, degrees: int) -> float:
    """Two-sided p-value of a t statistic."""
    return float(2 * stdtr(degrees, -abs(t)))
