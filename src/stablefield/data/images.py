"""Sources of images, which are decoded once into a store in the cache and mapped into memory from there."""

import json
import os
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.decode import Decoded, ImageError, Mode, Pixels, Preprocessing, Transform, decode, parse_size
from stablefield.data.files import open_files
from stablefield.data.labels import number_classes
from stablefield.data.notices import summarize
from stablefield.data.sources import Source
from stablefield.data.store import cached_pool
from stablefield.files import printable
from stablefield.pool import Pool

S = TypeVar("S")
T = TypeVar("T")
Read = Callable[[int], bytes]

_DECODING = 2  # version of the decoding; images in the cache from an older one are decoded again


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Base class of sources of images, which can be cropped, resized and converted.

    Attributes:
        resolution: size of the images, "WIDTHxHEIGHT" such as "64x64"; by default the one they have. Without a
            transform they are stretched to it.
        transform: "center-crop" first crops each image to the largest central window of these proportions;
            "center-crop-wide" also pads it with black bars above and below to a square.
        mode: "rgb" or "grey" converts the images to three channels or one; by default they keep their own.
        background: colour behind transparent images: a name such as "white", or "#rrggbb".
        drop_alpha: discard transparency and keep the stored colours, instead of compositing on the background.
        skip_unreadable: leave out images that cannot be decoded, instead of refusing the data set.
        max_images: number of images to use, the first ones in the order of the data; by default all.
        labels: False to ignore labels.
    """

    resolution: str | None = None
    transform: Transform | None = None
    mode: Mode | None = None
    background: str = "white"
    drop_alpha: bool = False
    skip_unreadable: bool = False
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
        return Preprocessing(size, self.transform, self.mode, self.drop_alpha, self.background)

    @override
    def contents(self) -> Contents:
        contents = self._first(self._contents())
        if contents.labels is not None:
            labels, classes, note = number_classes(contents.labels, contents.classes, self.where)
            contents = replace(contents, labels=labels, classes=classes)
            contents.notes.extend([note] if note else [])
        return replace(contents, values=self.values or contents.values or "image")

    @override
    def load(self, progress: Progress = silent) -> Pool:
        options = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("path", "holdout")
        }
        if self.values is None:
            del options["values"]
        recipe = json.dumps([type(self).__name__, options, _DECODING, self.fingerprint()], default=str)
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
        if not self.labels:
            contents = replace(contents, labels=None, classes=())
        count, blocks, labels = self.max_images, contents.blocks, contents.labels
        if count is None or count >= contents.count:
            return contents
        labels = None if labels is None else labels[:count]
        return replace(contents, count=count, blocks=lambda: _first(count, blocks()), labels=labels)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that are read by their number, with their labels.

    Attributes:
        names: name of each image.
        open: context that opens the files, with a function from the number of an image to the content of its file. The
            function is called from several threads, and raises ValueError if the file cannot be read.
        preprocessing: cropping, resizing and conversion of each image.
        where: where the files are, for notes and errors.
        labels: class of each image; None for images without labels.
        classes: names of the classes, if they are known.
        notes: lines that say how the files were found.
    """

    names: Sequence[str]
    open: Callable[[], AbstractContextManager[Read]]
    preprocessing: Preprocessing
    where: str
    labels: Int64[np.ndarray, "N"] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def select(self, most: int | None, skip_unreadable: bool) -> Contents:
        """The first images, decoded; errors of all of them are reported together.

        Args:
            most: number of images; None for all.
            skip_unreadable: True to leave out those that cannot be decoded. Each image is decoded once more for this.

        Raises:
            ValueError: no image is readable.
        """
        if skip_unreadable:
            return self._readable(most)._contents()
        labels = None if self.labels is None else self.labels[:most]
        return replace(self, names=self.names[:most], labels=labels)._contents()

    def _contents(self) -> Contents:
        notes = list(self.notes)
        return Contents(len(self.names), lambda: self._blocks(notes), self.labels, self.classes, notes=notes)

    def _readable(self, most: int | None) -> "ImageFiles":
        """The first images that can be decoded."""
        kept: list[int] = []
        skipped: list[ImageError] = []
        for number, decoded in enumerate(self._decoded()):
            if isinstance(decoded, ImageError):
                skipped.append(decoded)
            else:
                kept.append(number)
            if len(kept) == most:
                break
        if not kept:
            raise ValueError(_report(skipped, len(skipped), self.where))
        note = f"{self.where}: left out {len(skipped):,} images that cannot be read"
        notes = (summarize(note, [error.reason for error in skipped], 3),) if skipped else ()
        labels = None if self.labels is None else self.labels[kept]
        names = [self.names[number] for number in kept]

        @contextmanager
        def opened() -> Iterator[Read]:
            with self.open() as read:
                yield lambda number: read(kept[number])

        return replace(self, names=names, open=opened, labels=labels, notes=(*self.notes, *notes))

    def _blocks(self, notes: list[str]) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
        """The images as blocks of one, all of the same size and number of channels."""
        problems: list[ImageError] = []
        remarks: Counter[str] = Counter()
        first: tuple[str, Pixels] | None = None
        for name, decoded in zip(self.names, self._decoded(), strict=True):
            if isinstance(decoded, ImageError):
                problems.append(decoded)
                continue
            pixels = decoded.pixels
            first = first or (name, pixels)
            if pixels.shape != first[1].shape:
                problems.append(_difference(*first, name, pixels))
            elif not problems:
                remarks.update(decoded.remarks)
                yield pixels[None]
        if problems:
            raise ValueError(_report(problems, len(self.names), self.where))
        notes.extend(note for note in _notes(remarks, self) if note not in notes)

    def _decoded(self) -> Iterator[Decoded | ImageError]:
        with self.open() as read:
            yield from in_order(partial(self._decode, read), range(len(self.names)))

    def _decode(self, read: Read, number: int) -> Decoded | ImageError:
        try:
            return decode(read(number), f"{self.names[number]} in {self.where}", self.preprocessing)
        except ImageError as error:
            return error
        except ValueError as error:  # from `read`
            return ImageError(str(error), "--skip-unreadable (skip_unreadable=true) leaves such images out")


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
            names, labels, classes = files.images(self.labels)

        @contextmanager
        def opened() -> Iterator[Read]:
            with open_files(self.path) as files:
                yield lambda number: files.read(names[number])

        found = ImageFiles(names, opened, self.preprocessing(), self.where, labels, classes, files.notes)
        return found.select(self.max_images, self.skip_unreadable)


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


def in_order(function: Callable[[S], T], items: Iterable[S], together: int = 4) -> Iterator[T]:
    """Results of a function in the order of its arguments, computed by a thread per core.

    Args:
        function: a function that releases Python's lock for most of its time.
        items: its arguments.
        together: number of arguments that a thread is given at once, to be woken less often. At most three times as
            many results per thread are held.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, rest = cores or 1, iter(items)
    if threads == 1:
        yield from map(function, rest)
        return

    def several(some: list[S]) -> list[T]:
        return [function(item) for item in some]

    with ThreadPoolExecutor(threads) as executor:
        futures: deque[Future[list[T]]] = deque()
        try:
            while some := list(islice(rest, together)):
                futures.append(executor.submit(several, some))
                if len(futures) > 2 * threads:
                    yield from futures.popleft().result()
            while futures:
                yield from futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


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
    neutral = Preprocessing(drop_alpha=preprocessing.drop_alpha, background=preprocessing.background)
    if preprocessing == neutral:
        yield from (array[start : start + 256] for start in range(0, len(array), 256))
        return
    from PIL import Image

    for number, pixels in enumerate(array):
        channels_last = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        yield preprocessing(Image.fromarray(channels_last), f"image {number}").pixels[None]


def _report(problems: list[ImageError], count: int, where: str, most: int = 20) -> str:
    """Message with the first problems of a data set, their number, and what the user can do."""
    if len(problems) == 1:
        return str(problems[0])
    ways_out = "; ".join(dict.fromkeys(problem.way_out for problem in problems))
    lines = "\n".join(f"  {problem.reason}" for problem in problems[:most])
    more = f"\n  and {len(problems) - most:,} more" if len(problems) > most else ""
    return f"{len(problems):,} of the {count:,} images in {where} cannot be used:\n{lines}{more}\n{ways_out}"


def _difference(first: str, pixels: Pixels, other: str, other_pixels: Pixels) -> ImageError:
    if pixels.shape[1:] == other_pixels.shape[1:]:
        solution = "convert all images with --mode rgb or --mode grey (mode=...)"
    else:
        solution = "resize all images with --resolution WIDTHxHEIGHT, for example with --transform center-crop"
    sizes = f"{printable(first)} is {_size_in_words(pixels)}, but {printable(other)} is {_size_in_words(other_pixels)}"
    return ImageError(sizes, solution)


def _size_in_words(pixels: Pixels) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} in {'grey' if channels == 1 else 'colour'}"


def _notes(remarks: Counter[str], images: ImageFiles) -> Iterator[str]:
    """Lines that say what was done to images beyond decoding, or looks wrong."""
    where, background = images.where, images.preprocessing.background
    if remarks["composited"]:
        yield (
            f"{where}: {remarks['composited']:,} images with transparency were composited on {background} "
            "(--background, data.background)"
        )
    if remarks["turned"]:
        yield f"{where}: {remarks['turned']:,} images were turned upright by the orientation in their EXIF data"
    if remarks["dark"] and not remarks["16 bits"]:
        yield (
            f"{where}: {remarks['dark']:,} images of 16 bits use at most 13 of them and become nearly black, because "
            "the high byte is kept; scale them to the full range of 16 bits, or save them in 8 bits"
        )


def _first(count: int, blocks: Iterator[Shaped[np.ndarray, "n *D"]]) -> Iterator[Shaped[np.ndarray, "m *D"]]:
    """The first `count` data points of all blocks."""
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return
