"""Store: a folder of decoded data that is mapped into memory, so that no training step decodes anything.

    faces/data.npy      (N, *D), uint8 or float32
          labels.npy    (N,), int64, if there are labels
          store.json    shape, type, num_levels, values ("image" or "float"), names of the classes, source, a hash
                        of the data and labels, and a checksum of all these entries

A store is complete or absent: it is written to a folder beside its final path, flushed to the disk, and renamed. Images
that are used directly from a ZIP file or a folder are decoded into such a store in a cache.

A store is compared with its hash when it is used, once for each state of its files: sizes, times of the last changes,
inodes. The cache remembers the last state that was compared. Small data are compared before they are used, large data
in the background, while they are used.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from typing_extensions import override

from stablefield.data.arrays import as_tensor, map_array
from stablefield.data.contents import Contents, Progress, content_hash, hash_blocks, silent
from stablefield.data.labels import class_labels
from stablefield.data.limits import read_json
from stablefield.data.notices import say
from stablefield.data.sources import Source
from stablefield.files import atomic_folder, cache_folder, cached, printable, write_text
from stablefield.pool import Pool

FORMAT = "stablefield store 2"

LOGGER = logging.getLogger("stablefield")

_MAX_JSON = 2**24
_WAIT = 2**32  # bytes of data up to which a comparison with the hash is waited for
_GOOD = "good"


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "hash": lambda value: isinstance(value, str),
    "shape": lambda value: _is_list(value, int) and len(value) > 1 and min(value) > 0,
    "dtype": lambda value: value in ("uint8", "float32"),
    "num_levels": lambda value: type(value) is int and 2 <= value <= 256,
    "values": lambda value: value in (None, "image", "float"),
    "labels": lambda value: type(value) is bool,
    "classes": lambda value: _is_list(value, str),
    "source": lambda value: isinstance(value, str),
}
"""Entries of `store.json` that every store has, and what is valid."""


@dataclass(frozen=True)
class Store(Source):
    """Folder of decoded data, as `stablefield data convert` writes it.

    Attributes:
        path: the folder.
    """

    path: Path

    @override
    def load(self, progress: Progress = silent) -> Pool:
        pool, metadata = self._load()
        _check_once(self.path, pool.nbytes, lambda: self._compare_hash(pool, metadata["hash"]))
        return pool

    def _load(self) -> tuple[Pool, dict[str, Any]]:
        """The data, which are not compared with the hash, and the entries of `store.json`."""
        metadata = self.metadata()
        data = map_array(self._file("data.npy"))
        self._compare("data.npy", data, metadata["dtype"], metadata["shape"])
        labels = None
        if metadata["labels"]:
            array = map_array(self._file("labels.npy"))
            self._compare("labels.npy", array, "int64", metadata["shape"][:1])
            labels = torch.from_numpy(class_labels(array, self.where))
        values = self.values or metadata["values"]
        try:
            return Pool(as_tensor(data), labels, metadata["num_levels"], values=values), metadata
        except ValueError as error:
            raise ValueError(f"{self.where}: {printable(error)}") from None

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
        pool, metadata = self._load()
        state = _state_of(self.path)
        self._compare_hash(pool, metadata["hash"])
        _remember(self.path, state)
        return str(metadata["hash"])

    def metadata(self) -> dict[str, Any]:
        """The entries of `store.json`: hash, shape, dtype, num_levels, values, labels, classes and source.

        Raises:
            ValueError: the file is missing or damaged, or the store was written in another format.
        """
        file = self._file("store.json")
        try:
            if file.stat().st_size > _MAX_JSON:
                raise ValueError(f"{printable(file)} has more than {_MAX_JSON:,} bytes, the limit for store.json")
            metadata = read_json(file.read_bytes(), printable(file), 1000)
            if metadata["format"] != FORMAT:
                raise ValueError(
                    f"{self.where} has the format {printable(repr(metadata['format']))}, but this version reads "
                    f"{FORMAT!r}; convert the data again"
                )
            entries = {name: metadata[name] for name in _ENTRIES} | {"notes": metadata.get("notes", [])}
        except (KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{printable(file)} is damaged: {printable(repr(error))}; convert the data again"
            ) from None
        if wrong := [name for name, valid in _ENTRIES.items() if not valid(entries[name])]:
            raise ValueError(f"{printable(file)} is damaged: its {wrong[0]} is not valid; convert the data again")
        if metadata.get("checksum", found := _checksum(metadata)) != found:  # stores of before have none
            raise ValueError(f"{printable(file)} is damaged: its checksum differs; convert the data again")
        return entries | {name: list(map(printable, entries[name])) for name in ("classes", "notes")}

    def _compare_hash(self, pool: Pool, expected: str) -> None:
        """Refuse data and labels that have another hash than `store.json` says."""
        computed = content_hash(pool)
        if expected != computed:
            raise ValueError(
                f"{self.where} is damaged: its data have the hash {computed[:16]}..., store.json says "
                f"{printable(expected[:16])}...; remove the folder and convert the data again"
            )

    def _file(self, name: str) -> Path:
        """Path of a file of the store, which must exist."""
        if not (self.path / name).is_file():
            raise ValueError(
                f"{self.where} is not a complete store: {name} is missing; write one with `stablefield data convert`"
            )
        return self.path / name

    def _compare(self, name: str, array: np.ndarray, dtype: str, shape: list[int]) -> None:
        """Refuse an array of another type or shape than `store.json` says."""
        if array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(
                f"{printable(self.path / name)} contains {array.dtype} {array.shape}, but store.json says {dtype} "
                f"{tuple(shape)}; "
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
    with atomic_folder(path) as temporary:
        metadata = _fill(temporary, contents, progress) | {"source": source}
        text = json.dumps(metadata | {"checksum": _checksum(metadata)}, indent=2)
        (temporary / "store.json").write_text(text)
    _remember(path, _state_of(path))
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
            if not path.exists():
                return None
            store = Store(path)
            for note in store.metadata()["notes"]:
                say(note)
            return store.load()
        except ValueError as error:
            raise ValueError(f"{error} (in the cache; remove {path} to decode the data again)") from None

    def make(path: Path) -> None:
        write_store(path, contents(), source=source, progress=progress)

    return cached(hashlib.sha256(f"{FORMAT} {recipe}".encode()).hexdigest()[:32], find, make)


def _checksum(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the entries of `store.json`, without the checksum itself."""
    entries = {name: value for name, value in metadata.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _fill(folder: Path, contents: Contents, progress: Progress) -> dict[str, Any]:
    """Write data and labels, and return the entries of `store.json` about them."""
    blocks = contents.checked_blocks()
    first = next(blocks)
    shape = (contents.count, *first.shape[1:])

    def written(file: BinaryIO) -> Iterator[np.ndarray]:
        done = 0
        for block in chain([first], blocks):
            # a write to a full disk raises an error, whereas an assignment to a memory map would kill the process
            flat = np.ascontiguousarray(block)
            file.write(flat.data)
            yield flat
            done += len(block)
            progress(done, contents.count)
        assert done == contents.count

    with (folder / "data.npy").open("xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        found = hash_blocks(contents, shape, first.dtype, written(file))
    if contents.labels is not None:
        with (folder / "labels.npy").open("xb") as file:
            np.save(file, contents.labels.astype(np.int64))
    return {
        "format": FORMAT,
        "hash": found,
        "shape": shape,
        "dtype": first.dtype.name,
        "num_levels": contents.num_levels,
        "values": contents.values,
        "labels": contents.labels is not None,
        "classes": list(contents.classes),
        "notes": contents.notes,
    }


# ---- which stores were compared with their hash, in which state of their files


def _check_once(folder: Path, nbytes: int, check: Callable[[], None]) -> None:
    """Check the files of a folder, unless the cache remembers that they were checked in this state."""
    state = _state_of(folder)
    known, result = _remembered(folder)
    if known == state and result != _GOOD:
        raise ValueError(result)
    if known == state:
        return

    def compare() -> None:
        try:
            check()
        except ValueError as error:
            _remember(folder, state, str(error))
            raise
        _remember(folder, state)

    def compare_later() -> None:
        try:
            compare()
        except ValueError as error:
            LOGGER.error("%s; stop this program: it uses the damaged data", error)

    if nbytes <= _WAIT:
        compare()
    else:
        threading.Thread(target=compare_later, daemon=True).start()


def _remember(folder: Path, state: str, result: str = _GOOD) -> None:
    """Note in the cache that a folder was checked; where the cache cannot be written, it is checked again next time."""
    with suppress(OSError):
        write_text(_note(folder), json.dumps([state, result]))


def _state_of(folder: Path) -> str:
    """Hash of the sizes, the times of the last changes and the inodes of the files in a folder."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    states = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats]
    return hashlib.sha256(repr(states).encode(errors="surrogateescape")).hexdigest()


def _remembered(folder: Path) -> tuple[str, str]:
    """The last state of a folder that was checked, and its result; empty if there is none."""
    try:
        known, result = json.loads(_note(folder).read_text(encoding="utf-8"))
        return str(known), str(result)
    except (OSError, ValueError, TypeError):
        return "", ""


def _note(folder: Path) -> Path:
    """The file of the cache with the last state of a folder that was checked."""
    name = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / f"{name}.checked"
