"""What DDPM++, NCSN++ and ADM are made of: waves, filters, and one residual block.

    h = conv0(silu(norm0(x)))                         conv0 and skip change the resolution, if any
    h = conv1(dropout(silu(tell(h, e))))              tell: norm1, with what the network is told, e
    x = s (skip(x) + h)
    x = s (x + proj(attention(qkv(norm2(x)))))        at some resolutions

The networks differ in how e enters, in s and in where there is attention. Modules have the names and the
order of EDM's checkpoints (Karras et al. 2022), so that weights and optimiser states flow both ways.

Two things here are cheaper than they read, and equal up to the last boundary pixel. Filters act on each
channel alone and 1 x 1 convolutions on each pixel alone, so they commute: what goes up is mixed before, at a
quarter of the pixels. "Convolve, filter, keep every second pixel" is "filter, convolve with stride 2": again
a quarter.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    interpolate,
    linear,
    scaled_dot_product_attention,
    silu,
)
from torch.utils.checkpoint import checkpoint

Change = Literal["up", "down"]


# -- waves: a noise level as a vector ------------------------------------------------------------------------


class PositionalEmbedding(nn.Module):
    """[cos(x f), sin(x f)] with f from 1 down to 1/10000, in equal ratios (Ho et al. 2020).

    Args:
        channels: how many numbers come out.
        endpoint: whether the last f is 1/10000 itself or the one before.
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.last = channels, channels // 2 - endpoint

    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B channels"]:
        # Made when needed, in the type of x: a buffer would lose digits in a half-precision network.
        index = torch.arange(self.channels // 2, dtype=x.dtype, device=x.device)
        return waves(x, 10000 ** -(index / self.last))


class FourierEmbedding(nn.Module):
    """[cos(2 pi x f), sin(2 pi x f)] with f ~ N(0, 16^2), drawn once (Tancik et al. 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B channels"]:
        return waves(x, 2 * math.pi * self.freqs.to(x.dtype))


def waves(x: Float[Tensor, " B"], frequencies: Float[Tensor, " F"]) -> Float[Tensor, "B F+F"]:
    """Cosines, then sines."""
    angle = x[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def told(given: Float[Tensor, "B _"] | None, width: int, x: Float[Tensor, "B C H W"], what: str) -> Tensor:
    """What the network is told, as rows in the type of x: zeros if nothing.

    Raises:
        ValueError: rows of another width than the network was built for.
    """
    if given is None:
        return x.new_zeros(len(x), width)
    if given.shape[1] != width:
        raise ValueError(
            f"{what} has {given.shape[1]} columns, the network was built with {what}_dim={width}: "
            f"pass {what}_dim={given.shape[1]} when building it"
        )
    return given.to(x.dtype)


# -- filters: half and twice the resolution ------------------------------------------------------------------


def filter_of(taps: Sequence[float]) -> Float[Tensor, "1 1 n n"]:
    """The outer product of the taps with themselves, of sum 1.

    Raises:
        ValueError: an odd number of taps, or a lopsided choice: either would shift the image.
    """
    if len(taps) % 2 or list(taps) != list(taps)[::-1]:
        raise ValueError(
            f"resample_filter needs an even number of taps that read the same both ways, as (1, 1) or "
            f"(1, 3, 3, 1), not {len(taps)}: {tuple(taps)}"
        )
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum() ** 2)[None, None]


def upsample(x: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, 2H, 2W): zeros between the pixels, then the filter, times 4 to keep the mean."""
    if taps.shape[-1] == 2:  # a box: every pixel four times
        x = interpolate(x, scale_factor=2.0, mode="nearest")
        return x if bias is None else x + bias[:, None, None]
    kernel = (4 * taps.to(x.dtype)).expand(x.shape[1], -1, -1, -1)
    return conv_transpose2d(x, kernel, bias, stride=2, padding=taps.shape[-1] // 2 - 1, groups=x.shape[1])


def downsample(x: Tensor, taps: Tensor, *, stride: int = 2, margin: int = 0) -> Tensor:
    """(B, C, H/2, W/2): the filter, then every `stride`-th pixel; `margin` more zeros around than needed."""
    size = taps.shape[-1]
    padding = size // 2 - 1 + margin
    if size == 2 and padding == 0:  # a box: the mean of four
        return avg_pool2d(x, 2, stride)
    kernel = taps.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


class Resample(nn.Module):
    """The filter alone, up or down."""

    def __init__(self, change: Change, taps: Sequence[float]) -> None:
        super().__init__()
        self.resample = upsample if change == "up" else downsample
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", filter_of(taps))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x, self.resample_filter)


class FilteredConv(nn.Conv2d):
    """A k x k convolution next to a filter; which is done first, the final classes say."""

    def __init__(self, inputs: int, outputs: int, kernel: int, taps: Sequence[float]) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", filter_of(taps))


class UpConv(FilteredConv):
    """Twice the resolution, then the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            return upsample(conv2d(x, self.weight), self.resample_filter, self.bias)
        return super().forward(upsample(x, self.resample_filter))


class DownConv(FilteredConv):
    """Half the resolution, then the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(downsample(x, self.resample_filter))


class ConvDown(FilteredConv):
    """The convolution of an image in a sea of zeros, then half the resolution: the stride moves inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = downsample(x, self.resample_filter, stride=1, margin=self.kernel_size[0] // 2)
        return conv2d(x, self.weight, self.bias, stride=2)


def conv(inputs: int, outputs: int, kernel: int, change: Change | None, taps: Sequence[float]) -> nn.Module:
    """The k x k convolution for this change of resolution, if any; k = 0 leaves only the filter."""
    match change:
        case _ if kernel == 0:
            return Resample(change, taps) if change else nn.Identity()
        case "up":
            return UpConv(inputs, outputs, kernel, taps)
        case "down":
            return DownConv(inputs, outputs, kernel, taps)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


# -- the residual block --------------------------------------------------------------------------------------


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with min(32, C // 4) groups.

    Raises:
        ValueError: channels that do not divide into them.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{channels} channels do not divide into {groups} groups (min(32, C // 4)): "
            f"choose model_channels so that all widths are multiples of 4, and above 128 of 32"
        )
    return nn.GroupNorm(groups, channels, eps)


class ResidualBlock(nn.Module, ABC):
    """The block above, told a vector e of `emb_channels` numbers.

    Args:
        inputs: channels that come in.
        outputs: channels that leave.
        emb_channels: length of e.
        change: of the resolution, if any.
        taps: of the filter that changes it.
        heads: of the attention; 0 for none.
        dropout: share of features dropped.
        checkpointing: forget what is inside after the forward pass, compute it again in the backward pass.

    Raises:
        ValueError: channels that do not divide into groups or heads.
    """

    eps: ClassVar[float]  # of all three normalisations
    scale: ClassVar[float]  # s: 1, or sqrt(1/2) to keep the variance when two things are added
    affine_width: ClassVar[int]  # numbers that e becomes, a channel
    resample_proj: ClassVar[bool]  # whether skip mixes channels where only the resolution changes

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        emb_channels: int,
        change: Change | None = None,
        taps: Sequence[float] = (1, 1),
        heads: int = 0,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if heads and outputs % heads:
            raise ValueError(
                f"{outputs} channels do not divide into {heads} heads: choose model_channels so that they do"
            )
        self.heads, self.checkpointing = heads, checkpointing
        mixes = inputs != outputs or (change is not None and self.resample_proj)
        self.norm0 = group_norm(inputs, self.eps)
        self.conv0 = conv(inputs, outputs, 3, change, taps)
        self.affine = nn.Linear(emb_channels, self.affine_width * outputs)
        self.norm1 = group_norm(outputs, self.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = conv(inputs, outputs, int(mixes), change, taps)
        if heads:
            self.norm2 = group_norm(outputs, self.eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    @abstractmethod
    def tell(self, h: Float[Tensor, "B C H W"], e: Float[Tensor, "B E 1 1"]) -> Float[Tensor, "B C H W"]:
        """norm1(h) with e in it."""

    def forward(self, x: Float[Tensor, "B _ _ _"], emb: Float[Tensor, "B _"]) -> Float[Tensor, "B _ _ _"]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, use_reentrant=False)
        return self.compute(x, emb)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        h = silu(self.tell(h, self.affine(emb)[:, :, None, None]))
        x = (self.conv1(self.dropout(h)) + self.skip(x)) * self.scale
        return (self.attention(x) + x) * self.scale if self.heads else x

    def attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """proj(softmax(q k / sqrt(C / heads)) v); the softmax is summed in float32 in every precision."""
        # The rows of qkv are (head, channel, q|k|v). Sorting the weights as (q|k|v, head, channel) costs less
        # than sorting what they give, and puts a head's channels side by side, as fused kernels want them.
        weight, bias = (p.unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2) for p in self.qkv.parameters())
        pixels = self.norm2(x).flatten(2).mT
        q, k, v = linear(pixels, weight.flatten(1), bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(mixed, self.proj.weight.flatten(1), self.proj.bias).mT.unflatten(2, x.shape[2:])
