"""Checkpoints of a run: the newest, those before it, and the best.

A save is a chain of renames, each of which leaves a run that can go on, wherever the chain is cut:

    1. the newest gets a second name among the older ones;
    2. the new one is written beside its place, forced to the disk, and takes the place of the newest;
    3. it gets a second name as the best, if it is (it says so itself, so this can be made up for);
    4. the oldest are removed.
"""

import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablefield.checkpoint import replacing, save
from stablefield.config import MARK, Allowed, Config, ConfigError, as_setting, resolve, unedited, written
from stablefield.engine.state import TrainState
from stablefield.ranks import Ranks
from stablefield.run import Folder, Parts, describe, fingerprint, refuse_other_data

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# what may change when a run goes on, beside how it is sampled: how far it goes, what it writes, how it is computed
# (which may change rounding), and where the data are, if they are the same, and whether they are drawn
MAY_CHANGE = {
    *(f"training.{key}" for key in ("images", "save_every", "keep", "log_every", "sample_every")),
    *(f"training.{key}" for key in ("device", "micro_batch", "compile", "deterministic")),
    "target.sharded",
    "target.at_once",
    "data.path",
    "data.values",
}


def refuse_another(before: Config, after: Config) -> None:
    """Raises:
    ConfigError: to go on with the one as the other would make it another run.
    """
    other = [key for key in before.differences(after) if not _may_change(key, before)]
    if other == ["training.images"]:
        raise ConfigError("training.images: it says where the cosine of the learning rate ends; start another run")
    if other:
        raise ConfigError(f"{', '.join(other)}: a run goes on as what it is; for another configuration start another")


def _may_change(key: str, config: Config) -> bool:
    """Whether a run of this configuration stays the same run if a key changes."""
    if key == "training.images" and config.training.decay == "cosine":
        return False
    return key in MAY_CHANGE or key.partition(".")[0] in ("sampler", "grid")


def last_told(folder: Folder, allow: Iterable[Allowed] = ()) -> Config | None:
    """The configuration that the run in a folder was last given; None if no run is there.

    A run has it twice, in config.toml and in its newest checkpoint, and writes config.toml first. So where they differ
    in what may change, config.toml is the later: the run was stopped between both, or an older checkpoint was put back.
    A config.toml that is missing, or not as the run wrote it, says nothing here (see `refuse_edited`).

    Args:
        allow: names of classes, or classes, that the run may name (`config.resolve`).

    Raises:
        ConfigError: config.toml is not as the run wrote it, and there is no checkpoint; or both are of different runs.
        CheckpointError: the newest checkpoint is damaged.
    """
    saved = resolve(folder.newest().config["config"], allow=allow) if folder.checkpoint.exists() else None
    text = _text(folder)
    if text is None:
        return saved
    if not unedited(text):
        if saved is None:
            raise ConfigError(f"{folder.config} {_how_changed(folder, text)}")
        return saved
    found = resolve(tomllib.loads(text), allow=allow)
    if saved is not None and (other := [key for key in saved.differences(found) if not _may_change(key, saved)]):
        said = _both(_differing(found.sections, saved), other)
        raise ConfigError(
            f"config.toml and checkpoint.safetensors in {folder.path} are of different runs: {said}; put back the one "
            f"that belongs here, or remove {folder.config} to go on with the checkpoint's"
        )
    return found


def refuse_edited(folder: Folder, wanted: Config) -> None:
    """A run is changed by settings when it is resumed, and never by editing its config.toml.

    Args:
        wanted: the configuration to go on with; an edited config.toml that says just the same is accepted.

    Raises:
        ConfigError: config.toml is not as the run wrote it, and says something else than the checkpoint.
    """
    text = _text(folder)
    if text is None or unedited(text) or not folder.checkpoint.exists():
        return
    try:
        found: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{folder.config} was cut short or damaged ({error}); to go on as the checkpoint says, remove it"
        ) from None
    saved = resolve(folder.newest().config["config"], allow=wanted.allowed)
    changed = _differing(found, saved)
    if not changed or not _differing(found, wanted):
        return
    settings = " ".join(f"--set {as_setting(key, there)}" for key, (there, _) in changed.items())
    ways = [f"to go on as before, remove {folder.config}"]
    if all(there is not None for there, _ in changed.values()):
        ways.append(
            f"to change the run, type: stablefield train --resume {folder.path} {settings}"
            if all(_may_change(key, saved) for key in changed)
            else f"for another run, type: stablefield train --from {folder.path} --out FOLDER {settings}"
        )
    raise ConfigError(
        f"{folder.config} was edited or cut short: {_both(changed, list(changed))}. A run is changed by --set when it "
        f"is resumed, and not in this file: {'; '.join(ways)}"
    )


def _text(folder: Folder) -> str | None:
    try:
        return folder.config.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _how_changed(folder: Folder, text: str) -> str:
    """What is wrong with a config.toml that no checkpoint stands beside, and the way out."""
    if MARK in text and text.endswith("\n"):
        return (
            f"was edited, and a run goes on as it was begun: undo that, or begin another run with: "
            f"stablefield train --config {folder.config} --out FOLDER"
        )
    return (
        f"was cut short (its last line, with a checksum of the others, is not there), and no checkpoint is beside it: "
        f"remove {folder.path}, and begin the run again"
    )


def _differing(found: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: what a file holds, and what a configuration says; None where one has none."""
    sections = {name: part if isinstance(part, dict) else {"": part} for name, part in found.items()}
    names = {(section, key) for source in (sections, config.sections) for section in source for key in source[section]}
    pairs = {
        f"{section}.{key}": (sections.get(section, {}).get(key), config.sections.get(section, {}).get(key))
        for section, key in sorted(names)
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _both(changed: Mapping[str, tuple[Any, Any]], keys: Sequence[str], most: int = 8) -> str:
    """Keys with their values in config.toml and in the checkpoint."""

    def shown(value: Any) -> str:
        return "not set" if value is None else written(value)

    said = [f"{key} is {shown(changed[key][0])} in it, {shown(changed[key][1])} in the checkpoint" for key in keys]
    return ", ".join([*said[:most], *([f"and {len(said) - most} more"] if len(said) > most else [])])


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
        if (before := last_told(self.folder, self.config.allowed)) is not None:
            refuse_another(before, self.config)
            refuse_edited(self.folder, self.config)
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
        refuse_another(resolve(saved["config"], allow=self.config.allowed), self.config)
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
