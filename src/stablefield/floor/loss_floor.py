"""The floor of a training loss: the least value that a squared error against single sources can have.

    floor(t) = E Tr Cov[x | x_t]      (in units of the loss)

Whatever the network, loss(DSM) = excess + V_DSM, loss(STF, n) = excess + V_STF(n) and loss(exact) = excess, at every
x_t and for each class, where the excess is the mean squared distance of the network from E[x | x_t]. So a loss cannot
go below the variance of its targets, and that part of it says nothing about the network (cf. arXiv 2506.13763).

The floor is that of the finite training set. Below the distance of neighbouring data points it is 0, far under that of
the distribution the data were drawn from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.floor.estimate import ByNoise
from stablefield.floor.exact import Exact, Progress, exact_posteriors
from stablefield.floor.loss import SquaredError
from stablefield.floor.points import draw_points, noise_levels_of_bins
from stablefield.pool import Pool
from stablefield.process import NoisyBatch


@dataclass(frozen=True, eq=False)
class LossFloor:
    """The floor of a loss by noise level, for several kinds of targets.

    Attributes:
        floors: the floor by the name of the target: "dsm", "stf:n", "knn:k" and "exact".
        label: class of each point, (K, m); None for an unconditional floor.
    """

    floors: dict[str, ByNoise]
    label: Int[Tensor, "K m"] | None = None

    @classmethod
    def measure(
        cls,
        data: Any,
        loss: Any = None,
        *,
        labels: Tensor | None = None,
        targets: Sequence[str] = ("dsm",),
        bins: int = 16,
        per_bin: int = 64,
        draws: int = 8,
        seed: int = 0,
        label_dropout: float = 0.0,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> "LossFloor":
        """Measure the floor of a loss on a data set.

        >>> import torch
        >>> from stablefield.floor import LossFloor, SquaredError
        >>> from stablefield.process import Flow
        >>> data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> floor = LossFloor.measure(data, SquaredError(Flow(), prediction_type="velocity"))
        >>> bool(0 < floor.floors["dsm"].value)
        True

        Args:
            data: the training data: a `Pool`, a tensor or a memory map (N, *D). With labels the floor is that of a
                network which is given the class. Mirrored training is `Pool(data).mirrored()`.
            loss: the loss, a `SquaredError`; EDM's noise and a weight of 1 on errors of x by default.
            labels: class of each data point, for a tensor; a pool has its own.
            targets: kinds of targets: "dsm", "stf:n" (n candidates with the source), "knn:k" (the k nearest data
                points if the source is among them, else the source) and "exact".
            bins: number of ranges of the noise level, which the loss visits equally often.
            per_bin: number of x_t in each of them.
            draws: number of reference batches for stable targets.
            seed: seed of all draws.
            label_dropout: probability that an example is trained without its label.
            device: device of the computation; that of the data by default.
            progress: called with (done, total).

        Raises:
            ValueError: the loss is not a squared error, the target is unknown, or the data do not fit.
        """
        pool, loss = as_pool(data, labels), check_loss(SquaredError() if loss is None else loss)
        sizes, neighbours = supports(targets)
        noisy = draw_points(pool, loss, bins=bins, per_bin=per_bin, seed=seed, label_dropout=label_dropout)
        exact = exact_posteriors(
            pool, noisy, sizes=sizes, neighbours=neighbours, draws=draws, seed=seed, device=device, progress=progress
        )
        ends, values = noise_levels_of_bins(loss, bins), in_units_of_loss(exact, noisy, loss)
        floors = {name: ByNoise(values[name].unflatten(0, (bins, per_bin)), ends) for name in dict.fromkeys(targets)}
        return cls(floors, None if noisy.label is None else noisy.label.reshape(bins, per_bin))

    def by_class(self, target: str = "dsm") -> dict[int, tuple[float, float]]:
        """The floor of each class and its standard error; -1 is that of examples without label.

        Args:
            target: kind of the target.

        Raises:
            ValueError: the floor is unconditional.
        """
        if self.label is None:
            raise ValueError("this floor is unconditional: give labels to have the floors of classes")
        values = self.floors[target].values.mean(2)
        return {label: _mean_of_class(values, self.label == label) for label in self.label.unique().tolist()}


def _mean_of_class(values: Float[Tensor, "K m"], chosen: Tensor) -> tuple[float, float]:
    """Mean over the chosen points, each range counting equally, and its standard error."""
    bins = [row[mask] for row, mask in zip(values, chosen, strict=True) if mask.any()]
    errors = [row.var() / len(row) if len(row) > 1 else row.new_zeros(()) for row in bins]
    mean = torch.stack([row.mean() for row in bins]).mean()
    return float(mean), float(torch.stack(errors).sum().sqrt()) / len(bins)


def in_units_of_loss(exact: Exact, noisy: NoisyBatch, loss: SquaredError) -> dict[str, Float[Tensor, "B R"]]:
    """Variances of targets at noisy examples in units of a loss, by the name of the target.

    Args:
        exact: posteriors at the examples.
        noisy: the examples.
        loss: the loss.
    """
    factor = loss.factor_of_x0(noisy.t.double(), noisy.x[0].numel())[:, None]
    zero = torch.zeros_like(exact.dsm)[:, None]
    variances = {
        "dsm": exact.dsm[:, None],
        "exact": zero,
        **{f"stf:{n}": errors.variance for n, errors in exact.stf.items()},
        **{f"knn:{k}": variance[:, None] for k, variance in exact.knn.items()},
    }
    # a weight may be infinite where the variance is 0, at the very end of the noise levels
    return {name: torch.where(values == 0, 0.0, factor * values) for name, values in variances.items()}


def supports(targets: Iterable[str]) -> tuple[list[int], list[int]]:
    """Sizes n of the targets "stf:n" of a list, and k of its "knn:k", sorted.

    Args:
        targets: kinds of targets, as for `LossFloor.measure`.

    Raises:
        ValueError: an unknown target.
    """
    sizes: dict[str, set[int]] = {"stf": set(), "knn": set()}
    for target in targets:
        kind, _, size = target.partition(":")
        if target in ("dsm", "exact"):
            continue
        if kind not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                'a target is "dsm", "exact", "stf:n" with n candidates, such as "stf:256", or "knn:k" with the k '
                f"nearest, not {target!r}"
            )
        sizes[kind].add(int(size))
    return sorted(sizes["stf"]), sorted(sizes["knn"])


def check_loss(loss: Any) -> SquaredError:
    """The loss, which must be a squared error: for others the mean is not the best prediction.

    Args:
        loss: the loss.

    Raises:
        ValueError: it is another loss.
    """
    if not isinstance(loss, SquaredError):
        name = loss if isinstance(loss, str) else type(loss).__name__
        raise ValueError(f"a floor is known for squared errors only, not for {name}: describe the loss by SquaredError")
    return loss


def as_pool(data: Any, labels: Tensor | None = None) -> Pool:
    """A data set as a pool.

    Args:
        data: a `Pool`, a tensor or a memory map (N, *D).
        labels: class of each data point of a tensor.

    Raises:
        ValueError: labels for a pool, which has its own, or data of another type.
    """
    if isinstance(data, Pool):
        if labels is not None:
            raise ValueError("labels belong to a tensor: a Pool has its own")
        return data
    if not isinstance(data, Tensor):
        if not hasattr(data, "__array_interface__"):
            raise ValueError(f"data must be a Pool, a tensor or a memory map, not {type(data).__name__}")
        data = torch.as_tensor(data)
    return Pool(data.detach(), labels)
