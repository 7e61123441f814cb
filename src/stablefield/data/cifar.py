"""CIFAR-10 and CIFAR-100 as they are published for Python: a tar archive of pickled dictionaries.

`stablefield.data.pickles` reads them with the few names that these files need; every other name is refused.
"""

import gzip
import hashlib
import math
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from jaxtyping import Int64, UInt8
from typing_extensions import override

from stablefield.data.contents import Contents
from stablefield.data.images import ImageSource, preprocess_array
from stablefield.data.limits import MAX_FILE, LimitError, Unpacked
from stablefield.data.pickles import NUMPY, Dtype, Record, RefusedError, Stream, Table, expect, refusing, unpickle
from stablefield.files import file_hash, printable

# file names of each split, first those of CIFAR-10 and then those of CIFAR-100
SPLITS = {
    "train": (tuple(f"data_batch_{number}" for number in range(1, 6)), ("train",)),
    "test": (("test_batch",), ("test",)),
}
_META = ("batches.meta", "meta")
_NAMES = {name for choices in (*SPLITS.values(), (_META,)) for names in choices for name in names}


@dataclass(frozen=True)
class CIFAR(ImageSource):
    """CIFAR-10, or CIFAR-100 with its fine labels.

    Attributes:
        path: `cifar-10-python.tar.gz`, `cifar-100-python.tar.gz`, or the folder that one of them contains.
        split: "train" or "test".
    """

    path: Path
    split: Literal["train", "test"] = "train"

    @override
    def fingerprint(self) -> str:
        if self.path.is_file():
            return file_hash(self.path)
        files = _read_files(self.path)
        return " ".join(hashlib.sha256(files[name]).hexdigest() for name in sorted(files))

    @override
    def _contents(self) -> Contents:
        files = _read_files(self.path)
        names = next((names for names in SPLITS[self.split] if files.keys() >= set(names)), None)
        if names is None:
            missing = " or ".join(", ".join(sorted(set(names) - files.keys())) for names in SPLITS[self.split])
            raise ValueError(f"{self.path} is not a complete CIFAR data set: {missing} is missing")
        batches = [_read_batch(files[name], f"{name} in {self.path}") for name in names]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return Contents(
            len(images), lambda: preprocess_array(images, self.preprocessing()), labels, self._classes(files)
        )

    def _classes(self, files: dict[str, bytes]) -> tuple[str, ...]:
        """Names of the classes; none if the file with them is missing."""
        meta = next((name for name in _META if name in files), None)
        if meta is None:
            return ()
        content = _read_pickle(files[meta], f"{meta} in {self.path}")
        names = content.get("label_names", content.get("fine_label_names", []))
        if type(names) is not list or len(names) > 1000 or not all(isinstance(name, bytes | str) for name in names):
            raise ValueError(f"{meta} in {self.path} does not name its classes in a list of up to 1,000 words")
        return tuple(printable(_text(name[:301])) for name in names)


def _read_files(path: Path) -> dict[str, bytes]:
    """Contents of CIFAR's files in a tar archive or a folder, at any depth, by file name."""
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.name in _NAMES and file.is_file())
        return {file.name: _read_limited(file) for file in files}
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    contents = {}
    try:
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if file.read(2) == b"\x1f\x8b":
                file = cast("BinaryIO", stack.enter_context(gzip.GzipFile(path)))
            file.seek(0)
            stream = Unpacked(file, printable(path), path.stat().st_size, "unpack it with tar, and give the folder")
            # a stream is read once, from its beginning to its end
            tar = stack.enter_context(tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|"))
            for entry in tar:
                name = entry.name.rpartition("/")[2]
                if entry.isfile() and name in _NAMES and (opened := tar.extractfile(entry)):
                    contents[name] = opened.read()
    except LimitError:
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise ValueError(f"{printable(path)} is not a tar archive, or is damaged: {printable(error)}") from None
    return contents


def _read_pickle(content: bytes, name: str) -> dict[str, Any]:
    """The dictionary in a pickle of CIFAR, with arrays of bytes as numpy arrays; nothing of the pickle is run."""
    with refusing(name):
        found = expect(unpickle(Stream(content), _TABLE), dict)
        if any(type(value) is _Array and value.content is None for value in found.values()):
            raise RefusedError("an array in it has no content")
        return {_text(key): value.content if type(value) is _Array else value for key, value in found.items()}


def _read_limited(path: Path) -> bytes:
    """The content of a file in a folder."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{printable(path)} has more than {MAX_FILE:,} bytes, the limit for a file of CIFAR")
    return path.read_bytes()


def _read_batch(content: bytes, name: str) -> tuple[UInt8[np.ndarray, "N 3 32 32"], Int64[np.ndarray, "N"]]:
    """Images and labels in one of the files."""
    batch = _read_pickle(content, name)
    data, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{name} contains no images of 3,072 bytes named data")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int and 0 <= label < 2**31 for label in labels)
    ):
        raise ValueError(f"{name} contains {len(data)} images, but not one label for each")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


@dataclass(eq=False)
class _Array(Record):
    """Stand-in for an array of numpy, with its content once that is known to be bytes that fill its shape."""

    content: UInt8[np.ndarray, "..."] | None = None

    @override
    def set_state(self, state: object) -> None:
        match state:
            case (1, tuple() as shape, Dtype(code="u1"), bool() | int() as fortran, bytes() as content):
                if len(shape) > 8 or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
                    raise RefusedError("an array in it has a shape that is not of a few sizes")
                if math.prod(shape) != len(content):
                    raise RefusedError(f"an array in it is incomplete: {shape} and {len(content)} bytes")
                self.content = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
            case _:
                raise RefusedError("an array in it is not uint8")


_TABLE: Table = {
    **NUMPY,
    "numpy.core.multiarray _reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray _reconstruct": lambda *_: _Array(),
    "numpy ndarray": None,  # only an argument of _reconstruct
}
