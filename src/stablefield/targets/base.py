"""Interface of the target estimators, and their handling of labels and augmentations.

Why the estimators are unbiased. Given x_t, the source is distributed as the posterior. Partition the data
into cells by a rule that does not depend on which data point is the source. Replacing the source by the posterior mean
over the cell that contains it keeps the expectation and does not increase the variance (Rao-Blackwell). So the rule may
depend on t, the label, x_t and the data, but never on the source, which only selects the cell.

Labels confine the support: an example whose label is given to the network has only data points of that class as
candidates. The draw of a label does not depend on the other labels of a batch.

So do augmentations that the network is given as a condition: the references must be seen through the same map as the
example. A flip is undone on x_t, the unaugmented references are averaged, and the mean is flipped (distances do
not change when both are flipped). Under any other map the references must be transformed for this example alone:
`STFTarget` does so for a smaller reference batch; otherwise an example keeps its own x as target, which is unbiased
under any map. The choice depends on the augmentation label alone, which is drawn without looking at the source.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.augmentation import flip, permutes
from stablefield.kernel.accumulator import Posterior
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch
from stablefield.targets.query import Examples


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
                the pool, or have a label that no data point has. To see on a GPU that examples differ or are not
                finite, the host would have to wait: there the means are not finite, and `check` says why.
        """

    def check(self, noisy: NoisyBatch) -> None:  # noqa: B027 (nothing to check by default)
        """Refuse a batch for which no target exists; training calls this where a gradient is not finite.

        Args:
            noisy: the batch.

        Raises:
            ValueError: examples differ from the data points of their index, or have values that are not finite.
        """

    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        """Mask of the examples whose target is their own x (DSM), whatever the references are.

        Args:
            noisy: the batch.
        """
        return torch.zeros(len(noisy), dtype=torch.bool)


class PoolTarget(TargetEstimator):
    """Base class of estimators that average over a pool: undoes flips around `average`, and handles other maps apart.

    Attributes:
        pool: the data.
    """

    pool: Pool

    @property
    def needs_index(self) -> bool:
        """True if examples without an index are refused."""
        return True

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        seed = int(torch.randint(2**62, (), generator=generator))
        if noisy.augment_label is None:
            return self._average(noisy, seed)
        plain = _permuted(noisy)
        if plain.all():
            return self._through_flips(noisy, seed)
        index, rest = plain.nonzero().flatten(), (~plain).nonzero().flatten()
        parts = [self._through_flips(noisy.select(index), seed)] if len(index) else []
        parts.append(self.average_through_maps(noisy.select(rest), seed))
        return Posterior.concatenate(parts).select(torch.cat([index, rest]).argsort())

    @abstractmethod
    def average(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: Int[Tensor, "B"], seed: int) -> Posterior:
        """Posterior mean of examples without flips.

        Args:
            noisy: the examples.
            index: their data points, on the CPU.
            label: their labels, on the CPU; `NULL_LABEL` where the network is not given one.
            seed: seed of random references. Each label draws from a generator of its own, so that a target does not
                depend on the rest of the batch.
        """

    def average_through_maps(self, noisy: NoisyBatch, seed: int) -> Posterior:
        """Posterior mean of examples under maps that do not permute pixels; by default their own x.

        Args:
            noisy: the examples.
            seed: seed of random references.
        """
        return keep_source(noisy)

    @override
    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        return ~_permuted(noisy)

    @override
    def check(self, noisy: NoisyBatch) -> None:
        if noisy.augment_label is not None:
            noisy = _undo_flips(noisy).select(_permuted(noisy).nonzero().flatten())
        if len(noisy):
            refuse_non_finite(noisy)
        if len(noisy) and noisy.index is not None:
            _refuse_changed(noisy, self.pool, indices_of(noisy, self.pool))

    def _through_flips(self, noisy: NoisyBatch, seed: int) -> Posterior:
        found = self._average(_undo_flips(noisy), seed)
        return found if noisy.augment_label is None else replace(found, mean=flip(found.mean, noisy.augment_label))

    def _average(self, noisy: NoisyBatch, seed: int) -> Posterior:
        label = labels_of(noisy)
        if noisy.index is None and not self.needs_index:
            return self.average(noisy, torch.full_like(label, -1), label, seed)
        index = indices_of(noisy, self.pool)
        if noisy.x.device.type != "cuda":
            _refuse_changed(noisy, self.pool, index)
            return self.average(noisy, index, label, seed)
        found = self.average(noisy, index, label, seed)
        # to look at these, the host would have to wait
        difference, limit = _difference(*_first(noisy, self.pool, index))
        return replace(found, mean=found.mean.masked_fill(difference > limit, math.nan))


def keep_source(noisy: NoisyBatch) -> Posterior:
    """The source of each example as its target: denoising score matching (Vincent 2011).

    Args:
        noisy: the batch.
    """
    one = torch.ones(len(noisy.x), dtype=noisy.x.dtype, device=noisy.x.device)
    return Posterior(noisy.x.detach(), one, torch.zeros_like(one))


def indices_of(noisy: NoisyBatch, pool: Pool) -> Int[Tensor, "B"]:
    """The data point of each example, (B,) on the CPU.

    Args:
        noisy: a batch with `index`.
        pool: the data that `index` counts.

    Raises:
        ValueError: no index, an index out of range, or examples of another shape.
    """
    if tuple(noisy.x.shape[1:]) != pool.shape:
        raise ValueError(f"examples have shape {tuple(noisy.x.shape[1:])}, but data points of the pool {pool.shape}")
    if noisy.index is None:
        raise ValueError(
            "this target averages over data points and needs to know which ones the examples are: set index"
        )
    index = noisy.index.cpu()
    if len(index):
        low, high = map(int, index.aminmax())
        if low < 0 or high >= len(pool):
            beyond = low if low < 0 else high
            raise ValueError(f"index {beyond} is out of range: the pool has {len(pool)} data points")
    return index


def refuse_non_finite(noisy: NoisyBatch | Examples) -> None:
    """Refuse noisy data and noise levels that are not finite, and negative noise levels.

    Args:
        noisy: the batch.

    Raises:
        ValueError: there are such values.
    """
    numbers = torch.isfinite(noisy.x_t).flatten(1).all(1) & torch.isfinite(noisy.sigma) & torch.isfinite(noisy.alpha)
    if (numbers & (noisy.sigma >= 0)).all():  # one wait for a GPU
        return
    for name in ("x_t", "sigma", "alpha"):
        if (bad := ~torch.isfinite(getattr(noisy, name).flatten(1 if name == "x_t" else 0))).any():
            raise ValueError(f"{name} is not finite in example {int(bad.nonzero()[0, 0])}")
    raise ValueError(f"sigma must not be negative; the smallest is {float(noisy.sigma.min())}")


def labels_of(noisy: NoisyBatch) -> Int[Tensor, "B"]:
    """The label of each example, (B,) on the CPU; `NULL_LABEL` where the network is not given one.

    Args:
        noisy: the batch.
    """
    return torch.full((len(noisy),), NULL_LABEL) if noisy.label is None else noisy.label.cpu()


def _permuted(noisy: NoisyBatch) -> Bool[Tensor, "B"]:
    """Mask of the examples that can use plain references once their flips are undone."""
    if noisy.augment_label is None:
        return torch.ones(len(noisy), dtype=torch.bool)
    return permutes(noisy.augment_label).cpu()


def _undo_flips(noisy: NoisyBatch) -> NoisyBatch:
    """The examples without the flips that the network is given as a condition."""
    if (augment_label := noisy.augment_label) is None:
        return noisy
    x, noise, x_t = (flip(value, augment_label) for value in (noisy.x, noisy.noise, noisy.x_t))
    return replace(noisy, x=x, noise=noise, x_t=x_t)


def _first(noisy: NoisyBatch, pool: Pool, index: Int[Tensor, "B"]) -> tuple[Float[Tensor, "*D"], Float[Tensor, "*D"]]:
    """The first example, and the data point of its index."""
    return noisy.x[0], pool.take(index[:1], noisy.x.device)[0].to(noisy.x.dtype)


def _difference(x: Float[Tensor, "*D"], data_point: Float[Tensor, "*D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Largest difference of an example from its data point, and how large it may be."""
    return (x - data_point).abs().max(), 0.01 * data_point.abs().max()  # more than half precision rounds


def _refuse_changed(noisy: NoisyBatch, pool: Pool, index: Int[Tensor, "B"]) -> None:
    """Refuse an example that differs from the data point of its index.

    Examples that were changed on the way (flipped, cropped, brightened) and are averaged with unchanged references
    would silently have biased targets. Only one example per call is compared, which costs nothing: examples come in
    random order, so this is noticed within a few batches.
    """
    example = _first(noisy, pool, index)
    if torch.equal(*example):
        return
    difference, limit = torch.stack(_difference(*example)).tolist()
    if difference > limit:
        first = int(index[0])
        raise ValueError(
            f"an example with index {first} is not data point {first} of the pool: they differ by {difference:.3g} "
            f"(largest value {100 * limit:.3g}). References must be transformed as the examples are: put transformed "
            "data into the pool, give the transformation to the network (NoisyBatch.augment_label), or use DSMTarget"
        )
