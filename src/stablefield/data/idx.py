"""IDX files: MNIST, Fashion-MNIST, EMNIST and KMNIST as they are published.

A file is two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a big-endian
32-bit number, and the values. (Format: the page of the MNIST database, LeCun, Cortes & Burges.)
"""

import gzip
import hashlib
import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped

from stablefield.data.contents import Contents
from stablefield.data.decode import Rules
from stablefield.data.images import Pictures, from_array
from stablefield.reference import Pool

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NAMES = re.compile(r"^(.*)images([-.])idx\d(.*?)(\.gz)?$")


@dataclass(frozen=True)
class IDX(Pictures):
    """An IDX file of images, and the labels beside it.

    Attributes:
        path: the file, maybe compressed (`train-images-idx3-ubyte.gz`), or a folder with one of that name. Labels are
            looked for in `train-labels-idx1-ubyte`, compressed or not.
    """

    path: Path

    def fingerprint(self) -> str:
        images = images_file(self.path)
        files = [images, labels_beside(images)]
        return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file)

    def _contents(self) -> Contents:
        file = images_file(self.path)
        images, beside = read_idx(file), labels_beside(file)
        images = images[:, None] if images.ndim == 3 else images  # one channel
        labels = read_idx(beside).astype(np.int64) if beside and self.labels else None
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"{file} holds {len(images)} images, but {beside} {labels.shape} labels")
        if images.dtype == np.uint8 and images.ndim == 4:
            return Contents(len(images), lambda: from_array(images, self.rules()), labels)
        if images.dtype.kind != "f" and images.dtype != np.uint8:
            raise ValueError(f"{file} holds {images.dtype}; data must be bytes or floating")
        if self.rules() != Rules():
            raise ValueError(f"{file} holds {images.dtype} {images.shape}: no images in bytes, to be cut or resized")
        told = None if labels is None else torch.from_numpy(labels)
        try:
            return Contents.of(Pool(torch.from_numpy(images), told, values=self.values))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


def images_file(path: Path) -> Path:
    """The file itself, or the training images in a folder.

    Raises:
        ValueError: there is none.
    """
    found = sorted(path.glob("*train-images?idx*")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ValueError(f"there is no IDX file of images in {path}" if path.is_dir() else f"there is no file {path}")
    return found[0]


def labels_beside(images: Path) -> Path | None:
    """The labels of a file of images, by the usual names: `train-labels-idx1-ubyte` for `train-images-idx3-ubyte`."""
    named = NAMES.match(images.name)
    if not named:
        return None
    plain = images.with_name(f"{named[1]}labels{named[2]}idx1{named[3]}")
    return next((file for file in (plain, plain.with_name(plain.name + ".gz")) if file.is_file()), None)


def read_idx(path: Path) -> Shaped[np.ndarray, "N ..."]:
    """The array in an IDX file: bytes stay bytes, floating numbers become float32.

    Raises:
        ValueError: it is none, or damaged, or shorter or longer than it says.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed, it is damaged or cut short: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or content[3] == 0:
        raise ValueError(f"{path} is no IDX file: it begins with {content[:4].hex(' ')}")
    dtype, header = np.dtype(TYPES[content[2]]), 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path} is cut short: its header needs {header} bytes, there are {len(content)}")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"{path} is damaged: {shape} needs {expected:,} bytes, there are {len(content):,}")
    array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    return array.astype({"f": np.float32, "u": np.uint8}.get(dtype.kind, np.int64))
