"""The endpoints of a comparison: the numbers that decide, fixed before the first run, and what is found in each.

Each endpoint compares a target with the baseline of the same objective, seed by seed, as the logarithm of a ratio:

    area              mean over log(images) of the log distance: the area between two curves; no threshold
    end               log distance at the end of training
    spread            spread of the log distance at the end over seeds (Pitman-Morgan)
    roughness         spread of the log distance between successive evaluations
    held-out loss     at equal images, and at equal time of training
    excess            mean square of D(x_t) - E[x | x_t] on training data, at the end

The first four are taken in every feature space, and all of them for averaged and for raw weights. All results on a page
are corrected together by Holm's method.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, isnan, log, nan

from stablefield.config import describe_target
from stablefield.studies.compare.statistics import Curve, Estimate, spread_ratio

WEIGHTS = ("average", "raw")
LEVEL = 0.05
_DEFINITIONS = "1"  # must increase when the meaning of an endpoint changes


@dataclass(frozen=True)
class Endpoint:
    """A number that decides, as written in `comparison.json`: `WEIGHTS/QUANTITY/STATISTIC`.

    Attributes:
        weights: "average" or "raw".
        quantity: a feature space (its Frechet distance), "held-out loss" or "excess".
        statistic: "area", "end", "spread", "roughness" or "time" (the value at equal time).
    """

    weights: str
    quantity: str
    statistic: str

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """The endpoint that a text names.

        Args:
            text: as `str` of an endpoint returns it.
        """
        return cls(*text.split("/"))

    def __str__(self) -> str:
        return f"{self.weights}/{self.quantity}/{self.statistic}"

    @property
    def title(self) -> str:
        """Name of the endpoint in a report."""
        quantity = self.quantity if self.quantity in ("held-out loss", "excess") else f"distance ({self.quantity})"
        statistics = {
            "area": "mean over log images",
            "end": "at the end",
            "time": "at equal time",
            "spread": "spread over seeds",
            "roughness": "spread between evaluations",
        }
        return f"{quantity}, {statistics[self.statistic]}"


def fixed_endpoints(spaces: Sequence[str]) -> tuple[Endpoint, ...]:
    """Endpoints of a comparison, in all spaces and for both sets of weights.

    Args:
        spaces: names of its feature spaces.
    """
    distances = [(space, statistic) for space in spaces for statistic in ("area", "end", "spread", "roughness")]
    others = [("held-out loss", "end"), ("held-out loss", "time"), ("excess", "end")]
    return tuple(Endpoint(weights, *each) for weights in WEIGHTS for each in (*distances, *others))


def endpoints_hash(endpoints: Sequence[Endpoint]) -> str:
    """Hash of a list of endpoints and of the version of their definitions.

    Args:
        endpoints: the endpoints, in order.
    """
    return hashlib.sha256("\n".join([_DEFINITIONS, *map(str, endpoints)]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Finding:
    """Result of one endpoint for one target.

    Attributes:
        objective: name of the objective; "" if all runs share one.
        target: the target.
        baseline: the target that it is compared with.
        endpoint: the endpoint.
        estimate: logarithm of the ratio to the baseline.
        p_adjusted: p-value after Holm's correction over the page; nan if nothing could be tested.
    """

    objective: str
    target: str
    baseline: str
    endpoint: Endpoint
    estimate: Estimate
    p_adjusted: float

    @property
    def contrast(self) -> str:
        """The two arms that are compared, in words."""
        target, baseline = map(describe_target, (self.target, self.baseline))
        return f"{self.objective + ': ' if self.objective else ''}{target} against {baseline}"

    @property
    def direction(self) -> str:
        """One of "increases", "decreases", "not distinguishable" and "not measured"."""
        if isnan(self.estimate.p):
            return "not measured"
        if self.p_adjusted > LEVEL:
            return "not distinguishable"
        return "increases" if self.estimate.mean > 0 else "decreases"

    @property
    def change(self) -> str:
        """The change in per cent with its interval."""
        if isnan(self.estimate.p):
            return "not measured" if isnan(self.estimate.mean) else f"{as_percent(self.estimate.mean)} (no interval)"
        low, high = as_percent(self.estimate.low), as_percent(self.estimate.high)
        return f"{as_percent(self.estimate.mean)} ({low} to {high})"


def as_percent(log_ratio: float) -> str:
    """A logarithm of a ratio as a change in per cent; beyond a factor of a hundred as the factor.

    Args:
        log_ratio: a finite logarithm.
    """
    if abs(log_ratio) > log(100):
        return f"× {exp(min(log_ratio, 700)):.3g}"
    change = 100 * (exp(log_ratio) - 1)
    return f"{change:+.2g} %" if abs(change) < 10 else f"{change:+.1f} %"


def measure_endpoint(
    endpoint: Endpoint, arm: Sequence[Curve], baseline: Sequence[Curve], time_ratio: float = nan
) -> Estimate:
    """Logarithm of the ratio of an arm to the baseline.

    Args:
        endpoint: the endpoint.
        arm: curves of its quantity, one per seed.
        baseline: curves of the baseline with the same seeds.
        time_ratio: training time of a step relative to the baseline's; without it, nothing is known at equal time.
    """
    if endpoint.statistic == "time":
        if not isfinite(time_ratio):
            return Estimate.from_values([])
        # the faster of the two sees all images
        ours = [_early(curve, max(time_ratio, 1.0)) for curve in arm]
        theirs = [_early(curve, max(1 / time_ratio, 1.0)) for curve in baseline]
    else:
        ours, theirs = ([_STATISTICS[endpoint.statistic](curve) for curve in curves] for curves in (arm, baseline))
    if endpoint.statistic == "spread":
        return spread_ratio(ours, theirs)
    return Estimate.from_values([a - b for a, b in zip(ours, theirs, strict=True)])


def _early(curve: Curve, factor: float) -> float:
    """Logarithm of a curve when a fraction 1 / factor of the images were seen."""
    return curve.end() if factor == 1 else curve.at(curve.images[-1] / factor)


_STATISTICS = {"area": Curve.area, "end": Curve.end, "spread": Curve.end, "roughness": Curve.roughness}
