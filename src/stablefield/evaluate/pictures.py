"""Pictures of samples: as bytes, as grids, as files."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def to_bytes(x: Float[Tensor, "*S"]) -> UInt8[Tensor, "*S"]:
    """[-1, 1] as 0 .. 255, cut off and rounded down as is the custom of the field."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def save_picture(path: Path | BinaryIO, x: Float[Tensor, "C H W"]) -> None:
    """One image as a PNG file."""
    pixels = to_bytes(x).movedim(0, -1).cpu().numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, "PNG")


def open_picture(path: Path) -> Float[Tensor, "C H W"]:
    """The image in a PNG file, in [-1, 1]."""
    pixels = np.asarray(Image.open(path)).astype(np.float32)
    x = torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).movedim(-1, 0)
    return x / 127.5 - 1


def save_grid(path: Path, x: Float[Tensor, "n C H W"], *, columns: int | None = None, side: int = 48) -> None:
    """Images in rows, a thin line between them, small ones enlarged to about `side` pixels, as a PNG file."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    factor = max(1, round(side / max(x.shape[2:])))
    pixels = to_bytes(x).movedim(1, -1).cpu().numpy().repeat(factor, 1).repeat(factor, 2)
    tiles = np.full((math.ceil(len(x) / columns) * columns, *(n + 2 for n in pixels.shape[1:3]), x.shape[1]), 128)
    tiles[: len(x), 1:-1, 1:-1] = pixels
    _, height, width, channels = tiles.shape
    sheet = tiles.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(-1, columns * width, channels).astype(np.uint8)
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)
