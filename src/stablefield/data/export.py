"""Export of data for other programs: a ZIP file in the layout of EDM and StyleGAN, or an `.npz` archive of arrays.

The files are complete or absent, as stores are, and equal data give equal bytes.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.images import in_order
from stablefield.data.png import encode_png
from stablefield.data.store import refuse_existing
from stablefield.files import atomic_path

_ALTERNATIVE = "write a store (DEST without a suffix) or .npz instead"


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
