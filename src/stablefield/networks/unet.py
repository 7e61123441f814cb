"""A small U-Net that gives good images after a few minutes of training on a laptop.

    encoder (downsample, widen) -> residual blocks and attention at the lowest level -> decoder with skip connections

The networks of the literature (DDPM++, NCSN++, ADM) are in `song` and `adm_unet`; this one favours brevity.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu
from typing_extensions import override

from stablefield.networks.group_norm import GroupNorm
from stablefield.networks.layers import Embedding, check_counts


class UNet(nn.Module):
    """U-Net for images, square or not.

    Args:
        shape: (C, H, W) of one image; H and W must be divisible by 2 once for every level below the first.
        num_classes: number of classes, 0 for a network without labels.
        augment_dim: length of the augmentation label, 0 for a network without one.
        channels: width of the first level, in channels.
        multipliers: width of each level, in units of `channels`.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        dropout: probability of dropping a feature in each block.

    Raises:
        ValueError: the data are not images, or a side cannot be halved often enough.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(2**16, channels=channels)
        check_counts(2**10, multipliers=multipliers)
        check_counts(128, blocks=blocks)
        factor = 2 ** (len(multipliers) - 1)
        if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"a U-Net with {len(multipliers)} levels needs images (C, H, W) with sides divisible by {factor}, "
                f"not {tuple(shape)}; use MLP for other data"
            )
        widths = [channels * m for m in multipliers]
        embedding = 4 * channels
        self.embedding = Embedding(embedding, num_classes, augment_dim)
        self.enter = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Block(current, width, embedding, dropout))
                skips.append(current := width)
            if level + 1 < len(widths):
                self.down.append(Downsample(width))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                Block(current, current, embedding, dropout),
                Attention(current),
                Block(current, current, embedding, dropout),
            ]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(Block(current + skips.pop(), width, embedding, dropout))
                current = width
            if level > 0:
                self.up.append(Upsample(width))
        self.leave = nn.Sequential(_norm(current), nn.SiLU(), _zero_init(nn.Conv2d(current, shape[0], 3, padding=1)))

    @override
    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        c_noise: Float[Tensor, "B"],
        label_one_hot: Float[Tensor, "B L"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Output of the network before preconditioning, with the shape of x.

        Args:
            x: noisy input, scaled by the preconditioning (c_in x_t).
            c_noise: noise level, transformed by the preconditioning, one value per example.
            label_one_hot: one-hot labels; a row of zeros, or None for all, is the null label.
            augment_label: augmentation labels; zeros, or None for all, mean that no augmentation was applied.
        """
        emb = self.embedding(c_noise, label_one_hot, augment_label)
        h = self.enter(x)
        skips = [h]
        for part in self.down:
            h = part(h, emb)
            skips.append(h)
        for part in self.middle:
            h = part(h, emb)
        for part in self.up:
            h = part(torch.cat([h, skips.pop()], 1) if isinstance(part, Block) else h, emb)
        return self.leave(h)


class Block(nn.Module):
    """Residual block whose normalised features are scaled and shifted by the embedding.

        h + conv(silu((1 + scale) norm(conv(silu(norm(h)))) + shift))

    Args:
        inputs: input channels.
        outputs: output channels.
        embedding: length of the embedding.
        dropout: probability of dropping a feature.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.second = _zero_init(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)
        inner = silu(self.norm(self.first(h)) * (1 + scale) + shift)
        return self.skip(h) + self.second(self.dropout(inner))


class Attention(nn.Module):
    """Self-attention over the pixels, with heads of 32 channels.

    Args:
        channels: input and output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // 32)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero_init(nn.Conv2d(channels, channels, 1))

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm(h)).view(batch, 3, self.num_heads, channels // self.num_heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return h + self.out(mixed.reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Strided convolution that halves the resolution.

    Args:
        channels: input and output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(h)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation that doubles the resolution, then a convolution.

    Args:
        channels: input and output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(interpolate(h, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> GroupNorm:
    """Group normalisation with the most groups of at least 4 channels that divide evenly, 32 at most."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels)


def _zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zero weights: residual branches and the output start at zero."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
