"""Decoding of image files to bytes (C, H, W), with cropping and resizing.

    grey, 1 bit         one channel
    RGB, CMYK, palette  three channels
    16 bits             the high byte (257 k and 256 k become k)
    transparency        refused, or dropped on request: the stored colours are kept
    several frames      refused
    32 bits, floating   refused: such data belong in array files

The orientation flags of cameras are ignored, as is common in the field.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:  # Pillow is imported when the first image is decoded
    from PIL import Image

__all__ = ["SUFFIXES", "Mode", "Pixels", "Preprocessing", "Transform", "decode", "largest_window", "parse_size"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")

Transform = Literal["center-crop", "center-crop-wide"]
Mode = Literal["rgb", "grey"]
Pixels = UInt8[np.ndarray, "C H W"]

# Pillow's names of pixel formats
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to bytes of a given size and number of channels.

    Attributes:
        size: (width, height) of the result; by default the size of the image. Without a transform the image is
            stretched to it.
        transform: "center-crop" first crops to the largest central window with the proportions of `size`;
            "center-crop-wide" also pads the result with black bars above and below to a square.
        mode: "rgb" or "grey" converts to three channels or one; by default the image keeps its own.
        drop_alpha: discard transparency instead of refusing the image.
        window: (width, height) of a central window to crop to before everything else.

    Raises:
        ValueError: a transform without a size, or "center-crop-wide" with a size higher than wide.
    """

    size: tuple[int, int] | None = None
    transform: Transform | None = None
    mode: Mode | None = None
    drop_alpha: bool = False
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and self.size is None:
            raise ValueError(f"the transform {self.transform} requires a resolution, such as 64x64")
        if self.transform == "center-crop-wide" and self.size is not None and self.size[0] < self.size[1]:
            width, height = self.size
            raise ValueError(
                f"center-crop-wide requires a resolution that is wider than high, not {width}x{height}; use center-crop"
            )

    def __call__(self, image: "Image.Image", name: str) -> Pixels:
        """The pixels of an image.

        Args:
            image: the image.
            name: name of the image in errors.

        Raises:
            ValueError: the pixel format is not supported, or the image is smaller than the window.
        """
        from PIL import Image

        image = _eight_bits(image, name, self.drop_alpha)
        if self.mode is not None:
            image = image.convert({"rgb": "RGB", "grey": "L"}[self.mode])
        if self.window is not None:
            image = _crop(image, self.window, name)
        if self.size is not None and self.transform is not None:
            image = _crop(image, largest_window(image.size, self.size), name)
        if self.size is not None and image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        pixels = np.array(image)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return _pad_to_square(pixels) if self.transform == "center-crop-wide" else pixels


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from a string such as "64x48".

    Args:
        text: WIDTHxHEIGHT.

    Raises:
        ValueError: the string has another form, or a number is zero.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ValueError(f"a resolution has the form WIDTHxHEIGHT, such as 64x64, not {text!r}")
    return int(match[1]), int(match[2])


def decode(content: bytes, name: str, preprocessing: Preprocessing) -> Pixels:
    """The pixels of an image file.

    Args:
        content: content of the file.
        name: name of the file in errors.
        preprocessing: cropping, resizing and conversion.

    Raises:
        ValueError: the file is damaged, not an image, or of a kind that is not supported.
    """
    from PIL import Image

    decoding_errors = (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )
    try:
        image = Image.open(io.BytesIO(content))
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
    except decoding_errors as error:
        raise ValueError(f"{name} cannot be decoded; it is damaged or not an image: {error}") from None
    if frames > 1:
        raise ValueError(f"{name} contains {frames} frames; save the one to use as an image of its own")
    return preprocessing(image, name)


def largest_window(size: tuple[int, int], proportions: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the largest window with the given proportions, to a pixel, that fits into an image.

    Args:
        size: (width, height) of the image.
        proportions: (width, height) up to a common factor.
    """
    (width, height), (w, h) = size, proportions
    if width * h > height * w:
        return max(1, round(height * w / h)), height
    return width, max(1, round(width * h / w))


def _crop(image: "Image.Image", window: tuple[int, int], name: str) -> "Image.Image":
    """Central window of an image."""
    (width, height), (w, h) = image.size, window
    if w > width or h > height:
        raise ValueError(f"{name} is {width}x{height}, too small for a crop of {w}x{h}")
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _pad_to_square(pixels: Pixels) -> UInt8[np.ndarray, "C W W"]:
    _, height, width = pixels.shape
    above = (width - height) // 2
    return np.pad(pixels, ((0, 0), (above, width - height - above), (0, 0)))


def _eight_bits(image: "Image.Image", name: str, drop_alpha: bool) -> "Image.Image":
    """The image in 8 bits, grey or RGB."""
    if image.has_transparency_data and not drop_alpha:
        raise ValueError(
            f"{name} has transparency ({image.mode}); --drop-alpha (drop_alpha=true) keeps the colours without it"
        )
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return _high_byte(image)
    if image.mode in _GREY:
        return image.convert("L")
    if image.mode in _COLOUR:
        # Pillow warns when it converts a palette with transparency directly to RGB
        return (image.convert("RGBA") if image.has_transparency_data else image).convert("RGB")
    raise ValueError(
        f"{name} has pixels of the format {image.mode!r}, but images must be grey or RGB in 8 or 16 bits; save other "
        "data as .npy"
    )


def _high_byte(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
