"""DDPM++ and NCSN++, the U-Nets of score-based models (Song et al. 2021), as in EDM (Karras et al. 2022).

    e = silu(map_layer1(silu(map_layer0(map_noise(c_noise) + map_label(label) + map_augment(augmentation)))))
    block: silu(norm1(h + e)), and every sum times sqrt(1/2)

DDPM++ embeds c_noise with positional sinusoids and resamples with a box filter. NCSN++ uses random Fourier features,
resamples with the binomial filter (1, 3, 3, 1), and adds features of the downsampled input at every resolution of the
encoder. The third architecture, "skip", adds a 1 x 1 convolution of the downsampled input in the encoder, or sums an
image of every resolution in the decoder.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from typing_extensions import override

from stablefield.networks.layers import (
    ConvDown,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    check_counts,
    condition_or_zeros,
)
from stablefield.networks.residual_unet import ResidualBlock, ResidualUNet, group_norm

# The arguments of SongUNet that make NCSN++; its defaults are DDPM++.
NCSNPP: dict[str, Any] = {
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}


class SongBlock(ResidualBlock):
    """Residual block of DDPM++ and NCSN++: the embedding is added to the features before normalisation."""

    eps, scale, affine_width, resample_proj = 1e-6, math.sqrt(1 / 2), 1, True

    @override
    def condition(self, h: Tensor, e: Tensor) -> Tensor:
        return self.norm1(h + e)


class SongUNet(ResidualUNet):
    """U-Net of Song et al.: DDPM++ by default, NCSN++ with the arguments of `ncsnpp`; weights fit EDM's files.

    Args:
        shape: (C, H, W) of one image; H and W must be divisible by 2 once for every level below the first.
        num_classes: number of classes, 0 for a network without labels.
        augment_dim: length of the augmentation label, 0 for a network without one.
        model_channels: unit of all widths, in channels.
        channel_mult: width of each level, in units of `model_channels`; by default (2, 2, 2) for sides below 64, as
            published for CIFAR-10, and (1, 2, 2, 2) from there on, as for FFHQ and AFHQ.
        channel_mult_emb: length of the embedding e, in the same unit.
        channel_mult_noise: length of the sinusoids of c_noise, in the same unit.
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: image heights of the levels with attention; the lowest level always has one such block.
        dropout: probability of dropping a feature in each block.
        embedding: sinusoids of c_noise: "positional" or "fourier" (random frequencies).
        encoder: auxiliary path of the encoder: none ("standard"), the downsampled image ("skip") or features of it
            ("residual").
        decoder: output from the features at full resolution ("standard"), or summed over all resolutions ("skip").
        resample_filter: taps of the filter that halves and doubles the resolution.
        out_channels: channels of the output; by default those of the input.
        checkpointing: recompute the activations of each block in the backward pass instead of storing them.

    Raises:
        ValueError: the shape, a width or the name of an option does not fit.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 7
    """

    decoder_attention_last_only = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        num_classes: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] | None = None,
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: Literal["positional", "fourier"] = "positional",
        encoder: Literal["standard", "skip", "residual"] = "standard",
        decoder: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
        out_channels: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        channel_mult = channel_mult or _default_multipliers(shape)
        super().__init__(shape, channel_mult, num_blocks, attn_resolutions)
        _check_option("embedding", embedding, ("positional", "fourier"))
        _check_option("encoder", encoder, ("standard", "skip", "residual"))
        _check_option("decoder", decoder, ("standard", "skip"))
        check_counts(2**16, model_channels=model_channels)
        check_counts(2**10, channel_mult_emb=channel_mult_emb, channel_mult_noise=channel_mult_noise)
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.encoder, self.decoder = encoder, decoder
        self.taps, self.out_channels = resample_filter, out_channels or shape[0]
        noise_width, width = channel_mult_noise * model_channels, channel_mult_emb * model_channels
        positional = embedding == "positional"
        self.map_noise = PositionalEmbedding(noise_width, True) if positional else FourierEmbedding(noise_width)
        self.map_label = nn.Linear(num_classes, noise_width) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_width, width)
        self.map_layer1 = nn.Linear(width, width)
        block = partial(
            SongBlock, emb_channels=width, taps=resample_filter, dropout=dropout, checkpointing=checkpointing
        )
        self.build(block, model_channels, [m * model_channels for m in channel_mult])
        self.initialize()

    @override
    def num_heads(self, channels: int) -> int:
        return 1

    @override
    def build_encoder_aux(self, resolution: str, channels: int, aux_channels: int) -> int:
        if self.encoder == "residual":
            self.enc[f"{resolution}_aux_residual"] = ConvDown(aux_channels, channels, 3, self.taps)
            return channels
        if self.encoder == "skip":
            self.enc[f"{resolution}_aux_down"] = Resample("down", self.taps)
            self.enc[f"{resolution}_aux_skip"] = nn.Conv2d(aux_channels, channels, 1)
        return aux_channels

    @override
    def build_decoder_aux(self, resolution: str, channels: int) -> None:
        if resolution != self.resolutions[0] and self.decoder == "standard":
            return
        if resolution != self.resolutions[-1] and self.decoder == "skip":
            self.dec[f"{resolution}_aux_up"] = Resample("up", self.taps)
        self.dec[f"{resolution}_aux_norm"] = group_norm(channels, SongBlock.eps)
        self.dec[f"{resolution}_aux_conv"] = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set Xavier-uniform weights and zero biases; the last layer of a branch or of the network is near zero."""
        gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @override
    def output(self, h: Tensor, image: Tensor | None) -> Tensor:
        assert image is not None
        return image

    @override
    def embed(self, x: Tensor, c_noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        # one-hot labels of L classes are scaled by sqrt(L) to unit variance
        label = condition_or_zeros(label, self.num_classes, x, name="label_one_hot", argument="num_classes")
        augment = condition_or_zeros(augment, self.augment_dim, x, name="augment_label", argument="augment_dim")
        emb = self.map_noise(c_noise).to(x.dtype)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # in EDM's files the sines are first
        if self.map_label is not None:
            emb = emb + self.map_label(label * math.sqrt(self.num_classes))
        if self.map_augment is not None:
            emb = emb + self.map_augment(augment)
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    @override
    def encode_aux(self, resolution: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder == "residual":
            x = (x + self.enc[f"{resolution}_aux_residual"](aux)) * math.sqrt(1 / 2)
            return x, x
        if self.encoder == "skip":
            aux = self.enc[f"{resolution}_aux_down"](aux)
            x = x + self.enc[f"{resolution}_aux_skip"](aux)
        return x, aux

    @override
    def decode_aux(self, resolution: str, x: Tensor, aux: Tensor | None) -> Tensor | None:
        if f"{resolution}_aux_conv" not in self.dec:
            return None
        image = self.dec[f"{resolution}_aux_conv"](silu(self.dec[f"{resolution}_aux_norm"](x)))
        return image if aux is None else image + self.dec[f"{resolution}_aux_up"](aux)


def ddpmpp(shape: Sequence[int] = (3, 32, 32), **options: Any) -> SongUNet:
    """DDPM++ as EDM trains it: 55.7 M parameters at 32 x 32, 61.8 M at 64 x 64.

    Args:
        shape: (C, H, W) of one image.
        **options: other arguments of `SongUNet`.
    """
    return SongUNet(shape, **options)


def ncsnpp(shape: Sequence[int] = (3, 32, 32), **options: Any) -> SongUNet:
    """NCSN++ as EDM trains it: 56.4 M parameters at 32 x 32, 62.8 M at 64 x 64.

    Args:
        shape: (C, H, W) of one image.
        **options: other arguments of `SongUNet`, which override those of NCSN++.
    """
    return SongUNet(shape, **{**NCSNPP, **options})


def _default_multipliers(shape: Sequence[int]) -> tuple[int, ...]:
    """Published widths: CIFAR-10's for sides below 64 pixels, and FFHQ's and AFHQ's from there on."""
    return (2, 2, 2) if min(shape[1:]) < 64 else (1, 2, 2, 2)


def _check_option(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, not {value!r}")
