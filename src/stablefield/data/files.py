"""Image files in a ZIP file or a folder: their names in order, contents and labels.

Each file is used once, whatever links lead to it. Hidden files are ignored; other files that are not images, and links
to files that are there already, are counted in a note.

Labels are read from `dataset.json` in the layout of EDM and StyleGAN,

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", [0, 1, 0]], ...]}     or {"labels": null}

Without that file, each top folder is a class, numbered in alphabetical order. If a single folder contains everything,
the folders in it count as the top folders.
"""

import hashlib
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from typing_extensions import override

from stablefield.data.decode import SUFFIXES
from stablefield.data.labels import class_labels
from stablefield.data.limits import MAX_FILE, read_json
from stablefield.data.notices import summarize
from stablefield.files import printable

LABELS = "dataset.json"  # the file of labels

# names of the images in order, their labels, and the names of the classes, if they are known
ImageList = tuple[list[str], Int64[np.ndarray, "N"] | None, tuple[str, ...]]

# EDM's layout has folders of a thousand images, which are not classes
_EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")


class Files(AbstractContextManager["Files"], ABC):
    """Base class of collections of image files and `dataset.json`, in a context that keeps them open.

    Names are relative to the innermost folder that contains all files. They have forward slashes and composed letters
    (NFC), whichever program wrote them.

    Attributes:
        path: the ZIP file or folder.
        notes: lines that say which files were passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open_files = ExitStack()
        found = list(self._find())
        used = [(name, entry) for name, entry in found if _is_used(name)]
        if doubled := [name for name, count in Counter(name for name, _ in used).items() if count > 1]:
            raise ValueError(summarize(f"{path} contains two files of one name", doubled))
        entries = dict(used)
        self._prefix, names = _without_common_folder(entries)
        self._entries = {name: entries[self._prefix + name] for name in names}
        self.notes = (*_passed_over((name for name, _ in found), path), *self._links())

    @override
    def __exit__(self, *error: object) -> None:
        self._open_files.close()

    def images(self, labelled: bool = True) -> ImageList:
        """Names of the images, their labels (None without), and the names of the classes.

        Args:
            labelled: False to ignore labels.

        Raises:
            ValueError: no image was found; `dataset.json` is damaged or does not fit the images; labels are not
                classes; or there are images beside class folders.
        """
        images = [name for name in self._entries if name.lower().endswith(SUFFIXES)]
        if not images:
            known = ", ".join(SUFFIXES)
            more = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise ValueError(f"there are no images ({known}) in {printable(self.path)}{more}")
        if not labelled:
            return images, None, ()
        if LABELS in self._entries:
            return _labels_of_json(images, self.read(LABELS), self.path)
        return _labels_of_folders(images, self.path)

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file; several threads may read at once.

        Args:
            name: one of the names of images.

        Raises:
            ValueError: the file is damaged, too large or cannot be read.
        """

    def fingerprint(self) -> str:
        """Hash that changes whenever a file does, computed without reading the files."""
        digest = hashlib.sha256()
        for name, entry in self._entries.items():
            digest.update(f"{(name, *self._state(entry))}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @abstractmethod
    def _find(self) -> Iterable[tuple[str, Any]]:
        """Names and entries of all files."""

    @abstractmethod
    def _state(self, entry: Any) -> tuple[int, ...]:
        """Numbers that change whenever a file does."""

    def _links(self) -> Iterator[str]:
        """Notes about links that were not followed."""
        yield from ()


class _ZipFiles(Files):
    """The files in a ZIP file."""

    @override
    def _find(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        try:
            self._archive = self._open_files.enter_context(zipfile.ZipFile(self.path))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path} is not a ZIP file, or was cut short: {printable(error)}") from None
        return ((_zip_name(entry), entry) for entry in self._archive.infolist() if not entry.filename.endswith("/"))

    @override
    def read(self, name: str) -> bytes:
        entry, shown = self._entries[name], printable(f"{self._prefix}{name} in {self.path}")
        _refuse_large(shown, entry.file_size)
        try:
            return self._archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise ValueError(f"{shown} cannot be read: {printable(error)}") from None
        except Exception as error:  # the decoders of unusual compressions have errors of their own
            raise ValueError(f"{shown} cannot be unpacked: {printable(repr(error))}") from None

    @override
    def _state(self, entry: zipfile.ZipInfo) -> tuple[int, ...]:
        return entry.file_size, entry.CRC  # the central directory contains a checksum of every file


class _FolderFiles(Files):
    """The files in a folder and its subfolders."""

    @override
    def _find(self) -> list[tuple[str, tuple[Path, os.stat_result]]]:
        self._walk = _Walk(self.path)
        return self._walk.files

    @override
    def read(self, name: str) -> bytes:
        path, _ = self._entries[name]
        try:
            _refuse_large(printable(path), path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error.strerror or error}") from None

    @override
    def _state(self, entry: tuple[Path, os.stat_result]) -> tuple[int, ...]:
        # the time of the last status change (ctime) cannot be set back by programs that copy files, unlike mtime
        return entry[1].st_size, entry[1].st_mtime_ns, entry[1].st_ctime_ns

    @override
    def _links(self) -> Iterator[str]:
        return self._walk.notes()


class _Walk:
    """Regular files below a folder, each once: files and folders in it come before links that lead to them."""

    def __init__(self, root: Path) -> None:
        self.files: list[tuple[str, tuple[Path, os.stat_result]]] = []
        self._root, self._seen, self._links = root, set[tuple[int, int]](), [("", root)]
        self._aliases: list[str] = []
        self._broken: list[str] = []
        while self._links:  # a linked folder may contain links
            links, self._links = sorted(self._links), []
            for name, path in links:
                self._follow(name, path)

    def notes(self) -> Iterator[str]:
        """Lines about links that lead nowhere, or to files that are there already."""
        if self._aliases:
            yield summarize(f"{self._root}: passed over links to files that are there already", self._aliases, 3)
        if self._broken:
            yield summarize(f"{self._root}: passed over broken links and files that are not regular", self._broken, 3)

    def _follow(self, name: str, path: Path) -> None:
        """Add what a link leads to; a link to a folder around it would add everything again."""
        try:
            found = path.stat()
        except OSError:
            self._broken.append(name)
            return
        inside = (
            name
            and stat.S_ISDIR(found.st_mode)
            and Path(os.path.realpath(self._root)).is_relative_to(os.path.realpath(path))
        )
        if inside:
            self._aliases.append(name)
        elif stat.S_ISDIR(found.st_mode):
            self._add_folder(name, path, found)
        else:
            self._add_file(name, path, found)

    def _add_folder(self, name: str, path: Path, found: os.stat_result) -> None:
        folders = [(name, path, found)]
        while folders:
            name, path, found = folders.pop()
            if not self._is_new(name, found):
                continue
            try:
                entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError as error:
                raise ValueError(f"{printable(path)} cannot be read: {error.strerror or error}") from None
            for entry in entries:
                inner = f"{name}/{entry.name}" if name else entry.name
                if entry.is_symlink():
                    self._links.append((inner, Path(entry.path)))
                elif entry.is_dir():
                    folders.append((inner, Path(entry.path), os.stat(entry.path)))
                else:
                    self._add_file(inner, Path(entry.path), os.stat(entry.path))

    def _add_file(self, name: str, path: Path, found: os.stat_result) -> None:
        name = _normal_name(name)
        if not stat.S_ISREG(found.st_mode):
            self._broken.append(name)
        elif not _is_used(name) or self._is_new(name, found):
            self.files.append((name, (path, found)))

    def _is_new(self, name: str, found: os.stat_result) -> bool:
        """True the first time that a file or folder is found."""
        identity = (found.st_dev, found.st_ino)
        if identity in self._seen:
            self._aliases.append(name)
            return False
        self._seen.add(identity)
        return True


def open_files(path: Path) -> Files:
    """The image files in a ZIP file or a folder.

    Args:
        path: the ZIP file or folder.

    Raises:
        ValueError: the path does not exist; a file is not a ZIP file or is damaged; a subfolder cannot be read; or two
            files have one name, or names that differ only in their slashes or in how accents are written.
    """
    if path.is_dir():
        return _FolderFiles(path)
    if path.is_file():
        return _ZipFiles(path)
    raise ValueError(f"there is no file or folder {printable(path)}")


def _without_common_folder(names: Iterable[str]) -> tuple[str, list[str]]:
    """The innermost folder that contains all files, such as "a/b/", and the names of the files in it, sorted."""
    inside, prefix = sorted(names), ""
    while inside and "/" in inside[0]:
        top = inside[0].partition("/")[0] + "/"
        if not all(name.startswith(top) for name in inside):
            break
        inside, prefix = [name.removeprefix(top) for name in inside], prefix + top
    return prefix, inside


def _normal_name(name: str) -> str:
    """A name with forward slashes and composed letters (NFC), whichever program wrote it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Name of a file in a ZIP file; UTF-8 that is not marked as such, as macOS writes it, is recognised."""
    name = entry.filename
    if not entry.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return _normal_name(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _is_used(name: str) -> bool:
    """True for `dataset.json` and images that are not hidden."""
    last = name.rpartition("/")[2]
    return not _is_hidden(name) and (last == LABELS or last.lower().endswith(SUFFIXES))


def _passed_over(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """A note with the number of files that are neither images nor hidden, by suffix."""
    suffixes = Counter(
        os.path.splitext(name)[1].lower() or "no suffix"
        for name in names
        if not _is_used(name) and not _is_hidden(name)
    )
    if not suffixes:
        return ()
    shown = ", ".join(f"{count:,} {printable(suffix, 20)}" for suffix, count in suffixes.most_common(5))
    return (f"{printable(path)}: passed over {suffixes.total():,} files that are not images by their names ({shown})",)


def _refuse_large(name: str, size: int) -> None:
    if size > MAX_FILE:
        raise ValueError(f"{name} has {size:,} bytes; the limit for an image file is {MAX_FILE:,}; save it smaller")


def _labels_of_json(images: list[str], content: bytes, path: Path) -> ImageList:
    """Images with the labels in `dataset.json`."""
    name = f"{LABELS} in {printable(path)}"
    if len(content) > 2**20 + 2**16 * len(images):
        raise ValueError(f"{name} has {len(content):,} bytes; the limit is 1 MiB and 64 KiB per image")
    parsed = read_json(content, name, 1000 + 6 * len(images))
    try:
        entries, classes = parsed["labels"], tuple(map(printable, parsed.get("classes") or ()))
        listed = None if entries is None else [(_normal_name(str(image)), label) for image, label in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{name} is not {{"labels": [["name", label], ...]}} or {{"labels": null}}: {printable(repr(error))}'
        ) from None
    if listed is None:
        return images, None, ()
    labels = dict(listed)
    known = set(images)
    problems = {
        "has two labels for": [image for image, label in listed if labels[image] != label],
        "has no label for": [image for image in images if image not in labels],
        "has a label for": sorted(labels.keys() - known),
    }
    found = [summarize(problem, names) for problem, names in problems.items() if names]
    if found:
        which = ", which does not exist in the data" if problems["has a label for"] else ""
        raise ValueError(f"{name} {'; it '.join(found)}{which}; --no-labels (labels=false) ignores all labels")
    return images, class_labels([labels[image] for image in images], path, images), classes


def _labels_of_folders(images: list[str], path: Path) -> ImageList:
    """Images with their top folders as classes."""
    loose = [name for name in images if "/" not in name]
    if len(loose) == len(images) or all(_EDM_NAME.fullmatch(name) for name in images):
        return images, None, ()
    if loose:
        raise ValueError(
            f"{summarize(f'{printable(path)} has images beside its class folders', loose)}; move them, or ignore the "
            "labels with --no-labels (labels=false)"
        )
    folders = [name.partition("/")[0] for name in images]
    classes = sorted(set(folders))
    number = {name: label for label, name in enumerate(classes)}
    return images, np.array([number[name] for name in folders], np.int64), tuple(map(printable, classes))
