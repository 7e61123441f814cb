"""Decoding of image files to bytes (C, H, W), with cropping and resizing.

    grey, 1 bit         one channel
    RGB, CMYK, palette  three channels
    16 bits             the high byte (257 k and 256 k become k)
    transparency        composited on a background, white by default; or dropped on request: the stored colours are kept
    orientation         applied as the camera noted it (EXIF)
    several frames      refused
    32 bits, floating   refused: such data belong in array files

Pillow decodes without holding Python's lock, so that several images are decoded at once, one per core.
"""

import io
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from stablefield.data.limits import MAX_PIXELS
from stablefield.files import printable

if TYPE_CHECKING:  # Pillow is imported when the first image is decoded
    from PIL import Image

# formats that Pillow decodes by itself, and their suffixes; EPS, which runs another program, is not among them
_FORMATS = {
    "PNG": ".png .apng",
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "MPO": ".mpo",
    "BMP": ".bmp",
    "DIB": ".dib",
    "GIF": ".gif",
    "WEBP": ".webp",
    "TIFF": ".tif .tiff",
    "PPM": ".ppm .pgm .pbm .pnm",
    "AVIF": ".avif .avifs",
    "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
    "TGA": ".tga .icb .vda .vst",
    "QOI": ".qoi",
    "PCX": ".pcx",
    "SGI": ".sgi .bw .rgb .rgba",
    "ICO": ".ico",
    "XBM": ".xbm",
    "XPM": ".xpm",
    "DDS": ".dds",
}
SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes.split())

Transform = Literal["center-crop", "center-crop-wide"]
Mode = Literal["rgb", "grey"]
Pixels = UInt8[np.ndarray, "C H W"]

# Pillow's names of pixel formats
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}
_ONE_LARGE_IMAGE = threading.Lock()  # large images are decoded one after the other, to bound the memory
_LARGE = 2**24
_SKIP = "--skip-unreadable (skip_unreadable=true) leaves such images out"


class ImageError(ValueError):
    """An image that cannot be used, and what the user can do.

    Args:
        reason: the name of the image and what is wrong with it.
        way_out: what the user can do.
    """

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}; {way_out}")
        self.reason, self.way_out = reason, way_out


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: bytes (C, H, W).
        remarks: what was done to it beyond decoding, or looks wrong, as keys of `images.REMARKS`.
    """

    pixels: Pixels
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to bytes of a given size and number of channels.

    Attributes:
        size: (width, height) of the result; by default the size of the image. Without a transform the image is
            stretched to it.
        transform: "center-crop" first crops to the largest central window with the proportions of `size`;
            "center-crop-wide" also pads the result with black bars above and below to a square.
        mode: "rgb" or "grey" converts to three channels or one; by default the image keeps its own.
        drop_alpha: discard transparency instead of compositing the image on the background.
        background: colour behind transparent images: a name, or "#rrggbb".
        window: (width, height) of a central window to crop to before everything else.

    Raises:
        ValueError: a transform without a size, "center-crop-wide" with a size higher than wide, or an unknown colour.
    """

    size: tuple[int, int] | None = None
    transform: Transform | None = None
    mode: Mode | None = None
    drop_alpha: bool = False
    background: str = "white"
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and self.size is None:
            raise ValueError(f"the transform {self.transform} requires a resolution, such as 64x64")
        if self.transform == "center-crop-wide" and self.size is not None and self.size[0] < self.size[1]:
            width, height = self.size
            raise ValueError(
                f"center-crop-wide requires a resolution that is wider than high, not {width}x{height}; use center-crop"
            )
        if not re.fullmatch(r"[a-zA-Z]+|#[0-9a-fA-F]{6}", self.background):
            raise ValueError(f"a background is the name of a colour or #rrggbb, such as white, not {self.background!r}")

    def __call__(self, image: "Image.Image", name: str) -> Decoded:
        """The pixels of an image.

        Args:
            image: the image.
            name: name of the image in errors.

        Raises:
            ImageError: the pixel format is not supported, or the image is smaller than the window.
        """
        from PIL import Image

        image, remarks = self._eight_bits(image, name)
        if self.mode is not None:
            image = image.convert({"rgb": "RGB", "grey": "L"}[self.mode])
        if self.window is not None:
            image = _crop(image, self.window, name)
        if self.size is not None and self.transform is not None:
            image = _crop(image, _largest_window(image.size, self.size), name)
        if self.size is not None and image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        pixels = np.array(image)
        pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return Decoded(_pad_to_square(pixels) if self.transform == "center-crop-wide" else pixels, remarks)

    def _eight_bits(self, image: "Image.Image", name: str) -> tuple["Image.Image", tuple[str, ...]]:
        """The image upright and in 8 bits, grey or RGB, and what was done to it."""
        from PIL import Image, ImageOps

        turned = _orientation(image) in range(2, 9)
        transposed, remarks = (ImageOps.exif_transpose(image), ("turned",)) if turned else (image, ())
        if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
            deep = np.asarray(transposed).astype(np.uint16)
            high = Image.fromarray((deep >> 8).astype(np.uint8))
            return high, (*remarks, "dark" if deep.max() < 2**13 else "16 bits")
        image = transposed
        if image.mode not in _GREY | _COLOUR:
            raise ImageError(
                f"{name} has pixels of the format {printable(image.mode)!r}, but images must be grey or RGB in 8 or 16 "
                "bits",
                "save other data as .npy",
            )
        grey = image.mode in _GREY
        if not image.has_transparency_data:
            mode = "L" if grey else "RGB"
            return image if image.mode == mode else image.convert(mode), remarks
        # Pillow warns when it converts a palette with transparency directly to RGB
        image = image if grey and image.mode == "LA" else image.convert("RGBA")
        if self.drop_alpha:
            return image.convert("L" if grey else "RGB"), remarks
        opaque = image.getchannel("A").getextrema()[0] == 255
        return self._composited(image, grey), remarks if opaque else (*remarks, "composited")

    def _composited(self, image: "Image.Image", grey: bool) -> "Image.Image":
        """A transparent image on the background; grey images stay grey where the background is grey."""
        from PIL import Image, ImageColor

        colour = ImageColor.getrgb(self.background)[:3]
        behind = Image.new("RGBA", image.size, (*colour, 255))
        mixed = Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
        return mixed.getchannel(0) if grey and len(set(colour)) == 1 else mixed


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from a string such as "64x48".

    Args:
        text: WIDTHxHEIGHT.

    Raises:
        ValueError: the string has another form, a number is zero, or the size is beyond the limit for images.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if not match:
        raise ValueError(f"a resolution has the form WIDTHxHEIGHT, such as 64x64, not {text!r}")
    width, height = int(match[1]), int(match[2])
    if width * height > MAX_PIXELS:
        raise ValueError(f"a resolution may have {MAX_PIXELS:,} pixels, not {width}x{height}")
    return width, height


def decode(content: bytes, name: str, preprocessing: Preprocessing) -> Decoded:
    """The pixels of an image file.

    Args:
        content: content of the file.
        name: name of the file in errors.
        preprocessing: cropping, resizing and conversion.

    Raises:
        ImageError: the file is damaged, not an image, too large, or of a kind that is not supported.
    """
    from PIL import Image, UnidentifiedImageError

    name = printable(name)
    Image.init()  # only some of the formats are known before
    try:
        image = Image.open(io.BytesIO(content), formats=[form for form in _FORMATS if form in Image.OPEN])
        width, height = image.size
        frames = image.format != "MPO" and getattr(image, "is_animated", False)
        if width * height <= MAX_PIXELS and not frames:
            with _ONE_LARGE_IMAGE if width * height > _LARGE else nullcontext():
                image.load()
                return preprocessing(image, name)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        frames = False
    except Exception as error:  # the decoders of damaged files fail in any way
        why = "its format is not known" if isinstance(error, UnidentifiedImageError) else printable(error)
        reason = f"{name} cannot be decoded; it is damaged or not an image: {why}"
        raise ImageError(reason, _SKIP) from None
    if frames:
        raise ImageError(f"{name} contains several frames", f"save the one to use as an image of its own, or {_SKIP}")
    raise ImageError(f"{name} has more pixels than the limit of 8192x8192", f"save it smaller, or {_SKIP}")


def _largest_window(size: tuple[int, int], proportions: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the largest window with the given proportions, to a pixel, that fits into an image."""
    (width, height), (w, h) = size, proportions
    if width * h > height * w:
        return max(1, round(height * w / h)), height
    return width, max(1, round(width * h / w))


def _crop(image: "Image.Image", window: tuple[int, int], name: str) -> "Image.Image":
    """Central window of an image."""
    (width, height), (w, h) = image.size, window
    if w > width or h > height:
        raise ImageError(f"{name} is {width}x{height}, too small for a crop of {w}x{h}", "choose a smaller crop")
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _pad_to_square(pixels: Pixels) -> UInt8[np.ndarray, "C W W"]:
    _, height, width = pixels.shape
    above = (width - height) // 2
    return np.pad(pixels, ((0, 0), (above, width - height - above), (0, 0)))


def _orientation(image: "Image.Image") -> int:
    """The orientation that the camera noted; 1 is upright."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # notes of cameras that are damaged in any way
        return 1
