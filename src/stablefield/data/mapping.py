"""Arrays on the disk as if they were in memory: read when looked at, and shared by all processes that look."""

import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped


def mapped(path: Path) -> Shaped[np.ndarray, "..."]:
    """An array file, mapped into memory.

    Raises:
        ValueError: it is no array, holds Python objects, or was cut short.
    """
    try:
        array: np.ndarray = _open_map(path)
        expected = path.stat().st_size
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or no array file: {error}") from None
    found = array.offset + array.nbytes if isinstance(array, np.memmap) else expected
    if found != expected:
        raise ValueError(f"{path} is damaged: its array needs {found:,} bytes, the file has {expected:,}")
    return array


def _open_map(path: Path) -> np.ndarray:
    try:
        # copy on write: pages are shared, and whoever writes to the tensor changes his own copy
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError:
        # the system may refuse that for more than all its memory; then they can be read only
        return np.load(path, mmap_mode="r", allow_pickle=False)


def as_tensor(array: Shaped[np.ndarray, "..."]) -> torch.Tensor:
    """A mapped array as a tensor on the same pages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(array)
