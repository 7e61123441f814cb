"""Sources of images, which are decoded once into a store in the cache and mapped into memory from there."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped, UInt8
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, silent, slices
from stablefield.data.decode import Mode, Pixels, Preprocessing, Transform, decode, parse_size
from stablefield.data.files import list_images, open_files
from stablefield.data.sources import Source
from stablefield.data.store import cached_pool
from stablefield.pool import Pool

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CelebA", "ImageSource", "Images", "preprocess_array", "require_same_shape", "to_pil"]


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Base class of sources of images, which can be cropped, resized and converted.

    Attributes:
        resolution: size of the images, "WIDTHxHEIGHT" such as "64x64"; by default the one they have. Without a
            transform they are stretched to it.
        transform: "center-crop" first crops each image to the largest central window of these proportions;
            "center-crop-wide" also pads it with black bars above and below to a square.
        mode: "rgb" or "grey" converts the images to three channels or one; by default they keep their own.
        drop_alpha: discard transparency instead of refusing the images.
        max_images: number of images to use, the first ones in the order of the data; by default all.
        labels: False to ignore labels.
    """

    resolution: str | None = None
    transform: Transform | None = None
    mode: Mode | None = None
    drop_alpha: bool = False
    max_images: int | None = None
    labels: bool = True

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, not {self.max_images}")
        self.preprocessing()

    def preprocessing(self) -> Preprocessing:
        """Cropping, resizing and conversion of each image.

        Raises:
            ValueError: options that do not fit together.
        """
        size = None if self.resolution is None else parse_size(self.resolution)
        return Preprocessing(size, self.transform, self.mode, self.drop_alpha)

    @override
    def contents(self) -> Contents:
        contents = self._first(self._contents())
        return replace(contents, values=self.values or contents.values or "image")

    @override
    def load(self, progress: Progress = silent) -> Pool:
        options = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("path", "holdout")
        }
        if self.values is None:
            del options["values"]
        recipe = json.dumps([type(self).__name__, options, self.fingerprint()], default=str)
        return cached_pool(recipe, self.contents, source=repr(self), progress=progress)

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the data of the source change.

        Raises:
            ValueError: the source is missing or damaged.
        """

    @abstractmethod
    def _contents(self) -> Contents:
        """Every image, regardless of `max_images`; blocks are only read as far as they are needed."""

    def _first(self, contents: Contents) -> Contents:
        """The first `max_images` images, without labels if these are to be ignored."""
        count = min(self.max_images or contents.count, contents.count)
        if count == contents.count and self.labels:
            return contents
        labels = contents.labels[:count] if self.labels and contents.labels is not None else None
        classes = contents.classes if labels is not None else ()
        blocks = contents.blocks
        return replace(contents, count=count, blocks=lambda: _first(count, blocks()), labels=labels, classes=classes)


@dataclass(frozen=True)
class Images(ImageSource):
    """Images in a ZIP file or a folder, in the layout of EDM and StyleGAN or with a folder for each class.

    Attributes:
        path: the ZIP file or folder. Labels are read from its `dataset.json`, or else from the names of its top
            folders.
    """

    path: Path

    @override
    def fingerprint(self) -> str:
        with open_files(self.path) as files:
            return files.fingerprint()

    @override
    def _contents(self) -> Contents:
        with open_files(self.path) as files:
            images = list_images(files, self.path, self.labels)
        return Contents(len(images.names), lambda: self._decoded(images.names), images.labels, images.classes)

    def _decoded(self, names: list[str]) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
        preprocessing = self.preprocessing()
        with open_files(self.path) as files:
            yield from require_same_shape(
                (name, decode(files.read(name), f"{name} in {self.path}", preprocessing)) for name in names
            )


@dataclass(frozen=True, kw_only=True)
class CelebA(Images):
    """CelebA's aligned faces (178 x 218), cropped to the central 140 x 140 and resized to 64 x 64, without labels.

    Attributes:
        path: the folder `img_align_celeba`, a folder that contains it, or a ZIP file of it.
        crop: size of the central window, "WIDTHxHEIGHT"; 140x140 is common in the field.
        resolution: size of the images after cropping, "WIDTHxHEIGHT".
        labels: False, as the images have no labels.
    """

    crop: str = "140x140"
    resolution: str | None = "64x64"
    labels: bool = False

    @override
    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing(), window=parse_size(self.crop))


def require_same_shape(images: Iterable[tuple[str, Pixels]]) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
    """Images as blocks of one, all of the same size and number of channels.

    Args:
        images: (name, pixels) of each image.

    Raises:
        ValueError: an image differs from the first one; the message has the names of both.
    """
    first: tuple[str, Pixels] | None = None
    for name, pixels in images:
        first = first or (name, pixels)
        if pixels.shape != first[1].shape:
            raise ValueError(_difference(*first, name, pixels))
        yield pixels[None]


def _difference(first: str, pixels: Pixels, other: str, other_pixels: Pixels) -> str:
    if pixels.shape[1:] == other_pixels.shape[1:]:
        solution = "convert all images with --mode rgb or --mode grey (mode=...)"
    else:
        solution = "resize all images with --resolution WIDTHxHEIGHT, for example with --transform center-crop"
    return f"{first} is {_size_in_words(pixels)}, but {other} is {_size_in_words(other_pixels)}; {solution}"


def _size_in_words(pixels: Pixels) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} in {'grey' if channels == 1 else 'colour'}"


def preprocess_array(
    array: UInt8[np.ndarray, "N C H W"], preprocessing: Preprocessing
) -> Iterator[UInt8[np.ndarray, "n C H W"]]:
    """Decoded images in blocks, with the same preprocessing as image files.

    Args:
        array: the images.
        preprocessing: cropping, resizing and conversion.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if preprocessing == Preprocessing(drop_alpha=preprocessing.drop_alpha):
        yield from slices(array)
        return
    for number, pixels in enumerate(array):
        yield preprocessing(to_pil(pixels), f"image {number}")[None]


def to_pil(pixels: Pixels) -> "Image.Image":
    """A Pillow image of one or three channels.

    Args:
        pixels: (C, H, W).
    """
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _first(count: int, blocks: Iterator[Shaped[np.ndarray, "n *D"]]) -> Iterator[Shaped[np.ndarray, "m *D"]]:
    """The first `count` data points of all blocks."""
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
