"""Layers that the networks share: embeddings of the condition, and filtered convolutions that change the resolution.

Two things here are cheaper than they read, and equal up to the outermost pixels. Filters act on each channel
separately and 1 x 1 convolutions on each pixel separately, so they commute: a 1 x 1 convolution is applied before
upsampling, to a quarter of the pixels. "Convolve, filter, keep every second pixel" is "filter, convolve with stride 2":
again a quarter of the work.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, silu
from typing_extensions import override

Resampling = Literal["up", "down"]


# ---- embeddings of the noise level and of the condition


def check_counts(most: int, **counts: int | Sequence[int]) -> None:
    """Refuse counts that are not between 1 and a limit, before anything is built.

    Args:
        most: the limit.
        **counts: numbers of channels, blocks or layers, by the name of the argument.

    Raises:
        ValueError: a count is beyond the limits.
    """
    for name, given in counts.items():
        numbers = given if isinstance(given, Sequence) else (given,)
        if not numbers or not all(1 <= number <= most for number in numbers):
            raise ValueError(f"{name} must be between 1 and {most:,}, not {given}")


class PositionalEmbedding(nn.Module):
    """Cosines and sines of x f, with frequencies f from 1 down to 1/10000 in equal ratios (Ho et al. 2020).

    Args:
        channels: length of the embedding; half of it are cosines.
        endpoint: include f = 1/10000; by False the frequencies end one step before it.
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.last = channels, channels // 2 - endpoint

    @override
    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B channels"]:
        # The frequencies are computed in the type of x: a buffer would lose digits in a half-precision network.
        index = torch.arange(self.channels // 2, dtype=x.dtype, device=x.device)
        return sinusoids(x, 10000 ** -(index / self.last))


class FourierEmbedding(nn.Module):
    """Cosines and sines of 2 pi x f, with random frequencies f ~ N(0, 16^2) drawn once (Tancik et al. 2020).

    Args:
        channels: length of the embedding; half of it are cosines.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    @override
    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B channels"]:
        return sinusoids(x, 2 * math.pi * self.freqs.to(x.dtype))


def sinusoids(x: Float[Tensor, " B"], frequencies: Float[Tensor, " F"]) -> Float[Tensor, "B F+F"]:
    """Cosines, then sines, of the products of x and the angular frequencies.

    Args:
        x: one number per example.
        frequencies: angular frequencies, in radians per unit of x.
    """
    angle = x[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class Embedding(nn.Module):
    """Embedding of the noise level, the label and the augmentation label as one vector, for `UNet` and `MLP`.

        emb = silu(out(silu(noise(sinusoids(c_noise)) + label(label_one_hot) + augment(augment_label))))

    The wave lengths run from 1/8 to 32: c_noise = ln(sigma) / 4 spans about 4 units from 0.002 to 80.

    Args:
        width: length of the embedding.
        num_classes: number of classes, 0 for a network without labels.
        augment_dim: length of the augmentation label, 0 for a network without one.
    """

    def __init__(self, width: int, num_classes: int = 0, augment_dim: int = 0) -> None:
        super().__init__()
        self.frequencies: Tensor
        # on the CPU also where the network is built without memory: for that device torch would import its compiler
        frequencies = 2 * math.pi * torch.logspace(-5, 3, width // 2, base=2, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise = nn.Linear(2 * (width // 2), width)
        self.label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.out = nn.Linear(width, width)

    @override
    def forward(
        self,
        c_noise: Float[Tensor, "B"],
        label_one_hot: Float[Tensor, "B L"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B width"]:
        emb = self.noise(sinusoids(c_noise, self.frequencies))
        for layer, value in ((self.label, label_one_hot), (self.augment, augment_label)):
            if layer is not None and value is not None:
                emb = emb + layer(value)
        return silu(self.out(silu(emb)))


def condition_or_zeros(
    value: Float[Tensor, "B _"] | None, width: int, x: Float[Tensor, "B C H W"], *, name: str, argument: str
) -> Float[Tensor, "B width"]:
    """A condition in the type of x, or zeros where none is given.

    Args:
        value: one vector per example, or None.
        width: length of the vectors that the network was built for.
        x: the batch, which gives batch size, type and device.
        name: name of the condition in the error message.
        argument: constructor argument that sets the width, for the error message.

    Raises:
        ValueError: the vectors have another length than `width`.
    """
    if value is None:
        return x.new_zeros(x.shape[0], width)
    if value.shape[1] != width:
        raise ValueError(
            f"{name} has {value.shape[1]} columns, but the network was built with {argument}={width}; "
            f"build it with {argument}={value.shape[1]}"
        )
    return value.to(x.dtype)


# ---- filters that halve or double the resolution


def separable_filter(taps: Sequence[float]) -> Float[Tensor, "1 1 n n"]:
    """Outer product of the filter taps with themselves, normalised to sum 1.

    Args:
        taps: one-dimensional filter: an even number of values that read the same both ways.

    Raises:
        ValueError: the number of taps is odd or they are not symmetric; either would shift the image.
    """
    if len(taps) % 2 or list(taps) != list(taps)[::-1]:
        raise ValueError(
            f"resample_filter needs an even number of taps that read the same both ways, as (1, 1) or "
            f"(1, 3, 3, 1), not {len(taps)}: {tuple(taps)}"
        )
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum() ** 2)[None, None]


def upsample(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Doubled resolution: zeros between the pixels, then the filter, times 4 to keep the mean.

    Args:
        x: (B, C, H, W).
        kernel: filter (1, 1, n, n), as `separable_filter` gives it.
        bias: added to each channel (C,), if given.

    Returns:
        (B, C, 2 H, 2 W).
    """
    if kernel.shape[-1] == 2:  # a box filter repeats every pixel four times
        x = interpolate(x, scale_factor=2.0, mode="nearest")
        return x if bias is None else x + bias[:, None, None]
    weight = (4 * kernel.to(x.dtype)).expand(x.shape[1], -1, -1, -1)
    return conv_transpose2d(x, weight, bias, stride=2, padding=kernel.shape[-1] // 2 - 1, groups=x.shape[1])


def downsample(x: Tensor, kernel: Tensor, *, stride: int = 2, margin: int = 0) -> Tensor:
    """Filtered x, of which every `stride`-th pixel is kept.

    Args:
        x: (B, C, H, W).
        kernel: filter (1, 1, n, n), as `separable_filter` gives it.
        stride: distance of the pixels that are kept; 2 halves the resolution.
        margin: additional zeros around the image, in pixels.

    Returns:
        (B, C, H / stride, W / stride) for margin 0.
    """
    size = kernel.shape[-1]
    padding = size // 2 - 1 + margin
    if size == 2 and padding == 0:  # a box filter is the mean of four pixels
        return avg_pool2d(x, 2, stride)
    weight = kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1])


class Resample(nn.Module):
    """Filter that doubles or halves the resolution, without a convolution.

    Args:
        direction: "up" or "down".
        taps: filter taps, see `separable_filter`.
    """

    def __init__(self, direction: Resampling, taps: Sequence[float]) -> None:
        super().__init__()
        self.resample = upsample if direction == "up" else downsample
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", separable_filter(taps))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x, self.resample_filter)


class FilteredConv(nn.Conv2d):
    """Base class of a k x k convolution combined with a resampling filter.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side k of the kernel, odd.
        taps: filter taps, see `separable_filter`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, taps: Sequence[float]) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", separable_filter(taps))


class UpConv(FilteredConv):
    """Upsampling by 2, then the convolution."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            return upsample(conv2d(x, self.weight), self.resample_filter, self.bias)
        return super().forward(upsample(x, self.resample_filter))


class DownConv(FilteredConv):
    """Downsampling by 2, then the convolution."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(downsample(x, self.resample_filter))


class ConvDown(FilteredConv):
    """Convolution of the zero-padded image, then downsampling by 2, computed as one strided convolution."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = downsample(x, self.resample_filter, stride=1, margin=self.kernel_size[0] // 2)
        return conv2d(x, self.weight, self.bias, stride=2)


def resampling_conv(
    inputs: int, outputs: int, kernel: int, resampling: Resampling | None, taps: Sequence[float]
) -> nn.Module:
    """Convolution layer that also changes the resolution, if asked to.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel; 0 leaves only the filter (or the identity).
        resampling: "up", "down", or None to keep the resolution.
        taps: filter taps, see `separable_filter`.
    """
    match resampling:
        case _ if kernel == 0:
            return Resample(resampling, taps) if resampling else nn.Identity()
        case "up":
            return UpConv(inputs, outputs, kernel, taps)
        case "down":
            return DownConv(inputs, outputs, kernel, taps)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
