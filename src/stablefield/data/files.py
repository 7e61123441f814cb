"""Image files in a ZIP file or a folder: their names in order, their contents, and their labels.

Labels are read from `dataset.json` in the layout of EDM and StyleGAN,

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", [0, 1, 0]], ...]}     or {"labels": null}

Without that file, each top folder is a class, numbered in alphabetical order. If a single folder contains everything,
the folders in it count as the top folders. Hidden files and files that are not images are ignored.
"""

import hashlib
import json
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from typing_extensions import override

from stablefield.data.decode import SUFFIXES

__all__ = ["Files", "FolderFiles", "ImageList", "ZipFiles", "class_labels", "list_images", "open_files"]

# EDM's layout has folders of a thousand images, which are not classes
_EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")


class Files(AbstractContextManager["Files"], ABC):
    """Base class of collections of image files and `dataset.json`, in a context that keeps them open.

    Names have forward slashes and are relative to the innermost folder that contains all files.
    """

    def __init__(self) -> None:
        self._open_files = ExitStack()

    @override
    def __exit__(self, *error: object) -> None:
        self._open_files.close()

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all files, sorted."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file.

        Args:
            name: one of `names`.

        Raises:
            ValueError: the file is damaged or cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes whenever a file does, computed without reading the files."""


class ZipFiles(Files):
    """The files in a ZIP file.

    Args:
        path: the ZIP file.

    Raises:
        ValueError: the file is not a ZIP file, or was cut short.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self._archive = self._open_files.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is not a ZIP file, or was cut short: {error}") from None
        entries = {entry.filename: entry for entry in self._archive.infolist() if not entry.is_dir()}
        self._path = path
        self._prefix, names = _without_common_folder(name for name in entries if _is_used(name))
        self._entries = {name: entries[self._prefix + name] for name in names}

    @override
    def names(self) -> list[str]:
        return list(self._entries)

    @override
    def read(self, name: str) -> bytes:
        try:
            return self._archive.read(self._entries[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise ValueError(f"{self._prefix}{name} in {self._path} cannot be read: {error}") from None

    @override
    def fingerprint(self) -> str:
        # the central directory contains a checksum of every file
        return _hash((name, entry.file_size, entry.CRC) for name, entry in self._entries.items())


class FolderFiles(Files):
    """The files in a folder and its subfolders.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        relative = (file.relative_to(path).as_posix() for file in files)
        prefix, self._names = _without_common_folder(name for name in relative if _is_used(name))
        self._folder = path / prefix

    @override
    def names(self) -> list[str]:
        return self._names

    @override
    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{self._folder / name} cannot be read: {error}") from None

    @override
    def fingerprint(self) -> str:
        # the time of the last status change (ctime) cannot be set back by programs that copy files, unlike mtime
        stats = ((name, (self._folder / name).stat()) for name in self._names)
        return _hash((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def open_files(path: Path) -> Files:
    """The image files in a ZIP file or a folder.

    Args:
        path: the ZIP file or folder.

    Raises:
        ValueError: the path does not exist, or is a file but not a ZIP file.
    """
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file():
        return ZipFiles(path)
    raise ValueError(f"there is no file or folder {path}")


@dataclass(frozen=True, eq=False)
class ImageList:
    """Names of the images of a data set, and their labels.

    Attributes:
        names: names of the files, in order.
        labels: class of each image; None for images without labels.
        classes: names of the classes, if they are known.
    """

    names: list[str]
    labels: Int64[np.ndarray, "N"] | None
    classes: tuple[str, ...] = ()


def list_images(files: Files, path: Path, labelled: bool = True) -> ImageList:
    """The images among files, with their labels.

    Args:
        files: the files.
        path: where they are, for errors.
        labelled: False to ignore labels.

    Raises:
        ValueError: there are no images; `dataset.json` is damaged or does not fit the images; labels are not classes;
            or there are images beside class folders.
    """
    names = files.names()
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(f"there are no images ({', '.join(SUFFIXES)}) in {path}")
    if not labelled:
        return ImageList(images, None)
    if "dataset.json" in names:
        return _labels_of_json(images, files.read("dataset.json"), path)
    return _labels_of_folders(images, path)


def class_labels(labels: Sequence[Any], path: object) -> Int64[np.ndarray, "N"]:
    """Classes, given as numbers or as one-hot vectors.

    Args:
        labels: the labels of all images.
        path: where the labels are from, for errors.

    Raises:
        ValueError: the labels are neither.
    """
    try:
        array = np.asarray(labels)
    except ValueError:
        raise ValueError(f"labels in {path} are vectors of different lengths") from None
    if array.ndim == 2 and np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():
        return array.argmax(1).astype(np.int64)
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.floor(array)).all()))
    if array.ndim != 1 or not whole or int(array.min()) < 0:
        raise ValueError(
            f"labels in {path} are not classes: they must be numbers 0, 1, 2, ... or one-hot vectors, not like "
            f"{labels[0]!r}; --no-labels (labels=false) ignores them"
        )
    return array.astype(np.int64)


def _labels_of_json(images: list[str], content: bytes, path: Path) -> ImageList:
    """Images with the labels in `dataset.json`."""
    try:
        parsed = json.loads(content)
        entries, classes = parsed["labels"], tuple(map(str, parsed.get("classes") or ()))
        labels = None if entries is None else {str(name).replace("\\", "/"): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'dataset.json in {path} is not {{"labels": [["name", label], ...]}} or {{"labels": null}}: {error!r}'
        ) from None
    if labels is None:
        return ImageList(images, None)
    if missing := [name for name in images if name not in labels]:
        raise ValueError(
            f"dataset.json in {path} has no label for {missing[0]} ({len(missing)} images without a label)"
        )
    if unknown := sorted(labels.keys() - set(images)):
        raise ValueError(
            f"dataset.json in {path} has a label for {unknown[0]}, which does not exist ({len(unknown)} such names)"
        )
    return ImageList(images, class_labels([labels[name] for name in images], path), classes)


def _labels_of_folders(images: list[str], path: Path) -> ImageList:
    """Images with their top folders as classes."""
    loose = [name for name in images if "/" not in name]
    if len(loose) == len(images) or all(_EDM_NAME.fullmatch(name) for name in images):
        return ImageList(images, None)
    if loose:
        raise ValueError(
            f"{path} has images beside its class folders, such as {loose[0]}; move them, or ignore the labels with "
            "--no-labels (labels=false)"
        )
    folders = [name.partition("/")[0] for name in images]
    classes = sorted(set(folders))
    number = {name: label for label, name in enumerate(classes)}
    return ImageList(images, np.array([number[name] for name in folders], np.int64), tuple(classes))


def _without_common_folder(names: Iterable[str]) -> tuple[str, list[str]]:
    """The innermost folder that contains all files, such as "a/b/", and the names of the files in it, sorted."""
    inside, prefix = sorted(names), ""
    while inside and "/" in inside[0]:
        top = inside[0].partition("/")[0] + "/"
        if not all(name.startswith(top) for name in inside):
            break
        inside, prefix = [name.removeprefix(top) for name in inside], prefix + top
    return prefix, inside


def _is_used(name: str) -> bool:
    """True for `dataset.json` and images that are not hidden."""
    *folders, last = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) for part in (*folders, last))
    return not hidden and (last == "dataset.json" or last.lower().endswith(SUFFIXES))


def _hash(entries: Iterable[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry}\n".encode())
    return digest.hexdigest()
