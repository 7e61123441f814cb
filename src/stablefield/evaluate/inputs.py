"""Inputs of an evaluation: the samples that are scored, and the reference that they are compared with."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablefield.config import ConfigError, resolve
from stablefield.data import Source, StageProgress, content_hash, data_section, range_question, say, silent_stage, split
from stablefield.data.arrays import map_array, read_archive
from stablefield.distributed import Ranks
from stablefield.evaluate.frechet import Statistics
from stablefield.generate import SampleStore, SamplingPlan
from stablefield.generate.plan import sample_to
from stablefield.pool import Pool
from stablefield.run import RunFolder, training_data

Take = Callable[[Sequence[int]], Tensor]  # returns the data of some keys, (n, *D)


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
    take: Take
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
        if len(keys) < 2:
            raise ConfigError(f"{self.metadata['name']} holds {len(keys)} sample; scores need at least 2")
        seeds = self.seeds and [self.seeds[0][:count]]
        return replace(self, repeats=[keys[:count]], seeds=seeds)


@dataclass(frozen=True, eq=False)
class Reference:
    """Data that samples are compared with, or only their statistics.

    What was computed of the data is kept, so that one reference serves several evaluations.

    Attributes:
        name: where the reference comes from.
        pool: the data; None if only statistics are given.
        statistics: mean and covariance from a file; None if the data are given.
        held_out: data that a run was not trained on.
        computed: features and distances of the data that evaluations have computed already.
    """

    name: str
    pool: Pool | None = None
    statistics: Statistics | None = None
    held_out: Pool | None = None
    computed: dict[object, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def hash(self) -> str:
        """Hash of the data; "" if unknown."""
        return content_hash(self.pool) if self.pool else self.statistics.data if self.statistics else ""

    @property
    def n(self) -> int | None:
        """Number of data points; None if unknown."""
        return len(self.pool) if self.pool else self.statistics.n if self.statistics else None

    def metadata(self) -> dict[str, Any]:
        """Name, number of data points and hash, which are stored with every score."""
        return {"name": self.name, "n": self.n, "hash": self.hash or None}


def is_run(path: Path) -> bool:
    """True for a run's folder or a checkpoint, whose samples must be made first.

    Args:
        path: any path.
    """
    return path.suffix == ".safetensors" or (path.is_dir() and RunFolder(path).occupied())


def open_reference(
    reference: str | Path | Pool | Tensor | Statistics | Reference, progress: StageProgress = silent_stage
) -> Reference:
    """Reference from a path or from data in memory.

    Args:
        reference: data of any kind, as a path, a pool or a tensor; or statistics, or an `.npz` file with `mu` and
            `sigma`.
        progress: opens a progress callback while images are decoded.

    Raises:
        ValueError: there is nothing at that path, or its format is unknown.
    """
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, Statistics):
        return Reference("statistics", statistics=reference)
    if isinstance(reference, Pool | Tensor):
        pool = reference if isinstance(reference, Pool) else Pool(reference)
        return Reference(repr(pool), pool)
    path = str(reference)
    if {"mu.npy", "sigma.npy"} <= _arrays(Path(path)):
        return Reference(path, statistics=Statistics.read(Path(path)))
    return Reference(path, _load(_data_source(path), progress))


def training_reference(plan: SamplingPlan, progress: StageProgress = silent_stage) -> Reference:
    """The data that a run was trained on, and those that it held out; refused if the data have changed since.

    Args:
        plan: the run.
        progress: opens a progress callback while images are decoded.

    Raises:
        ConfigError: the data are no longer those of the run.
    """
    source: Source = plan.trained.config.make("data")
    way_out = "restore those, or score against other data with --reference PATH"
    with progress("decoding") as watch:
        data = training_data(plan.trained, watch, way_out=way_out)
    pool, held_out = split(data, source.holdout)
    without = f", without the {len(held_out):,} held out" if held_out else ""
    return Reference(f"{source!r}{without}", pool, held_out=held_out)


def open_samples(samples: object, progress: StageProgress = silent_stage) -> SampleSource:
    """Samples from a path or in memory.

    Args:
        samples: the output of `stablefield sample`, a folder of images, an archive, or data of any kind, as a path; or
            a pool or a tensor (n, *D).
        progress: opens a progress callback while images are decoded.

    Raises:
        ValueError: there is nothing at that path, its format is unknown, or the samples are of another type.
    """
    if isinstance(samples, Pool | Tensor):
        pool = samples if isinstance(samples, Pool) else Pool(samples)
        return SampleSource([range(len(pool))], take_from(pool), pool.shape, {"name": repr(pool)}, pool.images, pool)
    if not isinstance(samples, str | Path):
        raise ValueError(f"samples must be a path, a Pool, a tensor or a run, not {type(samples).__name__}")
    path, location = str(samples), Path(samples)
    if (location / "samples.json").is_file():
        return _open_folder(location)
    pool = _load(_data_source(path), progress)
    found = SampleStore.at(location, pool.images)
    store = found if found.out == location and not found.png and found.identity_file.is_file() else None
    metadata = {"name": path} | ({} if store is None else store.metadata())
    stored = read_archive(location, ["seeds"]) if store and "seeds.npy" in _arrays(location) else {}
    seeds = [stored["seeds"].tolist()] if stored else None
    return SampleSource([range(len(pool))], take_from(pool), pool.shape, metadata, pool.images, pool, seeds)


def sample_run(
    plan: SamplingPlan,
    repeats: Sequence[Sequence[int]],
    keep: Path | None,
    batch_size: int,
    ranks: Ranks,
    progress: StageProgress = silent_stage,
) -> SampleSource:
    """Samples of a run, made if they do not exist; each plan has a folder of its own.

    Args:
        plan: how to make them.
        repeats: seeds of each repeat.
        keep: folder that keeps the samples; by default `evaluated` in the folder of the run.
        batch_size: samples per batch.
        ranks: the ranks that share the work.
        progress: opens a progress callback for sampling.

    Raises:
        ValueError: a seed is out of range.
        OSError: the samples cannot be written.
    """
    key = hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()[:12]
    seeds = [seed for repeat in repeats for seed in repeat]
    with progress("sampling") as watch:
        out = (plan.trained.folder / "evaluated" if keep is None else keep) / key
        store = sample_to(
            plan, out, seeds=seeds, batch_size=batch_size, ranks=ranks, progress=watch, finish=plan.images
        )
    metadata = {"name": plan.name, "training_images": plan.trained.images, **store.metadata()}
    return SampleSource(repeats, store.take, plan.trained.shape, metadata, store.images, seeds=repeats)


def take_from(pool: Pool) -> Take:
    """Function that returns the data points of some indices.

    Args:
        pool: the data.
    """
    return lambda index: pool.take(torch.tensor(index))


def _load(source: Source, progress: StageProgress) -> Pool:
    """Load a data set, with a progress bar if images must be decoded."""
    try:
        with progress("decoding") as watch:
            pool = source.load(watch)
    except ValueError as error:
        if "set data." not in str(error):
            raise
        convert = f"stablefield data convert {source.where} STORE --set data.KEY=VALUE"
        raise ConfigError(f"{error}. Data to evaluate have no keys; convert them first: {convert}") from None
    if question := range_question(pool):
        say(f"{source.where}: {question}")
    return pool


def _data_source(path: str) -> Source:
    """The data set at a path; arrays of images as bytes have channels last, as other programs write them."""
    section = data_section(path)
    if section["kind"] == "arrays" and _channels_last(Path(section["path"])):
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
    if not (path.is_file() and path.suffix == ".npz"):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return set()  # what reads the data says what is wrong


def _channels_last(path: Path) -> bool:
    """True for images as bytes, (N, H, W, C), in `arr_0` of an archive, or in an array if no other axis fits."""
    try:
        if path.suffix == ".npy":
            array = map_array(path)
            shape, dtype = array.shape, array.dtype
        else:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # there is no such array, or what reads the data says what is wrong
        return False
    images = dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
    return images and (path.suffix != ".npy" or shape[1] not in (1, 3))
