"""Probes: fixed noisy examples at which the distance of a network from E[x | x_t] is measured.

    excess = E_t weight(t) ||D(x_t, t) - E[x | x_t]||^2 / dim

The exact means are computed once, and each evaluation of a network costs one forward pass over a few hundred examples.
No loss is subtracted from another, so that the excess has no noise of targets in it.

Probes of held-out data have a denoising loss of their own, and a distance from the posterior mean over the *training*
set. A network that begins to copy its training data approaches that mean there, while its denoising loss rises.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.floor.estimate import ByNoise
from stablefield.floor.exact import Exact, Progress, exact_posteriors
from stablefield.floor.loss import Levels, SquaredError
from stablefield.pool import NULL_LABEL, Pool
from stablefield.prediction import stable_target
from stablefield.process import NoisyBatch, draw_noise, per_example
from stablefield.seeding import generator

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
        target: kind of the targets that the network is trained with, or several kinds, whose floor is measured too:
            "dsm", "stf:n", "knn:k" or "exact", as for `LossFloor.measure`.
        bins: number of ranges of the noise level, which the loss visits equally often.
        per_bin: number of examples in each of them.
        draws: number of reference batches for the floor of stable targets.
        seed: seed of all draws.
        label_dropout: probability that an example has no label.
        part: (rank, number of ranks) of a process that measures only its part of the examples.
        device: device of the exact means; that of the data by default.
        progress: called with (done, total) while these are computed.

    Attributes:
        pool: the training data.
        loss, target, bins, per_bin: as they were given.
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
        target: str | Iterable[str] = "dsm",
        bins: int = 8,
        per_bin: int = 32,
        draws: int = 8,
        seed: int = 0,
        label_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.pool, self.loss = as_pool(data, labels), _checked(SquaredError() if loss is None else loss)
        self.sources: Pool = self.pool if sources is None else as_pool(sources)
        if self.sources.shape != self.pool.shape:
            raise ValueError(f"sources have the shape {self.sources.shape}, but the data {self.pool.shape}")
        if (self.sources.labels is None) != (self.pool.labels is None):
            raise ValueError("sources need labels if and only if the data have labels")
        self.target, self._supports = target, _supports([target] if isinstance(target, str) else target)
        self.bins, self.per_bin, self.draws, self.seed = bins, per_bin, draws, seed
        self.label_dropout, self.part, self.device, self.progress = label_dropout, part, device, progress
        ends = self.loss.quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64))
        alpha, sigma = self.loss.process.scales(ends)
        self.noise_levels = sigma / alpha

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
            progress=self.progress,
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
            ValueError: another target than the probes were made for.
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
        """
        known = _in_units_of_loss(self.exact, self.noisy, self.loss)
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


def draw_points(
    pool: Pool,
    loss: SquaredError,
    *,
    bins: int,
    per_bin: int,
    seed: int = 0,
    label_dropout: float = 0.0,
    only: Int[Tensor, "b"] | None = None,
) -> NoisyBatch:
    """Noisy examples, those of a range of the noise level after one another; their numbers are `image_number`.

    The ranges are visited equally often by the loss, with times spread evenly over each. The sources of a range are
    spread evenly over the data in the order of their labels. Each example follows from the seed and its number.

    Args:
        pool: the data that sources are drawn from.
        loss: the loss, for its process and noise levels.
        bins: number of ranges of the noise level.
        per_bin: number of examples in each of them.
        seed: seed of all draws.
        label_dropout: probability that an example has no label.
        only: numbers of the examples to return, between 0 and bins * per_bin; all by default.
    """
    count = bins * per_bin
    only = torch.arange(count) if only is None else only
    draws = generator(seed, "floor", "points", bins, per_bin)
    spread = torch.rand(4, count, generator=draws, dtype=torch.float64)
    u = (torch.arange(count) + spread[0].clamp(min=2.0**-40)) / count
    place = spread[1].reshape(bins, per_bin).argsort(1)  # so that sources are independent of the noise levels
    share = (place + spread[2].reshape(bins, per_bin)).flatten() / per_bin
    order = torch.arange(len(pool)) if pool.labels is None else pool.labels.cpu().argsort(stable=True)
    index = order[(share * len(pool)).long().clamp(max=len(pool) - 1)][only]
    x, label = pool.take(index).cpu(), pool.label(index)
    if label is not None:
        label = torch.where(spread[3][only] < label_dropout, NULL_LABEL, label.cpu())
    noise = draw_noise(x, (generator(seed, "floor", "noise", n) for n in only.tolist()))
    t = loss.quantile(u)[only].to(x.dtype)
    return loss.process.perturb(x, t, noise, label=label, index=index, image_number=only)


def _in_units_of_loss(exact: Exact, noisy: NoisyBatch, loss: SquaredError) -> dict[str, Float[Tensor, "B R"]]:
    """Variances of targets at noisy examples in units of a loss, by the name of the target."""
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


def _supports(targets: Iterable[str]) -> tuple[list[int], list[int]]:
    """Sizes n of the targets "stf:n" of a list, and k of its "knn:k", sorted."""
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


def _checked(loss: Any) -> SquaredError:
    """The loss, which must be a squared error: for others the mean is not the best prediction."""
    if not isinstance(loss, SquaredError):
        name = loss if isinstance(loss, str) else type(loss).__name__
        raise ValueError(f"a floor is known for squared errors only, not for {name}: describe the loss by SquaredError")
    return loss


def _call(prediction: Prediction, noisy: NoisyBatch, loss: SquaredError) -> Tensor:
    """Predictions of a network at some examples."""
    t = noisy.t.long() if isinstance(loss.process, Levels) else noisy.t
    return prediction(noisy.x_t, t) if noisy.label is None else prediction(noisy.x_t, t, noisy.label)
