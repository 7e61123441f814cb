"""Sources of data: descriptions of a data set that load into a `Pool`.

Arrays in files are mapped into memory: pages are read when they are used, and shared by all processes that use them.
"""

import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, silent
from stablefield.pool import Pool, Values
from stablefield.seeding import generator

__all__ = ["Arrays", "Digits", "Source", "UnknownData", "as_tensor", "map_array", "split"]


@dataclass(frozen=True)
class Source(ABC):
    """Base class of data sets: where the data are, and how they become a pool.

    Attributes:
        holdout: number of data points that are held out from training (see `split`); `load` returns them too.
        values: "image" or "float", as in `Pool`; by default what the file declares, or else what suits the type.
    """

    # not part of the repr, which identifies the data
    holdout: int = field(default=0, kw_only=True, repr=False)
    values: Values | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def load(self, progress: Progress = silent) -> Pool:
        """The data, in memory or mapped into it, with their labels.

        Args:
            progress: called with (done, total) while data are decoded.

        Raises:
            ValueError: the data are missing, damaged, or of a type or shape that is not supported.
        """

    def contents(self) -> Contents:
        """The same data in blocks, to be written elsewhere.

        Raises:
            ValueError: as for `load`.
        """
        return Contents.from_pool(self.load())


def split(pool: Pool, holdout: int) -> tuple[Pool, Pool | None]:
    """Training data and held-out data, as views of a pool.

    The random choice depends on nothing but the two numbers, and a larger held-out set contains every smaller one.

    Args:
        pool: all data.
        holdout: number of data points to hold out; 0 for none.

    Returns:
        Both views, each in the order of the pool; the second is None if nothing is held out.

    Raises:
        ValueError: holdout is negative, or no data would be left to train on.
    """
    if not 0 <= holdout < len(pool):
        raise ValueError(
            f"holdout must be at least 0 and less than the {len(pool)} data points there are, not {holdout}"
        )
    if holdout == 0:
        return pool, None
    held_out, trained = torch.randperm(len(pool), generator=generator(0, "holdout")).split(
        [holdout, len(pool) - holdout]
    )
    return pool.subset(trained.sort().values), pool.subset(held_out.sort().values)


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels with 17 grey levels, in ten classes."""

    @override
    def load(self, progress: Progress = silent) -> Pool:
        table = _digits_table()
        images = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 1, 8, 8)
        return Pool(images, torch.from_numpy(table[:, -1].astype(np.int64)), num_levels=17, values=self.values)


def _digits_table() -> np.ndarray:
    """Pixels and class of each digit, read from scikit-learn's file: importing sklearn would take a second."""
    places = spec.submodule_search_locations if (spec := find_spec("sklearn")) else None
    file = Path(places[0], "datasets", "data", "digits.csv.gz") if places else None
    if file and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


@dataclass(frozen=True)
class UnknownData(Source):
    """Unknown training data of a checkpoint of another project, which can be sampled from but not trained further."""

    @override
    def load(self, progress: Progress = silent) -> Pool:
        raise ValueError(
            "the checkpoint does not say which data it was trained on; set the data, for example "
            "--set data.kind=images --set data.path=PATH"
        )


@dataclass(frozen=True)
class Arrays(Source):
    """Array file: `.npy`, or `.npz` with the data named `data`, `images`, `x` or `arr_0`, and optionally `labels`.

    A `.npy` file of uint8 or float32 is mapped into memory. An archive may also contain `num_levels`, `values`, and the
    names of the `classes`.

    Attributes:
        path: the file, with data (N, *D) of type uint8 (0 .. 255 stands for [-1, 1]) or floating; images are
            (N, C, H, W).
        channels_last: True if the data are (N, H, W, C). It must be set for bytes whose shape looks like that.
    """

    path: Path
    channels_last: bool | None = None

    @override
    def load(self, progress: Progress = silent) -> Pool:
        arrays = self._read()
        name = next((name for name in ("data", "images", "x", "arr_0") if name in arrays), None)
        if name is None:
            raise ValueError(
                f"{self.path} contains the arrays {', '.join(arrays)}; the data must be named data, images, x or arr_0"
            )
        data = self._data(arrays[name])
        if (other := {"label", "y", "targets"} & arrays.keys()) and "labels" not in arrays:
            raise ValueError(f"{self.path} contains an array {other.pop()}; labels must be named labels")
        labels = torch.from_numpy(_whole_numbers(arrays["labels"], self.path)) if "labels" in arrays else None
        num_levels, values = int(arrays.get("num_levels", 256)), self.values or _declared_values(arrays)
        try:
            return Pool(as_tensor(data), labels, num_levels, values=values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @override
    def contents(self) -> Contents:
        return Contents.from_pool(self.load(), tuple(map(str, self._read(("classes",)).get("classes", ()))))

    def _read(self, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """The arrays of the file by name; by default all of them."""
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        if not zipfile.is_zipfile(self.path):
            return {"data": map_array(self.path)}
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive if not names or name in names}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} cannot be read as numpy arrays: {error}") from None

    def _data(self, array: np.ndarray) -> np.ndarray:
        """The data as uint8 or float32, with the channels first."""
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ValueError(f"{self.path} contains {array.dtype}; data must be uint8 or floating")
        if self.channels_last is None and _looks_channels_last(array):
            raise ValueError(
                f"{self.path} contains {array.shape}, which looks like (N, H, W, C); set channels_last=true if it is, "
                "or channels_last=false for (N, C, H, W)"
            )
        array = np.moveaxis(array, -1, 1) if self.channels_last else array
        return np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))


def map_array(path: Path) -> Shaped[np.ndarray, "..."]:
    """A `.npy` file, mapped into memory; writing to the array does not change the file.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not an array, contains Python objects, or was cut short.
    """
    try:
        array: np.ndarray = _open_map(path)
        size = path.stat().st_size
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or not an array file: {error}") from None
    expected = array.offset + array.nbytes if isinstance(array, np.memmap) else size
    if expected != size:
        raise ValueError(f"{path} is damaged: its array needs {expected:,} bytes, the file has {size:,}")
    return array


def as_tensor(array: Shaped[np.ndarray, "..."]) -> torch.Tensor:
    """A tensor that shares the memory of an array, also of one that is mapped read-only.

    Args:
        array: the array.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(array)


def _open_map(path: Path) -> np.ndarray:
    try:
        # copy on write: processes share the pages until one writes to its own copy
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError:
        # the system may refuse copy on write for files larger than its memory; then they can be read only
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _declared_values(arrays: dict[str, np.ndarray]) -> Any:
    """The declaration "image" or "float" in an archive; an array `values` that is not a string is something else."""
    declared = arrays.get("values")
    return str(declared) if declared is not None and declared.shape == () and declared.dtype.kind == "U" else None


def _looks_channels_last(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3)


def _whole_numbers(labels: np.ndarray, path: Path) -> Int64[np.ndarray, "N"]:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"labels in {path} are {labels.dtype} {labels.shape}; they must be whole numbers of shape (N,)"
        )
    return labels.astype(np.int64)
