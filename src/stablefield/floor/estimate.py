"""A quantity by noise level: means over examples and draws in ranges that a loss visits equally often."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ByNoise:
    """A quantity at points in K ranges of the noise level that are equally likely, and its means.

    The points of a range are in the order of their noise level, one in each of m equal parts. So their standard error
    comes from the differences of successive points, not from the trend within the range. Where points share random
    draws, the spread over these is added.

    Attributes:
        values: the quantity at each point and draw, (K, m, R), in units of the loss.
        noise_levels: sigma / alpha at the ends of the ranges, (K + 1,); or of ranges of a single level each, (K,).
    """

    values: Float[Tensor, "K m R"]
    noise_levels: Float[Tensor, "ends"]

    def __repr__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"

    def __float__(self) -> float:
        return self.value

    @property
    def value(self) -> float:
        """Mean over all noise levels."""
        return float(self.values.mean())

    @property
    def error(self) -> float:
        """Standard error of `value`."""
        points = self._errors_over_points().square().sum() / len(self.values) ** 2
        return float((points + _squared_error(self.values.mean((0, 1)))).sqrt())

    @property
    def names(self) -> list[str]:
        """Noise levels at both ends of each range, such as `0.1..0.2`."""
        return [f"{low:.3g}..{high:.3g}" for low, high in pairwise(self.noise_levels.tolist())]

    @property
    def by_bin(self) -> Float[Tensor, "K"]:
        """Mean in each range."""
        return self.values.mean((1, 2))

    @property
    def errors_by_bin(self) -> Float[Tensor, "K"]:
        """Standard error of each mean."""
        return (self._errors_over_points().square() + _squared_error(self.values.mean(1))).sqrt()

    def map(self, function: Callable[[Tensor], Tensor]) -> "ByNoise":
        """The quantity with a function applied to its values.

        Args:
            function: maps values (K, m, R) to others.
        """
        return ByNoise(function(self.values), self.noise_levels)

    def _errors_over_points(self) -> Float[Tensor, "K"]:
        points = self.values.mean(2)
        count = points.shape[1]
        return (points.diff(dim=1).square().sum(1) / (2 * max(1, count - 1) * count)).sqrt()


def _squared_error(draws: Float[Tensor, "*K R"]) -> Float[Tensor, "*K"]:
    """Squared standard error of the mean over draws; 0 for a single one."""
    count = draws.shape[-1]
    return draws.var(-1) / count if count > 1 else draws[..., 0] * 0
