"""Checkpoints of a run: the newest, those before it, and the best.

A save is a chain of renames, each of which leaves a run that can go on, wherever the chain is cut:

    1. the newest gets a second name among the older ones;
    2. the new one is written beside its place, forced to the disk, and takes the place of the newest;
    3. it gets a second name as the best, if it is (it says so itself, so this can be made up for);
    4. the oldest are removed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablefield.checkpoint import replacing, save
from stablefield.config import Config, ConfigError, resolve
from stablefield.engine.state import TrainState
from stablefield.ranks import Ranks
from stablefield.run import Folder, Parts, describe, fingerprint, refuse_other_data

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# what may change when a run goes on, beside how it is sampled: how far it goes, what it writes, how it is computed
# (which may change rounding), and where the data are, if they are the same
MAY_CHANGE = {
    *(f"training.{key}" for key in ("images", "save_every", "keep", "log_every", "sample_every")),
    *(f"training.{key}" for key in ("device", "micro_batch", "compile", "deterministic")),
    "target.sharded",
    "target.at_once",
    "data.path",
}


def refuse_another(before: Config, after: Config) -> None:
    """Raises:
    ConfigError: to go on with the one as the other would make it another run.
    """
    changed = [key for key in before.differences(after) if key.partition(".")[0] not in ("sampler", "grid")]
    if other := [key for key in changed if key not in MAY_CHANGE]:
        raise ConfigError(f"{', '.join(other)}: a run goes on as what it is; for another configuration start another")
    if "training.images" in changed and after.training.decay == "cosine":
        raise ConfigError("training.images: it says where the cosine of the learning rate ends; start another run")


@contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """The folder is this process's, and swept clean of what one that was killed had left.

    Raises:
        ConfigError: another process is training here.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    handle = None if fcntl is None else os.open(folder.path, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle, folder)
        folder.sweep()
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Folder) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is training in {folder.path}") from None
    except OSError:
        pass  # a file system without locks


class Saver:
    """Writes a run's checkpoints, and finds them again.

    Attributes:
        best: the lowest score so far, and the images seen by then; empty if none was scored.
    """

    def __init__(self, folder: Folder, config: Config, parts: Parts) -> None:
        self.folder, self.config, self.keep = folder, config, config.training.keep
        self.pool, self.data = parts.data, fingerprint(parts.data)
        self.about = describe(config, parts.pool)
        self.best: dict[str, Any] = {}
        self.newest = -1

    def restore(self, state: TrainState, ranks: Ranks) -> None:
        """Put the state where the newest checkpoint was, if there is one.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it is of another configuration or other data, or further than asked for, or ranks see others.
        """
        saved = self.folder.newest() if self.folder.checkpoint.exists() else None
        if saved is not None:
            self._refuse_others(saved.config, saved.images)
            state.restore(saved.tensors, saved.images)
            self.newest, self.best = saved.images, saved.config.get("best", {})
        if len(ranks.each(self.newest).unique()) > 1:
            raise ConfigError(f"the ranks do not see the same files in {self.folder.path}: it must be shared by all")
        if len(ranks.each(int(self.data[:15], 16)).unique()) > 1:
            raise ConfigError("the ranks do not see the same data")

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write the newest checkpoint, which is the best too if its score is lower than any before.

        Raises:
            OSError: it could not be written; what was there before is untouched.
        """
        if score is not None and score < self.best.get("score", float("inf")):
            self.best = {"score": score, "images": state.images}
        if self.keep > 1 and 0 <= self.newest != state.images:
            _name(self.folder.checkpoint, self.folder.older(self.newest))
        about = self.about | {"data": self.data} | ({"best": self.best} if self.best else {})
        save(self.folder.checkpoint, state.tensors(), config=about, images=state.images)
        self.newest = state.images
        if self.best.get("images") == state.images:
            _name(self.folder.checkpoint, self.folder.best)
        passed = [path for images, path in self.folder.olders().items() if images < state.images]
        for path in passed[: max(0, len(passed) - (self.keep - 1))]:
            path.unlink(missing_ok=True)

    def _refuse_others(self, saved: dict[str, Any], images: int) -> None:
        refuse_another(resolve(saved["config"]), self.config)
        way_out = "bring those back, or start another run, --from this one"
        refuse_other_data(self.pool, self.data, saved.get("data", ""), way_out)
        training = self.config.training
        if images > training.images + training.batch_size:
            raise ConfigError(f"training.images = {training.images}, but this run has seen {images} already")


def _name(file: Path, name: Path) -> None:
    """Give a file another name too, in place of what had it; a copy where there cannot be two names."""
    name.parent.mkdir(exist_ok=True)
    with replacing(name) as beside:
        try:
            os.link(file, beside)
        except OSError:
            shutil.copyfile(file, beside)
