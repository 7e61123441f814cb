"""What `stablefield evaluate` judges, and what it compares with."""

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

from stablefield.cli.album import Album
from stablefield.cli.data import progress_bar
from stablefield.config import ConfigError, resolve
from stablefield.data import Source, content_hash, guess_kind
from stablefield.evaluate import Statistics
from stablefield.reference import Pool
from stablefield.run import checkpoint_of


@dataclass(frozen=True, eq=False)
class Subject:
    """What is judged: rows of data, once or several times.

    Attributes:
        repeats: the rows of each repeat.
        take: the data of some rows.
        shape: of one of them.
        about: where they are from.
        images: whether they are images in [-1, 1], to be drawn and seen by Inception.
        pool: all of them, if they are a data set.
        seeds: of each repeat, if they are known.
    """

    repeats: Sequence[Sequence[int]]
    take: Callable[[Sequence[int]], Float[Tensor, "n *D"]]
    shape: tuple[int, ...]
    about: dict[str, Any]
    images: bool
    pool: Pool | None = None
    seeds: Sequence[Sequence[int]] | None = None

    def shortened(self, samples: int | None) -> "Subject":
        """Only the first so many.

        Raises:
            ConfigError: there are fewer.
        """
        (rows,) = self.repeats
        if samples is not None and samples > len(rows):
            raise ConfigError(f"there are {len(rows):,} samples in {self.about['from']}, not {samples:,}")
        seeds = self.seeds and [self.seeds[0][:samples]]
        return replace(self, repeats=[rows[:samples]], seeds=seeds)


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with: data, or only the statistics of some.

    Attributes:
        name: where it is from.
        pool: the data.
        statistics: those in a file; with them there is no pool.
        held_out: data that were kept apart from the pool.
    """

    name: str
    pool: Pool | None = None
    statistics: Statistics | None = None
    held_out: Pool | None = None

    @cached_property
    def hash(self) -> str:
        """Of the data; "" for statistics that do not say."""
        return content_hash(self.pool) if self.pool else self.statistics.data if self.statistics else ""

    @property
    def n(self) -> int | None:
        """How many members it has; None for statistics that do not say."""
        return len(self.pool) if self.pool else self.statistics.n if self.statistics else None

    def refuse_unlike(self, shape: tuple[int, ...]) -> None:
        """Raises:
        ConfigError: what is judged is of another shape.
        """
        if self.pool and self.pool.shape != shape:
            raise ConfigError(f"samples of shape {shape} cannot be compared with {self.pool}")

    def about(self) -> dict[str, Any]:
        """What every number must carry along."""
        return {"from": self.name, "n": self.n, "hash": self.hash or None}


def is_run(path: Path) -> bool:
    """Whether samples are yet to be made: a run's folder, or a checkpoint."""
    return path.suffix == ".safetensors" or (path.is_dir() and checkpoint_of(path).is_file())


def open_reference(place: str) -> Reference:
    """Data of any kind, or statistics: a `.npz` with `mu` and `sigma`.

    Raises:
        ValueError: nothing is there, or nothing that is known.
    """
    if {"mu.npy", "sigma.npy"} <= _arrays(Path(place)):
        return Reference(place, statistics=Statistics.read(Path(place)))
    return Reference(place, loaded(source_of(place)))


def open_samples(place: str) -> Subject:
    """Samples that `stablefield sample` or anyone else made: a folder of images, an archive, or any data.

    Raises:
        ValueError: nothing is there, or nothing that is known.
    """
    path = Path(place)
    if (path / "samples.json").is_file():
        return _of_album(path)
    pool = loaded(source_of(place))
    there = Album.at(path, pool.images)
    album = there if there.out == path and not there.pictures and there.note.is_file() else None
    about = {"from": place} | ({} if album is None else told_by(album))
    seeds = [np.load(path)["seeds"].tolist()] if album and "seeds.npy" in _arrays(path) else None
    rows = range(len(pool))
    return Subject([rows], lambda rows: pool.take(torch.tensor(rows)), pool.shape, about, pool.images, pool, seeds)


def told_by(album: Album) -> dict[str, Any]:
    """What an album says of its samples."""
    return album.identity() | {"evaluations": album.evaluations()}


def loaded(source: Source) -> Pool:
    """Its data, with a bar if they must be decoded first."""
    with progress_bar("decoding") as progress:
        return source.load(progress)


def source_of(place: str) -> Source:
    """The data set that a path leads to; in archives of samples (`arr_0`) channels come last."""
    kind, path = guess_kind(place)
    section: dict[str, Any] = {"kind": kind, **({"path": path} if path else {})}
    if kind == "arrays" and _channels_last(Path(path)):
        section["channels_last"] = True
    return resolve({"data": section}).make("data")


def _of_album(folder: Path) -> Subject:
    album = Album(folder, folder, pictures=True, images=True)
    seeds = album.seeds()
    if not seeds:
        raise ConfigError(f"{folder} holds no samples yet")
    about = {"from": str(folder)} | told_by(album)
    return Subject([seeds], album.take, tuple(album.take(seeds[:1]).shape[1:]), about, True, seeds=[seeds])


def _arrays(path: Path) -> set[str]:
    """The files in an archive of arrays; none if it is something else."""
    if not (path.is_file() and path.suffix == ".npz" and zipfile.is_zipfile(path)):
        return set()
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def _channels_last(path: Path) -> bool:
    if "arr_0.npy" not in _arrays(path):
        return False
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
