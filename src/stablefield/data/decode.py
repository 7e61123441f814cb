"""From image files to bytes: which pixels become which numbers.

    grey, 1 bit         one channel
    RGB, CMYK, palette  three channels
    16 bits             the high byte (what is 257 k or 256 k becomes k)
    transparency        refused, unless it is dropped: the colours stay as they are stored
    several frames      refused
    32 bits, floating   refused: arrays hold such data as they are

Orientation flags of cameras are not obeyed, as is the custom of the field.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:  # it takes long to import, and not everybody has pictures
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
GREY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}

Transform = Literal["center-crop", "center-crop-wide"]
Mode = Literal["rgb", "grey"]
Picture = UInt8[np.ndarray, "C H W"]


@dataclass(frozen=True)
class Rules:
    """What is done to each image.

    Attributes:
        size: width and height to bring it to; without a transform it is stretched to them.
        transform: "center-crop" cuts the largest central window of these proportions first; "center-crop-wide" does
            so too, and adds black bars above and below until the image is as high as wide.
        mode: "rgb" or "grey", whatever it was.
        drop_alpha: forget its transparency, instead of refusing it.
        window: width and height of a central window to cut before anything else.

    Raises:
        ValueError: a transform without a size, or bars above and below what is higher than wide.
    """

    size: tuple[int, int] | None = None
    transform: Transform | None = None
    mode: Mode | None = None
    drop_alpha: bool = False
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and self.size is None:
            raise ValueError(f"the transform {self.transform} needs a resolution to bring images to, as 64x64")
        if self.transform == "center-crop-wide" and self.size is not None and self.size[0] < self.size[1]:
            width, height = self.size
            raise ValueError(f"center-crop-wide is for images wider than high, not {width}x{height}; try center-crop")

    def __call__(self, image: "Image.Image", name: str) -> Picture:
        """The pixels of an image.

        Raises:
            ValueError: naming the image: pixels of a kind that is refused, or too few of them.
        """
        from PIL import Image

        image = _plain(image, name, self.drop_alpha)
        if self.mode is not None:
            image = image.convert({"rgb": "RGB", "grey": "L"}[self.mode])
        if self.window is not None:
            image = _cut(image, self.window, name)
        if self.size is not None and self.transform is not None:
            image = _cut(image, largest_window(image.size, self.size), name)
        if self.size is not None and image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        pixels = np.array(image)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return _with_bars(pixels) if self.transform == "center-crop-wide" else pixels


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "64x48".

    Raises:
        ValueError: another form, or zero.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"a resolution is WIDTHxHEIGHT, as 64x64, not {text!r}")
    return int(found[1]), int(found[2])


def decode(content: bytes, name: str, rules: Rules) -> Picture:
    """The pixels of an image file.

    Raises:
        ValueError: naming the file: it is damaged, no image, or of a kind that is refused.
    """
    from PIL import Image

    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        image = Image.open(io.BytesIO(content))
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
    except broken as error:
        raise ValueError(f"{name} cannot be decoded, it is damaged or no image: {error}") from None
    if frames > 1:
        raise ValueError(f"{name} holds {frames} frames, and one is expected: save the one that is meant")
    return rules(image, name)


def largest_window(size: tuple[int, int], proportions: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the largest window of these proportions (to a pixel) that fits into an image of this size."""
    (width, height), (w, h) = size, proportions
    if width * h > height * w:
        return max(1, round(height * w / h)), height
    return width, max(1, round(width * h / w))


def _cut(image: "Image.Image", window: tuple[int, int], name: str) -> "Image.Image":
    (width, height), (w, h) = image.size, window
    if w > width or h > height:
        raise ValueError(f"{name} is {width}x{height}, too small to cut {w}x{h} out of it")
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _with_bars(pixels: Picture) -> UInt8[np.ndarray, "C W W"]:
    _, height, width = pixels.shape
    above = (width - height) // 2
    return np.pad(pixels, ((0, 0), (above, width - height - above), (0, 0)))


def _plain(image: "Image.Image", name: str, drop_alpha: bool) -> "Image.Image":
    """The image in 8 bits, grey or RGB."""
    if image.has_transparency_data and not drop_alpha:
        raise ValueError(
            f"{name} has transparency ({image.mode}): --drop-alpha (drop_alpha = true) keeps the colours without it"
        )
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return _high_byte(image)
    if image.mode in GREY:
        return image.convert("L")
    if image.mode in COLOUR:
        # palettes with transparency lose it without a warning only on the way over RGBA
        return (image.convert("RGBA") if image.has_transparency_data else image).convert("RGB")
    raise ValueError(
        f"{name} has pixels of the kind {image.mode!r}; images are grey or RGB in 8 or 16 bits, other data fit in .npy"
    )


def _high_byte(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
