"""Images, from wherever they come: decoded once, into a store in the cache."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped, UInt8

from stablefield.data.contents import Contents, Progress, silent, slices
from stablefield.data.decode import Mode, Picture, Rules, Transform, decode, parse_size
from stablefield.data.files import list_images, open_files
from stablefield.data.sources import Source
from stablefield.data.store import cached
from stablefield.reference import Pool

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Pictures(Source):
    """Images of any source, and what is done to each.

    Attributes:
        resolution: bring them to this size, as "64x64" (width first); without a transform they are stretched.
        transform: "center-crop" cuts the largest central window first; "center-crop-wide" also adds black bars above
            and below, until they are square.
        mode: "rgb" or "grey", whatever they were.
        drop_alpha: forget transparency, instead of refusing it.
        max_images: only the first so many, in the order of their names.
        labels: whether labels are wanted, if there are any.
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
        self.rules()

    def rules(self) -> Rules:
        """What is done to each image."""
        size = None if self.resolution is None else parse_size(self.resolution)
        return Rules(size, self.transform, self.mode, self.drop_alpha)

    def contents(self) -> Contents:
        """Names and labels now, pixels when asked.

        Raises:
            ValueError: naming the file that is missing, damaged, or unlike the others.
        """
        found = self._first(self._contents())
        return replace(found, values=self.values or found.values or "image")

    def load(self, progress: Progress = silent) -> Pool:
        """The images, mapped from the cache; decoded into it first if they are not there, or have changed.

        Raises:
            ValueError: naming the file that is missing, damaged, or unlike the others.
        """
        told = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("path", "holdout")
        }
        if self.values is None:
            del told["values"]
        recipe = json.dumps([type(self).__name__, told, self.fingerprint()], default=str)
        return cached(recipe, self.contents, source=repr(self), progress=progress)

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever what the source holds does."""

    @abstractmethod
    def _contents(self) -> Contents:
        """All of it, whatever `max_images` says: blocks are only read as far as they are wanted."""

    def _first(self, all_: Contents) -> Contents:
        count = min(self.max_images or all_.count, all_.count)
        if count == all_.count and self.labels:
            return all_
        labels = all_.labels[:count] if self.labels and all_.labels is not None else None
        classes = all_.classes if labels is not None else ()
        return replace(all_, count=count, blocks=lambda: _until(count, all_.blocks()), labels=labels, classes=classes)


@dataclass(frozen=True)
class Images(Pictures):
    """Images in a zip or a folder: in EDM's and StyleGAN's layout, or any, where the top folder is the class.

    Attributes:
        path: the zip or the folder; labels are in its `dataset.json`, or else in the names of its top folders.
    """

    path: Path

    def fingerprint(self) -> str:
        with open_files(self.path) as files:
            return files.fingerprint()

    def _contents(self) -> Contents:
        with open_files(self.path) as files:
            found = list_images(files, self.path, self.labels)
        return Contents(len(found.names), lambda: self._decoded(found.names), found.labels, found.classes)

    def _decoded(self, names: list[str]) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
        rules = self.rules()
        with open_files(self.path) as files:
            yield from alike((name, decode(files.read(name), f"{name} in {self.path}", rules)) for name in names)


@dataclass(frozen=True, kw_only=True)
class CelebA(Images):
    """CelebA's aligned faces: of each 178 x 218 image the central 140 x 140, brought to 64 x 64. No labels.

    Attributes:
        path: `img_align_celeba`, a folder that holds it, or the zip of it.
        crop: width and height of the window; "140x140" is the custom of the field.
    """

    crop: str = "140x140"
    resolution: str | None = "64x64"
    labels: bool = False

    def rules(self) -> Rules:
        return replace(super().rules(), window=parse_size(self.crop))


def alike(named: Iterator[tuple[str, Picture]]) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
    """Images one by one, as long as they are of one size and all grey or all in colour.

    Raises:
        ValueError: naming the first image and the one that differs.
    """
    first: tuple[str, Picture] | None = None
    for name, pixels in named:
        first = first or (name, pixels)
        if pixels.shape != first[1].shape:
            raise ValueError(_differ(*first, name, pixels))
        yield pixels[None]


def _differ(first: str, pixels: Picture, other: str, others: Picture) -> str:
    if pixels.shape[1:] == others.shape[1:]:
        way = "--mode rgb or --mode grey (mode = ...) makes them alike"
    else:
        way = "--resolution WIDTHxHEIGHT, maybe with --transform center-crop, makes them alike"
    return f"{first} is {size_of(pixels)}, but {other} is {size_of(others)}: {way}"


def size_of(pixels: Picture) -> str:
    """Width and height, and whether there is colour, in words."""
    channels, height, width = pixels.shape
    return f"{width}x{height} in {'grey' if channels == 1 else 'colour'}"


def from_array(array: UInt8[np.ndarray, "N C H W"], rules: Rules) -> Iterator[UInt8[np.ndarray, "n C H W"]]:
    """Images that are decoded already, by the same rules as files."""
    if rules == Rules(drop_alpha=rules.drop_alpha):
        yield from slices(array)
        return
    for number, pixels in enumerate(array):
        yield rules(picture(pixels), f"image {number}")[None]


def picture(pixels: Picture) -> "Image.Image":
    """An image that Pillow can work on."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _until(count: int, blocks: Iterator[Shaped[np.ndarray, "n *D"]]) -> Iterator[Shaped[np.ndarray, "m *D"]]:
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
