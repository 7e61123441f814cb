"""The floor of a loss from the cache, and in words."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stablefield.checkpoint import cached_tensors
from stablefield.data import Progress, content_hash, silent
from stablefield.floor import ByNoise, LossFloor, SquaredError
from stablefield.pool import Pool
from stablefield.studies.field.linear import LinearDenoiser


def cached_floor(
    pool: Pool,
    loss: SquaredError,
    *,
    targets: Sequence[str],
    bins: int,
    per_bin: int,
    seed: int = 0,
    label_dropout: float = 0.0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> LossFloor:
    """The floor of a loss on a data set, from the cache; the first call measures it.

    Args:
        pool: the data.
        loss: the loss, whose parts must have complete representations, as those of this package do.
        targets: kinds of targets, as for `LossFloor.measure`.
        bins: number of ranges of the noise level.
        per_bin: number of examples in each of them.
        seed: seed of all draws.
        label_dropout: probability that an example is trained without its label.
        device: device of the computation.
        progress: called with (done, total) if it is measured.
    """
    options = {"bins": bins, "per_bin": per_bin, "seed": seed, "label_dropout": label_dropout}
    data_hash = content_hash(pool)
    description = {"kind": "floor 1", "data": data_hash, "loss": repr(loss), "targets": list(targets), **options}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def compute() -> dict[str, torch.Tensor]:
        found = LossFloor.measure(
            pool, loss, targets=targets, device=device, progress=progress, bins=bins, per_bin=per_bin, seed=seed,
            label_dropout=label_dropout,
        )  # fmt: skip
        tensors = {name: floor.values.contiguous() for name, floor in found.floors.items()}
        tensors["noise_levels"] = next(iter(found.floors.values())).noise_levels
        return tensors | ({} if found.label is None else {"label": found.label})

    tensors = cached_tensors(f"{data_hash[:32]}-floor-{digest[:16]}.safetensors", description, compute)
    floors = {name: ByNoise(tensors[name], tensors["noise_levels"]) for name in targets}
    return LossFloor(floors, tensors.get("label"))


def loss_of_linear_denoiser(pool: Pool, loss: SquaredError) -> float:
    """The loss of the best linear denoiser, which a trained network should be far below.

    Args:
        pool: the data.
        loss: the loss.
    """
    t = loss.quantile((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    alpha, sigma = loss.process.scales(t)
    linear = LinearDenoiser.from_pool(pool)
    return float((loss.factor_of_x0(t, len(linear.variances)) * linear.squared_error(sigma / alpha)).mean())


@dataclass(frozen=True, eq=False)
class FloorReport:
    """The floor of a loss in words.

    Attributes:
        floors: the floor by the name of the target.
        linear_loss: loss of the best linear denoiser.
        excess: excess of a network, if there is one.
    """

    floors: Mapping[str, ByNoise]
    linear_loss: float
    excess: ByNoise | None = None

    def table(self) -> list[list[str]]:
        """Floor and excess by noise level, as rows of cells."""
        columns = {f"floor {name}": floor for name, floor in self.floors.items()}
        columns |= {} if self.excess is None else {"excess": self.excess}
        rows = [["sigma / alpha", *columns]]
        for i, name in enumerate([*next(iter(columns.values())).names, "all"]):
            cells = (
                (values.value, values.error) if name == "all" else (values.by_bin[i], values.errors_by_bin[i])
                for values in columns.values()
            )
            rows.append([name, *(_cell(float(value), float(error)) for value, error in cells)])
        return rows

    def lines(self) -> list[str]:
        """Sentences that say what the floor means for a training."""
        found = []
        for name, floor in self.floors.items():
            kind = "a DSM loss" if name == "dsm" else f"a loss with {name} targets"
            share = ""
            if self.excess is not None:
                noise = 100 * floor.value / (floor.value + self.excess.value)
                share = f"; {noise:.0f} % of what it reports for this network is noise of the targets"
            found.append(f"with these settings {kind} cannot go below {floor.value:.3g}{share}")
        found[0] += f" (the best linear denoiser: {self.linear_loss:.3g})"
        if self.excess is not None:
            found.append(f"the network is {self.excess!r} above the floor (excess)")
        return found

    def record(self) -> dict[str, Any]:
        """Values, standard errors and noise levels, for a JSON file."""

        def numbers(values: ByNoise) -> dict[str, Any]:
            numbers = {"value": values.value, "error": values.error, "noise_levels": values.noise_levels.tolist()}
            return {**numbers, "by_bin": values.by_bin.tolist(), "errors_by_bin": values.errors_by_bin.tolist()}

        return {
            "floors": {name: numbers(floor) for name, floor in self.floors.items()},
            "linear_loss": self.linear_loss,
            "excess": None if self.excess is None else numbers(self.excess),
        }


def _cell(value: float, error: float) -> str:
    """A value and its standard error; what is below rounding is 0."""
    return "0" if abs(value) < 1e-12 else f"{value:.4g} ± {error:.1g}"
