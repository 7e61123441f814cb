"""Excess of a run's network over the floor of its loss, at fixed noisy examples (`stablefield.floor`).

The exact posterior means of the examples are computed when they are first due, not before the first step. The examples
and the image counts at which they are due follow from the configuration, the network is copied and evaluated without
dropout, and no random number of training is used. So a run has the same weights with probes and without.

Two losses are measured: the run's own, with its noise and weight, and EDM's with its default noise and weight, which
alone is comparable between runs on the same data. At held-out images the denoising loss of the network stands beside
its distance from the posterior mean over the *training* data, which falls if the network begins to copy them.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.build import Components
from stablefield.config import Config
from stablefield.distributed import Ranks
from stablefield.engine.state import TrainState
from stablefield.floor import ByNoise, Probes, SquaredError, edm_loss
from stablefield.objective import Objective
from stablefield.process import VE, Process
from stablefield.seeding import derive
from stablefield.targets import DSMTarget, ExactTarget, KNNTarget, Prefetched, Sharded, STFTarget, TargetEstimator
from stablefield.times import LogNormal, Stratified

LOGGER = logging.getLogger("stablefield")


def target_name(target: TargetEstimator) -> str | None:
    """The name of a target whose floor is known: "dsm", "stf:n", "knn:k" or "exact"; None for others.

    An approximate search for the nearest is one of the others: what it finds depends on its index.

    Args:
        target: the estimator of a run.
    """
    match target:
        case Prefetched(target=inner) | Sharded(target=inner):
            return target_name(inner)
        case DSMTarget():
            return "dsm"
        case STFTarget(size=size):
            return f"stf:{size}"
        case KNNTarget(neighbours=neighbours, search="exhaustive"):
            return f"knn:{neighbours}"
        case ExactTarget():
            return "exact"
        case _:
            return None


def _named(group: str, name: str, values: ByNoise) -> dict[str, float]:
    """Mean over all noise levels and over each range, by the names of the metrics."""
    by_noise = f"{'' if group == 'loss' else group + '_'}{name}_by_noise"
    ranges = zip(values.names, values.by_bin.tolist(), strict=True)
    return {f"{group}/{name}": values.value} | {f"{by_noise}/{label}": value for label, value in ranges}


class RunProbes:
    """Measures the excess of the network of a run at fixed noisy examples.

    Args:
        config: configuration of the run.
        components: the parts of the run.
        ranks: this process and those it trains with, among which the examples are divided.

    Attributes:
        every: images between two measurements; 0 for none.
        target: name of the targets that the run is trained with; None if their floor is not known.
        latest: the excess and the floor that were measured last, and the name of the target; empty before.
        excess_by_bin: the excess in each range of the noise level under the run's own loss, as measured last.
    """

    def __init__(self, config: Config, components: Components, ranks: Ranks) -> None:
        self.training, self.components, self.ranks = config.training, components, ranks
        self.every, self.target = config.training.probe_every, target_name(components.objective.target)
        self.batch_size = self.training.micro_batch_size or self.training.batch_size // ranks.world_size
        self.augmented = bool(config.make("augmentation").augment_dim)
        self.latest: dict[str, Any] = {}
        self.excess_by_bin = torch.zeros(0)
        self._made: tuple[dict[str, Probes], Probes | None] | None = None

    def due(self, images: int, batch_size: int) -> bool:
        """True if a measurement is due after a step.

        Args:
            images: images seen at the end of the step.
            batch_size: images of the step.
        """
        if not self.every or images < self.every:
            return False
        return images // self.every > (images - batch_size) // self.every or images >= self.training.images

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Metrics of the network with its weights as they are and averaged; must be called on all ranks.

        Args:
            state: the state of training, which is not changed.
        """
        start = perf_counter()
        groups, held_out = self._groups(state.denoiser.process)
        devices = [] if state.device.type == "cpu" else [state.device]
        with torch.random.fork_rng(devices):  # networks that draw random numbers take none from training
            torch.manual_seed(derive(self.training.seed, "probes"))
            metrics = self._floors(groups)
            raw = copy.deepcopy(state.average)
            raw.load_state_dict(state.denoiser.state_dict())
            for suffix, network in (("", raw), ("_average", state.average)):
                metrics |= self._excess(groups, network, suffix)
            if held_out is not None:
                squares = held_out.squares(state.average, batch_size=self.batch_size)
                for name, square in zip(("distance_to_training_mean", "probe_loss"), squares, strict=True):
                    metrics |= _named("held_out", name, self._gathered(held_out, held_out.weighted(square)))
        self.recall(metrics)
        return metrics | {"timing/probe_sec": perf_counter() - start}

    def recall(self, metrics: Mapping[str, Any]) -> None:
        """Take what was measured last from metrics, which `latest` then has.

        Args:
            metrics: metrics of a measurement, such as the last line of a run that is resumed.
        """
        name, target = ("floor_target", self.target) if "loss/floor_target" in metrics else ("floor_dsm", "dsm")
        self.latest = {"loss/excess": metrics["loss/excess"], "loss/floor": metrics[f"loss/{name}"]}
        self.latest["target/name"] = target or "dsm"

    def _excess(self, groups: dict[str, Probes], network: Callable[..., Tensor], suffix: str) -> dict[str, float]:
        metrics: dict[str, float] = {}
        squares: dict[int, Tensor] = {}  # groups that differ in their weight share one evaluation of the network
        for group, probes in groups.items():
            if id(probes.noisy) not in squares:
                squares[id(probes.noisy)] = probes.squares(network, batch_size=self.batch_size)[0]
            excess = self._gathered(probes, probes.weighted(squares[id(probes.noisy)]))
            metrics |= _named(group, f"excess{suffix}", excess)
            metrics[f"{group}/excess{suffix}_error"] = excess.error
            if group == "loss" and not suffix:
                self.excess_by_bin = excess.by_bin
        return metrics

    def _floors(self, groups: dict[str, Probes]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        names = {"floor_dsm": "dsm"} | ({"floor_target": self.target} if self.target else {})
        for group, probes in groups.items():
            for name, target in names.items():
                floor = self._gathered(probes, probes.floors(target))
                metrics |= _named(group, name, floor)
                metrics[f"{group}/{name}_error"] = floor.error
        return metrics

    def _gathered(self, probes: Probes, values: Float[Tensor, "B R"]) -> ByNoise:
        """Values at the examples of all ranks."""
        return probes.by_noise(self.ranks.all_gather(values.to(self.ranks.device).float()).cpu().double())

    def _groups(self, process: Process) -> tuple[dict[str, Probes], Probes | None]:
        """The probes of the run's own loss, of EDM's, and of held-out images; made when they are first due."""
        if self._made is None:
            if self.augmented and self.ranks.is_main:
                LOGGER.warning(
                    "the excess and the floor of the loss are measured without augmentation (at the identity map)"
                )
            objective, held_out = self.components.objective, self.components.held_out
            own, edm = SquaredError.of_objective(objective, process), edm_loss(process)
            probes = self._probes(own)
            of_edm = probes.with_weight(edm) if _has_noise_of_edm(objective, process) else self._probes(edm)
            of_held_out = None if held_out is None else self._probes(own, sources=held_out)
            self._made = {"loss": probes, "edm": of_edm}, of_held_out
        return self._made

    def _probes(self, loss: SquaredError, **sources: Any) -> Probes:
        return Probes(
            self.components.pool,
            loss,
            target=self.target or "dsm",
            per_bin=self.training.probes,
            label_dropout=self.training.label_dropout,
            part=(self.ranks.rank, self.ranks.world_size),
            device=self.ranks.device,
            **sources,
        )


def _has_noise_of_edm(objective: Objective, process: Process) -> bool:
    """True if a run draws its noise levels as EDM does by default."""
    times = objective.times.times if isinstance(objective.times, Stratified) else objective.times
    return isinstance(process, VE) and times == LogNormal()
