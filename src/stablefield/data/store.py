"""Data decoded once, in a folder that is mapped into memory: no step decodes anything, and processes share the pages.

    faces/data.npy      (N, *D), uint8 or float32
          labels.npy    (N,), int64, if there are labels
          store.json    shape, type, levels, what the values are, names of classes, where they came from, and a hash
                        over data and labels

A store appears whole or not at all: it is written in a folder beside its place, forced to the disk, and renamed.
What is used directly from a zip or a folder is decoded into such a store too, in a cache.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from stablefield.data.contents import Contents, Progress, begin_hash, content_hash, end_hash, silent
from stablefield.data.mapping import as_tensor, mapped
from stablefield.data.sources import Source
from stablefield.reference import Pool

if sys.platform != "win32":
    import fcntl

FORMAT = "stablefield store 1"


@dataclass(frozen=True)
class Store(Source):
    """A folder of decoded data, as `stablefield data convert` writes it.

    Attributes:
        path: the folder.
    """

    path: Path

    def load(self, progress: Progress = silent) -> Pool:
        """The data, mapped and not read: what is never looked at is never loaded. Writing to them changes no file.

        Raises:
            ValueError: there is no store, or files are missing, cut short, or not what its `store.json` says.
        """
        about = self.about()
        data = mapped(self._file("data.npy"))
        self._compare("data.npy", data, about["dtype"], about["shape"])
        labels = None
        if about["labels"]:
            found = mapped(self._file("labels.npy"))
            self._compare("labels.npy", found, "int64", about["shape"][:1])
            labels = torch.from_numpy(np.array(found))
        try:
            return Pool(as_tensor(data), labels, about["levels"], values=self.values or about["values"])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def contents(self) -> Contents:
        return Contents.of(self.load(), tuple(self.about()["classes"]))

    def verify(self) -> str:
        """Read everything and compare it with the hash that was written with it, which is returned.

        Raises:
            ValueError: the data or the labels are not what was written.
        """
        written, found = self.about()["hash"], content_hash(self.load())
        if written != found:
            raise ValueError(
                f"{self.path} is damaged: its contents have the hash {found[:16]}..., {written[:16]}... was written; "
                "remove the folder and convert the data again"
            )
        return found

    def about(self) -> dict[str, Any]:
        """What `store.json` says.

        Raises:
            ValueError: there is none, or it says something else.
        """
        file = self._file("store.json")
        try:
            about = json.loads(file.read_text())
            if about["format"] != FORMAT:
                raise ValueError(f"{file} is of the format {about['format']!r}, and this version reads {FORMAT!r}")
            names = ("hash", "shape", "dtype", "levels", "labels", "classes", "source")
            return {name: about[name] for name in names} | {"values": about.get("values")}  # older stores do not say
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}; convert the data again") from None

    def _file(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise ValueError(f"{self.path} is no whole store: it has no {name} (`stablefield data convert` makes one)")
        return self.path / name

    def _compare(self, name: str, array: np.ndarray, dtype: str, shape: list[int]) -> None:
        if array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(
                f"{self.path / name} holds {array.dtype} {array.shape}, but store.json says {dtype} {tuple(shape)}; "
                "convert the data again"
            )


def write(path: Path, contents: Contents, *, source: str, progress: Progress = silent) -> Store:
    """Write a store, block by block.

    Raises:
        ValueError: the place is taken, or blocks differ in type or shape, or hold numbers that are not finite.
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    beside.mkdir()
    try:
        about = _fill(beside, contents, progress) | {"source": source}
        with _synced(beside / "store.json") as file:
            file.write(json.dumps(about, indent=2).encode())
        _sync_folder(beside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync_folder(path.parent)
    return Store(path)


def free(path: Path) -> None:
    """Nothing is ever written over.

    Raises:
        ValueError: there is a file, or a folder with something in it.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is there already: choose another place, or remove it")


def cached(recipe: str, contents: Callable[[], Contents], *, source: str, progress: Progress = silent) -> Pool:
    """Data from the cache, decoded into it if they are not there yet.

    Args:
        recipe: says the contents of the source and how they are decoded; another recipe is another store.
        contents: reads the source; called only if there is anything to decode.

    Raises:
        ValueError: the source, or the store that is there, is damaged.
    """
    key = hashlib.sha256(f"{FORMAT} {recipe}".encode()).hexdigest()[:32]
    folder = cache_folder()
    if not (folder / key).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{key}.lock"):
            _decode_into(folder / key, contents, source, progress)
    try:
        return Store(folder / key).load()
    except ValueError as error:
        raise ValueError(f"{error} (in the cache: remove {folder / key}, and it is decoded again)") from None


def cache_folder() -> Path:
    """Where data are decoded to that are used directly: `STABLEFIELD_CACHE`, or `~/.cache/stablefield`."""
    return Path(os.environ.get("STABLEFIELD_CACHE") or Path.home() / ".cache" / "stablefield")


def _decode_into(place: Path, contents: Callable[[], Contents], source: str, progress: Progress) -> None:
    if place.exists():  # another process did it while we waited
        return
    try:
        write(place, contents(), source=source, progress=progress)
    except (OSError, ValueError):
        if not place.exists():  # where locks do nothing, another process may have been faster: theirs is as good
            raise


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time, so that ranks do not all decode; where files cannot be locked, renaming alone decides."""
    with lock.open("a") as file:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
    """Write data and labels; what there is to say of them."""
    blocks = contents.blocks()
    first = next(blocks)
    shape, done = (contents.count, *first.shape[1:]), 0
    digest = begin_hash(first.dtype, shape, contents.levels)
    with _synced(folder / "data.npy") as file:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in chain([first], blocks):
            # written, not assigned to a map: a full disk is then an error and not the end of the process
            flat = np.ascontiguousarray(_checked(block, first)).data
            file.write(flat)
            digest.update(flat)
            done += len(block)
            progress(done, contents.count)
    assert done == contents.count
    if contents.labels is not None:
        with _synced(folder / "labels.npy") as file:
            np.save(file, contents.labels.astype(np.int64))
    return {
        "format": FORMAT,
        "hash": end_hash(digest, contents.labels),
        "shape": shape,
        "dtype": first.dtype.name,
        "levels": contents.levels,
        "values": contents.values,
        "labels": contents.labels is not None,
        "classes": list(contents.classes),
    }


def _checked(block: np.ndarray, first: np.ndarray) -> np.ndarray:
    if block.dtype != first.dtype or block.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"data of {block.dtype} {block.shape[1:]} came after {first.dtype} {first.shape[1:]}; all must be alike"
        )
    if block.dtype.kind == "f" and not np.isfinite(block).all():
        raise ValueError("data holds numbers that are not finite")
    return block


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
