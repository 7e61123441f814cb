"""diffusers: alpha and sigma of its schedulers, and its U-Net as a network of this package.

    x_t = scheduler.add_noise(x, noise, timesteps) = alpha x + sigma noise

so alpha is what `add_noise` makes of x = 1 and noise = 0, and sigma what it makes of x = 0 and noise = 1. That holds
for every scheduler, and gives the very numbers, in the very type, that x_t was made with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from stablefield.extras import how_to_install


@torch.no_grad()
def scales(scheduler: Any, timesteps: Tensor, x: Float[Tensor, "B *D"]) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of a scheduler of diffusers at the timesteps of a batch.

    Args:
        scheduler: a scheduler with `add_noise`, or with `scale_noise` (flow matching).
        timesteps: timestep of each example, as passed to the scheduler.
        x: clean data; alpha and sigma have its type and device.

    Returns:
        alpha and sigma, each (B, 1, ..., 1).

    Raises:
        ValueError: the scheduler has neither method, or is not linear in data and noise.
    """
    one = x.new_ones(len(x), *[1] * (x.ndim - 1))
    zero = torch.zeros_like(one)
    if hasattr(scheduler, "scale_noise"):
        alpha, sigma, both = (scheduler.scale_noise(a, timesteps, b) for a, b in ((one, zero), (zero, one), (one, one)))
    elif hasattr(scheduler, "add_noise"):
        alpha, sigma, both = (scheduler.add_noise(a, b, timesteps) for a, b in ((one, zero), (zero, one), (one, one)))
    else:
        raise ValueError(f"{type(scheduler).__name__} has neither add_noise nor scale_noise: pass alpha and sigma")
    rounding = 4 * torch.finfo(x.dtype).eps
    if alpha.shape != one.shape or ((alpha + sigma - both).abs() > rounding * (alpha.abs() + sigma.abs())).any():
        raise ValueError(f"{type(scheduler).__name__} does not make alpha x + sigma noise with one alpha per example")
    return alpha, sigma


class UNet2D(nn.Module):
    """`diffusers.UNet2DModel` as a network of this package: `network.kind=stablefield.interop.diffusers:UNet2D`.

    Args:
        shape: (C, H, W) of one image; H and W must be divisible by 2 once for every level below the first.
        num_classes: number of classes, 0 for a network without labels.
        channels: width of each level.
        blocks: residual blocks per level.
        attention: numbers of the levels with attention, counted from 0.
        dropout: probability of dropping a feature.
        time_scale: factor of c_noise before the sinusoidal embedding, which resolves steps of about 1. For a
            preconditioning whose c_noise counts timesteps (vp, iddpm) set it to 1.

    Raises:
        ImportError: diffusers is not installed, or cannot be imported.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError(f"{how_to_install('UNet2D', 'diffusers')} ({error})") from error
        self.num_classes, self.time_scale = num_classes, time_scale
        down = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(channels))]
        up = ["AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(channels)))]
        self.unet = UNet2DModel(
            sample_size=(shape[1], shape[2]),
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=tuple(channels),
            layers_per_block=blocks,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=min(8, *channels),
            attention_head_dim=None,
            dropout=dropout,
            num_class_embeds=num_classes + 1 if num_classes else None,  # the last one is "no class"
        )

    @override
    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        c_noise: Float[Tensor, "B"],
        label_one_hot: Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """The output of the network.

        Args:
            x: scaled noisy images.
            c_noise: scaled noise level of each.
            label_one_hot: one-hot label of each, zeros for no class.
        """
        label = None
        if label_one_hot is not None:
            label = torch.where(label_one_hot.any(1), label_one_hot.argmax(1), self.num_classes)
        return self.unet(x, self.time_scale * c_noise, class_labels=label).sample
