"""Array files: `.npy` and `.npz`.

A `.npy` file is mapped into memory: its pages are read when they are used, and shared by all processes that use them.
Headers are compared with the size of the file before any memory is used.
"""

import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.labels import Classes, class_labels, number_classes
from stablefield.data.limits import read_bytes, refuse_unpacked
from stablefield.data.notices import say
from stablefield.data.sources import Source
from stablefield.files import printable
from stablefield.pool import Pool

_DATA = ("data", "images", "x", "arr_0")
_OTHER_LABELS = {"label", "y", "targets"}
_SAVE_AGAIN = "save it with np.savez, which does not compress, or as .npy"


@dataclass(frozen=True)
class Arrays(Source):
    """Array file: `.npy`, or `.npz` with the data named `data`, `images`, `x` or `arr_0`, and optionally `labels`.

    A `.npy` file of uint8 or float32 is mapped into memory. An archive may also contain `num_levels`, `values`, and the
    names of the `classes`.

    Attributes:
        path: the file, with data (N, *D) of type uint8 (0 .. 255 stands for [-1, 1]) or floating; images are
            (N, C, H, W), or (N, H, W) with values="image".
        channels_last: True if the data are (N, H, W, C). It must be set for a shape that looks like that.
    """

    path: Path
    channels_last: bool | None = None

    @override
    def load(self, progress: Progress = silent) -> Pool:
        return self._load()[0]

    @override
    def contents(self) -> Contents:
        pool, classes = self._load()
        contents = Contents.from_pool(pool, classes.names)
        contents.notes.extend([classes.note] if classes.note else [])
        return contents

    def _load(self) -> tuple[Pool, Classes]:
        """The data, and their classes; those of data without labels are empty."""
        where = self.where
        if not self.path.is_file():
            raise ValueError(f"there is no file {where}")
        with self.path.open("rb") as file:
            begin = file.read(64)
        if begin[:2] != b"PK":
            arrays: dict[str, np.ndarray] = {"data": map_array(self.path)}
        else:
            arrays = read_archive(self.path, ("labels", "num_levels", "values", "classes"), _DATA)
        name = next((name for name in _DATA if name in arrays), None)
        if name is None:
            raise ValueError(
                f"{where} contains the arrays {printable(', '.join(arrays))}; the data must be named data, images, x "
                "or arr_0"
            )
        if (other := _OTHER_LABELS & arrays.keys()) and "labels" not in arrays:
            raise ValueError(f"{where} contains an array {other.pop()}; labels must be named labels")
        values = self.values or _declared_values(arrays)
        if others := [other for other in _DATA if other in arrays and other != name]:
            say(f"{where}: the array {name} is used, and {', '.join(others)} passed over")
        data = self._data(arrays[name], values)
        classes = Classes(np.zeros(0, np.int64), _names(arrays.get("classes")))
        labels = None
        if "labels" in arrays:
            classes = number_classes(class_labels(arrays["labels"], self.path), classes.names, self.path)
            labels = torch.from_numpy(classes.labels)
            if classes.note:
                say(classes.note)
        try:
            return Pool(as_tensor(data), labels, _num_levels(arrays, data, where), values=values), classes  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where}: {printable(error)}") from None

    def _data(self, array: np.ndarray, values: str | None) -> np.ndarray:
        """The data as uint8 or float32, with the channels first."""
        where = self.where
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ValueError(
                f"{where} contains {array.dtype}; data must be uint8 or floating: convert them, for example with "
                "array.astype(np.uint8) for values 0 to 255"
            )
        if array.ndim == 3 and values == "image":
            array = array[:, None]
        elif array.ndim == 3 and array.shape[1] == array.shape[2] > 3 and values is None:
            problem = f"{where} contains {array.dtype} {array.shape}, which looks like (N, H, W) without a channel axis"
            if array.dtype == np.uint8:
                raise ValueError(
                    f"{problem}; set data.values=image for grey images (N, 1, H, W), or data.values=float for data of "
                    f"shape {array.shape[1:]}"
                )
            say(f"{problem}; it is used as {array.shape[1]} channels of {array.shape[2]} values")
        if self.channels_last is None and _looks_channels_last(array.shape):
            raise ValueError(
                f"{where} contains {array.dtype} {array.shape}, which looks like (N, H, W, C); set "
                "data.channels_last=true if it is, or data.channels_last=false for (N, C, H, W)"
            )
        if self.channels_last and array.ndim > 2:
            array = np.moveaxis(array, -1, 1)
        return np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))


def map_array(path: Path) -> Shaped[np.ndarray, "..."]:
    """A `.npy` file, mapped into memory; writing to the array does not change the file.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not an array, contains Python objects, or was cut short.
    """
    where = printable(path)
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, _ = _header(file, where, path.stat().st_size)
            offset = file.tell()
        try:
            # copy on write: processes share the pages until one writes to its own copy
            return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")
        except OSError:
            # the system may refuse copy on write for files larger than its memory; then they can be read only
            return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None


def as_tensor(array: Shaped[np.ndarray, "..."]) -> torch.Tensor:
    """A tensor that shares the memory of an array, also of one that is mapped read-only.

    Args:
        array: the array.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(array)


def _header(file: BufferedIOBase, name: str, size: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and size in bytes of the array in an open `.npy` file, which has exactly that size."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is the text of a Python value, which can be wrong in any way
        file.seek(0)
        raise ValueError(f"{name} is damaged, or not an array file: {_describe(file.read(64), error)}") from None
    if dtype.hasobject:
        raise ValueError(f"{name} contains Python objects, which are not read; save it as an array of numbers")
    expected, found = math.prod(shape) * dtype.itemsize, size - file.tell()
    if expected <= 0 or min(shape, default=1) < 0:
        raise ValueError(f"{name} contains no data: its shape is {shape}")
    if expected != found:
        raise ValueError(
            f"{name} is damaged: its array {dtype} {shape} needs {expected:,} bytes, the file has {found:,}"
        )
    return shape, fortran, dtype, expected


def _describe(begin: bytes, error: Exception) -> str:
    """The reason why the beginning of a file is not that of an array."""
    if begin.startswith(b"\x93NUMPY"):
        return printable(error)
    if begin.lstrip()[:1] == b"<":
        return "it is a web page (HTML or XML); download the data again"
    if begin[:2] == b"PK":
        return "it is an archive; give it the suffix .npz"
    return f"it begins with the bytes {begin[:6].hex(' ') or '(none)'}; .npy and .npz files are read"


def read_archive(path: Path, names: Sequence[str], choices: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` file.

    Args:
        path: the file.
        names: names of the arrays to read, as far as they exist.
        choices: further names, of which the first that exists is read.

    Returns:
        All arrays by name; those that are not read are empty.

    Raises:
        ValueError: the file is damaged, contains Python objects, or expands beyond the limit.
    """
    where = printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            chosen = next((name for name in choices if name in entries), "")
            used = {name for name in entries if name in names or name == chosen}
            packed, unpacked = path.stat().st_size, sum(entries[name].file_size for name in used)
            refuse_unpacked(where, packed, unpacked, _SAVE_AGAIN)
            return {
                name: _read_member(archive, entry, f"{printable(name)} in {where}") if name in used else np.empty(0)
                for name, entry in entries.items()
            }
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"{where} is damaged, or cut short as by a download that broke off: {error}") from None


def _read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> np.ndarray:
    """An array of an `.npz` file."""
    try:
        with archive.open(entry) as file:
            shape, fortran, dtype, size = _header(file, name, entry.file_size)  # type: ignore[arg-type]
            flat = read_bytes(file.read, size)
            if len(flat) < size:
                raise ValueError(f"{name} is cut short: it needs {size:,} bytes and has {len(flat):,}")
    except ValueError:
        raise
    except Exception as error:  # damaged archives, and the decoders of unusual compressions, fail in any way
        raise ValueError(f"{name} cannot be read: {printable(error)}") from None
    return flat.view(dtype).reshape(shape, order="F" if fortran else "C")


def _declared_values(arrays: dict[str, np.ndarray]) -> str | None:
    """The declaration "image" or "float" in an archive; an array `values` that is not a string is something else."""
    declared = arrays.get("values")
    return str(declared) if declared is not None and declared.shape == () and declared.dtype.kind == "U" else None


def _num_levels(arrays: dict[str, np.ndarray], data: np.ndarray, where: str) -> int:
    """Number of values of a byte, 256 if an archive does not say it."""
    found = arrays.get("num_levels", np.array(256))
    if found.shape != () or found.dtype.kind not in "iu" or not 2 <= int(found) <= 256:
        raise ValueError(f"num_levels in {where} must be a whole number from 2 to 256")
    levels = int(found)
    if data.dtype == np.uint8 and levels < 256 and (top := int(data.max())) >= levels:
        raise ValueError(f"{where} contains the value {top}, but its num_levels is {levels}: values 0 to {levels - 1}")
    return levels


def _names(classes: np.ndarray | None) -> tuple[str, ...]:
    """Names of classes in an archive."""
    known = classes is not None and classes.ndim == 1 and classes.dtype.kind == "U"
    return tuple(map(printable, classes.tolist())) if known and classes is not None else ()


def _looks_channels_last(shape: Sequence[int]) -> bool:
    """True for (N, H, W, C) with H = W, or with C smaller than H and W, unless the last two sizes are equal."""
    if len(shape) < 4 or shape[-1] == shape[-2]:
        return False
    spatial, last = shape[1:-1], shape[-1]
    return (len(set(spatial)) == 1 and spatial[0] > 3) or (len(shape) == 4 and last < min(spatial))
