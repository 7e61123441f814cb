"""Data sets, each a recipe that loads into a `Pool`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stablefield.reference import Pool


class Source(ABC):
    """A data set: where it is, and how it becomes a pool."""

    @abstractmethod
    def load(self) -> Pool:
        """All data, resident in memory, with labels if there are any."""


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels with 17 grey levels, in ten classes."""

    def load(self) -> Pool:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images.astype(np.uint8)).unsqueeze(1)
        return Pool(images, torch.from_numpy(found.target.astype(np.int64)), levels=17)


@dataclass(frozen=True)
class Unnamed(Source):
    """The data of a checkpoint from elsewhere: it can be sampled from, but trained only on data with a name."""

    def load(self) -> Pool:
        """Raises:
        ValueError: always.
        """
        raise ValueError("this checkpoint does not say what data it was trained on: name some, as --set data.kind=...")


@dataclass(frozen=True)
class Arrays(Source):
    """An array file: `.npy`, or `.npz` with the data under `data`, `images`, `x` or `arr_0`, and maybe `labels`.

    Attributes:
        path: the file; uint8 (0 .. 255 stands for [-1, 1]) or floating, (N, *D); images are (N, C, H, W).
    """

    path: Path

    def load(self) -> Pool:
        """Raises:
        ValueError: no such file, or no array of a usable type and shape in it.
        """
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        try:
            found = np.load(self.path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} cannot be read as numpy arrays: {error}") from None
        if isinstance(found, np.ndarray):
            return Pool(_data(found, self.path))
        name = next((name for name in ("data", "images", "x", "arr_0") if name in found), None)
        if name is None:
            raise ValueError(f"{self.path} holds {', '.join(found)}; data are expected under data, images, x or arr_0")
        labels = torch.from_numpy(found["labels"].astype(np.int64)) if "labels" in found else None
        return Pool(_data(found[name], self.path), labels)


def _data(array: np.ndarray, path: Path) -> torch.Tensor:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path} holds {array.dtype}; data must be uint8 or floating")
    return torch.from_numpy(np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32)))
