"""From two sets of data to numbers: what is kept of each, what is compared, and what must be said beside it.

Of a set, in some features, there are the sums over all of it, and the features themselves of some members: distances
between Gaussians need only the first, and what looks at pairs is content with 10,000 on each side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.evaluate.features import Features
from stablefield.evaluate.frechet import BLOCK, Statistics, Sums, frechet_distance, merged
from stablefield.evaluate.pairs import kernel_distance, precision_recall
from stablefield.posterior import exact

MOST_PAIRS = 10_000
NEIGHBOURS = 3


@dataclass(frozen=True, eq=False)
class Cloud:
    """A set of data in some features. Parts of it, from batches or ranks, merge in any order.

    Attributes:
        sums: over all members; None if there are none.
        features: of the members that are kept.
        index: which they are, in order.
    """

    sums: Sums | None
    features: Float[Tensor, "m F"]
    index: Int[Tensor, "m"]

    @classmethod
    def of(
        cls,
        features: Features,
        blocks: Iterable[tuple[Int[Tensor, "n"], Float[Tensor, "n *D"]]],
        *,
        keep: Int[Tensor, "k"] | None = None,
    ) -> "Cloud":
        """Look at data block by block, each with the numbers of its members; keep the features of all, or of some."""
        sums: list[Sums] = []
        waiting, kept, which = [], [], [torch.empty(0, dtype=torch.int64)]
        for index, x in blocks:
            found = features(x)
            waiting.append(found)
            if sum(map(len, waiting)) >= BLOCK:  # a small batch costs as much to add as a large one
                sums, waiting = [merged([*sums, Sums.of(torch.cat(waiting))])], []
            wanted = torch.isin(index, keep) if keep is not None else torch.ones_like(index, dtype=torch.bool)
            kept.append(found[wanted])
            which.append(index[wanted])
        sums += [Sums.of(torch.cat(waiting))] if waiting else []
        return _ordered(merged(sums) if sums else None, kept, which)

    def merge(self, other: "Cloud") -> "Cloud":
        """All that was in either."""
        sums = self.sums.merge(other.sums) if self.sums and other.sums else self.sums or other.sums
        return _ordered(sums, [self.features, other.features], [self.index, other.index])

    @property
    def statistics(self) -> Statistics:
        """Mean and covariance over all members.

        Raises:
            ValueError: fewer than two.
        """
        if self.sums is None:
            raise ValueError("a covariance needs at least 2 features, not 0")
        return self.sums.statistics()


def _ordered(sums: Sums | None, features: list[Tensor], index: list[Tensor]) -> Cloud:
    order, some = torch.cat(index).argsort(), [part for part in features if len(part)]
    return Cloud(sums, torch.cat(some)[order] if some else torch.empty(0, 0), torch.cat(index)[order])


def scores(
    features: Features,
    samples: Cloud,
    reference: Statistics,
    members: Float[Tensor, "m F"] | None = None,
) -> dict[str, float]:
    """All numbers that these features give.

    Args:
        features: which they are; they name the numbers.
        samples: what is judged.
        reference: what it is compared with.
        members: features of members of the reference; without any, only Gaussians are compared.

    Raises:
        ValueError: the numbers of features differ, or there are too few samples.
    """
    found = {features.frechet: frechet_distance(samples.statistics, reference)}
    if members is not None:
        pair = [side[:MOST_PAIRS].to(exact(features.device)) for side in (samples.features, members)]
        unit = features.unit(reference) or 1.0
        found[features.kernel], found[f"{features.kernel}_deviation"] = kernel_distance(*(x / unit for x in pair))
        if min(map(len, pair)) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(*pair, k=NEIGHBOURS)
    return found | features.scores(samples.features)


def remarks(n: int, dimension: int, reference: int | None) -> list[str]:
    """What a reader must know of numbers from so few samples."""
    said = []
    for whose, count in (("samples", n), ("members of the reference", reference)):
        if count is not None and count <= dimension:
            said.append(
                f"{count:,} {whose} in {dimension:,} features: their covariance is singular, and the Frechet distance "
                "mostly says how few they are"
            )
        elif count is not None and count < 10 * dimension:
            said.append(
                f"{count:,} {whose} are few for {dimension:,} features: the Frechet distance is biased upwards; "
                "compare it only with others from as many"
            )
    return said


@dataclass(frozen=True)
class Summary:
    """A number measured several times, each with fresh samples.

    Attributes:
        mean: over the repeats.
        deviation: the standard deviation over them (n - 1); None for a single one.
        least: the smallest, which is what papers in this field report of three.
        each: all of them.

    Raises:
        ValueError: some are not finite (of which there is no least).
    """

    mean: float
    deviation: float | None
    least: float
    each: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(map(isfinite, self.each)):
            raise ValueError(f"a score is not finite: {', '.join(map(str, self.each))}")

    @classmethod
    def of(cls, each: Sequence[float]) -> "Summary":
        """Of at least one number."""
        values = torch.tensor(each, dtype=torch.float64)
        deviation = float(values.std()) if len(each) > 1 else None
        return cls(float(values.mean()), deviation, min(each), tuple(each))


def summarised(repeats: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """Each number over all repeats.

    Raises:
        ValueError: one that is not finite, by its name.
    """
    try:
        found = {}
        for name in repeats[0]:
            found[name] = Summary.of([repeat[name] for repeat in repeats if name in repeat])
        return found
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
