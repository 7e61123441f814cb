"""A score with its uncertainty over independent repeats."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """Mean of a quantity over independent repeats, such as new samples or new seeds, with its standard error.

    Attributes:
        values: the value of each repeat; at least one.

    Raises:
        ValueError: there is no value, or one is not finite.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("an estimate needs at least one value")
        if not all(map(isfinite, self.values)):
            raise ValueError(f"a score is not finite: {', '.join(map(str, self.values))}")

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Estimate":
        """Estimate from the value of each repeat.

        Args:
            values: at least one value.
        """
        return cls(tuple(map(float, values)))

    @property
    def n(self) -> int:
        """Number of repeats."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the repeats."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation over the repeats, with denominator n - 1; None for a single repeat."""
        return stdev(self.values) if self.n > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean, std / sqrt(n); None for a single repeat."""
        return None if self.std is None else self.std / sqrt(self.n)

    @property
    def min(self) -> float:
        """Smallest value, which papers report of three repeats."""
        return min(self.values)

    def __float__(self) -> float:
        return self.mean

    def as_dict(self) -> dict[str, float | list[float] | None]:
        """Mean, standard deviation, smallest value and all values, as they are written to files."""
        return {"mean": self.mean, "std": self.std, "min": self.min, "values": list(self.values)}
