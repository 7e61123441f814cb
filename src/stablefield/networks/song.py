"""DDPM++ and NCSN++, the U-Nets of score-based models (Song et al. 2021), as in EDM (Karras et al. 2022).

    e = silu(map_layer1(silu(map_layer0(waves(c_noise) + label + augmentation))))
    block: silu(norm1(h + e)), and every sum times sqrt(1/2)

DDPM++ is told the noise by positional waves and resamples with a box. NCSN++ is told by random Fourier waves,
resamples with the binomial (1, 3, 3, 1), and hands a shrinking image down beside the encoder. Another way,
"skip", adds a plain image at every resolution on the way down, or sums one on the way up.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from stablefield.networks.layers import (
    ConvDown,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    ResidualBlock,
    group_norm,
    told,
)
from stablefield.networks.walk import ResidualUNet

# what makes an NCSN++ of a DDPM++
NCSNPP: dict[str, Any] = {
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}


class SongBlock(ResidualBlock):
    """h + e, then normalised."""

    eps, scale, affine_width, resample_proj = 1e-6, math.sqrt(1 / 2), 1, True

    def tell(self, h: Tensor, e: Tensor) -> Tensor:
        return self.norm1(h + e)


class SongUNet(ResidualUNet):
    """DDPM++ (as it stands) and NCSN++ (see `ncsnpp`), weight-compatible with EDM's files.

    Args:
        shape: (C, H, W) of one image; the sides divisible by 2 once for every level below the first.
        label_dim: classes it is told of, as one-hot rows.
        augment_dim: numbers that say how an image was augmented.
        model_channels: the unit of all widths.
        channel_mult: width of each level, in units of `model_channels`; by default (2, 2, 2) for sides below 64, as
            published for CIFAR-10, and (1, 2, 2, 2) from there on, as for FFHQ and AFHQ.
        channel_mult_emb: length of e, in the same unit.
        channel_mult_noise: waves of c_noise, in the same unit.
        num_blocks: residual blocks a level on the way down; one more on the way up.
        attn_resolutions: heights at which there is attention; the lowest level has some anyway.
        dropout: share of features dropped in each block.
        embedding: waves of c_noise.
        encoder: what goes down beside the features: nothing, the image ("skip") or its features ("residual").
        decoder: where the image is read: at the top, or at every resolution and summed ("skip").
        resample_filter: taps of the filter that halves and doubles.
        out_channels: if not as many as come in.
        checkpointing: blocks forget their insides until the backward pass, and then compute them again.

    Raises:
        ValueError: a shape, a width or a name that does not fit.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 7
    """

    dec_attends_last = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        label_dim: int = 0,
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
        channel_mult = channel_mult or levels(shape)
        super().__init__(shape, channel_mult, num_blocks, attn_resolutions)
        known("embedding", embedding, ("positional", "fourier"))
        known("encoder", encoder, ("standard", "skip", "residual"))
        known("decoder", decoder, ("standard", "skip"))
        self.label_dim, self.augment_dim, self.encoder, self.decoder = (
            label_dim,
            augment_dim,
            encoder,
            decoder,
        )
        self.taps, self.out_channels = resample_filter, out_channels or shape[0]
        waves, width = channel_mult_noise * model_channels, channel_mult_emb * model_channels
        self.map_noise = PositionalEmbedding(waves, True) if embedding == "positional" else FourierEmbedding(waves)
        self.map_label = nn.Linear(label_dim, waves) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, waves, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(waves, width)
        self.map_layer1 = nn.Linear(width, width)
        block = partial(
            SongBlock, emb_channels=width, taps=resample_filter, dropout=dropout, checkpointing=checkpointing
        )
        self.grow(block, model_channels, [m * model_channels for m in channel_mult])
        self.initialize()

    def heads(self, channels: int) -> int:
        return 1

    def grow_encoder(self, r: str, channels: int, beside: int) -> int:
        if self.encoder == "residual":
            self.enc[f"{r}_aux_residual"] = ConvDown(beside, channels, 3, self.taps)
            return channels
        if self.encoder == "skip":
            self.enc[f"{r}_aux_down"] = Resample("down", self.taps)
            self.enc[f"{r}_aux_skip"] = nn.Conv2d(beside, channels, 1)
        return beside

    def grow_decoder(self, r: str, channels: int) -> None:
        if r != self.levels[0] and self.decoder == "standard":
            return
        if r != self.levels[-1] and self.decoder == "skip":
            self.dec[f"{r}_aux_up"] = Resample("up", self.taps)
        self.dec[f"{r}_aux_norm"] = group_norm(channels, SongBlock.eps)
        self.dec[f"{r}_aux_conv"] = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier-uniform weights, zero biases; what ends a residual branch or the network is near zero."""
        gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

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
        _, image = self.up(self.down(x, emb), emb)
        assert image is not None
        return image

    def embed(self, x: Tensor, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """e (B, E). Labels are scaled to unit variance: one-hot rows of L classes by sqrt(L)."""
        label = told(label, self.label_dim, x, "label")
        augment = told(augment, self.augment_dim, x, "augment")
        emb = self.map_noise(noise).to(x.dtype)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # EDM's files have the sines first
        if self.map_label is not None:
            emb = emb + self.map_label(label * math.sqrt(self.label_dim))
        if self.map_augment is not None:
            emb = emb + self.map_augment(augment)
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def beside_down(self, r: str, x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder == "residual":
            x = (x + self.enc[f"{r}_aux_residual"](beside)) * math.sqrt(1 / 2)
            return x, x
        if self.encoder == "skip":
            beside = self.enc[f"{r}_aux_down"](beside)
            x = x + self.enc[f"{r}_aux_skip"](beside)
        return x, beside

    def beside_up(self, r: str, x: Tensor, beside: Tensor | None) -> Tensor | None:
        if f"{r}_aux_conv" not in self.dec:
            return None
        image = self.dec[f"{r}_aux_conv"](silu(self.dec[f"{r}_aux_norm"](x)))
        return image if beside is None else image + self.dec[f"{r}_aux_up"](beside)


def ddpmpp(shape: Sequence[int] = (3, 32, 32), **options: Any) -> SongUNet:
    """DDPM++ as EDM trains it: 55.7 M parameters at 32 x 32, 61.8 M at 64 x 64. Options are `SongUNet`'s."""
    return SongUNet(shape, **options)


def ncsnpp(shape: Sequence[int] = (3, 32, 32), **options: Any) -> SongUNet:
    """NCSN++ as EDM trains it: 56.4 M parameters at 32 x 32, 62.8 M at 64 x 64. Options are `SongUNet`'s."""
    return SongUNet(shape, **{**NCSNPP, **options})


def levels(shape: Sequence[int]) -> tuple[int, ...]:
    """Widths by size: CIFAR-10's below 64 pixels, and from there on FFHQ's and AFHQ's at 64."""
    return (2, 2, 2) if min(shape[1:]) < 64 else (1, 2, 2, 2)


def known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"{what} is one of {', '.join(names)}, not {name!r}")
