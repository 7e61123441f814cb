"""CIFAR-10 and CIFAR-100 as they are published for Python: a tar of pickled dictionaries.

Pickles are programs. These are read by one that can do nothing: the few names they may use stand for classes of ours
that only take note of what they are given, and every other name is refused.
"""

import hashlib
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from stablefield.data.contents import Contents
from stablefield.data.images import Pictures, from_array

FILES = {
    "train": (tuple(f"data_batch_{number}" for number in range(1, 6)), ("train",)),
    "test": (("test_batch",), ("test",)),
}
META = ("batches.meta", "meta")
NAMES = {name for choices in (*FILES.values(), (META,)) for names in choices for name in names}


@dataclass(frozen=True)
class CIFAR(Pictures):
    """CIFAR-10 or CIFAR-100 (with its fine labels).

    Attributes:
        path: `cifar-10-python.tar.gz` or `cifar-100-python.tar.gz`, or the folder that is in it.
        split: "train" or "test".
    """

    path: Path
    split: Literal["train", "test"] = "train"

    def fingerprint(self) -> str:
        if self.path.is_file():
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        files = read_members(self.path)
        return " ".join(hashlib.sha256(files[name]).hexdigest() for name in sorted(files))

    def _contents(self) -> Contents:
        files = read_members(self.path)
        chosen = next((names for names in FILES[self.split] if files.keys() >= set(names)), None)
        if chosen is None:
            lacking = " or ".join(", ".join(sorted(set(names) - files.keys())) for names in FILES[self.split])
            raise ValueError(f"{self.path} is no CIFAR, or not all of it: it lacks {lacking}")
        read = [_batch(files[name], f"{name} in {self.path}") for name in chosen]
        images, labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
        return Contents(len(images), lambda: from_array(images, self.rules()), labels, self._classes(files))

    def _classes(self, files: dict[str, bytes]) -> tuple[str, ...]:
        meta = next((name for name in META if name in files), None)
        if meta is None:
            return ()
        said = read_pickle(files[meta], f"{meta} in {self.path}")
        return tuple(_text(name) for name in said.get("label_names", said.get("fine_label_names", ())))


def read_members(path: Path) -> dict[str, bytes]:
    """CIFAR's files in a tar or a folder, wherever in it, by their names.

    Raises:
        ValueError: there is neither, or the tar is damaged or cut short.
    """
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.rglob("*") if file.name in NAMES and file.is_file()}
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}")
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in NAMES and (content := tar.extractfile(member)):
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is no tar, or damaged: {error}") from None
    return found


def read_pickle(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of CIFAR's, arrays of bytes as numpy's.

    Raises:
        ValueError: it is damaged, or asks for anything but dictionaries, lists, text, numbers and arrays of bytes.
    """
    try:
        found = _Harmless(io.BytesIO(content), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(f"{where} is refused: it asks for {error}, which these files have no use for") from None
    except Exception as error:  # a damaged pickle can fail in any way; none of them runs anything
        raise ValueError(f"{where} is damaged, or no pickle of CIFAR's: {error!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds no dictionary, but {type(found).__name__}")
    return {_text(key): value.array(where) if isinstance(value, _Array) else value for key, value in found.items()}


def _batch(content: bytes, where: str) -> tuple[UInt8[np.ndarray, "N 3 32 32"], np.ndarray]:
    said = read_pickle(content, where)
    data, labels = said.get("data"), said.get("labels", said.get("fine_labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{where} holds no images of 3,072 bytes under data")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise ValueError(f"{where} holds {len(data)} images, and not as many labels")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Refused(Exception):
    """A name that is not on the list."""


class _Array:
    """Stands for numpy's array: notes its state, and becomes one if that is plain bytes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self, where: str) -> UInt8[np.ndarray, "..."]:
        """The array.

        Raises:
            ValueError: it is not of bytes, or not of as many as its shape says.
        """
        try:
            _, shape, dtype, fortran, content = self.state
            if dtype.name not in ("u1", "|u1") or len(content) != math.prod(shape):
                raise ValueError(f"{dtype.name} {shape} and {len(content)} bytes")
            return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is damaged: an array in it is not of bytes, or not whole: {error}") from None


class _DType:
    """Stands for numpy's dtype: notes its name."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes do not have."""


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding}")
    return text.encode("latin1")


class _Stand(NamedTuple):
    """What a pickle gets for a name: it can be called, and nothing about it can be changed."""

    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Stand(lambda *_: _Array()),
    ("numpy._core.multiarray", "_reconstruct"): _Stand(lambda *_: _Array()),
    ("numpy", "ndarray"): _Stand(lambda *_: None),  # only ever mentioned
    ("numpy", "dtype"): _Stand(_DType),
    ("_codecs", "encode"): _Stand(_encode),
}


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]
