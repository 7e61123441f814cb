"""The files of a run's folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablefield.checkpoint import Checkpoint, CheckpointError, finite, read
from stablefield.config import Config, ConfigError
from stablefield.files import append, sweep, write_text


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
    def exported(self) -> Path:
        """File of the weights of an export; a folder that has it is not a run (see `run.export`)."""
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """File of the best checkpoint; exists only if checkpoints are scored."""
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        """File of the scores, one JSON object per table."""
        return self.path / "scores.jsonl"

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
            other = next(filter(is_readable, reversed(others)), None)
            hint = f"; to resume from an older one, copy {other} to {self.checkpoint}" if other else ""
            raise CheckpointError(f"{error}{hint}") from None

    def occupied(self) -> bool:
        """True if the folder holds a run, finished or not, or an export."""
        return self.config.exists() or self.checkpoint.exists() or self.exported.exists()

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
            ConfigError: the folder holds a run already, finished or not, or an export.
        """
        if self.exported.exists():
            raise ConfigError(f"{self.path} holds an exported model; change --out")
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


def is_readable(path: Path) -> bool:
    """True for a whole checkpoint.

    Args:
        path: the file.
    """
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
        run: folder of a run, whose newest checkpoint is meant, or of an export, or a checkpoint file.
    """
    folder = RunFolder(run)
    if folder.exported.exists() and not folder.checkpoint.exists():
        return folder.exported
    return folder.checkpoint if run.is_dir() or not run.suffix else run


def run_folder(run: Path) -> Path:
    """Folder of a run.

    Args:
        run: the folder itself, or a checkpoint in it.
    """
    return run if run.is_dir() else run.parent
