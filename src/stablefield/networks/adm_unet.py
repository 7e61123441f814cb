"""ADM, the U-Net of "Diffusion models beat GANs" (Dhariwal & Nichol 2021), as EDM trains it on ImageNet.

    e = silu(map_layer1(silu(map_layer0(map_noise(c_noise) + map_augment(augmentation)))) + map_label(label))
    block: silu(norm1(h) (1 + scale(e)) + shift(e))

Unlike in DDPM++, e scales and shifts the features instead of being added to them, attention has several heads and
is used at more resolutions, and residual branches start at zero.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from typing_extensions import override

from stablefield.networks.layers import PositionalEmbedding, check_counts, condition_or_zeros
from stablefield.networks.residual_unet import ResidualBlock, ResidualUNet, group_norm


class ADMBlock(ResidualBlock):
    """Residual block of ADM: the embedding scales and shifts the normalised features."""

    eps, scale, affine_width, resample_proj = 1e-5, 1.0, 2, False

    @override
    def condition(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = e.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)


class ADM(ResidualUNet):
    """U-Net of ADM, whose weights fit EDM's files ("DhariwalUNet"); the defaults are those for ImageNet at 64 x 64.

    Args:
        shape: (C, H, W) of one image; H and W must be divisible by 2 once for every level below the first.
        num_classes: number of classes, 0 for a network without labels.
        augment_dim: length of the augmentation label, 0 for a network without one.
        model_channels: unit of all widths, in channels.
        channel_mult: width of each level, in units of `model_channels`.
        channel_mult_emb: length of the embedding e, in the same unit.
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: image heights of the levels with attention; the lowest level always has one such block.
        channels_per_head: channels of one attention head; a level with fewer channels has no attention, as in EDM.
        dropout: probability of dropping a feature in each block.
        out_channels: channels of the output; by default those of the input. Improved DDPM has twice as many.
        checkpointing: recompute the activations of each block in the backward pass instead of storing them.

    Raises:
        ValueError: the shape or a width does not fit.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021)
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 7
    """

    decoder_attention_last_only = False

    def __init__(
        self,
        shape: Sequence[int],
        *,
        num_classes: int = 0,
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
        check_counts(2**16, model_channels=model_channels, channels_per_head=channels_per_head)
        check_counts(2**10, channel_mult_emb=channel_mult_emb)
        self.num_classes, self.augment_dim, self.channels_per_head = num_classes, augment_dim, channels_per_head
        width, widths = channel_mult_emb * model_channels, [m * model_channels for m in channel_mult]
        self.map_noise = PositionalEmbedding(model_channels, False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        block = partial(ADMBlock, emb_channels=width, dropout=dropout, checkpointing=checkpointing)
        self.build(block, widths[0], widths)
        self.out_norm = group_norm(widths[0], ADMBlock.eps)
        self.out_conv = nn.Conv2d(widths[0], out_channels or shape[0], 3, padding=1)
        self.initialize()

    @override
    def num_heads(self, channels: int) -> int:
        return channels // self.channels_per_head

    @torch.no_grad()
    def initialize(self) -> None:
        """Keep PyTorch's weights, uniform within 1 / sqrt(fan_in), and set the last layer of each branch to zero."""
        for name, parameter in self.named_parameters():
            if name.split(".")[-2] in ("conv1", "proj", "out_conv", "map_augment"):
                nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)  # Kaiming's 1 / sqrt(num_classes), times sqrt(num_classes)

    @override
    def output(self, h: Tensor, image: Tensor | None) -> Tensor:
        return self.out_conv(silu(self.out_norm(h)))

    @override
    def embed(self, x: Tensor, c_noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        label = condition_or_zeros(label, self.num_classes, x, name="label_one_hot", argument="num_classes")
        augment = condition_or_zeros(augment, self.augment_dim, x, name="augment_label", argument="augment_dim")
        emb = self.map_noise(c_noise).to(x.dtype)
        if self.map_augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(label)
        return silu(emb)


def adm(shape: Sequence[int] = (3, 64, 64), **options: Any) -> ADM:
    """ADM as EDM trains it on ImageNet at 64 x 64: 295.9 M parameters with 1000 classes.

    Args:
        shape: (C, H, W) of one image.
        **options: other arguments of `ADM`.
    """
    return ADM(shape, **options)
