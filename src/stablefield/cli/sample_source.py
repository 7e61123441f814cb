"""Inputs of `stablefield evaluate`: the samples that are scored, and the reference that they are compared with."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.cli.progress import progress_bar
from stablefield.cli.sample_store import SampleStore
from stablefield.config import ConfigError, resolve
from stablefield.data import Source, content_hash, guess_kind
from stablefield.evaluate import Statistics
from stablefield.pool import Pool
from stablefield.run import checkpoint_of

__all__ = ["Reference", "SampleSource", "is_run", "open_reference", "open_samples"]


@dataclass(frozen=True, eq=False)
class SampleSource:
    """Samples that are scored, in one or several repeats.

    Attributes:
        repeats: keys of the samples of each repeat: seeds, or indices in a data set.
        take: returns the samples of some keys, (n, *D).
        shape: shape of one sample.
        metadata: where the samples come from; stored with every score.
        images: True if they are images in [-1, 1], which can be shown and given to Inception.
        pool: all samples, if they are a data set.
        seeds: seeds of each repeat, if they are known.
    """

    repeats: Sequence[Sequence[int]]
    take: Callable[[Sequence[int]], Float[Tensor, "n *D"]]
    shape: tuple[int, ...]
    metadata: dict[str, Any]
    images: bool
    pool: Pool | None = None
    seeds: Sequence[Sequence[int]] | None = None

    def first(self, count: int | None) -> "SampleSource":
        """The first samples of a source with one repeat.

        Args:
            count: number of samples; all if None.

        Raises:
            ConfigError: there are fewer.
        """
        (keys,) = self.repeats
        if count is not None and count > len(keys):
            raise ConfigError(f"{self.metadata['name']} holds {len(keys):,} samples, fewer than --samples {count}")
        seeds = self.seeds and [self.seeds[0][:count]]
        return replace(self, repeats=[keys[:count]], seeds=seeds)


@dataclass(frozen=True, eq=False)
class Reference:
    """Data that samples are compared with, or only their statistics.

    Attributes:
        name: where the reference comes from.
        pool: the data; None if only statistics are given.
        statistics: mean and covariance from a file; None if the data are given.
        held_out: data that a run was not trained on.
    """

    name: str
    pool: Pool | None = None
    statistics: Statistics | None = None
    held_out: Pool | None = None

    @cached_property
    def hash(self) -> str:
        """Hash of the data; "" if unknown."""
        return content_hash(self.pool) if self.pool else self.statistics.data if self.statistics else ""

    @property
    def n(self) -> int | None:
        """Number of data points; None if unknown."""
        return len(self.pool) if self.pool else self.statistics.n if self.statistics else None

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of another shape.

        Args:
            shape: shape of one sample.

        Raises:
            ConfigError: the reference data have another shape.
        """
        if self.pool and self.pool.shape != shape:
            raise ConfigError(f"samples of shape {shape} cannot be compared with {self.pool} from {self.name}")

    def metadata(self) -> dict[str, Any]:
        """Name, number of data points and hash, which are stored with every score."""
        return {"name": self.name, "n": self.n, "hash": self.hash or None}


def is_run(path: Path) -> bool:
    """True for a run's folder or a checkpoint, whose samples must be made first.

    Args:
        path: any path.
    """
    return path.suffix == ".safetensors" or (path.is_dir() and checkpoint_of(path).is_file())


def open_reference(path: str) -> Reference:
    """Reference from a path.

    Args:
        path: data of any kind, or an `.npz` file with `mu` and `sigma`.

    Raises:
        ValueError: there is nothing at that path, or its format is unknown.
    """
    if {"mu.npy", "sigma.npy"} <= _arrays(Path(path)):
        return Reference(path, statistics=Statistics.read(Path(path)))
    return Reference(path, _load(_data_source(path)))


def open_samples(path: str) -> SampleSource:
    """Samples from a path.

    Args:
        path: the output of `stablefield sample`, a folder of images, an archive, or data of any kind.

    Raises:
        ValueError: there is nothing at that path, or its format is unknown.
    """
    location = Path(path)
    if (location / "samples.json").is_file():
        return _open_folder(location)
    pool = _load(_data_source(path))
    found = SampleStore.at(location, pool.images)
    store = found if found.out == location and not found.png and found.identity_file.is_file() else None
    metadata = {"name": path} | ({} if store is None else store.metadata())
    seeds = [np.load(location)["seeds"].tolist()] if store and "seeds.npy" in _arrays(location) else None
    return SampleSource(
        [range(len(pool))],
        lambda index: pool.take(torch.tensor(index)),
        pool.shape,
        metadata,
        pool.images,
        pool,
        seeds,
    )


def _load(source: Source) -> Pool:
    """Load a data set, with a progress bar if images must be decoded."""
    with progress_bar("decoding") as progress:
        return source.load(progress)


def _data_source(path: str) -> Source:
    """The data set at a path; archives of samples (`arr_0`) have channels last."""
    kind, found = guess_kind(path)
    section: dict[str, Any] = {"kind": kind, **({"path": found} if found else {})}
    if kind == "arrays" and _channels_last(Path(found)):
        section["channels_last"] = True
    return resolve({"data": section}).make("data")


def _open_folder(folder: Path) -> SampleSource:
    """Samples in a folder of PNG files that `stablefield sample` wrote."""
    store = SampleStore(folder, folder, png=True, images=True)
    seeds = store.seeds()
    if not seeds:
        raise ConfigError(f"{folder} does not hold any samples yet")
    shape = tuple(store.take(seeds[:1]).shape[1:])
    metadata = {"name": str(folder)} | store.metadata()
    return SampleSource([seeds], store.take, shape, metadata, images=True, seeds=[seeds])


def _arrays(path: Path) -> set[str]:
    """Names of the files in an `.npz` archive; empty for anything else."""
    if not (path.is_file() and path.suffix == ".npz" and zipfile.is_zipfile(path)):
        return set()
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def _channels_last(path: Path) -> bool:
    """True for archives of images as bytes, (N, H, W, C), in `arr_0`."""
    if "arr_0.npy" not in _arrays(path):
        return False
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
