"""Images as bytes, as PNG files, and as sheets of samples.

Plots are in `evaluate.plots`, which needs matplotlib; training and sampling import this module only.
"""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from stablefield.data.png import encode_png
from stablefield.files import atomic_path


def to_bytes(x: Float[Tensor, "*S"]) -> UInt8[Tensor, "*S"]:
    """Values in [-1, 1] as bytes 0 .. 255: x * 127.5 + 128, clipped and rounded down as EDM does.

    Args:
        x: the values, of any shape.
    """
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_pixels(x: Float[Tensor, "n C H W"]) -> UInt8[np.ndarray, "n H W C"]:
    """Images in [-1, 1] as arrays of bytes, channels last.

    Args:
        x: the images.
    """
    return np.ascontiguousarray(to_bytes(x).movedim(1, -1).cpu().numpy())


def save_sheet(path: Path, x: Float[Tensor, "n C H W"], *, columns: int | None = None, side: int = 48) -> None:
    """Write a sheet: many images in one PNG file, row by row, separated by thin lines.

    Args:
        path: the file; it is replaced when the new one is complete.
        x: the images in [-1, 1], with one or three channels.
        columns: number of images in a row; by default the sheet is about as wide as it is high.
        side: side in pixels to which smaller images are enlarged, by a whole factor.

    Raises:
        OSError: the file cannot be written.
    """
    columns = columns or math.ceil(math.sqrt(len(x)))
    factor = max(1, round(side / max(x.shape[2:])))
    pixels = to_pixels(x).repeat(factor, 1).repeat(factor, 2)
    count, height, width, channels = pixels.shape
    tiles = np.full((math.ceil(count / columns) * columns, height + 2, width + 2, channels), 128, np.uint8)
    tiles[:count, 1:-1, 1:-1] = pixels
    sheet = tiles.reshape(-1, columns, height + 2, width + 2, channels).swapaxes(1, 2)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(sheet.reshape(-1, columns * (width + 2), channels)))
