"""Group normalisation that keeps the memory layout and the type of its input on GPUs (Wu & He 2018).

    y = weight (x - mean) / sqrt(variance + eps) + bias        mean and variance: per example, over a group of channels

PyTorch's CUDA kernel returns channels-first tensors, and under autocast float32, so that every convolution after it
would move them to the other layout and type. Here x is read and y is written as they are, and only what is constant
over the pixels is float32:

    y = scale x + shift    scale = weight / sqrt(variance + eps),  shift = bias - mean scale   (per example and channel)

On CPUs PyTorch's kernel keeps layout and type, and is used.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import group_norm
from typing_extensions import override


class GroupNorm(nn.GroupNorm):
    """Group normalisation; on a GPU, too, the output has the layout and the type of the input."""

    @override
    def forward(self, input: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        if input.device.type != "cuda" or torch._C._are_functorch_transforms_active():
            return super().forward(input)
        y: Tensor = GroupNormByChannel.apply(input, self.num_groups, self.weight, self.bias, self.eps)
        return y


class GroupNormByChannel(torch.autograd.Function):
    """Group normalisation as one affine map per example and channel; `GroupNorm` calls it on GPUs.

    The sums over the pixels are taken in float32 without a copy of x in that type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "B C *S"],
        groups: int,
        weight: Float[Tensor, " C"],
        bias: Float[Tensor, " C"],
        eps: float,
    ) -> Float[Tensor, "B C *S"]:
        """The normalised x.

        Args:
            ctx: what the backward pass needs is saved here.
            x: the features.
            groups: number of groups of consecutive channels.
            weight: factor of each channel.
            bias: added to each channel.
            eps: added to the variance.
        """
        mean, variance = _moments(x, groups)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        scale = weight * _by_channel(rstd, x)
        shift = bias - scale * _by_channel(mean, x)
        return torch.addcmul(_like(shift, x), x, _like(scale, x), out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """Gradients with respect to x, weight and bias.

        Args:
            ctx: what the forward pass has saved.
            *gradients: the gradient with respect to the output.
        """
        (dy,), (x, weight, bias, mean, rstd) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of this gradient are wanted: PyTorch has them
            y = group_norm(x, ctx.groups, weight.to(x.dtype), bias.to(x.dtype), ctx.eps)
            dx, d_weight, d_bias = torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype), create_graph=True)
            return dx, None, d_weight, d_bias, None
        pixels, dtype = tuple(range(2, x.ndim)), mean.dtype
        mean_c, rstd_c = _by_channel(mean, x), _by_channel(rstd, x)
        sums = dy.sum(pixels, dtype=dtype)  # of the gradient, and of its product with the normalised x
        products = ((dy * x).sum(pixels, dtype=dtype) - mean_c * sums) * rstd_c
        of_sums, of_products = (
            _by_channel((weight * each).unflatten(1, (ctx.groups, -1)).mean(2), x) / x[0, 0].numel()
            for each in (sums, products)
        )
        of_x = -rstd_c.square() * of_products
        constant = -rstd_c * of_sums - mean_c * of_x
        dx = torch.addcmul(_like(constant, x), x, _like(of_x, x), out=torch.empty_like(x))
        dx.addcmul_(dy, _like(weight * rstd_c, x))
        return dx, None, products.sum(0).to(weight.dtype), sums.sum(0).to(bias.dtype), None


def _moments(x: Float[Tensor, "B C *S"], groups: int) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"]]:
    """Mean and variance of each group, from those of its channels."""
    pixels = tuple(range(2, x.ndim))
    if x.dtype in (torch.float16, torch.bfloat16):
        # the difference of squares loses less than the rounding of x, and float32 sums need no copy of x
        channel_mean = x.mean(pixels, dtype=torch.float32)
        squares = torch.linalg.vector_norm(x, 2, pixels, dtype=torch.float32).square() / x[0, 0].numel()
        mean, square = (each.unflatten(1, (groups, -1)).mean(2) for each in (channel_mean, squares))
        return mean, (square - mean.square()).clamp(min=0)
    variance, channel_mean = torch.var_mean(x, pixels, correction=0)
    within, between = (each.unflatten(1, (groups, -1)) for each in (variance, channel_mean))
    return between.mean(2), within.mean(2) + between.var(2, correction=0)


def _by_channel(values: Float[Tensor, "B G"], x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C"]:
    """Values of groups, repeated for each of their channels."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], 1, output_size=x.shape[1])


def _like(values: Float[Tensor, "B C"], x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *_"]:
    """Values of channels as they are broadcast over the pixels of x."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))
