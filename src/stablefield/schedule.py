"""How the learning rate, and the averages of the weights, follow the images seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal

import torch
from torch import nn

Decay = Literal["none", "cosine", "inverse-sqrt"]


@dataclass(frozen=True)
class LearningRate:
    """A linear ramp, a plateau, and maybe a decay.

    Attributes:
        peak: the rate between ramp and decay.
        ramp: images it takes to get there.
        decay: "none"; "cosine", half a wave from the peak to 0 (Loshchilov & Hutter 2017, eq. 5); or "inverse-sqrt",
            peak sqrt(decay_from / images) (Karras et al. 2024, eq. 67).
        decay_from: images after which it falls.
        until: images at which a cosine reaches 0.

    Raises:
        ValueError: a decay without a beginning, or a cosine without an end after it.
    """

    peak: float = 1e-3
    ramp: int = 0
    decay: Decay = "none"
    decay_from: int = 0
    until: float = inf

    def __post_init__(self) -> None:
        if self.decay == "inverse-sqrt" and not self.decay_from > 0:
            raise ValueError("a rate that falls as sqrt(decay_from / images) needs decay_from > 0")
        if self.decay == "cosine" and not self.decay_from < self.until < inf:
            raise ValueError(f"a cosine that starts after {self.decay_from} images cannot end after {self.until}")

    def __call__(self, images: int) -> float:
        """The rate of the step that ends after so many images."""
        risen = min(1.0, images / self.ramp) if self.ramp else 1.0
        return self.peak * risen * self._left(images)

    def _left(self, images: int) -> float:
        if self.decay == "none" or images <= self.decay_from:
            return 1.0
        if self.decay == "inverse-sqrt":
            return (self.decay_from / images) ** 0.5
        done = (images - self.decay_from) / (self.until - self.decay_from)
        return (1 + cos(pi * min(1.0, done))) / 2


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights, whose samples are better than those of the last weights.

    average <- beta average + (1 - beta) weights,      beta = 2^(-batch / half_life)

    Attributes:
        half_life: images after which a weight counts half.
        ramp_up: early on, the half-life is at most this share of the images seen (Karras et al. 2022, appendix F.1).
    """

    half_life: float = 500_000
    ramp_up: float = 0.05

    def decay(self, images: int, batch: int) -> float:
        """beta for a batch that follows after so many images."""
        half_life = min(self.half_life, self.ramp_up * images)
        return 0.5 ** (batch / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, average: nn.Module, model: nn.Module, images: int, batch: int) -> None:
        """Move the average towards the model; buffers are copied."""
        beta = self.decay(images, batch)
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - beta)
        for kept, new in zip(average.buffers(), model.buffers(), strict=True):
            kept.copy_(new)


def average_names(half_lives: Sequence[float]) -> list[str]:
    """What the averages are called in a checkpoint: the first `average`, others by their half-lives.

    >>> average_names([500_000, 2_000_000])
    ['average', 'average-2000000']

    Raises:
        ValueError: none, or two of the same half-life.
    """
    names = [f"average-{half_life:.0f}" for half_life in half_lives]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"averages need half-lives that differ, and at least one, not {list(half_lives)}")
    return ["average", *names[1:]]
