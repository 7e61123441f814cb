"""ADM, the U-Net of "Diffusion models beat GANs" (Dhariwal & Nichol 2021), as EDM trains it on ImageNet.

    e = silu(map_layer1(silu(map_layer0(waves(c_noise) + augmentation))) + label)
    block: silu(norm1(h) (1 + scale(e)) + shift(e))

Compared with DDPM++, e scales features rather than being added to them, attention has several heads and more
places, and residual branches start at zero.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from stablefield.networks.layers import PositionalEmbedding, ResidualBlock, group_norm, told
from stablefield.networks.walk import ResidualUNet


class ADMBlock(ResidualBlock):
    """Normalised, then scaled and shifted by e."""

    eps, scale, affine_width, resample_proj = 1e-5, 1.0, 2, False

    def tell(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = e.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)


class ADM(ResidualUNet):
    """ADM, weight-compatible with EDM's files ("DhariwalUNet"). The defaults are ImageNet's at 64 x 64.

    Args:
        shape: (C, H, W) of one image; the sides divisible by 2 once for every level below the first.
        label_dim: classes it is told of, as one-hot rows.
        augment_dim: numbers that say how an image was augmented.
        model_channels: the unit of all widths.
        channel_mult: width of each level, in units of `model_channels`.
        channel_mult_emb: length of e, in the same unit.
        num_blocks: residual blocks a level on the way down; one more on the way up.
        attn_resolutions: heights at which there is attention; the lowest level has some anyway.
        channels_per_head: of the attention; a level with fewer channels has none, as in EDM.
        dropout: share of features dropped in each block.
        out_channels: if not as many as come in; improved DDPM has twice as many.
        checkpointing: blocks forget their insides until the backward pass, and then compute them again.

    Raises:
        ValueError: a shape or a width that does not fit.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021)
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 7
    """

    dec_attends_last = False

    def __init__(
        self,
        shape: Sequence[int],
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.1,
        out_channels: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(shape, channel_mult, num_blocks, attn_resolutions)
        self.label_dim, self.augment_dim, self.channels_per_head = label_dim, augment_dim, channels_per_head
        width, widths = channel_mult_emb * model_channels, [m * model_channels for m in channel_mult]
        self.map_noise = PositionalEmbedding(model_channels, False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        block = partial(ADMBlock, emb_channels=width, dropout=dropout, checkpointing=checkpointing)
        self.grow(block, widths[0], widths)
        self.out_norm = group_norm(widths[0], ADMBlock.eps)
        self.out_conv = nn.Conv2d(widths[0], out_channels or shape[0], 3, padding=1)
        self.initialize()

    def heads(self, channels: int) -> int:
        return channels // self.channels_per_head

    @torch.no_grad()
    def initialize(self) -> None:
        """PyTorch's own law, uniform within 1 / sqrt(fan_in); what ends a residual branch starts at zero."""
        for name, parameter in self.named_parameters():
            if name.split(".")[-2] in ("conv1", "proj", "out_conv", "map_augment"):
                nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)  # Kaiming's 1 / sqrt(label_dim), times sqrt(label_dim)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        noise: Float[Tensor, " B"],
        label: Float[Tensor, "B _"] | None = None,
        augment: Float[Tensor, "B _"] | None = None,
    ) -> Float[Tensor, "B _ H W"]:
        """F(x; c_noise), told a label (one-hot; zeros or None: not told) and an augmentation (likewise).

        Raises:
            ValueError: sides that cannot be halved often enough; rows of another width than `label_dim` or
                `augment_dim`.
        """
        emb = self.embed(x, noise, label, augment)
        h, _ = self.up(self.down(x, emb), emb)
        return self.out_conv(silu(self.out_norm(h)))

    def embed(self, x: Tensor, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """e (B, E)."""
        label = told(label, self.label_dim, x, "label")
        augment = told(augment, self.augment_dim, x, "augment")
        emb = self.map_noise(noise).to(x.dtype)
        if self.map_augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(label)
        return silu(emb)


def adm(shape: Sequence[int] = (3, 64, 64), **options: Any) -> ADM:
    """ADM as EDM trains it on ImageNet at 64 x 64: 295.9 M parameters, 1000 classes. Options are `ADM`'s."""
    return ADM(shape, **options)
