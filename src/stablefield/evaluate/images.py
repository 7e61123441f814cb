"""Images as bytes, as PNG files, and as sheets of samples.

Plots are in `plots.py`, which needs matplotlib; training and sampling import this module only.
"""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from stablefield.files import atomic_path

__all__ = ["read_image", "save_image", "save_sheet", "to_bytes"]


def to_bytes(x: Float[Tensor, "*S"]) -> UInt8[Tensor, "*S"]:
    """Values in [-1, 1] as bytes 0 .. 255: x * 127.5 + 128, clipped and rounded down as EDM does.

    Args:
        x: the values, of any shape.
    """
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def save_image(path: Path | BinaryIO, x: Float[Tensor, "C H W"]) -> None:
    """Write one image as PNG.

    Args:
        path: the file, as a path or open for writing.
        x: the image in [-1, 1], with one or three channels.
    """
    pixels = to_bytes(x).movedim(0, -1).cpu().numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, "PNG")


def read_image(path: Path) -> Float[Tensor, "C H W"]:
    """Read one image, in [-1, 1].

    Args:
        path: the file.
    """
    pixels = np.asarray(Image.open(path)).astype(np.float32)
    x = torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).movedim(-1, 0)
    return x / 127.5 - 1


def save_sheet(path: Path, x: Float[Tensor, "n C H W"], *, columns: int | None = None, side: int = 48) -> None:
    """Write a sheet: many images in one file, row by row, separated by thin lines.

    Args:
        path: the file; its suffix decides the format.
        x: the images in [-1, 1], with one or three channels.
        columns: number of images in a row; by default the sheet is about as wide as it is high.
        side: side in pixels to which smaller images are enlarged, by a whole factor.
    """
    columns = columns or math.ceil(math.sqrt(len(x)))
    factor = max(1, round(side / max(x.shape[2:])))
    pixels = to_bytes(x).movedim(1, -1).cpu().numpy().repeat(factor, 1).repeat(factor, 2)
    tiles = np.full((math.ceil(len(x) / columns) * columns, *(n + 2 for n in pixels.shape[1:3]), x.shape[1]), 128)
    tiles[: len(x), 1:-1, 1:-1] = pixels
    _, height, width, channels = tiles.shape
    sheet = tiles.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(-1, columns * width, channels).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(temporary)
