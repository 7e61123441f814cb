"""Images in a zip or a folder: their names, in order, their bytes, and their labels.

Labels are those of `dataset.json` in EDM's and StyleGAN's layout,

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", [0, 1, 0]], ...]}     or {"labels": null}

and without that file the top folder is the class, in the order of their names. A single folder around everything is
looked through. Hidden files, and others that are no images, are passed over.
"""

import hashlib
import json
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from stablefield.data.decode import SUFFIXES

SHARD = re.compile(r"\d{5}/img\d{8}\.\w+")  # EDM's layout: the folder is only there to be small


class Files(AbstractContextManager["Files"], ABC):
    """Images and `dataset.json` by name: with forward slashes, and without the one folder around all of them."""

    def __init__(self) -> None:
        self.held = ExitStack()

    def __exit__(self, *problem: object) -> None:
        self.held.close()

    @abstractmethod
    def names(self) -> list[str]:
        """All names, sorted."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            ValueError: naming it: it is damaged.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever a file does."""


class ZipFiles(Files):
    """The files of a zip.

    Raises:
        ValueError: it is none, or was cut short.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.archive = self.held.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is no zip, or was cut short: {error}") from None
        found = {entry.filename: entry for entry in self.archive.infolist() if not entry.is_dir()}
        self.path = path
        self.prefix, shown = _look_through(name for name in found if _shown(name))
        self.entries = {name: found[self.prefix + name] for name in shown}

    def names(self) -> list[str]:
        return list(self.entries)

    def read(self, name: str) -> bytes:
        try:
            return self.archive.read(self.entries[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise ValueError(f"{self.prefix}{name} in {self.path} cannot be read: {error}") from None

    def fingerprint(self) -> str:
        # the directory of a zip holds a checksum of each file's content: there is no need to read the files
        return _hash((name, entry.file_size, entry.CRC) for name, entry in self.entries.items())


class FolderFiles(Files):
    """The files of a folder and of those in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        relative = (file.relative_to(path).as_posix() for file in found)
        self.prefix, self.shown = _look_through(name for name in relative if _shown(name))

    def names(self) -> list[str]:
        return self.shown

    def read(self, name: str) -> bytes:
        try:
            return (self.path / self.prefix / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path / self.prefix / name} cannot be read: {error}") from None

    def fingerprint(self) -> str:
        return _hash((name, *stamp((self.path / self.prefix / name).stat())) for name in self.shown)


def stamp(found: os.stat_result) -> tuple[int, int, int]:
    """What changes with a file: its size and its times; the second one cannot be set back by whoever copies files."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_files(path: Path) -> Files:
    """The files of a zip or a folder.

    Raises:
        ValueError: it is neither.
    """
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file():
        return ZipFiles(path)
    raise ValueError(f"there is no file or folder {path}")


@dataclass(frozen=True, eq=False)
class Listing:
    """Images by name, and the class of each."""

    names: list[str]
    labels: Int64[np.ndarray, "N"] | None
    classes: tuple[str, ...] = ()


def list_images(files: Files, where: Path, labelled: bool = True) -> Listing:
    """The images among files, with their labels if they are wanted and there are any.

    Raises:
        ValueError: no images; labels that name other images or miss one, or are no classes; images beside class
            folders.
    """
    names = files.names()
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(f"there are no images in {where}; they end in {', '.join(SUFFIXES)}")
    if not labelled:
        return Listing(images, None)
    if "dataset.json" in names:
        return _listed(images, files.read("dataset.json"), where)
    return _by_folder(images, where)


def _listed(images: list[str], content: bytes, where: Path) -> Listing:
    """Labels from `dataset.json`."""
    try:
        said = json.loads(content)
        entries, classes = said["labels"], tuple(map(str, said.get("classes") or ()))
        given = None if entries is None else {str(name).replace("\\", "/"): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'dataset.json in {where} is not {{"labels": [["name", label], ...]}} or {{"labels": null}}: {error!r}'
        ) from None
    if given is None:
        return Listing(images, None)
    if missing := [name for name in images if name not in given]:
        raise ValueError(f"dataset.json in {where} has no label for {missing[0]} ({len(missing)} images without one)")
    if unknown := sorted(given.keys() - set(images)):
        raise ValueError(f"dataset.json in {where} labels {unknown[0]}, and there is no such image ({len(unknown)})")
    return Listing(images, as_classes([given[name] for name in images], where), classes)


def as_classes(labels: Sequence[Any], where: object) -> Int64[np.ndarray, "N"]:
    """Classes from numbers, or from vectors with a single 1.

    Raises:
        ValueError: anything else.
    """
    try:
        array = np.asarray(labels)
    except ValueError:
        raise ValueError(f"labels in {where} are vectors of differing lengths") from None
    if array.ndim == 2 and np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():
        return array.argmax(1).astype(np.int64)
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.floor(array)).all()))
    if array.ndim != 1 or not whole or int(array.min()) < 0:
        raise ValueError(
            f"labels in {where} are no classes: they must be numbers 0, 1, 2, ... or vectors with a single 1, "
            f"not as {labels[0]!r}; labels = false (--no-labels) leaves them out"
        )
    return array.astype(np.int64)


def _by_folder(images: list[str], where: Path) -> Listing:
    """The top folder is the class."""
    loose = [name for name in images if "/" not in name]
    if len(loose) == len(images) or all(SHARD.fullmatch(name) for name in images):
        return Listing(images, None)
    if loose:
        raise ValueError(
            f"{where} has images beside its class folders, as {loose[0]}: move them, or leave the labels out with "
            "labels = false (--no-labels)"
        )
    folders = [name.partition("/")[0] for name in images]
    classes = sorted(set(folders))
    number = {name: label for label, name in enumerate(classes)}
    return Listing(images, np.array([number[name] for name in folders], np.int64), tuple(classes))


def _look_through(names: Iterator[str]) -> tuple[str, list[str]]:
    """The folder around everything, as "a/b/", and the names in it, sorted."""
    inside, prefix = sorted(names), ""
    while inside and "/" in inside[0]:
        top = inside[0].partition("/")[0] + "/"
        if not all(name.startswith(top) for name in inside):
            break
        inside, prefix = [name.removeprefix(top) for name in inside], prefix + top
    return prefix, inside


def _shown(name: str) -> bool:
    *folders, last = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) for part in (*folders, last))
    return not hidden and (last == "dataset.json" or last.lower().endswith(SUFFIXES))


def _hash(lines: Iterator[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()
