"""Scores of samples against a reference, and their summary over repeats.

A set of data is reduced to a `FeatureSet`: running statistics of all features, which suffice for the Frechet distance,
and the features of some data points for the scores that compare pairs, of which at most 10,000 on each side are used.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.evaluate.estimate import Estimate
from stablefield.evaluate.features import Features
from stablefield.evaluate.frechet import BLOCK, Statistics, StatisticsAccumulator, frechet_distance, merge_all
from stablefield.evaluate.pairs import kernel_distance, precision_recall
from stablefield.kernel.accumulator import float64_device
from stablefield.process import move

MAX_PAIRED = 10_000  # features of each side that scores which compare pairs use
METRICS = ("frechet", "kernel", "precision_recall", "inception_score", "memorisation")
_NEIGHBOURS = 3


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of a set of data. Parts from batches or ranks can be merged in any order.

    Attributes:
        accumulator: running statistics of all features; None for an empty set.
        features: the features that are kept, (m, F), on the device that they were computed on.
        index: index of the data point of each kept feature vector, (m,), ascending, on the CPU.
    """

    accumulator: StatisticsAccumulator | None
    features: Float[Tensor, "m F"]
    index: Int[Tensor, "m"]

    @classmethod
    def compute(
        cls,
        features: Features,
        blocks: Iterable[tuple[Int[Tensor, "_"], Float[Tensor, "_ ..."]]],  # of several sizes
        *,
        keep: Int[Tensor, "k"] | None = None,
    ) -> "FeatureSet":
        """Features of data that arrive in blocks.

        Args:
            features: the feature space.
            blocks: pairs of the indices (n,) and the data (n, *D) of each block.
            keep: indices whose features are kept; all by default.
        """
        done: list[StatisticsAccumulator] = []
        waiting, kept, kept_index = [], [], [torch.empty(0, dtype=torch.int64)]
        for index, x in blocks:
            block = features(x)
            waiting.append(block)
            if sum(map(len, waiting)) >= BLOCK:  # adding a small batch costs as much as adding a large one
                done = [merge_all([*done, StatisticsAccumulator.from_features(torch.cat(waiting))])]
                waiting = []
            is_kept = torch.isin(index, keep) if keep is not None else torch.ones_like(index, dtype=torch.bool)
            position = is_kept.nonzero().flatten()
            kept.append(block.index_select(0, move(position, block.device)))
            kept_index.append(index[position])
        done += [StatisticsAccumulator.from_features(torch.cat(waiting))] if waiting else []
        return _ordered(merge_all(done) if done else None, kept, kept_index)

    def to(self, device: torch.device) -> "FeatureSet":
        """The set on another device.

        Args:
            device: where the features and their statistics go.
        """
        sums = self.accumulator and self.accumulator.to(device)
        return FeatureSet(sums, self.features.to(device), self.index)

    def merge(self, other: "FeatureSet") -> "FeatureSet":
        """The union of two sets.

        Args:
            other: features of other data points.
        """
        mine, theirs = self.accumulator, other.accumulator
        accumulator = mine.merge(theirs) if mine and theirs else mine or theirs
        return _ordered(accumulator, [self.features, other.features], [self.index, other.index])

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of all features.

        Raises:
            ValueError: there are fewer than two.
        """
        if self.accumulator is None:
            raise ValueError("a covariance needs at least 2 features, not 0")
        return self.accumulator.statistics()


def _ordered(accumulator: StatisticsAccumulator | None, features: list[Tensor], index: list[Tensor]) -> FeatureSet:
    """A feature set whose kept features are sorted by index."""
    order, nonempty = torch.cat(index).argsort(), [part for part in features if len(part)]
    kept = torch.cat(nonempty) if nonempty else torch.empty(0, 0)
    return FeatureSet(accumulator, kept.index_select(0, move(order, kept.device)), torch.cat(index)[order])


def compute_scores(
    features: Features,
    samples: FeatureSet,
    reference: Statistics,
    reference_features: Float[Tensor, "m F"] | None = None,
    metrics: Collection[str] = METRICS,
) -> dict[str, float]:
    """Scores of samples in one feature space, by name.

    Args:
        features: the feature space, which names the scores.
        samples: features of the samples.
        reference: mean and covariance of the reference.
        reference_features: features of data points of the reference, (m, F); without them only scores that need
            nothing but the mean and the covariance are computed.
        metrics: names of the metrics to compute.

    Raises:
        ValueError: samples and reference differ in their number of features, or there are too few samples.
    """
    found: dict[str, float] = {}
    if "frechet" in metrics:
        found[features.frechet_name] = frechet_distance(samples.statistics, reference)
    if reference_features is not None:
        device = float64_device(features.device)
        pair = [side[:MAX_PAIRED].to(device) for side in (samples.features, reference_features)]
        if "kernel" in metrics:
            scale, kernel = features.scale(reference) or 1.0, features.kernel_name
            found[kernel], found[f"{kernel}_std"] = kernel_distance(*(x / scale for x in pair))
        if "precision_recall" in metrics and min(map(len, pair)) > _NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(*pair, k=_NEIGHBOURS)
    return found | (features.extra_scores(samples.features) if "inception_score" in metrics else {})


def sample_size_notes(n: int, dimension: int, reference_n: int | None) -> list[str]:
    """Notes on sample sizes that are small for the number of features.

    Args:
        n: number of samples.
        dimension: number of features.
        reference_n: number of data points of the reference; None if unknown.

    Returns:
        At most one sentence for the samples and one for the reference.
    """
    notes = []
    for name, count in (("samples", n), ("reference data points", reference_n)):
        if count is not None and count <= dimension:
            notes.append(
                f"{count:,} {name} in {dimension:,} features: their covariance is singular, and the Frechet distance "
                "mostly reflects their small number"
            )
        elif count is not None and count < 10 * dimension:
            notes.append(
                f"{count:,} {name} are few for {dimension:,} features: the Frechet distance is biased upwards; "
                "compare it only with distances computed from as many"
            )
    return notes


def summarise(repeats: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Estimate of each score over all repeats.

    Args:
        repeats: scores by name, of each repeat.

    Raises:
        ValueError: a score is not finite.
    """
    summaries = {}
    for name in repeats[0]:
        try:
            summaries[name] = Estimate.from_values([repeat[name] for repeat in repeats if name in repeat])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return summaries
