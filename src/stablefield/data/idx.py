"""IDX files: MNIST, Fashion-MNIST, EMNIST and KMNIST as they are published.

A file consists of two zero bytes, a byte for the type, a byte for the number of dimensions, the size of each dimension
as a big-endian 32-bit integer, and the values (LeCun, Cortes & Burges, the web page of the MNIST database).
"""

import gzip
import math
import re
import struct
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from jaxtyping import Shaped
from typing_extensions import override

from stablefield.data.contents import Contents
from stablefield.data.decode import Preprocessing
from stablefield.data.images import ImageSource, preprocess_array
from stablefield.data.labels import class_labels
from stablefield.data.limits import read_bytes, refuse_unpacked
from stablefield.files import file_hash, printable
from stablefield.pool import Pool

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NAME = re.compile(r"^(.*)images([-.])idx\d(.*?)(\.gz)?$")


@dataclass(frozen=True)
class IDX(ImageSource):
    """Images in an IDX file, with the labels in the file beside it.

    Attributes:
        path: the file of images, optionally compressed (`train-images-idx3-ubyte.gz`), or a folder that contains one of
            this name. Labels are read from `train-labels-idx1-ubyte`, compressed or not, if it exists.
    """

    path: Path

    @override
    def fingerprint(self) -> str:
        images = _find_images(self.path)
        return " ".join(file_hash(file) for file in (images, _find_labels(images)) if file)

    @override
    def _contents(self) -> Contents:
        file = _find_images(self.path)
        images, labels_file = _read_idx(file), _find_labels(file)
        images = images[:, None] if images.ndim == 3 else images  # one channel
        labels = class_labels(_read_idx(labels_file), labels_file) if labels_file and self.labels else None
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(
                f"{printable(file)} contains {len(images)} images, but {printable(labels_file)} contains labels of "
                f"shape {labels.shape}"
            )
        if images.dtype == np.uint8 and images.ndim == 4:
            return Contents(len(images), lambda: preprocess_array(images, self.preprocessing()), labels)
        if images.dtype.kind != "f" and images.dtype != np.uint8:
            raise ValueError(f"{file} contains {images.dtype}; data must be uint8 or floating")
        if self.preprocessing() != Preprocessing():
            raise ValueError(
                f"{file} contains {images.dtype} {images.shape}, but only images in bytes can be cropped, resized or "
                "converted"
            )
        pool_labels = None if labels is None else torch.from_numpy(labels)
        try:
            return Contents.from_pool(Pool(torch.from_numpy(images), pool_labels, values=self.values))
        except ValueError as error:
            raise ValueError(f"{printable(file)}: {printable(error)}") from None


def _find_images(path: Path) -> Path:
    """The file of images: the path itself, or the training images in a folder."""
    files = sorted(path.glob("*train-images?idx*")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"there is no IDX file of images in {path}" if path.is_dir() else f"there is no file {path}")
    return files[0]


def _find_labels(images: Path) -> Path | None:
    """The file of labels beside a file of images, such as `train-labels-idx1-ubyte` for `train-images-idx3-ubyte`."""
    match = _NAME.match(images.name)
    if not match:
        return None
    plain = images.with_name(f"{match[1]}labels{match[2]}idx1{match[3]}")
    return next((file for file in (plain, plain.with_name(plain.name + ".gz")) if file.is_file()), None)


def _read_idx(path: Path) -> Shaped[np.ndarray, "N ..."]:
    """The array in an IDX file, as uint8 for unsigned bytes, float32 for floating values and int64 for the rest."""
    where = printable(path)
    try:
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(path.open("rb"))
            packed = path.stat().st_size
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if compressed:
                file = cast("BinaryIO", stack.enter_context(gzip.GzipFile(fileobj=file)))
            dtype, shape = _header(file, where)
            size, header = math.prod(shape) * dtype.itemsize, 4 + 4 * len(shape)
            if compressed:
                refuse_unpacked(where, packed, size, "unpack it with gunzip")
            elif packed != header + size:
                raise ValueError(f"{where} is damaged: {shape} needs {header + size:,} bytes, the file has {packed:,}")
            content = read_bytes(file.read, size)
            if len(content) < size or file.read(1):
                found = f"{len(content):,}" if len(content) < size else "more"
                raise ValueError(
                    f"{where} is damaged: its header asks for {size:,} bytes after it, and the file has {found}"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where} cannot be decompressed; it is damaged or cut short: {printable(error)}") from None
    array = content.view(dtype).reshape(shape)
    return array.astype({"f": np.float32, "u": np.uint8}.get(dtype.kind, np.int64), copy=False)


def _header(file: BinaryIO, where: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the array in a file."""
    begin = file.read(4)
    if len(begin) < 4 or begin[:2] != b"\0\0" or begin[2] not in _TYPES or not 1 <= begin[3] <= 8:
        raise ValueError(f"{where} is not an IDX file: it begins with the bytes {begin.hex(' ')}")
    sizes = file.read(4 * begin[3])
    if len(sizes) < 4 * begin[3]:
        raise ValueError(
            f"{where} is cut short: its header needs {4 + 4 * begin[3]} bytes, the file has {4 + len(sizes)}"
        )
    shape = struct.unpack(f">{begin[3]}I", sizes)
    if 0 in shape:
        raise ValueError(f"{where} contains no data: its shape is {shape}")
    return np.dtype(_TYPES[begin[2]]), shape
