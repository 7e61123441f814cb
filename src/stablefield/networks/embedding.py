"""What a network is told beside x: the noise level, a label, an augmentation, as one vector."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Embedding(nn.Module):
    """Waves of c_noise through two layers; labels and augmentations are added to the first.

    The wave lengths run from 1/8 to 32: c_noise = ln(sigma) / 4 spans about 4 units from 0.002 to 80.
    """

    def __init__(self, width: int, label_dim: int = 0, augment_dim: int = 0) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-5, 3, width // 2, base=2), persistent=False)
        self.noise = nn.Linear(2 * (width // 2), width)
        self.label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.out = nn.Linear(width, width)

    def forward(
        self,
        noise: Float[Tensor, "B"],
        label: Float[Tensor, "B L"] | None = None,
        augment: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B width"]:
        angle = noise[:, None] * self.frequencies
        width = self.noise(torch.cat([angle.cos(), angle.sin()], 1))
        for layer, value in ((self.label, label), (self.augment, augment)):
            if layer is not None and value is not None:
                width = width + layer(value)
        return nn.functional.silu(self.out(nn.functional.silu(width)))
