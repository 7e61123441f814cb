"""Data for others: as a zip in EDM's and StyleGAN's layout, or as an archive of arrays.

What is written appears whole or not at all, as a store does; the same data give the same bytes.
"""

import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.decode import Picture
from stablefield.data.images import picture
from stablefield.data.store import free

ANYTHING = "a store (DEST without a suffix) or .npz holds any data"


def write_zip(path: Path, contents: Contents, *, progress: Progress = silent) -> None:
    """Images as PNG files `00000/img00000000.png` and on, a thousand a folder, and `dataset.json` with their labels.

    Raises:
        ValueError: the place is taken, or these are no images in bytes with 256 levels and one or three channels.
    """
    if contents.levels != 256:
        raise ValueError(f"a zip holds images of 256 levels, these have {contents.levels}; a store or .npz keeps them")
    names: list[str] = []
    with _whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        for block in contents.blocks():
            if block.dtype == np.uint8 and contents.values == "float":
                raise ValueError(
                    f"a zip holds images, and bytes {block.shape[1:]} with values=float are none; {ANYTHING}"
                )
            for pixels in block:
                name = f"{len(names) // 1000:05d}/img{len(names):08d}.png"
                archive.writestr(zipfile.ZipInfo(name), png(pixels))
                names.append(name)
            progress(len(names), contents.count)
        archive.writestr(zipfile.ZipInfo("dataset.json"), _labels(names, contents))


def write_npz(path: Path, contents: Contents, *, progress: Progress = silent) -> None:
    """Arrays `data`, `levels` and `values`, and `labels` and names of `classes` if there are any.

    Raises:
        ValueError: the place is taken.
    """
    free(path)
    blocks, done = [], 0
    for block in contents.blocks():
        blocks.append(block)
        done += len(block)
        progress(done, contents.count)
    arrays = {"data": np.concatenate(blocks), "levels": np.array(contents.levels)}
    if contents.values is not None:
        arrays["values"] = np.array(contents.values)
    if contents.labels is not None:
        arrays["labels"] = contents.labels
    if contents.classes:
        arrays["classes"] = np.array(contents.classes)
    with _whole(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own flag might be among the names, for all mypy knows


def png(pixels: Picture) -> bytes:
    """An image as a PNG file.

    Raises:
        ValueError: no image in bytes with one or three channels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise ValueError(
            f"a zip holds images in bytes with 1 or 3 channels, not {pixels.dtype} {pixels.shape}; {ANYTHING}"
        )
    file = io.BytesIO()
    picture(pixels).save(file, "PNG")
    return file.getvalue()


def _labels(names: list[str], contents: Contents) -> str:
    if contents.labels is None:
        return json.dumps({"labels": None})
    labels = [[name, int(label)] for name, label in zip(names, contents.labels, strict=True)]
    # other readers of this layout look at the labels only
    return json.dumps({"labels": labels, **({"classes": list(contents.classes)} if contents.classes else {})})


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is finished, and not before."""
    free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
