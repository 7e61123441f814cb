"""Evaluation of all arms with the same x_t and exact posterior means, the same sampling seeds and the same features.

So differences between arms are due to the arms. Four properties of a denoiser D are measured:

    quality       Frechet distance between features of samples and of the training data
    held-out loss E ||D(x_t) - x||^2 per dimension, with x from data that were never trained on
    exact error   E ||D(x_t) - E[x | x_t]||^2 per dimension, with the posterior mean over the training data
    copies        distance of samples to the training data, relative to that of held-out data

The exact error alone says little about quality: a denoiser without any would only reproduce training data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.build import Components, build_sampler
from stablefield.config import Config
from stablefield.data import Progress, StageProgress, silent, silent_stage, split
from stablefield.denoise import Denoiser
from stablefield.evaluate import (
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
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch
from stablefield.sample import Sampler
from stablefield.seeding import generator
from stablefield.targets import ExactTarget
from stablefield.times import TimeDistribution

__all__ = ["Evaluator", "NoiseLevel", "make_evaluator", "noise_levels"]

NUM_LEVELS = 9
BATCH_SIZE = 250
BLOCK_SIZE = 1024
GRADIENT_BATCHES, GRADIENT_EXAMPLES = 16, 32


@dataclass(frozen=True, eq=False)
class NoiseLevel:
    """Examples at one noise level, on which denoisers are evaluated.

    Attributes:
        noise_level: sigma / alpha.
        share: probability that the training noise is nearer to this level than to the others.
        weight: loss weight at this level.
        train: x_t of training data, on the denoiser's device.
        exact: their posterior means E[x | x_t] over all training data.
        held_out: x_t of held-out data.
    """

    noise_level: float
    share: float
    weight: float
    train: NoisyBatch
    exact: Float[Tensor, "n *D"]
    held_out: NoisyBatch


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluation shared by all arms; it depends on the data and the configuration alone, not on any training.

    Attributes:
        shape: shape of one sample.
        pool: training data.
        sampler: sampler of all arms.
        seeds: sampling seeds, one per sample.
        features: feature network of the Frechet distance.
        train_statistics: feature statistics of the training data.
        held_out_statistics: feature statistics of the held-out data.
        held_out_nearest: nearest training data of held-out data, which samples are compared with.
        levels: examples at each noise level.
        gradient_batches: batches for the variance of the gradient, each with its exact posterior means.
        description: what the report needs besides the scores: noise levels, features, and scores of held-out data.
    """

    shape: tuple[int, ...]
    pool: Pool
    sampler: Sampler
    seeds: range
    features: Features
    train_statistics: Statistics
    held_out_statistics: Statistics
    held_out_nearest: NearestMatches
    levels: Sequence[NoiseLevel]
    gradient_batches: Sequence[tuple[NoisyBatch, Tensor]]
    description: dict[str, Any]

    def sample(self, denoiser: Denoiser) -> tuple[Float[Tensor, "n *D"], int]:
        """Samples on the CPU, one per seed, and the number of network evaluations per sample.

        Args:
            denoiser: the denoiser to sample from.
        """
        chunks = [self.seeds[start : start + BATCH_SIZE] for start in range(0, len(self.seeds), BATCH_SIZE)]
        samples = [self.sampler(denoiser, self.shape, seeds=seeds) for seeds in chunks]
        return torch.cat([chunk.x.float().cpu() for chunk in samples]), samples[0].evaluations

    def score_samples(self, x: Float[Tensor, "n *D"]) -> dict[str, float]:
        """Frechet distances of samples to training and held-out data, and measures of copying.

        Args:
            x: the samples.
        """
        statistics = Statistics.from_features(self.features(x))
        near = memorisation_scores(find_nearest(x, self.pool), self.held_out_nearest)
        return {
            "frechet": frechet_distance(statistics, self.train_statistics),
            "frechet_held_out": frechet_distance(statistics, self.held_out_statistics),
            "nearest_ratio": near.get("nearest_ratio", nan),
            "copies": near["copies"],
        }

    @torch.no_grad()
    def score_denoiser(self, denoiser: Denoiser) -> dict[str, Any]:
        """Exact error and held-out loss of a denoiser, at each noise level and weighted as in training.

        Args:
            denoiser: the denoiser to evaluate.
        """
        exact = [_error(denoiser, level.train, level.exact) for level in self.levels]
        held_out = [_error(denoiser, level.held_out, level.held_out.x) for level in self.levels]
        factors = [level.share * level.weight for level in self.levels]
        return {
            "exact_error": sum(f * e for f, e in zip(factors, exact, strict=True)),
            "held_out_loss": sum(f * e for f, e in zip(factors, held_out, strict=True)),
            "exact_error_by_level": exact,
            "held_out_loss_by_level": held_out,
        }


def make_evaluator(
    config: Config,
    parts: Components,
    *,
    samples: int,
    examples: int,
    stage_progress: StageProgress = silent_stage,
) -> Evaluator:
    """Make the evaluator of an experiment; with 50,000 images this takes minutes.

    Args:
        config: configuration that all arms share.
        parts: components built from it, with held-out data.
        samples: number of samples per evaluation.
        examples: number of examples per noise level.
        stage_progress: opens a progress callback for each stage, given its title.
    """
    pool, held_out = parts.pool, parts.held_out
    assert held_out is not None
    with stage_progress("training the classifier that compares samples") as progress:
        device = next(parts.denoiser.parameters()).device
        features, description = _features(split(parts.data, len(held_out))[0], device, progress)
    with stage_progress("features of the data") as progress:
        train_statistics = _statistics(features, pool, progress)
        held_out_statistics = _statistics(features, held_out, silent)
    index = torch.randperm(len(held_out), generator=generator(0, "near"))[:samples]
    held_out_nearest = find_nearest(held_out.take(index), pool)
    with stage_progress("exact targets at every noise level") as progress:
        levels = list(_levels(parts, held_out, examples, progress))
    with stage_progress("exact targets for the gradients") as progress:
        gradient_batches = list(_gradient_batches(parts, progress))
    description |= {
        "levels": [level.noise_level for level in levels],
        "shares": [level.share for level in levels],
        "weights": [level.weight for level in levels],
        "train_size": len(pool),
        "held_out_size": len(held_out),
        "frechet_of_held_out": frechet_distance(held_out_statistics, train_statistics),
        "nearest_of_held_out": float(held_out_nearest.distance[:, 0].median()),
        "copies_of_held_out": float(held_out_nearest.copies().double().mean()),
    }
    return Evaluator(
        pool.shape,
        pool,
        build_sampler(config),
        range(samples),
        features,
        train_statistics,
        held_out_statistics,
        held_out_nearest,
        levels,
        gradient_batches,
        description,
    )


def noise_levels(parts: Components) -> tuple[Float[Tensor, "L"], list[float]]:
    """Times at noise levels evenly spaced in log(sigma / alpha), and the share of the training noise nearest to each.

    Args:
        parts: components, with the process and the distribution of t.
    """
    process, times = parts.denoiser.process, parts.objective.times
    ends = _log_levels(parts, times, torch.tensor([0.005, 0.995], dtype=torch.float64))
    spaced = torch.linspace(float(ends[0]), float(ends[1]), NUM_LEVELS, dtype=torch.float64)
    quantiles = _log_levels(parts, times, (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    closest = (quantiles[:, None] - spaced).abs().argmin(1)
    shares = torch.bincount(closest, minlength=NUM_LEVELS).double() / len(quantiles)
    return process.time(spaced.exp()), shares.tolist()


def _levels(parts: Components, held_out: Pool, examples: int, progress: Progress) -> Iterator[NoiseLevel]:
    """Examples and exact posterior means at each noise level."""
    pool, process = parts.pool, parts.denoiser.process
    t, shares = noise_levels(parts)
    weights = parts.objective.weight(process, t).tolist()
    for number, (time, share, weight) in enumerate(zip(t, shares, weights, strict=True)):
        train, unseen = (
            _noisy_batch(parts, data, time.expand(min(examples, len(data))), number) for data in (pool, held_out)
        )
        alpha, sigma = process.scales(time)
        yield NoiseLevel(float(sigma / alpha), share, weight, train, _exact_means(pool, train), unseen)
        progress(number + 1, len(t))


def _gradient_batches(parts: Components, progress: Progress) -> Iterator[tuple[NoisyBatch, Tensor]]:
    """Batches as in training, each with its exact posterior means."""
    for number in range(GRADIENT_BATCHES):
        times = parts.objective.times.draw(GRADIENT_EXAMPLES, generator(0, "gradient times", number))
        noisy = _noisy_batch(parts, parts.pool, times, NUM_LEVELS + number)
        yield noisy, _exact_means(parts.pool, noisy)
        progress(number + 1, GRADIENT_BATCHES)


def _log_levels(parts: Components, times: TimeDistribution, u: Tensor) -> Tensor:
    """Quantiles of log(sigma / alpha)."""
    alpha, sigma = parts.denoiser.process.scales(times.quantile(u))
    return (sigma / alpha).log()


def _features(pool: Pool, device: torch.device, progress: Progress) -> tuple[Features, dict[str, Any]]:
    """Features of a classifier of the training data; the data themselves if they have no classes."""
    if pool.labels is None or len(pool.shape) != 3:
        return Pixels(), {"features": "the data themselves", "accuracy": None}
    classifier = cached_classifier(pool, device=device, progress=progress)
    return classifier, {"features": "a classifier of the training data", "accuracy": classifier.accuracy}


def _statistics(features: Features, pool: Pool, progress: Progress) -> Statistics:
    """Feature statistics of a pool, block by block."""

    def sums() -> Iterator[StatisticsAccumulator]:
        for number, block in enumerate(pool.blocks(NULL_LABEL, BLOCK_SIZE)):
            yield StatisticsAccumulator.from_features(features(block))
            progress(min((number + 1) * BLOCK_SIZE, len(pool)), len(pool))

    return merge_all(sums()).statistics()


def _noisy_batch(parts: Components, pool: Pool, t: Float[Tensor, "n"], number: int) -> NoisyBatch:
    """Random data points of a pool at the given times, on the denoiser's device."""
    random = generator(0, "yardstick", number, len(pool))
    index = torch.randperm(len(pool), generator=random)[: len(t)]
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=random, dtype=x.dtype)
    device = next(parts.denoiser.parameters()).device
    label = pool.label(index)
    return parts.denoiser.process.perturb(
        x.to(device),
        t.to(x).to(device),
        noise.to(device),
        label=None if label is None else label.to(device),
        index=index,
    )


def _exact_means(pool: Pool, noisy: NoisyBatch) -> Tensor:
    """E[x | x_t] of each example over the whole pool."""
    chunks = [noisy.select(slice(start, start + BATCH_SIZE)) for start in range(0, len(noisy), BATCH_SIZE)]
    return torch.cat([ExactTarget(pool, missing_mass=0.0)(chunk).mean for chunk in chunks])


def _error(denoiser: Denoiser, noisy: NoisyBatch, target: Tensor) -> float:
    """Mean squared error of a denoiser per dimension."""
    squares = [
        (denoiser(part.x_t, part.t, part.label) - target[start : start + BATCH_SIZE])
        .double()
        .square()
        .flatten(1)
        .mean(1)
        for start in range(0, len(noisy), BATCH_SIZE)
        for part in [noisy.select(slice(start, start + BATCH_SIZE))]
    ]
    return float(torch.cat(squares).mean())
