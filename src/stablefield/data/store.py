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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, begin_hash, content_hash, end_hash, silent
from stablefield.data.sources import Source, as_tensor, map_array
from stablefield.files import atomic_folder, cached, sweep
from stablefield.pool import Pool

__all__ = ["FORMAT", "Store", "cached_pool", "refuse_existing", "write_store"]

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
    sweep(path.parent)
    with atomic_folder(path) as temporary:
        metadata = _fill(temporary, contents, progress) | {"source": source}
        (temporary / "store.json").write_text(json.dumps(metadata, indent=2))
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


def cached_pool(recipe: str, contents: Callable[[], Contents], *, source: str, progress: Progress = silent) -> Pool:
    """Data from a store in the cache; they are decoded into it first if there is none.

    Args:
        recipe: describes the contents of the source and how they are decoded; each recipe has a store of its own.
        contents: reads the source; called only if the data must be decoded.
        source: where the data come from, noted in `store.json`.
        progress: called with (data points decoded, total).

    Raises:
        ValueError: the source or the store in the cache is damaged.
    """

    def find(path: Path) -> Pool | None:
        try:
            return Store(path).load() if path.exists() else None
        except ValueError as error:
            raise ValueError(f"{error} (in the cache; remove {path} to decode the data again)") from None

    def make(path: Path) -> None:
        write_store(path, contents(), source=source, progress=progress)

    return cached(hashlib.sha256(f"{FORMAT} {recipe}".encode()).hexdigest()[:32], find, make)


def _fill(folder: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
    """Write data and labels, and return the entries of `store.json` about them."""
    blocks = contents.blocks()
    first = next(blocks)
    shape, done = (contents.count, *first.shape[1:]), 0
    digest = begin_hash(first.dtype, shape, contents.num_levels)
    with (folder / "data.npy").open("xb") as file:
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
        with (folder / "labels.npy").open("xb") as file:
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
