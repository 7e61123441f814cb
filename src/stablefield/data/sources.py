"""Data sets, each a recipe that loads into a `Pool`."""

import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.mapping import as_tensor, mapped
from stablefield.reference import Pool, Values
from stablefield.seeding import generator


@dataclass(frozen=True)
class Source(ABC):
    """A data set: where it is, and how it becomes a pool.

    Attributes:
        holdout: how many members are kept from training (see `split`); `load` gives them too.
        values: "image" or "float", as of `Pool`; by default what the file says, or what suits the type.
    """

    # not in the repr, which says what the data are
    holdout: int = field(default=0, kw_only=True, repr=False)
    values: Values | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def load(self, progress: Progress = silent) -> Pool:
        """All data, in memory or mapped into it, with labels if there are any; `progress` is told what takes long."""

    def contents(self) -> Contents:
        """The same, block by block, for those who only pass them on."""
        return Contents.of(self.load())


def split(pool: Pool, holdout: int) -> tuple[Pool, Pool | None]:
    """What is trained on, and what is kept from training: a choice that depends on nothing but the two numbers.

    No data are copied. Who holds out more holds out the same members and others.

    Raises:
        ValueError: nothing would be left, or a negative number.
    """
    if not 0 <= holdout < len(pool):
        raise ValueError(f"holdout must leave some of the {len(pool)} members, and cannot be {holdout}")
    if holdout == 0:
        return pool, None
    held_out, trained = torch.randperm(len(pool), generator=generator(0, "holdout")).split(
        [holdout, len(pool) - holdout]
    )
    return pool.subset(trained.sort().values), pool.subset(held_out.sort().values)


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels with 17 grey levels, in ten classes."""

    def load(self, progress: Progress = silent) -> Pool:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
        return Pool(images, torch.from_numpy(found.target.astype(np.int64)), levels=17, values=self.values)


@dataclass(frozen=True)
class Unnamed(Source):
    """The data of a checkpoint from elsewhere: it can be sampled from, but trained only on data with a name."""

    def load(self, progress: Progress = silent) -> Pool:
        """Raises:
        ValueError: always.
        """
        raise ValueError("this checkpoint does not say what data it was trained on: name some, as --set data.kind=...")


@dataclass(frozen=True)
class Arrays(Source):
    """An array file: `.npy`, or `.npz` with the data under `data`, `images`, `x` or `arr_0`, and maybe `labels`.

    A `.npy` in bytes or float32 is mapped into memory. An archive may also say `levels`, `values`, and names of
    `classes`.

    Attributes:
        path: the file; uint8 (0 .. 255 stands for [-1, 1]) or floating, (N, *D); images are (N, C, H, W).
        channels_last: whether they are (N, H, W, C) instead; bytes that look so must say it, or say false.
    """

    path: Path
    channels_last: bool | None = None

    def load(self, progress: Progress = silent) -> Pool:
        """Raises:
        ValueError: no such file, or no array of a usable type and shape in it.
        """
        found = self._read()
        name = next((name for name in ("data", "images", "x", "arr_0") if name in found), None)
        if name is None:
            raise ValueError(f"{self.path} holds {', '.join(found)}; data are expected under data, images, x or arr_0")
        data = self._data(found[name])
        if (other := {"label", "y", "targets"} & found.keys()) and "labels" not in found:
            raise ValueError(f"{self.path} holds {other.pop()}, but labels are expected under the name labels")
        labels = torch.from_numpy(_whole(found["labels"], self.path)) if "labels" in found else None
        try:
            return Pool(as_tensor(data), labels, int(found.get("levels", 256)), values=self.values or _declared(found))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def contents(self) -> Contents:
        return Contents.of(self.load(), tuple(map(str, self._read(("classes",)).get("classes", ()))))

    def _read(self, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """The arrays of the file, by name: those asked for, or all."""
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        if not zipfile.is_zipfile(self.path):
            return {"data": mapped(self.path)}
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive if not names or name in names}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} cannot be read as numpy arrays: {error}") from None

    def _data(self, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ValueError(f"{self.path} holds {array.dtype}; data must be uint8 or floating")
        if self.channels_last is None and _looks_last(array):
            raise ValueError(
                f"{self.path} holds {array.shape}, which looks like images with their channels last: say "
                "channels_last = true if they are, or false if they are (N, C, H, W)"
            )
        array = np.moveaxis(array, -1, 1) if self.channels_last else array
        return np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))


def _declared(found: dict[str, np.ndarray]) -> Any:
    """What the data are as an archive says it; an array of that name that is no word says something else."""
    said = found.get("values")
    return str(said) if said is not None and said.shape == () and said.dtype.kind == "U" else None


def _looks_last(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3)


def _whole(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"labels in {path} are {labels.dtype} {labels.shape}; they must be whole numbers, (N,)")
    return labels.astype(np.int64)
