"""A run: its folder, and the parts that its configuration names.

runs/digits/config.toml               everything that was configured, and everything that was not
            checkpoint.safetensors    weights, their averages, the optimiser: the newest of the checkpoints
            checkpoints/              those before it, as many as `training.keep` says
            best.safetensors          the best of them all, where they are scored
            metrics.jsonl             what was measured on the way
            tensorboard/, grids/      the same as events; samples on the way
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stablefield.banded import Banded
from stablefield.checkpoint import Checkpoint, CheckpointError, create_text, finite, read, write_text
from stablefield.config import Allowed, Config, ConfigError, resolve
from stablefield.data import (
    IDX,
    Arrays,
    Augmentation,
    Batches,
    LabelDropout,
    NeighbourDistances,
    Progress,
    Shuffled,
    Source,
    Store,
    content_hash,
    silent,
    split,
)
from stablefield.denoise import Denoiser, Preconditioned
from stablefield.objective import Objective
from stablefield.posterior import exact
from stablefield.pruned import PrunedDataset
from stablefield.ranks import Ranks
from stablefield.reference import Pool, Values, values_of
from stablefield.sample import Sampler
from stablefield.seeding import derive
from stablefield.shards import ALONE, Shards
from stablefield.target import TargetEstimator
from stablefield.times import Stratified


@dataclass(frozen=True)
class Folder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def older(self, images: int) -> Path:
        """Where a checkpoint goes when a newer one comes."""
        return self.path / "checkpoints" / f"{images:09d}.safetensors"

    def olders(self) -> dict[int, Path]:
        """The checkpoints before the newest, by the images they have seen."""
        found = (self.path / "checkpoints").glob("[0-9]*.safetensors")
        return {int(path.stem): path for path in sorted(found) if path.stem.isdigit()}

    def newest(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        try:
            return read(self.checkpoint)
        except CheckpointError as error:
            others = [*self.olders().values(), *([self.best] if self.best.exists() else [])]
            hint = f"; to go on from an older one, copy {others[-1]} to {self.checkpoint}" if others else ""
            raise CheckpointError(f"{error}{hint}") from None

    def occupied(self) -> bool:
        """Whether a run is here already, finished or not."""
        return self.config.exists() or self.checkpoint.exists()

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(finite(line)) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.metrics} ({error})") from error

    def claim(self, config: Config) -> None:
        """Begin a run here, unless another has: of several that begin at once one succeeds.

        Raises:
            ConfigError: a run is here already, finished or not.
            OSError: the disk is full, or cannot be written; no run is here then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.refuse_if_occupied()
        try:
            create_text(self.config, config.toml())
        except FileExistsError:
            self.refuse_if_occupied()
            raise

    def refuse_if_occupied(self) -> None:
        """Raises:
        ConfigError: a run is here already, finished or not.
        """
        if self.occupied():
            raise ConfigError(
                f"{self.path} holds a run already: go on with it by --resume {self.path}, or choose another --out"
            )

    def history(self) -> list[dict[str, Any]]:
        """All lines of the metrics, but for those that were cut off as they were written."""
        lines = self.metrics.read_text(errors="replace").split("\n")[:-1] if self.metrics.exists() else []
        return [found for line in lines if (found := _whole(line)) is not None]

    def rewind(self, images: int) -> None:
        """Forget metrics and pictures from after so many images: that part of the run will happen again."""
        kept = (line for line in self.history() if round(line["Progress/kimg"] * 1000) <= images)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if self.metrics.exists():
            write_text(self.metrics, text)
        for grid in self.grids.glob("[0-9]*.png"):
            if int(grid.stem) > images:
                grid.unlink()

    def sweep(self) -> None:
        """Remove what a process had begun to write here when it was killed."""
        for place in (self.path, self.path / "checkpoints", self.grids):
            for file in place.glob(".*"):
                if re.fullmatch(r"\.\d+\.(config\.toml|metrics\.jsonl|\d+\.png|\w+\.safetensors)", file.name):
                    file.unlink(missing_ok=True)


def _whole(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "Progress/kimg" in found else None


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that a path means: the file itself, or the one in a run's folder."""
    return Folder(run).checkpoint if run.is_dir() or not run.suffix else run


@dataclass(frozen=True, eq=False)
class Parts:
    """What a configuration stands for, made and ready.

    Attributes:
        data: everything the source gave, labels included.
        pool: what is trained on; it has labels only if the network is told them.
        held_out: members that are never trained on, nor used as references; labelled as the pool is.
    """

    data: Pool
    pool: Pool
    denoiser: Denoiser
    objective: Objective
    batches: Batches
    held_out: Pool | None = None


def assemble(config: Config, progress: Progress = silent, ranks: Ranks | None = None) -> Parts:
    """Load the data (`progress` is told if they must be decoded first), and make every part of a training run.

    Args:
        ranks: this process among those that train together; alone, and where the configuration says, if not given.

    Raises:
        ValueError: parts that do not fit the data (sizes, shapes, missing labels).
    """
    training = config.training
    if training.deterministic:  # cuBLAS looks at it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ranks = ranks or Ranks(choose_device(training.device))
    source: Source = config.make("data")
    data = source.load(progress)
    if training.sample_every and not data.images:
        raise ConfigError(
            f"training.sample_every: data {data.shape} with values={data.values} are no pictures to make grids of; say "
            "0, or data.values=image if they are images in [-1, 1]"
        )
    if training.conditional and data.labels is None:
        raise ConfigError("training.conditional needs labels, and the data have none")
    pool, held_out = _kept_apart(data if training.conditional else replace(data, labels=None), source.holdout)
    augmentation: Augmentation = config.make("augmentation")
    shards = _shards(config, ranks)
    try:
        pool = augmentation.of_pool(pool)
    except ValueError as error:
        raise ConfigError(f"augmentation: {error}") from None
    if shards.total == 1:
        pool = resident(pool, ranks.device)
    times = Stratified(config.make("times")) if training.stratified else config.make("times")
    order = Shuffled(pool, training.batch_size, training.seed, ranks.rank, ranks.total)
    target = _make_target(config, order, shards, ranks.device, progress)
    denoiser = make_denoiser(config, pool.shape, pool.classes).to(ranks.device)
    _try_out(denoiser, pool, augmentation.dim)
    batches = augmentation.of_batches(order, training.seed, ranks.device)
    if training.label_dropout:
        batches = LabelDropout(batches, training.label_dropout, training.seed)
    return Parts(
        data,
        pool,
        denoiser,
        Objective(times, target, config.make("weight")),
        batches,
        held_out,
    )


def _kept_apart(data: Pool, holdout: int) -> tuple[Pool, Pool | None]:
    """What is trained on, and what is held out."""
    _check_classes(data)
    try:
        pool, held_out = split(data, holdout)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    if data.labels is not None and pool.labels is not None and len(pool.labels.unique()) < data.classes:
        raise ConfigError(f"data.holdout={holdout} leaves a class without members to train on: hold out fewer")
    return pool, held_out


def _shards(config: Config, ranks: Ranks) -> Shards:
    """How ranks share the references out: each keeps its part on its device, and the data stay where they are."""
    if not config["target"].get("sharded"):
        return ALONE
    return Shards(ranks.rank, ranks.total, ranks.gather, partial(resident, device=ranks.device))


def _make_target(
    config: Config, order: Shuffled, shards: Shards, device: torch.device, progress: Progress
) -> TargetEstimator:
    kind, pool = config["target"]["kind"], order.pool
    distances = NeighbourDistances(pool, device=exact(device), progress=progress)
    needs: dict[str, dict[str, Any]] = {
        "single": {},
        "rolling": {"order": order},
        "full": {"pool": pool, "shards": shards},
        "pruned": {"pool": pool, "distances": distances, "shards": shards},
        "auto": {"pool": pool, "distances": distances},
    }
    try:
        target: TargetEstimator = config.make("target", **needs.get(kind, {"pool": pool}))
    except ValueError as error:
        raise ConfigError(f"target: {error}") from None
    if isinstance(target, PrunedDataset) or (isinstance(target, Banded) and target.measures):
        distances.prepare(untold=config.training.label_dropout > 0)
    return target


def resident(pool: Pool, device: torch.device, share: float = 0.1) -> Pool:
    """The pool on a GPU, if its data take no more than this share of its memory; else where it is.

    On a CPU, too, it stays where it is: data mapped from a file are in memory once for all processes of a machine.
    """
    if device.type != "cuda" or pool.nbytes > share * torch.cuda.get_device_properties(device).total_memory:
        return pool
    return pool.to(device)


def _check_classes(pool: Pool) -> None:
    if pool.labels is None:
        return
    present = pool.labels.unique().tolist()
    if present != list(range(len(present))):
        missing = next(label for label, found in enumerate(present) if label != found)
        raise ConfigError(
            f"a network that is told classes needs them counted from 0 without gaps: class {missing} has no member, "
            f"but there is a class {present[-1]}"
        )


@torch.no_grad()
def _try_out(denoiser: Preconditioned, pool: Pool, told: int) -> None:
    """Ask a fresh network once, so that one that cannot answer is refused before any work."""
    parameter = next(denoiser.parameters(), None)
    if parameter is None:
        raise ConfigError("the network has no parameters to train")
    x = torch.zeros(2, *pool.shape, device=parameter.device)
    t = torch.full((2,), 0.5, device=parameter.device)
    label = None if pool.labels is None else torch.zeros(2, dtype=torch.int64, device=parameter.device)
    augmentation = torch.zeros(2, told, device=parameter.device) if told else None
    try:
        answer = denoiser.eval()(x, t, label, augmentation)
    except Exception as error:
        raise ConfigError(f"the network cannot be asked about data {pool.shape}: {_said(error)}") from error
    if answer.shape != x.shape:
        raise ConfigError(f"the network answers {tuple(answer.shape)} when asked about {tuple(x.shape)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def make_denoiser(config: Config, shape: tuple[int, ...], classes: int) -> Preconditioned:
    """A denoiser with fresh weights, which follow from the seed."""
    told = {"label_dim": classes} if classes else {}
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(config.training.seed, "weights"))
        try:
            network = config.make("network", shape=shape, **told)
        except ConfigError:
            raise
        except Exception as error:  # anyone's network may fail in any way
            kind = config["network"]["kind"]
            raise ConfigError(f"the network {kind!r} cannot be made for data {shape}: {_said(error)}") from error
    return Preconditioned(network, config.make("process"), config.make("scaling"), classes)


def make_sampler(config: Config) -> Sampler:
    """The sampler of a run, on its grid."""
    return config.make("sampler", grid=config.make("grid"))


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None


def describe(config: Config, pool: Pool) -> dict[str, Any]:
    """What a checkpoint remembers: the configuration, and what the data said of shape, classes and values."""
    return {
        "config": config.sections,
        "shape": list(pool.shape),
        "classes": pool.classes,
        "levels": pool.levels,
        "values": pool.values,
    }


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained run, ready to sample from.

    Its samples are images, to be drawn and written as bytes, or floats, never clipped: as the data were.

    Attributes:
        checksum: of the checkpoint; it also says which of its weights these are.
        data: hash of the data that it was trained on (see `fingerprint`); "" if the checkpoint does not say.
    """

    denoiser: Denoiser
    config: Config
    shape: tuple[int, ...]
    levels: int
    values: Values
    images: int
    checksum: str
    data: str = ""


def open_run(
    run: str | Path, *, weights: str = "average", device: str = "auto", allow: Iterable[Allowed] = ()
) -> Trained:
    """A trained run from its folder, or a checkpoint from its file.

    Args:
        weights: as of `load`.
        allow: as of `load`.

    Raises:
        CheckpointError: there is none, or it is damaged or another program's.
        ConfigError: the checkpoint names a class that is not allowed, or its configuration is not valid.
        ValueError: the checkpoint has no such weights.
    """
    path = Path(run)
    if weights == "best" and not Folder(path).best.exists():
        raise ValueError(f"{path} keeps no best checkpoint: none were scored (data.holdout makes a run score them)")
    found = read(Folder(path).best if weights == "best" else checkpoint_of(path))
    try:
        config = resolve(found.config["config"], allow=allow)
        shape, classes = tuple(found.config["shape"]), int(found.config["classes"])
        levels = int(found.config["levels"])
        values = _values(found.config.get("values"), config, shape)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not say what it is a checkpoint of: {error} is missing") from None
    denoiser = make_denoiser(config, shape, classes)
    name = "average" if weights == "best" else weights
    state = _weights(found, name)
    try:
        denoiser.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f'{path} has no "{weights}" weights for its network: {error}') from None
    denoiser = denoiser.to(choose_device(device)).eval().requires_grad_(False)
    checksum = found.checksum if name == "average" else f"{found.checksum} {name}"
    return Trained(denoiser, config, shape, levels, values, found.images, checksum, found.config.get("data", ""))


def _values(said: str | None, config: Config, shape: tuple[int, ...]) -> Values:
    """What a checkpoint says that its data are; older ones do not say it, and go by the data."""
    source: Source = config.make("data")
    if said is None and isinstance(source, (Arrays, IDX, Store)):
        try:
            said = source.load().values
        except (ValueError, OSError):
            said = "float"  # the data are elsewhere: as floats nothing of the samples is lost
    try:
        return values_of(said, True, shape)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit its data: {error}") from None


def fingerprint(pool: Pool, most: int = 2**28) -> str:
    """A hash of the data; beyond `most` bytes, of so much of them, evenly spread."""
    stride = -(-len(pool) * pool.data[0].nbytes // most)
    if stride <= 1:
        return content_hash(pool)
    return f"{content_hash(pool.subset(torch.arange(0, len(pool), stride)))} of {len(pool)}"


def refuse_other_data(data: Pool, found: str, known: str, way_out: str) -> None:
    """Refuse data that are not those of a run.

    Args:
        data: what was loaded.
        found: their hash (see `fingerprint`).
        known: the hash that the run remembers; "" if it does not.
        way_out: what can be done, to end the message.

    Raises:
        ConfigError: the hashes differ, or the run remembers none.
    """
    if not known:
        raise ConfigError(f"the checkpoint does not say which data the run was trained on (it has no hash); {way_out}")
    if found != known:
        raise ConfigError(
            f"these are not the data that the run was trained on: {data!r} has the hash {_short(found)}, and the "
            f"run's data {_short(known)}; {way_out}"
        )


def _short(found: str) -> str:
    digest, of, count = found.partition(" of ")
    return f"{digest[:16]}{of}{count}"


def training_data(trained: Trained, progress: Progress = silent, *, way_out: str) -> Pool:
    """Load the data of a run again: all of them, those held out too.

    Raises:
        ConfigError: what lies there now are other data, or the checkpoint does not say which they were.
    """
    data: Pool = trained.config.make("data").load(progress)
    refuse_other_data(data, fingerprint(data), trained.data, way_out)
    return data


def _weights(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """One set of weights of a checkpoint."""
    there = sorted({key.partition(".")[0] for key in checkpoint.tensors})
    names = [each for each in there if each == "model" or each.startswith("average")]
    if name not in names:
        raise ValueError(f"there are no weights {name!r} here, but {', '.join(names)}; or best, where a run keeps it")
    return {key.removeprefix(f"{name}."): t for key, t in checkpoint.tensors.items() if key.startswith(f"{name}.")}


def load(run: str | Path, *, weights: str = "average", device: str = "auto", allow: Iterable[Allowed] = ()) -> Denoiser:
    """The denoiser of a run: answers E[x | x_t], in evaluation mode, on a GPU if there is one.

    Args:
        run: the run's folder, or a checkpoint file.
        weights: "average" (the first EMA, for sampling), "average-HALFLIFE" (another), "model" (the last ones), or
            "best" (the average of the run's best checkpoint, where these are scored).
        device: "auto", or as torch names it.
        allow: classes outside this package that the run's network may be, each as the class or as `module:Class`.
            Nothing that a run names is imported otherwise.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or another program's.
        ConfigError: the checkpoint names a class that is not allowed.
        ValueError: the checkpoint has no such weights.
    """
    return open_run(run, weights=weights, device=device, allow=allow).denoiser
