"""Conversion and inspection of data sets, as `stablefield data convert` and `stablefield data inspect` do them.

Beside stores, data are written for other programs: a ZIP file in the layout of EDM and StyleGAN, or an `.npz` archive.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from stablefield.data.contents import Contents, DataSummary, Progress, content_hash, range_question, silent
from stablefield.data.decode import SUFFIXES
from stablefield.data.images import in_order
from stablefield.data.notices import say
from stablefield.data.png import encode_png
from stablefield.data.sources import Source
from stablefield.data.store import Store, refuse_existing, write_store
from stablefield.files import atomic_path
from stablefield.pool import Pool

_OTHER_FORMATS = {".npy", ".h5", ".hdf5", ".tar", ".gz", ".tgz", ".pt", ".pth", ".pkl", ".parquet", ".safetensors"}
_OTHER_FORMATS |= set(SUFFIXES)
_ALTERNATIVE = "write a store (DEST without a suffix) or .npz instead"


@dataclass(frozen=True)
class Converted:
    """A data set that was written in another format.

    Attributes:
        path: the store, ZIP file or archive.
        count: number of data points.
        num_classes: number of classes; 0 for data without labels.
        notes: lines that say what was changed or passed over; they are logged too.
    """

    path: Path
    count: int
    num_classes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """A data set, and what is known about it.

    Attributes:
        pool: the data.
        summary: their mean, spread and range, and the number of data points of each class.
        classes: names of the classes, as far as they are known.
        hash: hash of the data and labels (see `content_hash`).
        verified: True for a store, whose data and labels were read and compared with its hash.
        question: a line about values that may be on another scale than intended; None if there is nothing to ask.
    """

    pool: Pool
    summary: DataSummary
    classes: tuple[str, ...]
    hash: str
    verified: bool
    question: str | None


def convert(source: Source, dest: Path, *, progress: Progress = silent) -> Converted:
    """Write a data set as a store, a ZIP file or an array archive. Notes about the data are logged.

    Args:
        source: the data.
        dest: a `.zip` file in EDM's layout, an `.npz` file, or the folder of a store.
        progress: called with (data points written, total).

    Raises:
        ValueError: the destination exists or has the suffix of another format, the data are damaged, or they do not
            fit the format.
        OSError: the destination cannot be written; nothing is left behind.
    """
    refuse_existing(dest)
    suffix = dest.suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise ValueError(f"{dest}: data are written to a .zip file, an .npz file or a folder, not to {suffix}")
    contents = source.contents()
    if suffix == ".zip":
        write_zip(dest, contents, progress=progress)
    elif suffix == ".npz":
        write_npz(dest, contents, progress=progress)
    else:
        write_store(dest, contents, source=repr(source), progress=progress)
    for note in contents.notes:
        say(note)
    num_classes = 0 if contents.labels is None else int(contents.labels.max()) + 1
    return Converted(dest, contents.count, num_classes, tuple(contents.notes))


def inspect(source: Source, *, progress: Progress = silent) -> Inspection:
    """Load a data set, read all of it, and summarize it. Nothing is written but the cache of decoded images.

    Args:
        source: the data.
        progress: called with (images decoded, total) while images are decoded.

    Raises:
        ValueError: the data are missing or damaged.
    """
    pool, verified = source.load(progress), isinstance(source, Store)
    summary = DataSummary.from_pool(pool)
    found = source.verify() if isinstance(source, Store) else content_hash(pool)
    return Inspection(pool, summary, source.contents().classes, found, verified, range_question(pool))


# ---- files for other programs: complete or absent, as stores are; equal data give equal bytes


def write_zip(path: Path, contents: Contents, *, progress: Progress = silent) -> None:
    """Write images as PNG files `00000/img00000000.png` ..., a thousand per folder, and `dataset.json` with the labels.

    Args:
        path: the ZIP file.
        contents: the images to write, block by block.
        progress: called with (images written, total).

    Raises:
        ValueError: the path exists already, or the data are not images in bytes with 256 levels and one or three
            channels.
    """
    if contents.num_levels != 256:
        raise ValueError(
            f"a ZIP file can only contain images with 256 levels, not {contents.num_levels}; {_ALTERNATIVE}"
        )
    names: list[str] = []
    with _new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        # they are not compressed, so that they are written and read quickly
        for content in in_order(partial(encode_png, level=0), _images(contents)):
            name = f"{len(names) // 1000:05d}/img{len(names):08d}.png"
            archive.writestr(zipfile.ZipInfo(name), content)
            names.append(name)
            progress(len(names), contents.count)
        archive.writestr(zipfile.ZipInfo("dataset.json"), _labels_json(names, contents))


def write_npz(path: Path, contents: Contents, *, progress: Progress = silent) -> None:
    """Write the arrays `data`, `num_levels` and `values`, and, if there are any, `labels` and the names of `classes`.

    Args:
        path: the `.npz` file.
        contents: the data to write, block by block.
        progress: called with (data points read, total).

    Raises:
        ValueError: the path exists already.
    """
    refuse_existing(path)
    arrays = {"data": contents.array(progress), "num_levels": np.array(contents.num_levels)}
    if contents.values is not None:
        arrays["values"] = np.array(contents.values)
    if contents.labels is not None:
        arrays["labels"] = contents.labels
    if contents.classes:
        arrays["classes"] = np.array(contents.classes)
    with _new_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy assumes that numpy's own flag may be among the names


def _images(contents: Contents) -> Iterator[UInt8[np.ndarray, "H W C"]]:
    """The images one by one, channels last, or an error if the data are not images in bytes."""
    for block in contents.blocks():
        if block.dtype != np.uint8 or block.ndim != 4 or block.shape[1] not in (1, 3):
            raise ValueError(
                f"a ZIP file can only contain images in bytes with 1 or 3 channels, not {block.dtype} "
                f"{block.shape[1:]}; {_ALTERNATIVE}"
            )
        if contents.values == "float":
            raise ValueError(
                f"a ZIP file can only contain images, not bytes {block.shape[1:]} with values=float; {_ALTERNATIVE}"
            )
        yield from np.ascontiguousarray(block.transpose(0, 2, 3, 1))


def _labels_json(names: list[str], contents: Contents) -> str:
    """The content of `dataset.json`."""
    if contents.labels is None:
        return json.dumps({"labels": None})
    labels = [[name, int(label)] for name, label in zip(names, contents.labels, strict=True)]
    # names of classes are an extension that other readers of this layout ignore
    return json.dumps({"labels": labels, **({"classes": list(contents.classes)} if contents.classes else {})})


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """New file that appears at its path when it is complete."""
    refuse_existing(path)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file
