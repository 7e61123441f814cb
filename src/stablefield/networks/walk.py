"""The walk of a U-Net of residual blocks: down the levels, and up again with what was seen on the way.

    seen = conv(x), blocks, half the size, blocks, half the size, ...
    x    = blocks(x and the last of `seen`), twice the size, blocks, ...

DDPM++, NCSN++ and ADM share it. What goes down or up beside the features (small images, in some) is theirs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from stablefield.networks.layers import ResidualBlock


class ResidualUNet(nn.Module, ABC):
    """Down through the levels, and up again with what was seen on the way (Ronneberger et al. 2015).

    Features lie in memory channels innermost, weights as they are. A small batch is a little faster when they lie
    alike: `network.to(memory_format=torch.channels_last)`.

    Args:
        shape: (C, H, W) of one image; the sides divisible by 2 once for every level below the first.
        channel_mult: width of each level, in units of `model_channels`.
        num_blocks: residual blocks a level on the way down; one more on the way up.
        attn_resolutions: heights at which there is attention.

    Raises:
        ValueError: data that are no images, or a side that cannot be halved often enough.
    """

    dec_attends_last: ClassVar[bool]  # on the way up: attention in a level's last block only, or in all

    def __init__(
        self,
        shape: Sequence[int],
        channel_mult: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(channel_mult) - 1)
        if len(shape) != 3:
            raise ValueError(f"the network needs images (C, H, W), not {tuple(shape)}; for other data there is the MLP")
        self.check(shape[1:])
        self.shape, self.num_blocks = tuple(shape), num_blocks
        sides = [(shape[1] >> level, shape[2] >> level) for level in range(len(channel_mult))]
        self.levels = [f"{h}x{w}" for h, w in sides]  # the names of EDM's files
        self.attends = [h in attn_resolutions for h, _ in sides]

    def check(self, sides: Sequence[int]) -> None:
        if any(side % self.factor or side == 0 for side in sides):
            raise ValueError(
                f"{self.factor.bit_length()} levels need images with sides divisible by {self.factor}, not "
                f"{sides[0]} x {sides[1]}: pad or crop them, or choose a shorter channel_mult"
            )

    @abstractmethod
    def heads(self, channels: int) -> int:
        """Of the attention, where there is any."""

    def grow(self, block: Callable[..., ResidualBlock], stem: int, widths: Sequence[int]) -> None:
        """Makes `enc` and `dec`, in the order of EDM's files."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, beside, skips = stem, self.shape[0], [stem]
        for level, (r, width) in enumerate(zip(self.levels, widths, strict=True)):
            if level == 0:
                self.enc[f"{r}_conv"] = nn.Conv2d(self.shape[0], stem, 3, padding=1)
            else:
                self.enc[f"{r}_down"] = block(now, now, change="down")
                beside = self.grow_encoder(r, now, beside)
                skips.append(now)
            for i in range(self.num_blocks):
                heads = self.heads(width) if self.attends[level] else 0
                self.enc[f"{r}_block{i}"] = block(now, width, heads=heads)
                skips.append(now := width)
        for level, (r, width) in reversed(list(enumerate(zip(self.levels, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{r}_in0"] = block(now, now, heads=self.heads(now))
                self.dec[f"{r}_in1"] = block(now, now)
            else:
                self.dec[f"{r}_up"] = block(now, now, change="up")
            for i in range(self.num_blocks + 1):
                attends = self.attends[level] and (i == self.num_blocks or not self.dec_attends_last)
                self.dec[f"{r}_block{i}"] = block(now + skips.pop(), width, heads=self.heads(width) if attends else 0)
                now = width
            self.grow_decoder(r, now)

    def grow_encoder(self, r: str, channels: int, beside: int) -> int:
        """Layers for what is kept beside the way down; how many channels that has, before and after."""
        return beside

    def grow_decoder(self, r: str, channels: int) -> None:
        """Layers for what is kept beside the way up."""

    def down(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Everything seen on the way down."""
        self.check(x.shape[2:])
        beside, seen = x, []
        for r in self.levels:
            if r == self.levels[0]:
                # Channels innermost is how convolutions like it, most of all in bfloat16. All else follows suit.
                x = self.enc[f"{r}_conv"](x).contiguous(memory_format=torch.channels_last)
            else:
                x, beside = self.beside_down(r, self.enc[f"{r}_down"](x, emb), beside)
            seen.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{r}_block{i}"](x, emb)
                seen.append(x)
        return seen

    def beside_down(self, r: str, x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """x with what is kept beside the way down, and that."""
        return x, beside

    def up(self, seen: list[Tensor], emb: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features at the top again, and what was kept beside the way up."""
        x, beside = seen[-1], None
        for r in reversed(self.levels):
            if r == self.levels[-1]:
                x = self.dec[f"{r}_in1"](self.dec[f"{r}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{r}_up"](x, emb)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{r}_block{i}"](torch.cat((x, seen.pop()), dim=1), emb)
            beside = self.beside_up(r, x, beside)
        return x, beside

    def beside_up(self, r: str, x: Tensor, beside: Tensor | None) -> Tensor | None:
        """What is kept beside the way up, one level on."""
        return None
