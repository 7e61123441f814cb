"""A run on disk: the files of its folder, the denoiser in its checkpoints, and the identity of its data.

runs/digits/config.toml               the resolved configuration
            checkpoint.safetensors    the newest checkpoint: weights, their averages, state of the optimiser
            checkpoints/              the checkpoints before it, up to `training.keep_checkpoints` with the newest
            best.safetensors          the checkpoint with the lowest loss on held-out data, if there are any
            metrics.jsonl             the metrics, one JSON object per line
            loss.png                  the loss, its floor and the excess over it
            tensorboard/, sheets/     the same metrics as events; sheets of samples during training
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stablefield.build import build_denoiser, choose_device, place
from stablefield.checkpoint import Checkpoint, CheckpointError, finite, read
from stablefield.config import Allowed, Config, ConfigError, resolve
from stablefield.data import Progress, silent
from stablefield.data.identity import fingerprint, refuse_other_data
from stablefield.denoise import Denoiser
from stablefield.files import append, sweep, write_text
from stablefield.pool import Pool, Values, values_of

_MOST_VALUES = 2**28  # of one data point: an image of 9,459 x 9,459 pixels in color


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder, which need not exist yet.
    """

    path: Path

    @property
    def config(self) -> Path:
        """File of the resolved configuration."""
        return self.path / "config.toml"

    @property
    def checkpoint(self) -> Path:
        """File of the newest checkpoint."""
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        """File of the best checkpoint; exists only if checkpoints are scored."""
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def loss_figure(self) -> Path:
        """Figure of the loss, its floor and the excess over it."""
        return self.path / "loss.png"

    @property
    def sheets(self) -> Path:
        """Folder of the sheets of samples drawn during training."""
        return self.path / "sheets"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.path / "tensorboard"

    def older_checkpoint(self, images: int) -> Path:
        """File of a checkpoint that is no longer the newest.

        Args:
            images: number of images it has seen.
        """
        return self.path / "checkpoints" / f"{images:09d}.safetensors"

    def older_checkpoints(self) -> dict[int, Path]:
        """Files of the checkpoints before the newest, by the images they have seen, in ascending order."""
        found = (self.path / "checkpoints").glob("[0-9]*.safetensors")
        return {int(path.stem): path for path in sorted(found) if path.stem.isdigit()}

    def newest(self) -> Checkpoint:
        """Read the newest checkpoint.

        Raises:
            CheckpointError: it does not exist or cannot be read; the message names an older one that can be, if any.
        """
        try:
            return read(self.checkpoint)
        except CheckpointError as error:
            others = [*self.older_checkpoints().values(), *([self.best] if self.best.exists() else [])]
            other = next(filter(_is_readable, reversed(others)), None)
            hint = f"; to resume from an older one, copy {other} to {self.checkpoint}" if other else ""
            raise CheckpointError(f"{error}{hint}") from None

    def occupied(self) -> bool:
        """True if the folder holds a run, finished or not."""
        return self.config.exists() or self.checkpoint.exists()

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics.

        Args:
            line: values by the name of the metric; infinities and NaN are written as null.

        Raises:
            OSError: the disk is full or not writable.
        """
        append(self.metrics, json.dumps(finite(line)) + "\n")

    def claim(self, config: Config) -> None:
        """Begin a run in this folder by writing its config.toml; if several processes try at once, one succeeds.

        Args:
            config: the configuration of the run.

        Raises:
            ConfigError: the folder holds a run already.
            OSError: the disk is full or not writable; no run was begun.
        """
        self.refuse_if_occupied()
        try:
            write_text(self.config, config.toml(), new=True)
        except FileExistsError:
            self.refuse_if_occupied()
            raise

    def refuse_if_occupied(self) -> None:
        """Refuse to begin a run where there is one.

        Raises:
            ConfigError: the folder holds a run already, finished or not.
        """
        if self.occupied():
            raise ConfigError(f"{self.path} holds a run already; resume it with --resume {self.path}, or change --out")

    def history(self) -> list[dict[str, Any]]:
        """Complete lines of the metrics; one that was cut off while it was written is left out."""
        lines = self.metrics.read_text(errors="replace").split("\n")[:-1] if self.metrics.exists() else []
        return [found for line in lines if (found := _parse_line(line)) is not None]

    def rewind(self, images: int) -> None:
        """Remove metrics and sheets of samples that are later than a checkpoint the run resumes from.

        Args:
            images: number of images that the checkpoint has seen.
        """
        if self.metrics.exists():
            kept = (line for line in self.history() if round(line["progress/kimg"] * 1000) <= images)
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for sheet in self.sheets.glob("[0-9]*.png"):
            if int(sheet.stem) > images:
                sheet.unlink()

    def sweep(self) -> None:
        """Remove temporary files of a process that was killed while it wrote them."""
        sweep(self.path, self.path / "checkpoints", self.sheets, self.tensorboard)


def _is_readable(path: Path) -> bool:
    try:
        read(path)
    except CheckpointError:
        return False
    return True


def _parse_line(line: str) -> dict[str, Any] | None:
    """A line of the metrics; None if it is not complete."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "progress/kimg" in found else None


def checkpoint_of(run: Path) -> Path:
    """The checkpoint file of a path.

    Args:
        run: folder of a run, whose newest checkpoint is meant, or a checkpoint file.
    """
    return RunFolder(run).checkpoint if run.is_dir() or not run.suffix else run


def run_folder(run: Path) -> Path:
    """Folder of a run.

    Args:
        run: the folder itself, or a checkpoint in it.
    """
    return run if run.is_dir() else run.parent


def describe(config: Config, pool: Pool) -> dict[str, Any]:
    """The description in a checkpoint: the configuration, and what must be known of the data to sample.

    Args:
        config: configuration of the run.
        pool: the data that are trained on.
    """
    return {
        "config": config.sections,
        "shape": list(pool.shape),
        "num_classes": pool.num_classes,
        "num_levels": pool.num_levels,
        "values": pool.values,
    }


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained run, ready to sample from.

    Attributes:
        denoiser: the denoiser in evaluation mode.
        config: configuration of the run.
        shape: shape of one data point.
        num_levels: number of values of quantized data.
        values: "image" if samples are images, which are displayed and written as bytes, or "float" if they are numbers
            that are never clipped.
        images: number of images seen in training.
        checksum: checksum of the checkpoint, followed by the name of the weights if they are not the first average.
        path: the folder or checkpoint file that it was opened from.
        data: fingerprint of the training data (see `data.identity`); "" if the checkpoint does not have it.
    """

    denoiser: Denoiser
    config: Config
    shape: tuple[int, ...]
    num_levels: int
    values: Values
    images: int
    checksum: str
    path: Path
    data: str = ""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return run_folder(self.path)


def load(run: str | Path, *, weights: str = "average", device: str = "auto", allow: Iterable[Allowed] = ()) -> Denoiser:
    """The denoiser of a run, E[x | x_t], in evaluation mode.

    Args:
        run: folder of a run, or a checkpoint file.
        weights: "average" (the first moving average, for sampling), "average-HALFLIFE" (another one), "model" (the
            weights without averaging), or "best" (the average in the run's best checkpoint, if checkpoints are scored).
        device: "auto" for a GPU if there is one, or a name as torch has it.
        allow: classes outside this package that the network of the run may be, each as the class or as `module:Class`.
            No other name in a run is imported.

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged, or is of another program or version.
        ConfigError: the checkpoint names a class that is not allowed.
        ValueError: the checkpoint has no such weights.
    """
    return open_run(run, weights=weights, device=device, allow=allow).denoiser


def open_run(
    run: str | Path, *, weights: str = "average", device: str = "auto", allow: Iterable[Allowed] = ()
) -> TrainedRun:
    """A trained run with its denoiser, its configuration and what is known of its data.

    Args:
        run: folder of a run, or a checkpoint file.
        weights: name of the weights, as for `load`.
        device: name of the device, as for `load`.
        allow: classes outside this package that the network may be, as for `load`.

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged, or is of another program or version.
        ConfigError: the checkpoint names a class that is not allowed, or its configuration is not valid.
        ValueError: the checkpoint has no such weights.
    """
    path = Path(run)
    if weights == "best" and not RunFolder(path).best.exists():
        raise ValueError(f"{path} has no best checkpoint; runs keep one if data.holdout is set")
    found = read(RunFolder(path).best if weights == "best" else checkpoint_of(path))
    try:
        config = resolve(found.config["config"], allow=allow)
        shape, num_classes = found.config["shape"], found.config["num_classes"]
        num_levels, declared = found.config["num_levels"], found.config["values"]
        data = found.config.get("data", "")
    except KeyError as error:
        raise CheckpointError(f"the description in {path} is incomplete: {error} is missing") from None
    numbers = [*shape, num_classes, num_levels] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number <= _MOST_VALUES for number in numbers) or not (
        1 <= len(shape) <= 8 and 1 <= math.prod(shape) <= _MOST_VALUES and num_levels >= 2 and isinstance(data, str)
    ):
        raise CheckpointError(f"the description in {path} has no valid shape, num_classes, num_levels or data")
    shape = tuple(shape)
    try:
        values = values_of(declared, True, shape)
    except ValueError as error:
        raise CheckpointError(f"the description in {path} does not fit its data: {error}") from None
    name = "average" if weights == "best" else weights
    state = _select_weights(found, name)
    try:
        denoiser = build_denoiser(config, shape, num_classes, state)
        denoiser.load_state_dict(state)
    except ConfigError as error:
        raise CheckpointError(f'the weights "{name}" in {path} do not fit its network: {error}') from None
    except RuntimeError as error:
        raise CheckpointError(f'the weights "{name}" in {path} do not fit its network: {error}') from None
    denoiser = place(denoiser, choose_device(device)).eval().requires_grad_(False)
    checksum = found.checksum if name == "average" else f"{found.checksum} {name}"
    return TrainedRun(denoiser, config, shape, num_levels, values, found.images, checksum, path, data)


def _select_weights(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """One set of weights of a checkpoint."""
    prefixes = sorted({key.partition(".")[0] for key in checkpoint.tensors})
    names = [prefix for prefix in prefixes if prefix == "model" or prefix.startswith("average")]
    if name not in names:
        raise ValueError(f"there are no weights {name!r} in this checkpoint; choose one of {', '.join(names)}, or best")
    return {key.removeprefix(f"{name}."): t for key, t in checkpoint.tensors.items() if key.startswith(f"{name}.")}


def training_data(trained: TrainedRun, progress: Progress = silent, *, way_out: str) -> Pool:
    """Load all data of a run again, those that were held out included.

    Args:
        trained: the run, as `open_run` returns it.
        progress: called with (done, total) while data are decoded.
        way_out: what the user can do if the data have changed, the end of the message.

    Raises:
        ConfigError: the data are no longer those of the run, or the run does not record which they were.
    """
    data: Pool = trained.config.make("data").load(progress)
    refuse_other_data(data, fingerprint(data), trained.data, way_out)
    return data
