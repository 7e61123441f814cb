"""What every arm is measured with: the same x_t with their exact means, the same seeds, the same features.

So differences between arms are due to the arms. Four questions are asked of a denoiser D:

    quality       Frechet distance between features of samples and of the training data
    held out      E ||D(x_t) - x||^2 per dimension, x from data that were never trained on
    exact error   E ||D(x_t) - E[x | x_t]||^2 per dimension, the mean over the training data
    copies        how near samples are to the training data, against how near held-out data are

The third alone says little of quality: a denoiser without any error in it would only ever return training data.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.config import Config
from stablefield.data import Progress, silent, split
from stablefield.denoise import Denoiser
from stablefield.evaluate import (
    Features,
    Nearest,
    Pixels,
    Statistics,
    Sums,
    cached_classifier,
    frechet_distance,
    memorised,
    nearest,
)
from stablefield.evaluate.frechet import merged
from stablefield.process import Perturbed
from stablefield.reference import ALL, Pool
from stablefield.run import Parts, make_sampler
from stablefield.sample import Sampler
from stablefield.seeding import generator
from stablefield.target import FullDataset
from stablefield.times import Times

# what is being done -> progress of it
Stages = Callable[[str], AbstractContextManager[Progress]]

LEVELS = 9
AT_ONCE = 250
BLOCK = 1024
GRADIENT_BATCHES, GRADIENT_ROWS = 16, 32


@dataclass(frozen=True, eq=False)
class Level:
    """Rows at one noise level.

    Attributes:
        level: sigma / alpha.
        share: of the training noise that lies nearer to this level than to the others.
        weight: how much the loss makes of a squared error here.
        trained: x_t of training data.
        exact: their E[x | x_t] over all training data.
        held_out: x_t of data that are never trained on.
    """

    level: float
    share: float
    weight: float
    trained: Perturbed
    exact: Float[Tensor, "n *D"]
    held_out: Perturbed


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Made from data and configuration alone, before anything is trained.

    Attributes:
        about: what numbers need beside them: noise levels, features, what real data score.
    """

    shape: tuple[int, ...]
    pool: Pool
    sampler: Sampler
    seeds: range
    features: Features
    trained: Statistics
    held_out: Statistics
    fresh: Nearest
    levels: Sequence[Level]
    batches: Sequence[tuple[Perturbed, Tensor]]
    about: dict[str, Any]

    def sample(self, denoiser: Denoiser) -> tuple[Float[Tensor, "n *D"], int]:
        """One sample a seed, on the CPU, and how often the denoiser was asked for each."""
        parts = [self.seeds[start : start + AT_ONCE] for start in range(0, len(self.seeds), AT_ONCE)]
        made = [self.sampler(denoiser, self.shape, seeds=seeds) for seeds in parts]
        return torch.cat([part.x.float().cpu() for part in made]), made[0].evaluations

    def judge(self, x: Float[Tensor, "n *D"]) -> dict[str, float]:
        """Scores of samples."""
        found = Statistics.of(self.features(x))
        near = memorised(nearest(x, self.pool), self.fresh)
        return {
            "frechet": frechet_distance(found, self.trained),
            "frechet_held_out": frechet_distance(found, self.held_out),
            "nearest_ratio": near.get("nearest_ratio", nan),
            "copies": near["copies"],
        }

    @torch.no_grad()
    def question(self, denoiser: Denoiser) -> dict[str, Any]:
        """Errors of a denoiser, at each level and as the loss weighs them."""
        exact = [_error(denoiser, level.trained, level.exact) for level in self.levels]
        held_out = [_error(denoiser, level.held_out, level.held_out.x) for level in self.levels]
        factors = [level.share * level.weight for level in self.levels]
        return {
            "exact_error": sum(f * e for f, e in zip(factors, exact, strict=True)),
            "held_out_loss": sum(f * e for f, e in zip(factors, held_out, strict=True)),
            "exact_error_by_level": exact,
            "held_out_loss_by_level": held_out,
        }


@contextmanager
def quietly(title: str) -> Iterator[Progress]:
    """Stages that nobody watches."""
    yield silent


def make_yardstick(config: Config, parts: Parts, *, samples: int, rows: int, stages: Stages = quietly) -> Yardstick:
    """For a configuration and its parts, of which some data are held out.

    With 50,000 images it takes minutes; `stages` is told what of, and how far it is.
    """
    pool, held_out = parts.pool, parts.held_out
    assert held_out is not None
    with stages("training the classifier that compares samples") as progress:
        device = next(parts.denoiser.parameters()).device
        space, about = _features(split(parts.data, len(held_out))[0], device, progress)
    with stages("features of the data") as progress:
        trained, unseen = _statistics(space, pool, progress), _statistics(space, held_out, silent)
    fresh = nearest(held_out.take(torch.randperm(len(held_out), generator=generator(0, "near"))[:samples]), pool)
    with stages("exact answers at every noise level") as progress:
        levels = list(_levels(parts, held_out, rows, progress))
    with stages("exact answers for the gradients") as progress:
        batches = list(_batches(parts, progress))
    about |= {
        "levels": [level.level for level in levels],
        "shares": [level.share for level in levels],
        "weights": [level.weight for level in levels],
        "trained": len(pool),
        "held_out": len(held_out),
        "real": frechet_distance(unseen, trained),
        "nearest_held_out": float(fresh.distance[:, 0].median()),
        "copies_held_out": float(fresh.copies().double().mean()),
    }
    sampler = make_sampler(config)
    return Yardstick(pool.shape, pool, sampler, range(samples), space, trained, unseen, fresh, levels, batches, about)


def _levels(parts: Parts, held_out: Pool, rows: int, progress: Progress) -> Iterator[Level]:
    pool, process = parts.pool, parts.denoiser.process
    t, shares = noise_levels(parts)
    weights = parts.objective.weight(process, t).tolist()
    for number, (time, share, weight) in enumerate(zip(t, shares, weights, strict=True)):
        rows_of = [_perturbed(parts, part, time.expand(min(rows, len(part))), number) for part in (pool, held_out)]
        alpha, sigma = process.scales(time)
        yield Level(float(sigma / alpha), share, weight, rows_of[0], _exact(pool, rows_of[0]), rows_of[1])
        progress(number + 1, len(t))


def _batches(parts: Parts, progress: Progress) -> Iterator[tuple[Perturbed, Tensor]]:
    for number in range(GRADIENT_BATCHES):
        times = parts.objective.times.draw(GRADIENT_ROWS, generator(0, "gradient times", number))
        noisy = _perturbed(parts, parts.pool, times, LEVELS + number)
        yield noisy, _exact(parts.pool, noisy)
        progress(number + 1, GRADIENT_BATCHES)


def noise_levels(parts: Parts) -> tuple[Float[Tensor, "L"], list[float]]:
    """Times evenly spread in the logarithm of the noise, and the share of the training noise nearest to each."""
    process, times = parts.denoiser.process, parts.objective.times
    logs = _log_levels(parts, times, torch.tensor([0.005, 0.995], dtype=torch.float64))
    spread = torch.linspace(float(logs[0]), float(logs[1]), LEVELS, dtype=torch.float64)
    drawn = _log_levels(parts, times, (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    nearest_to = (drawn[:, None] - spread).abs().argmin(1)
    shares = torch.bincount(nearest_to, minlength=LEVELS).double() / len(drawn)
    return process.time(spread.exp()), shares.tolist()


def _log_levels(parts: Parts, times: Times, u: Tensor) -> Tensor:
    alpha, sigma = parts.denoiser.process.scales(times.quantile(u))
    return (sigma / alpha).log()


def _features(pool: Pool, device: torch.device, progress: Progress) -> tuple[Features, dict[str, Any]]:
    """Those of a classifier of the training data; the data themselves where they have no classes."""
    if pool.labels is None or len(pool.shape) != 3:
        return Pixels(), {"features": "the data themselves", "accuracy": None}
    classifier = cached_classifier(pool, device=device, progress=progress)
    return classifier, {"features": "a classifier of the training data", "accuracy": classifier.accuracy}


def _statistics(space: Features, pool: Pool, progress: Progress) -> Statistics:
    def sums() -> Iterator[Sums]:
        for number, block in enumerate(pool.blocks(ALL, BLOCK)):
            yield Sums.of(space(block))
            progress(min((number + 1) * BLOCK, len(pool)), len(pool))

    return merged(sums()).statistics()


def _perturbed(parts: Parts, pool: Pool, t: Float[Tensor, "n"], number: int) -> Perturbed:
    """Members of a pool, at these times, on the denoiser's device."""
    source = generator(0, "yardstick", number, len(pool))
    index = torch.randperm(len(pool), generator=source)[: len(t)]
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=source, dtype=x.dtype)
    device = next(parts.denoiser.parameters()).device
    label = pool.label(index)
    return parts.denoiser.process.perturb(
        x.to(device),
        t.to(x).to(device),
        noise.to(device),
        label=None if label is None else label.to(device),
        index=index,
    )


def _exact(pool: Pool, noisy: Perturbed) -> Tensor:
    parts = [noisy.rows(slice(start, start + AT_ONCE)) for start in range(0, len(noisy), AT_ONCE)]
    return torch.cat([FullDataset(pool)(part).mean for part in parts])


def _error(denoiser: Denoiser, noisy: Perturbed, wanted: Tensor) -> float:
    """Mean squared error, per dimension."""
    squares = [
        (denoiser(part.x_t, part.t, part.label) - wanted[start : start + AT_ONCE]).double().square().flatten(1).mean(1)
        for start in range(0, len(noisy), AT_ONCE)
        for part in [noisy.rows(slice(start, start + AT_ONCE))]
    ]
    return float(torch.cat(squares).mean())
