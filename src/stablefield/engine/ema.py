"""The exponential moving average of the weights, whose samples are better than those of the last weights.

average <- beta average + (1 - beta) weights,      beta = 2^(-batch / half_life)
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class EMA:
    """How fast the average forgets.

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
