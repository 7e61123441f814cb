"""Interface of the target estimators, and their handling of labels and augmentations.

Why the estimators are unbiased. Given x_t, the source is distributed as the posterior. Partition the data
into cells by a rule that does not depend on which data point is the source. Replacing the source by the posterior mean
over the cell that contains it keeps the expectation and does not increase the variance (Rao-Blackwell). So the rule may
depend on t, the label, x_t and the data, but never on the source, which only selects the cell.

Labels confine the support: an example whose label is given to the network has only data points of that class as
candidates. Each label in a batch gets a draw of its own.

So do augmentations that the network is given as a condition: the references must be seen through the same map as the
example. A flip is undone on x_t, the unaugmented references are averaged, and the mean is flipped (distances do
not change when both are flipped). An example under any other map keeps its own x as target, which is unbiased under any
map. The choice between the two depends on the augmentation vector alone, which is drawn without looking at the source.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from stablefield.augmentation import flip, permutes
from stablefield.kernel.accumulator import Posterior
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch
from stablefield.seeding import derive

__all__ = ["PerLabelTarget", "TargetEstimator", "check_index", "keep_source"]


class TargetEstimator(ABC):
    """Estimator of E[x | x_t] for each example of a batch: the regression target of a denoiser."""

    @abstractmethod
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        """Posterior mean of each example and its effective sample size.

        Args:
            noisy: the batch; estimators that average over data need its `index`.
            generator: randomness of the references, on the CPU; the global generator by default.

        Raises:
            ValueError: the examples have no index, differ from the data points of their index, have another shape than
                the pool, or have a label that no data point has.
        """


class PerLabelTarget(TargetEstimator):
    """Base class of estimators that average over data: splits a batch by label and undoes flips around `estimate`."""

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        # each label draws from a generator of its own, so that a target does not depend on the rest of the batch
        seed = int(torch.randint(2**62, (), generator=generator))
        plain, averaged = _undo_flips(noisy), _can_be_averaged(noisy)
        parts = [
            (index, self.estimate(plain.select(index), label, torch.Generator().manual_seed(derive(seed, label))))
            for label, index in _by_label(plain, averaged)
        ]
        if not averaged.all():
            index = (~averaged).nonzero().flatten()
            parts.append((index, keep_source(plain.select(index))))
        found = _in_batch_order(parts)
        return found if noisy.augment_label is None else replace(found, mean=flip(found.mean, noisy.augment_label))

    @abstractmethod
    def estimate(self, noisy: NoisyBatch, label: int, generator: torch.Generator | None) -> Posterior:
        """Posterior mean of examples that share one label.

        Args:
            noisy: examples without flips.
            label: the label of all of them; `NULL_LABEL` if the network is not given it.
            generator: as for `__call__`.
        """


def keep_source(noisy: NoisyBatch) -> Posterior:
    """The source of each example as its target: denoising score matching (Vincent 2011).

    Args:
        noisy: the batch.
    """
    one = torch.ones(len(noisy.x), dtype=noisy.x.dtype, device=noisy.x.device)
    return Posterior(noisy.x.detach(), one, torch.zeros_like(one))


def check_index(noisy: NoisyBatch, pool: Pool) -> Int[Tensor, "B"]:
    """The data point of each example, (B,) on the CPU, after checking that the examples can be those data points.

    Args:
        noisy: a batch with `index`.
        pool: the data that `index` counts.

    Raises:
        ValueError: no index, an index out of range, another shape, or an example that differs from its data point.
    """
    if tuple(noisy.x.shape[1:]) != pool.shape:
        raise ValueError(f"examples have shape {tuple(noisy.x.shape[1:])}, but data points of the pool {pool.shape}")
    if noisy.index is None:
        raise ValueError(
            "this target averages over data points and needs to know which ones the examples are: set index"
        )
    index = noisy.index.cpu()
    if (beyond := (index < 0) | (index >= len(pool))).any():
        raise ValueError(f"index {index[beyond][0].item()} is out of range: the pool has {len(pool)} data points")
    _compare(noisy.x[0], pool.take(index[:1])[0].to(noisy.x), int(index[0]))
    return index


def _by_label(noisy: NoisyBatch, averaged: Bool[Tensor, "B"]) -> Iterator[tuple[int, Int[Tensor, "b"]]]:
    """Each label among the averaged examples, and the positions of its examples."""
    label = torch.full((len(noisy),), NULL_LABEL) if noisy.label is None else noisy.label.cpu()
    return ((value, ((label == value) & averaged).nonzero().flatten()) for value in label[averaged].unique().tolist())


def _can_be_averaged(noisy: NoisyBatch) -> Bool[Tensor, "B"]:
    """Which examples can use plain references once their flips are undone."""
    if noisy.augment_label is None:
        return torch.ones(len(noisy), dtype=torch.bool)
    return permutes(noisy.augment_label).cpu()


def _undo_flips(noisy: NoisyBatch) -> NoisyBatch:
    """The examples without the flips that the network is given as a condition."""
    if (augment_label := noisy.augment_label) is None:
        return noisy
    x, noise, x_t = (flip(value, augment_label) for value in (noisy.x, noisy.noise, noisy.x_t))
    return replace(noisy, x=x, noise=noise, x_t=x_t)


def _in_batch_order(parts: Sequence[tuple[Int[Tensor, "_"], Posterior]]) -> Posterior:
    """Posteriors of parts of a batch as one, in the order of the batch."""
    return Posterior.concatenate([found for _, found in parts]).select(
        torch.cat([index for index, _ in parts]).argsort()
    )


def _compare(x: Tensor, data_point: Tensor, index: int) -> None:
    """Refuse an example that differs from the data point of its index.

    Examples that were changed on the way (flipped, cropped, brightened) and are averaged with unchanged references
    would silently have biased targets. Only one example per call is compared, which costs nothing: examples come in
    random order, so this is noticed within a few batches.
    """
    difference, most = torch.stack([(x - data_point).abs().max(), data_point.abs().max()]).tolist()
    if difference > 0.01 * most:  # more than half precision rounds
        raise ValueError(
            f"an example with index {index} is not data point {index} of the pool: they differ by {difference:.3g} "
            f"(largest value {most:.3g}). References must be transformed as the examples are: put transformed data "
            "into the pool, give the transformation to the network (NoisyBatch.augment_label), or use DSMTarget"
        )
