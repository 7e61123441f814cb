"""Store: a folder of decoded data that is mapped into memory, so that no training step decodes anything.

    faces/data.npy      (N, *D), uint8 or float32
          labels.npy    (N,), int64, if there are labels
          store.json    shape, type, num_levels, values ("image" or "float"), names of the classes, source, and a hash
                        of the data and labels

A store is complete or absent: it is written to a folder beside its final path, flushed to the disk, and renamed. Images
that are used directly from a ZIP file or a folder are decoded into such a store in a cache.
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
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, begin_hash, content_hash, end_hash, silent
from stablefield.data.sources import Source, as_tensor, map_array
from stablefield.pool import Pool

if sys.platform != "win32":
    import fcntl

__all__ = ["FORMAT", "Store", "cache_folder", "cached", "exclusive_lock", "refuse_existing", "write_store"]

FORMAT = "stablefield store 2"


@dataclass(frozen=True)
class Store(Source):
    """Folder of decoded data, as `stablefield data convert` writes it.

    Attributes:
        path: the folder.
    """

    path: Path

    @override
    def load(self, progress: Progress = silent) -> Pool:
        metadata = self.metadata()
        data = map_array(self._file("data.npy"))
        self._compare("data.npy", data, metadata["dtype"], metadata["shape"])
        labels = None
        if metadata["labels"]:
            array = map_array(self._file("labels.npy"))
            self._compare("labels.npy", array, "int64", metadata["shape"][:1])
            labels = torch.from_numpy(np.array(array))
        values = self.values or metadata["values"]
        try:
            return Pool(as_tensor(data), labels, metadata["num_levels"], values=values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @override
    def contents(self) -> Contents:
        return Contents.from_pool(self.load(), tuple(self.metadata()["classes"]))

    def verify(self) -> str:
        """Read all data and labels, and compare them with the hash in `store.json`.

        Returns:
            The hash.

        Raises:
            ValueError: the hashes differ.
        """
        expected, computed = self.metadata()["hash"], content_hash(self.load())
        if expected != computed:
            raise ValueError(
                f"{self.path} is damaged: its data have the hash {computed[:16]}..., store.json says "
                f"{expected[:16]}...; remove the folder and convert the data again"
            )
        return computed

    def metadata(self) -> dict[str, Any]:
        """The entries of `store.json`: hash, shape, dtype, num_levels, values, labels, classes and source.

        Raises:
            ValueError: the file is missing or damaged, or the store was written in another format.
        """
        file = self._file("store.json")
        try:
            metadata = json.loads(file.read_text())
            if metadata["format"] != FORMAT:
                raise ValueError(
                    f"{self.path} has the format {metadata['format']!r}, but this version reads {FORMAT!r}; "
                    "convert the data again"
                )
            names = ("hash", "shape", "dtype", "num_levels", "values", "labels", "classes", "source")
            return {name: metadata[name] for name in names}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}; convert the data again") from None

    def _file(self, name: str) -> Path:
        """Path of a file of the store, which must exist."""
        if not (self.path / name).is_file():
            raise ValueError(
                f"{self.path} is not a complete store: {name} is missing; write one with `stablefield data convert`"
            )
        return self.path / name

    def _compare(self, name: str, array: np.ndarray, dtype: str, shape: list[int]) -> None:
        """Refuse an array of another type or shape than `store.json` says."""
        if array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(
                f"{self.path / name} contains {array.dtype} {array.shape}, but store.json says {dtype} {tuple(shape)}; "
                "convert the data again"
            )


def write_store(path: Path, contents: Contents, *, source: str, progress: Progress = silent) -> Store:
    """Write data as a store, block by block.

    Args:
        path: folder of the store.
        contents: the data to write, block by block.
        source: where the data come from, noted in `store.json`.
        progress: called with (data points written, total).

    Raises:
        ValueError: the path exists already, blocks differ in type or shape, or values are not finite.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        metadata = _fill(temporary, contents, progress) | {"source": source}
        with _synced(temporary / "store.json") as file:
            file.write(json.dumps(metadata, indent=2).encode())
        _sync_folder(temporary)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)
    return Store(path)


def refuse_existing(path: Path) -> None:
    """Refuse to overwrite data.

    Args:
        path: where data will be written.

    Raises:
        ValueError: there is a file, or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already; choose another path, or remove it")


def cached(recipe: str, contents: Callable[[], Contents], *, source: str, progress: Progress = silent) -> Pool:
    """Data from a store in the cache; they are decoded into it first if there is none.

    Args:
        recipe: describes the contents of the source and how they are decoded; each recipe has a store of its own.
        contents: reads the source; called only if the data must be decoded.
        source: where the data come from, noted in `store.json`.
        progress: called with (data points decoded, total).

    Raises:
        ValueError: the source or the store in the cache is damaged.
    """
    key = hashlib.sha256(f"{FORMAT} {recipe}".encode()).hexdigest()[:32]
    folder = cache_folder()
    if not (folder / key).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / f"{key}.lock"):
            _decode_into(folder / key, contents, source, progress)
    try:
        return Store(folder / key).load()
    except ValueError as error:
        raise ValueError(f"{error} (in the cache; remove {folder / key} to decode the data again)") from None


def cache_folder() -> Path:
    """The folder of the cache: the environment variable `STABLEFIELD_CACHE`, or `~/.cache/stablefield`."""
    return Path(os.environ.get("STABLEFIELD_CACHE") or Path.home() / ".cache" / "stablefield")


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Context that one process at a time can enter, so that only one of several ranks decodes.

    Where the file system has no locks, all of them enter, and the atomic renaming decides which result is used.

    Args:
        path: the lock file, created if it does not exist.
    """
    with path.open("a") as file:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _decode_into(path: Path, contents: Callable[[], Contents], source: str, progress: Progress) -> None:
    """Write a store, unless another process has written it."""
    if path.exists():  # another process wrote it while this one waited for the lock
        return
    try:
        write_store(path, contents(), source=source, progress=progress)
    except (OSError, ValueError):
        if not path.exists():  # without locks, another process may have been faster, and its store holds the same data
            raise


def _fill(folder: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
    """Write data and labels, and return the entries of `store.json` about them."""
    blocks = contents.blocks()
    first = next(blocks)
    shape, done = (contents.count, *first.shape[1:]), 0
    digest = begin_hash(first.dtype, shape, contents.num_levels)
    with _synced(folder / "data.npy") as file:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in chain([first], blocks):
            # a write to a full disk raises an error, whereas an assignment to a memory map would kill the process
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
        "num_levels": contents.num_levels,
        "values": contents.values,
        "labels": contents.labels is not None,
        "classes": list(contents.classes),
    }


def _checked(block: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The block, which must be finite and of the type and shape of the first."""
    if block.dtype != first.dtype or block.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"all data must have the same type and shape, but {block.dtype} {block.shape[1:]} comes after "
            f"{first.dtype} {first.shape[1:]}"
        )
    if block.dtype.kind == "f" and not np.isfinite(block).all():
        raise ValueError("data contains values that are not finite")
    return block


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """New file that is flushed to the disk before it is closed."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot flush folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
