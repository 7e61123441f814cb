"""Encoder and decoder of residual blocks with skip connections, shared by DDPM++, NCSN++ and ADM.

    encoder: skips = [conv(x)], then blocks and halved resolution, level by level; every output is kept in skips
    decoder: x = blocks(concatenate(x, last of skips)), then doubled resolution, level by level

    block:   h = conv0(silu(norm0(x)))                         conv0 and skip change the resolution, if any
             h = conv1(dropout(silu(condition(h, e))))         e: embedding of noise level, label and augmentation
             x = s (skip(x) + h)
             x = s (x + proj(attention(qkv(norm2(x)))))        at some resolutions

The networks differ in how e enters, in s, in where there is attention, and in an auxiliary path next to the features
(in some an image at every resolution). Modules have the names and the order of EDM's checkpoints (Karras et al. 2022),
so that weights and optimiser states can be exchanged in both directions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from stablefield.networks.group_norm import GroupNorm
from stablefield.networks.layers import Resampling, check_counts, resampling_conv


def group_norm(channels: int, eps: float) -> GroupNorm:
    """Group normalisation with min(32, C // 4) groups.

    Args:
        channels: number of channels C.
        eps: added to the variance.

    Raises:
        ValueError: the channels cannot be divided into that many groups.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{channels} channels do not divide into {groups} groups (min(32, C // 4)): "
            f"choose model_channels so that all widths are multiples of 4, and above 128 of 32"
        )
    return GroupNorm(groups, channels, eps)


class ResidualBlock(nn.Module, ABC):
    """Residual block with an embedding, optional resampling and optional self-attention.

    Args:
        inputs: input channels.
        outputs: output channels.
        emb_channels: length of the embedding e.
        resampling: "up" or "down" to double or halve the resolution; None keeps it.
        taps: taps of the resampling filter.
        num_heads: attention heads; 0 for a block without attention.
        dropout: probability of dropping a feature.
        checkpointing: recompute the activations in the backward pass instead of storing them.

    Attributes:
        eps: added to the variance by all three normalisations.
        scale: s, the factor of every sum: 1, or sqrt(1/2) to keep the variance of a sum of two.
        affine_width: values that the embedding gives per output channel.
        resample_proj: the skip connection also mixes channels where only the resolution changes.

    Raises:
        ValueError: the channels cannot be divided into groups or heads.
    """

    eps: ClassVar[float]
    scale: ClassVar[float]
    affine_width: ClassVar[int]
    resample_proj: ClassVar[bool]

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        emb_channels: int,
        resampling: Resampling | None = None,
        taps: Sequence[float] = (1, 1),
        num_heads: int = 0,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_heads and outputs % num_heads:
            raise ValueError(
                f"{outputs} channels do not divide into {num_heads} heads: choose model_channels so that they do"
            )
        self.num_heads, self.checkpointing = num_heads, checkpointing
        mixes = inputs != outputs or (resampling is not None and self.resample_proj)
        self.norm0 = group_norm(inputs, self.eps)
        self.conv0 = resampling_conv(inputs, outputs, 3, resampling, taps)
        self.affine = nn.Linear(emb_channels, self.affine_width * outputs)
        self.norm1 = group_norm(outputs, self.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = resampling_conv(inputs, outputs, int(mixes), resampling, taps)
        if num_heads:
            self.norm2 = group_norm(outputs, self.eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    @abstractmethod
    def condition(self, h: Float[Tensor, "B C H W"], e: Float[Tensor, "B E 1 1"]) -> Float[Tensor, "B C H W"]:
        """Features after norm1 and the embedding.

        Args:
            h: features.
            e: what `affine` makes of the embedding, E = affine_width * C.
        """

    @override
    def forward(self, x: Float[Tensor, "B _ _ _"], emb: Float[Tensor, "B _"]) -> Float[Tensor, "B _ _ _"]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        h = silu(self.condition(h, self.affine(emb)[:, :, None, None]))
        x = (self.conv1(self.dropout(h)) + self.skip(x)) * self.scale
        return (self.attention(x) + x) * self.scale if self.num_heads else x

    def attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Self-attention over the pixels: proj(softmax(q k / sqrt(C / num_heads)) v).

        The softmax is summed in float32 in every precision.

        Args:
            x: features.
        """
        # The rows of qkv are (head, channel, q|k|v). Sorting the weights as (q|k|v, head, channel) costs less than
        # sorting their outputs, and puts the channels of a head side by side, which fused kernels need.
        weight, bias = (
            p.unflatten(0, (self.num_heads, -1, 3)).movedim(2, 0).flatten(0, 2) for p in self.qkv.parameters()
        )
        pixels = self.norm2(x).flatten(2).mT
        q, k, v = linear(pixels, weight.flatten(1), bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(mixed, self.proj.weight.flatten(1), self.proj.bias).mT.unflatten(2, x.shape[2:])


class ResidualUNet(nn.Module, ABC):
    """Base class of U-Nets of residual blocks (Ronneberger et al. 2015).

    Features are stored channels last, weights as they are. On a GPU, and for small batches on a CPU, it is faster when
    both are: `network.to(memory_format=torch.channels_last)`.

    Args:
        shape: (C, H, W) of one image; H and W must be divisible by 2 once for every level below the first.
        channel_mult: width of each level, in units of `model_channels`.
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        attn_resolutions: image heights H of the levels with attention.

    Attributes:
        decoder_attention_last_only: attention only in the last block of a level of the decoder, not in all.

    Raises:
        ValueError: the data are not images, or a side cannot be halved often enough.
    """

    decoder_attention_last_only: ClassVar[bool]

    def __init__(
        self,
        shape: Sequence[int],
        channel_mult: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> None:
        super().__init__()
        check_counts(128, num_blocks=num_blocks)
        check_counts(2**10, channel_mult=channel_mult)
        self.factor = 2 ** (len(channel_mult) - 1)
        if len(shape) != 3:
            raise ValueError(f"the network needs images (C, H, W), not {tuple(shape)}; use MLP for other data")
        self._check_sides(shape[1:])
        self.shape, self.num_blocks = tuple(shape), num_blocks
        sides = [(shape[1] >> level, shape[2] >> level) for level in range(len(channel_mult))]
        self.resolutions = [f"{h}x{w}" for h, w in sides]  # the names in EDM's files
        self.has_attention = [h in attn_resolutions for h, _ in sides]

    def _check_sides(self, sides: Sequence[int]) -> None:
        if any(side % self.factor or side == 0 for side in sides):
            raise ValueError(
                f"{self.factor.bit_length()} levels need images with sides divisible by {self.factor}, not "
                f"{sides[0]} x {sides[1]}: pad or crop them, or choose a shorter channel_mult"
            )

    @abstractmethod
    def num_heads(self, channels: int) -> int:
        """Attention heads of a block of this width, where there is attention.

        Args:
            channels: output channels of the block.
        """

    @override
    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        c_noise: Float[Tensor, " B"],
        label_one_hot: Float[Tensor, "B _"] | None = None,
        augment_label: Float[Tensor, "B _"] | None = None,
    ) -> Float[Tensor, "B _ H W"]:
        """Output F(x; c_noise) of the network before preconditioning (Karras et al. 2022, eq. 7).

        Args:
            x: noisy input, scaled to unit variance (c_in x_t).
            c_noise: noise level as the network sees it, one value per example.
            label_one_hot: one-hot labels; a row of zeros, or None for all, is the null label.
            augment_label: augmentation labels; zeros, or None for all, mean that no augmentation was applied.

        Raises:
            ValueError: a side cannot be halved often enough, or a label has another length than the network was built
                for.
        """
        emb = self.embed(x, c_noise, label_one_hot, augment_label)
        return self.output(*self.decode(self.encode(x, emb), emb))

    @abstractmethod
    def embed(self, x: Tensor, c_noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embedding e (B, E) of noise level, label and augmentation.

        Args:
            x: noisy input; its type and device are those of the embedding.
            c_noise: noise level as the network sees it, one value per example.
            label: one-hot labels; None is the null label.
            augment: augmentation labels; None means that no augmentation was applied.
        """

    @abstractmethod
    def output(self, h: Tensor, image: Tensor | None) -> Tensor:
        """Output of the network (B, C, H, W).

        Args:
            h: features of the decoder at full resolution.
            image: output of the auxiliary path, if there is one.
        """

    def build(self, block: Callable[..., ResidualBlock], stem: int, widths: Sequence[int]) -> None:
        """Create the encoder `enc` and the decoder `dec`, in the order of EDM's files.

        Args:
            block: makes a residual block from its input and output channels.
            stem: output channels of the first convolution.
            widths: channels of each level.
        """
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, aux_channels, skips = stem, self.shape[0], [stem]
        for level, (r, width) in enumerate(zip(self.resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{r}_conv"] = nn.Conv2d(self.shape[0], stem, 3, padding=1)
            else:
                self.enc[f"{r}_down"] = block(channels, channels, resampling="down")
                aux_channels = self.build_encoder_aux(r, channels, aux_channels)
                skips.append(channels)
            for i in range(self.num_blocks):
                num_heads = self.num_heads(width) if self.has_attention[level] else 0
                self.enc[f"{r}_block{i}"] = block(channels, width, num_heads=num_heads)
                skips.append(channels := width)
        for level, (r, width) in reversed(list(enumerate(zip(self.resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{r}_in0"] = block(channels, channels, num_heads=self.num_heads(channels))
                self.dec[f"{r}_in1"] = block(channels, channels)
            else:
                self.dec[f"{r}_up"] = block(channels, channels, resampling="up")
            for i in range(self.num_blocks + 1):
                attends = self.has_attention[level] and (i == self.num_blocks or not self.decoder_attention_last_only)
                num_heads = self.num_heads(width) if attends else 0
                self.dec[f"{r}_block{i}"] = block(channels + skips.pop(), width, num_heads=num_heads)
                channels = width
            self.build_decoder_aux(r, channels)

    def build_encoder_aux(self, resolution: str, channels: int, aux_channels: int) -> int:
        """Create the layers of the auxiliary path of the encoder at one level, and return its new number of channels.

        Args:
            resolution: name of the level, "HxW".
            channels: channels of the features.
            aux_channels: channels of the auxiliary path so far.
        """
        return aux_channels

    def build_decoder_aux(self, resolution: str, channels: int) -> None:
        """Create the layers of the auxiliary path of the decoder at one level.

        Args:
            resolution: name of the level, "HxW".
            channels: channels of the features.
        """

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Outputs of all blocks of the encoder, for the skip connections.

        Args:
            x: input images (B, C, H, W).
            emb: embedding (B, E).

        Raises:
            ValueError: a side of the images cannot be halved often enough.
        """
        self._check_sides(x.shape[2:])
        aux, skips = x, []
        for r in self.resolutions:
            if r == self.resolutions[0]:
                # Convolutions are faster on channels-last features, most of all in bfloat16; later layers keep it.
                x = self.enc[f"{r}_conv"](x).contiguous(memory_format=torch.channels_last)
            else:
                x, aux = self.encode_aux(r, self.enc[f"{r}_down"](x, emb), aux)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{r}_block{i}"](x, emb)
                skips.append(x)
        return skips

    def encode_aux(self, resolution: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        """Features and auxiliary path of the encoder at one level.

        Args:
            resolution: name of the level, "HxW".
            x: features.
            aux: auxiliary path at the level above.
        """
        return x, aux

    def decode(self, skips: list[Tensor], emb: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features at full resolution, and the output of the auxiliary path, if there is one.

        Args:
            skips: outputs of the encoder; the list is emptied.
            emb: embedding (B, E).
        """
        x, aux = skips[-1], None
        for r in reversed(self.resolutions):
            if r == self.resolutions[-1]:
                x = self.dec[f"{r}_in1"](self.dec[f"{r}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{r}_up"](x, emb)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{r}_block{i}"](torch.cat((x, skips.pop()), dim=1), emb)
            aux = self.decode_aux(r, x, aux)
        return x, aux

    def decode_aux(self, resolution: str, x: Tensor, aux: Tensor | None) -> Tensor | None:
        """Auxiliary path of the decoder at one level; None for a network without one.

        Args:
            resolution: name of the level, "HxW".
            x: features.
            aux: auxiliary path at the level below.
        """
        return None
