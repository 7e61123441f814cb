"""Probes: fixed noisy examples at which the distance of a network from E[x | x_t] is measured.

    excess = E_t weight(t) ||D(x_t, t) - E[x | x_t]||^2 / dim

The exact means are computed once, and each evaluation of a network costs one forward pass over a few hundred examples.
No loss is subtracted from another, so that the excess has no noise of targets in it.

Probes of held-out data have a denoising loss of their own, and a distance from the posterior mean over the *training*
set. A network that begins to copy its training data approaches that mean there, while its denoising loss rises.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.floor.estimate import ByNoise
from stablefield.floor.exact import Exact, exact_posteriors
from stablefield.floor.loss import Levels, SquaredError
from stablefield.floor.loss_floor import as_pool, check_loss, in_units_of_loss, supports
from stablefield.floor.points import draw_points, noise_levels_of_bins
from stablefield.pool import Pool
from stablefield.prediction import stable_target
from stablefield.process import NoisyBatch, per_example

Prediction = Callable[..., Tensor]
"""Network to examine, called as prediction(x_t, t), or as prediction(x_t, t, label) for data with labels."""


class Probes:
    """Fixed noisy examples with their exact posterior means, which are computed when they are first needed.

    >>> import torch
    >>> from stablefield.floor import Probes, SquaredError
    >>> from stablefield.process import Flow
    >>> data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> probes = Probes(data, SquaredError(Flow(), prediction_type="velocity"))
    >>> excess = probes.excess(lambda x_t, t: torch.zeros_like(x_t))
    >>> bool(excess.value > 0 and excess.error > 0)
    True

    Args:
        data: the training data, whose posterior means are the exact ones: a `Pool`, a tensor or a memory map (N, *D).
            With labels the network is given the class.
        loss: the loss, a `SquaredError`; EDM's noise and a weight of 1 on errors of x by default.
        labels: class of each data point, for a tensor; a pool has its own.
        sources: data that the examples are made from, such as held-out data (a pool or tensor); the training data by
            default. Labels as those of `data`.
        target: kind of the targets that the network is trained with, whose floor is measured too: "dsm", "stf:n",
            "knn:k" or "exact".
        bins: number of ranges of the noise level, which the loss visits equally often.
        per_bin: number of examples in each of them.
        draws: number of reference batches for the floor of stable targets.
        seed: seed of all draws.
        label_dropout: probability that an example has no label.
        part: (rank, number of ranks) of a process that measures only its part of the examples.
        device: device of the exact means; that of the data by default.

    Attributes:
        pool: the training data.
        loss: the loss.
        target: kind of the targets.
        bins: number of ranges of the noise level.
        per_bin: number of examples in each.
        noise_levels: sigma / alpha at the ends of the ranges, (bins + 1,).

    Raises:
        ValueError: the loss is not a squared error, the target is unknown, or the data do not fit.
    """

    def __init__(
        self,
        data: Any,
        loss: Any = None,
        *,
        labels: Tensor | None = None,
        sources: Any = None,
        target: str = "dsm",
        bins: int = 8,
        per_bin: int = 32,
        draws: int = 8,
        seed: int = 0,
        label_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
        device: torch.device | str | None = None,
    ) -> None:
        self.pool, self.loss = as_pool(data, labels), check_loss(SquaredError() if loss is None else loss)
        self.sources: Pool = self.pool if sources is None else as_pool(sources)
        if self.sources.shape != self.pool.shape:
            raise ValueError(f"sources have the shape {self.sources.shape}, but the data {self.pool.shape}")
        if (self.sources.labels is None) != (self.pool.labels is None):
            raise ValueError("sources need labels if and only if the data have labels")
        self.target, self._supports = target, supports([target])
        self.bins, self.per_bin, self.draws, self.seed = bins, per_bin, draws, seed
        self.label_dropout, self.part, self.device = label_dropout, part, device
        self.noise_levels = noise_levels_of_bins(self.loss, bins)

    def __len__(self) -> int:
        """Number of examples, of all parts."""
        return self.bins * self.per_bin

    @cached_property
    def noisy(self) -> NoisyBatch:
        """The examples of this part, on the CPU."""
        rank, total = self.part
        share = -(-len(self) // total)  # equally many in every part; those beyond the last one repeat
        only = torch.arange(rank * share, (rank + 1) * share) % len(self)
        return draw_points(
            self.sources,
            self.loss,
            bins=self.bins,
            per_bin=self.per_bin,
            seed=self.seed,
            label_dropout=self.label_dropout,
            only=only,
        )

    @cached_property
    def exact(self) -> Exact:
        """Exact posteriors of the examples of this part."""
        sizes, neighbours = self._supports if self.sources is self.pool else ((), ())
        return exact_posteriors(
            self.pool,
            self.noisy,
            sizes=sizes,
            neighbours=neighbours,
            draws=self.draws,
            seed=self.seed,
            device=self.device,
        )

    @cached_property
    def exact_prediction(self) -> Float[Tensor, "B *D"]:
        """The best prediction at each example of this part: E[x | x_t] as the network's prediction type."""
        return self._predictions(self.exact.mean)

    def excess(self, prediction: Prediction, *, batch_size: int = 64) -> ByNoise:
        """Weighted mean square of the distance of a network from its best prediction, by noise level.

        Args:
            prediction: the network in evaluation mode, called as prediction(x_t, t), or as prediction(x_t, t, label)
                for data with labels (-1 without), on the device of its parameters if it is a module. t is a time of
                the process, or the number of a level (int64) for `Levels`.
            batch_size: examples that pass through the network at once.

        Returns:
            The excess; of probes with `sources`, the distance from the posterior mean over the training data.
        """
        return self.by_noise(self.errors(prediction, batch_size=batch_size)[0])

    def denoising_loss(self, prediction: Prediction, *, batch_size: int = 64) -> ByNoise:
        """Loss of a network against the sources of the examples, by noise level: the DSM loss at these points.

        Args:
            prediction: the network, as for `excess`.
            batch_size: examples that pass through the network at once.
        """
        return self.by_noise(self.errors(prediction, batch_size=batch_size)[1])

    def floor(self, target: str = "dsm") -> ByNoise:
        """The floor of the loss at the examples, by noise level.

        Args:
            target: "dsm", "exact" or the `target` of the probes.

        Raises:
            ValueError: another target.
        """
        return self.by_noise(self.floors(target))

    def errors(self, prediction: Prediction, *, batch_size: int = 64) -> tuple[Float[Tensor, "B 1"], ...]:
        """Weighted squared distances of a network from its best prediction and from the DSM target, at each example.

        Args:
            prediction: the network, as for `excess`.
            batch_size: examples that pass through the network at once.
        """
        return tuple(self.weighted(square) for square in self.squares(prediction, batch_size=batch_size))

    def weighted(self, squares: Float[Tensor, "B"]) -> Float[Tensor, "B 1"]:
        """Squared errors of the prediction in units of the loss.

        Args:
            squares: squared errors at each example of this part, summed over the dimensions.
        """
        return (self.loss.factor(self.noisy.t.double(), self.noisy.x[0].numel()) * squares)[:, None]

    @torch.no_grad()
    def squares(self, prediction: Prediction, *, batch_size: int = 64) -> tuple[Float[Tensor, "B"], ...]:
        """Squared distances of a network from its best prediction and from the DSM target, without weights.

        Args:
            prediction: the network, as for `excess`.
            batch_size: examples that pass through the network at once.

        Raises:
            ValueError: the network returns another shape than its input.
        """
        device = next((p.device for p in getattr(prediction, "parameters", list)()), torch.device("cpu"))
        found = [
            _call(prediction, self.noisy.select(part).map(lambda values: values.to(device)), self.loss).cpu().double()
            for part in torch.arange(len(self.noisy)).split(batch_size)
        ]
        predicted = torch.cat(found)
        if predicted.shape != self.noisy.x_t.shape:
            raise ValueError(
                f"the network returns the shape {tuple(predicted.shape)} for an input {tuple(self.noisy.x_t.shape)}"
            )
        return tuple((predicted - best).flatten(1).square().sum(1) for best in (self.exact_prediction, self._sources))

    def with_weight(self, loss: SquaredError) -> "Probes":
        """Probes for a loss that differs in its weight alone; examples and exact means are shared.

        Args:
            loss: the other loss.
        """
        self.exact_prediction  # noqa: B018 (it is computed once for both)
        other = copy(self)
        other.loss = loss
        return other

    def floors(self, target: str = "dsm") -> Float[Tensor, "B R"]:
        """The floor of the loss at each example of this part.

        Args:
            target: as for `floor`.

        Raises:
            ValueError: another target than the probes were made for.
        """
        known = in_units_of_loss(self.exact, self.noisy, self.loss)
        if target not in known:
            raise ValueError(f"these probes know the floor of {', '.join(known)}, not of {target!r}: pass target=")
        return known[target]

    def by_noise(self, values: Float[Tensor, "B R"]) -> ByNoise:
        """Values at all examples, sorted by ranges of the noise level.

        Args:
            values: a quantity at each example, in the order of the parts; what repeats at the end is left out.
        """
        return ByNoise(values[: len(self)].unflatten(0, (self.bins, self.per_bin)), self.noise_levels)

    @cached_property
    def _sources(self) -> Float[Tensor, "B *D"]:
        return self._predictions(self.noisy.x.double())

    def _predictions(self, x0: Float[Tensor, "B *D"]) -> Float[Tensor, "B *D"]:
        """Predictions whose x0 is given, in float64."""
        noisy = self.noisy.map(lambda values: values.double() if values.is_floating_point() else values)
        alpha, sigma = self.loss.process.scales(noisy.t)
        # the noise that x_t contains after it was rounded, so that the prediction belongs to x_t as it is
        residual = noisy.x_t - per_example(alpha, noisy.x) * noisy.x
        noise = torch.where(per_example(sigma > 0, residual), residual / per_example(sigma, residual), noisy.noise)
        noisy = replace(noisy, alpha=alpha, sigma=sigma, noise=noise)
        return stable_target(noisy, x0, self.loss.process, prediction_type=self.loss.prediction_type)


def _call(prediction: Prediction, noisy: NoisyBatch, loss: SquaredError) -> Tensor:
    """Predictions of a network at some examples."""
    t = noisy.t.long() if isinstance(loss.process, Levels) else noisy.t
    return prediction(noisy.x_t, t) if noisy.label is None else prediction(noisy.x_t, t, noisy.label)
