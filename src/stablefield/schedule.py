"""Schedules over the images seen: the learning rate, and the exponential moving averages of the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal

import torch
from torch import Tensor

Decay = Literal["none", "cosine", "inverse-sqrt"]


@dataclass(frozen=True)
class LearningRate:
    """Learning-rate schedule: a linear warmup, a plateau, and optionally a decay.

    Attributes:
        peak: the rate between warmup and decay.
        warmup: images over which the rate rises linearly from 0 to `peak`.
        decay: "none"; "cosine", half a wave from the peak to 0 (Loshchilov & Hutter 2017, eq. 5); or "inverse-sqrt",
            peak sqrt(decay_start / images) (Karras et al. 2024, eq. 67).
        decay_start: images after which the rate decays.
        total_images: images at which a cosine reaches 0; other decays do not need it.

    Raises:
        ValueError: an inverse square root without `decay_start`, or a cosine that does not end after it starts.
    """

    peak: float = 1e-3
    warmup: int = 0
    decay: Decay = "none"
    decay_start: int = 0
    total_images: float = inf

    def __post_init__(self) -> None:
        if self.decay == "inverse-sqrt" and not self.decay_start > 0:
            raise ValueError(f"inverse-sqrt decay needs decay_start > 0, not {self.decay_start}")
        if self.decay == "cosine" and not self.decay_start < self.total_images < inf:
            raise ValueError(
                f"cosine decay needs decay_start < total_images < inf, not {self.decay_start} and {self.total_images}"
            )

    def __call__(self, images: int) -> float:
        """The learning rate of a training step.

        Args:
            images: images seen before the step, so that the first step of a warmup has rate 0, as in EDM and score_sde.
        """
        rise = min(1.0, images / self.warmup) if self.warmup else 1.0
        return self.peak * rise * self._decayed(images)

    def _decayed(self, images: int) -> float:
        """The factor of the decay, from 1 down to 0."""
        if self.decay == "none" or images <= self.decay_start:
            return 1.0
        if self.decay == "inverse-sqrt":
            return (self.decay_start / images) ** 0.5
        done = (images - self.decay_start) / (self.total_images - self.decay_start)
        return (1 + cos(pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights, used for sampling.

    average <- beta average + (1 - beta) weights,      beta = 2^(-batch_size / half_life)

    Attributes:
        half_life: images after which the influence of a step has halved.
        rampup_ratio: early in training the half-life is at most this share of the images seen (Karras et al. 2022,
            appendix F.1).
    """

    half_life: float = 500_000
    rampup_ratio: float = 0.05

    def decay(self, images: int, batch_size: int) -> float:
        """The factor beta of an update.

        Args:
            images: images seen before the step.
            batch_size: images of the step, over all ranks.
        """
        half_life = min(self.half_life, self.rampup_ratio * images)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, averages: list[Tensor], weights: list[Tensor], images: int, batch_size: int) -> None:
        """Move averaged weights towards those of the model.

        Args:
            averages: the averages, changed in place.
            weights: the weights that are trained.
            images: images seen before the step.
            batch_size: images of the step, over all ranks.
        """
        torch._foreach_lerp_(averages, weights, 1 - self.decay(images, batch_size))


def average_names(half_lives: Sequence[float]) -> list[str]:
    """Names of the averages in a checkpoint: `average` for the first, the others by their half-lives.

    >>> average_names([500_000, 2_000_000])
    ['average', 'average-2000000']

    Args:
        half_lives: of the averages, in images.

    Raises:
        ValueError: there is no half-life, or two are equal.
    """
    names = [f"average-{half_life:.0f}" for half_life in half_lives]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"need at least one half-life, all different, not {list(half_lives)}")
    return ["average", *names[1:]]
