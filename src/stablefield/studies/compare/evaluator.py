"""Evaluation of all runs with the same sampling seeds, the same features, and the same x_t and exact posterior means.

So differences between arms are due to the arms. Of raw and of averaged weights, it measures

    distance        Frechet distance between features of samples and of the training data, and of the held-out data
    held-out loss   the training loss (DSM) on data that were never trained on
    excess          mean of w(t) ||D(x_t) - E[x | x_t]||^2 per dimension, on training data

The excess alone says little about quality: a denoiser without any would only reproduce training data. So the fraction
of copies at the end is a part of the record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.build import Components, build_sampler
from stablefield.config import Config
from stablefield.data import Progress, StageProgress, silent
from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.engine.metrics import HeldOutLoss, NoiseBins
from stablefield.engine.state import TrainState
from stablefield.evaluate import (
    EfficientNetLite0,
    Features,
    NearestMatches,
    Pixels,
    Statistics,
    StatisticsAccumulator,
    cached_classifier,
    find_nearest,
    frechet_distance,
    memorisation_scores,
)
from stablefield.evaluate.frechet import merge_all
from stablefield.floor import Probes, SquaredError
from stablefield.objective import LossWeight
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch
from stablefield.sample import Sampler
from stablefield.seeding import generator
from stablefield.studies.compare.gradients import gradient_variance

BATCH_SIZE = 250
BLOCK_SIZE = 1024
GRADIENT_BATCHES, GRADIENT_EXAMPLES = 16, 32
PROBE_BINS = 32


def find_spaces(data: Pool) -> tuple[str, ...]:
    """Names of the feature spaces that suit some data and are installed.

    Args:
        data: all data.
    """
    if len(data.shape) != 3 or not data.images:
        return ("data",)
    own = "data" if data.labels is None else "classifier"
    general = EfficientNetLite0.available() and data.shape[0] in (1, 3)
    return (own, EfficientNetLite0.name) if general else (own,)


@dataclass(frozen=True, eq=False)
class _Space:
    """A feature space with the statistics of the data in it."""

    features: Features
    train: Statistics
    held_out: Statistics


@dataclass(frozen=True, eq=False)
class Reference:
    """Data that samples of every objective are compared with, and their features.

    Attributes:
        pool: the training data.
        held_out: the held-out data.
        spaces: the feature spaces by name.
        nearest: nearest training data of held-out data, which samples are compared with.
    """

    pool: Pool
    held_out: Pool
    spaces: dict[str, _Space]
    nearest: NearestMatches

    @classmethod
    def make(
        cls, parts: Components, names: Sequence[str], samples: int, cache: Path, stage_progress: StageProgress
    ) -> "Reference":
        """Compute features of all data, or read their statistics from the cache.

        Args:
            parts: components of a run, with held-out data.
            names: names of the feature spaces.
            samples: number of samples per evaluation.
            cache: folder for the statistics.
            stage_progress: opens a progress callback for each stage, given its title.
        """
        assert parts.held_out is not None
        device = parts.denoiser.device
        spaces = {}
        for name in names:
            with stage_progress(f"features: {name}") as progress:
                features = _features(name, parts.data, device, progress)
            with stage_progress(f"statistics of the data: {name}") as progress:
                compute = partial(_cached_statistics, cache, features)
                train = compute(f"{name}-train", parts.pool, progress)
                spaces[name] = _Space(features, train, compute(f"{name}-held-out", parts.held_out, silent))
        index = torch.randperm(len(parts.held_out), generator=generator(0, "near"))[:samples]
        nearest = find_nearest(parts.held_out.take(index), parts.pool)
        return cls(parts.pool, parts.held_out, spaces, nearest)

    def description(self) -> dict[str, Any]:
        """Sizes, features, and the scores of held-out data, which samples can be compared with."""
        return {
            "train_size": len(self.pool),
            "held_out_size": len(self.held_out),
            "features": {name: space.features.metadata() for name, space in self.spaces.items()},
            "held_out_distance": {name: frechet_distance(s.held_out, s.train) for name, s in self.spaces.items()},
            "held_out_copies": float(self.nearest.copies().double().mean()),
        }

    def distances(self, x: Float[Tensor, "n *D"]) -> dict[str, float]:
        """Frechet distances of samples to training and held-out data in every space.

        Args:
            x: the samples.
        """
        found = {}
        for name, space in self.spaces.items():
            statistics = Statistics.from_features(space.features(x))
            found[name] = frechet_distance(statistics, space.train)
            found[f"{name}, held-out"] = frechet_distance(statistics, space.held_out)
        return found

    def copies(self, x: Float[Tensor, "n *D"]) -> dict[str, float]:
        """Fraction of copies among samples, and their nearest distance relative to that of held-out data.

        Args:
            x: the samples.
        """
        found = memorisation_scores(find_nearest(x, self.pool), self.nearest)
        return {"copies": found["copies"], "nearest_ratio": found.get("nearest_ratio", nan)}


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluation shared by all runs of an objective, with its distribution of t and its weight.

    Attributes:
        reference: what samples are compared with.
        sampler: the sampler.
        samples: number of samples, with seeds 0, 1, ...
        held_out_loss: loss on the held-out data.
        probes: x_t of training data with their exact posterior means.
        weight: loss weight of the objective.
        gradient_batches: batches for the variance of the gradient, each with its exact posterior means.
    """

    reference: Reference
    sampler: Sampler
    samples: int
    held_out_loss: HeldOutLoss
    probes: Probes
    weight: LossWeight
    gradient_batches: Sequence[tuple[NoisyBatch, Tensor]]

    @classmethod
    def make(cls, config: Config, parts: Components, reference: Reference, samples: int, examples: int) -> "Evaluator":
        """Draw the x_t of an objective and compute their exact posterior means; with 50,000 images, in a minute.

        Args:
            config: configuration of a run of the objective, without settings of an arm.
            parts: its components.
            reference: what samples are compared with.
            samples: number of samples per evaluation.
            examples: number of x_t that the excess is measured on.
        """
        objective, process = parts.objective, parts.denoiser.process
        bins = NoiseBins.equally_likely(objective.times, process)
        ranks = Ranks(parts.denoiser.device)
        held_out_loss = HeldOutLoss(reference.held_out, objective, bins, ranks, BATCH_SIZE, max_examples=4 * examples)
        loss, device = SquaredError.of_objective(objective, process), ranks.device
        probes = Probes(parts.pool, loss, bins=PROBE_BINS, per_bin=-(-examples // PROBE_BINS), device=device)
        count = GRADIENT_BATCHES * GRADIENT_EXAMPLES
        points = Probes(parts.pool, loss, bins=GRADIENT_BATCHES, per_bin=GRADIENT_EXAMPLES, seed=1, device=device)
        batches = []
        for number, rows in enumerate(
            torch.randperm(count, generator=generator(0, "gradients")).split(GRADIENT_EXAMPLES)
        ):
            noisy = points.noisy.select(rows).map(lambda values: values.to(device))
            step = torch.full((len(rows),), number * len(parts.pool))  # recent references are those of one step
            batches.append((replace(noisy, image_number=step), points.exact.mean[rows].to(device)))
        return cls(reference, build_sampler(config), samples, held_out_loss, probes, objective.weight, batches)

    def __call__(self, state: TrainState, parts: Components, *, last: bool) -> tuple[dict[str, Any], Tensor]:
        """Scores of a run, and samples of its averaged weights.

        Args:
            state: its state.
            parts: its components.
            last: True at the end of training, when copies are counted.
        """
        line: dict[str, Any] = {"images": state.images}
        sheet = torch.empty(0)
        for name, denoiser in (("raw", state.denoiser), ("average", state.average)):
            denoiser.eval()
            sheet = self._sample(denoiser)
            line[name] = {
                **self.reference.distances(sheet),
                **(self.reference.copies(sheet) if last else {}),
                "held-out loss": self.held_out_loss(denoiser)["held_out/loss"],
                "excess": self.probes.excess(denoiser, batch_size=BATCH_SIZE).value,
            }
        state.denoiser.train()
        objective = replace(parts.objective, weight=self.weight)
        variance = gradient_variance(parts.denoiser, objective, self.gradient_batches)
        line |= {"gradient_variance": variance.total, "gradient_variance_of_target": variance.target}
        return line | {"gradient_squared_mean": variance.squared_mean}, sheet

    def _sample(self, denoiser: Denoiser) -> Float[Tensor, "n *D"]:
        """Samples on the CPU, one per seed."""
        chunks = [range(start, min(start + BATCH_SIZE, self.samples)) for start in range(0, self.samples, BATCH_SIZE)]
        shape = self.reference.pool.shape
        return torch.cat([self.sampler(denoiser, shape, seeds=seeds).x.float().cpu() for seeds in chunks])


def _features(name: str, data: Pool, device: torch.device, progress: Progress) -> Features:
    """Features by name; a classifier is trained on all data, so that it is the same for every number held out."""
    if name == "data":
        return Pixels()
    if name == "classifier":
        return cached_classifier(data, device=device, progress=progress)
    return EfficientNetLite0(device)


def _cached_statistics(cache: Path, features: Features, name: str, pool: Pool, progress: Progress) -> Statistics:
    """Feature statistics of a pool, block by block."""
    file = cache / f"statistics-{name}.npz"
    if file.exists() and (found := Statistics.read(file)).features == features.identity and found.n == len(pool):
        return found

    def sums() -> Iterator[StatisticsAccumulator]:
        for number, block in enumerate(pool.blocks(NULL_LABEL, BLOCK_SIZE)):
            yield StatisticsAccumulator.from_features(features(block))
            progress(min((number + 1) * BLOCK_SIZE, len(pool)), len(pool))

    statistics = replace(merge_all(sums()).statistics(), features=features.identity)
    cache.mkdir(parents=True, exist_ok=True)
    statistics.save(file)
    return statistics
