"""Small data sets in the formats of other projects, written by the tests."""

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """Content of an image file with pixels (C, H, W) in bytes, or (H, W) of another type."""
    file = io.BytesIO()
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def make_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """Folder with files of the given contents."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def make_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """ZIP file with files of the given contents."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def edm_files(images: np.ndarray, labels: Any) -> dict[str, bytes]:
    """Images in the layout of EDM and StyleGAN, with `dataset.json`."""
    names = [f"{number // 4:05d}/img{number:08d}.png" for number in range(len(images))]
    listed = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    files = dict(zip(names, map(png, images), strict=True))
    return files | {"dataset.json": json.dumps({"labels": listed}).encode()}


def idx(array: np.ndarray) -> bytes:
    """Content of an IDX file."""
    kind = {"u1": 0x08, "i4": 0x0C, "f4": 0x0D}[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def make_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, *, packed: bool = True) -> Path:
    """Folder with the training images and labels under their usual names."""
    folder.mkdir(exist_ok=True)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (name + packed * ".gz")).write_bytes(gzip.compress(content) if packed else content)
    return folder


def make_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Tar archive in the layout of CIFAR with files of the given contents."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_files(images: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    """Contents of CIFAR-10's files: five training batches, a test batch with one image, and the class names."""
    files = {}
    for number, part in enumerate(np.array_split(np.arange(len(images)), 5), 1):
        flat, own = images[part].reshape(len(part), -1), [labels[i] for i in part]
        files[f"data_batch_{number}"] = pickle.dumps({b"data": flat, b"labels": own, b"batch_label": b"x"}, 2)
    files["test_batch"] = pickle.dumps({b"data": images[:1].reshape(1, -1), b"labels": labels[:1]}, 2)
    return files | {"batches.meta": pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, 2)}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with bytes flipped, cut out, repeated or replaced."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(max(1, min(len(changed), draw.choice([64, 512, 10**9]))))
        what = draw.randrange(6)
        if what == 0:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif what == 1:
            changed[place : place + 4] = draw.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\1\0\0\0"]
            )
        elif what == 2:
            del changed[place : place + draw.randrange(1, 40)]
        elif what == 3:
            changed[place:place] = changed[place : place + draw.randrange(1, 40)]
        elif what == 4:
            del changed[place:]
        else:
            changed[place : place + 3] = draw.choice([b"-1,", b"1e9", b"[[[", b"\x1b[m", b"'''", b"9L)"])
    return bytes(changed)
