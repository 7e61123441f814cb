"""A small U-Net: good pictures from a few minutes on a laptop, in a file that can be read in one.

    halve and widen -> residual blocks, attention at the lowest level -> double and narrow, with skips

For the networks of the literature (DDPM++, NCSN++, ADM) see their own files; this one favours brevity.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from stablefield.networks.embedding import Embedding


class UNet(nn.Module):
    """A U-Net for images (C, H, W), square or not.

    Args:
        shape: of one image; H and W divisible by 2 as often as there are levels below the first.
        label_dim: classes it is told of, as one-hot rows.
        augment_dim: numbers that say how an image was augmented.
        channels: width of the first level.
        multipliers: width of each level, in units of `channels`.
        blocks: residual blocks a level on the way down; one more on the way up.
        dropout: share of features dropped in each block.

    Raises:
        ValueError: data that are no images, or a side that cannot be halved often enough.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(multipliers) - 1)
        if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"a U-Net with {len(multipliers)} levels needs images (C, H, W) with sides divisible by {factor}, "
                f"not {tuple(shape)}; for other data there is the MLP"
            )
        widths = [channels * m for m in multipliers]
        embedding = 4 * channels
        self.embedding = Embedding(embedding, label_dim, augment_dim)
        self.enter = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, now = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Block(now, width, embedding, dropout))
                skips.append(now := width)
            if level + 1 < len(widths):
                self.down.append(Halve(width))
                skips.append(width)
        self.middle = nn.ModuleList(
            [Block(now, now, embedding, dropout), Attention(now), Block(now, now, embedding, dropout)]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(Block(now + skips.pop(), width, embedding, dropout))
                now = width
            if level > 0:
                self.up.append(Double(width))
        self.leave = nn.Sequential(norm(now), nn.SiLU(), zeroed(nn.Conv2d(now, shape[0], 3, padding=1)))

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B"],
        label: Float[Tensor, "B L"] | None = None,
        augment: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        emb = self.embedding(noise, label, augment)
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
    """h + conv(silu(scale * norm(conv(silu(norm(h)))) + shift)), where the embedding gives scale and shift."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.second = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)
        inner = silu(self.norm(self.first(h)) * (1 + scale) + shift)
        return self.skip(h) + self.second(self.dropout(inner))


class Attention(nn.Module):
    """Self-attention over the pixels, in heads of 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        rows, channels, height, width = h.shape
        qkv = self.qkv(self.norm(h)).view(rows, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return h + self.out(mixed.reshape(rows, channels, height, width))


class Halve(nn.Module):
    """Half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(h)


class Double(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(interpolate(h, scale_factor=2.0, mode="nearest"))


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the most groups of at least 4 channels that divide evenly, 32 at most."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as nothing: residual branches and the output begin at zero."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
