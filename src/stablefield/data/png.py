"""PNG files: the encoder of everything that this package writes as PNG, without a graphics library.

Every row is stored as its difference from the row above (filter 2, "up") and compressed by zlib, by default at level 6.
"""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # number of channels -> grey, RGB


def encode_png(pixels: UInt8[np.ndarray, "H W C"], text: Mapping[str, str] | None = None, *, level: int = 6) -> bytes:
    """An image as the content of a PNG file.

    Args:
        pixels: the image, with one or three channels.
        text: texts to store in the file (tEXt chunks, Latin-1), by keyword.
        level: level of the compression, from 0 (none, quick) to 9.

    Raises:
        ValueError: the image has another number of channels.
    """
    height, width, channels = pixels.shape
    if channels not in _COLOUR_TYPES:
        raise ValueError(f"a PNG file holds images of one or three channels, not {pixels.shape}")
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2
    flat = pixels.reshape(height, -1)
    rows[:1, 1:] = flat[:1]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    texts = (_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in (text or {}).items())
    data = _chunk(b"IDAT", zlib.compress(rows.data, level))
    return b"".join((_SIGNATURE, _chunk(b"IHDR", header), *texts, data, _chunk(b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
