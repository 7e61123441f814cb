"""The floor of a training loss: the least value that a squared error against single sources can have.

    floor(t) = E Tr Cov[x | x_t]      (in units of the loss)

Whatever the network, loss(DSM) = excess + V_DSM, loss(STF, n) = excess + V_STF(n) and loss(exact) = excess, at every
x_t and for each class, where the excess is the mean squared distance of the network from E[x | x_t]. So a loss cannot
go below the variance of its targets, and that part of it says nothing about the network (cf. arXiv 2506.13763).

The floor is that of the finite training set. Below the distance of neighbouring data points it is 0, far under that of
the distribution the data were drawn from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.floor.estimate import ByNoise
from stablefield.floor.exact import Progress
from stablefield.floor.probes import Probes


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
        probes = Probes(
            data, loss, labels=labels, target=targets, bins=bins, per_bin=per_bin, draws=draws, seed=seed,
            label_dropout=label_dropout, device=device, progress=progress,
        )  # fmt: skip
        floors = {name: probes.floor(name) for name in dict.fromkeys(targets)}
        label = probes.noisy.label
        return cls(floors, None if label is None else label.reshape(bins, per_bin))

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
