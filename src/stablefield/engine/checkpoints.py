"""Checkpoints of a run: the newest, some before it, and the best.

A save is a sequence of atomic operations. A process that is killed between any two of them leaves a run that can be
resumed:

    1. the tensors are written to a temporary file;
    2. the metrics are synced to the disk, so that they are at least as new as the checkpoint;
    3. the newest checkpoint gets a second name in `checkpoints/`;
    4. the temporary file gets its description, is synced to the disk, and renamed over the newest checkpoint;
    5. if it is the best, it gets a second name as `best.safetensors` (it holds that fact itself, so that this step can
       be repeated);
    6. the oldest checkpoints are removed.

During training all but the first step happens in a thread. The training loop waits until the system has taken the
tensors, which needs no copy of them in this process, and for the checkpoint before, if that is still being written. The
tensors of a GPU are copied to the host instead, and the thread writes them: on a slow disk that takes less time.
"""

import os
import shutil
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from stablefield.build import Components
from stablefield.checkpoint import Draft
from stablefield.config import (
    CHECKSUM_LINE,
    Allowed,
    Config,
    ConfigError,
    as_setting,
    is_unedited,
    refuse_other_format,
    resolve,
    toml_value,
)
from stablefield.data.identity import DataIdentity
from stablefield.distributed import Ranks
from stablefield.engine.state import TrainState
from stablefield.files import atomic_path, exclusive_lock, sync
from stablefield.run import RunFolder, describe

RESUMABLE_KEYS = {
    *(f"training.{key}" for key in ("images", "save_every", "keep_checkpoints", "log_every", "sample_every")),
    "training.probe_every",
    "training.probes",
    *(f"training.{key}" for key in ("device", "micro_batch_size", "compile", "deterministic")),
    "training.target_prefetch",
    "training.target_sharding",
    "training.resident",
    "data.path",
    "data.values",
}
"""Keys that can be changed when resuming, besides those of the sampler and its time grid.

They set how long a run is, what it writes, how it is computed (which may change rounding), where its data are, and
whether its samples are images.
"""


def refuse_changed_config(before: Config, after: Config) -> None:
    """Refuse to resume a run with a configuration that would make it another run.

    Args:
        before: configuration that the run was trained with.
        after: configuration to resume it with.

    Raises:
        ConfigError: a key differs that cannot be changed when resuming.
    """
    changed = [key for key in before.differences(after) if not _can_change(key, before)]
    if not changed:
        return
    reason = ": the cosine decay of the learning rate ends there" if changed == ["training.images"] else ""
    raise ConfigError(f"cannot change {', '.join(changed)} when resuming{reason}; start a new run with --init-from RUN")


def _can_change(key: str, config: Config) -> bool:
    """True if a run of this configuration remains the same run when a key is changed."""
    if key == "training.images" and config.training.learning_rate_decay == "cosine":
        return False
    return key in RESUMABLE_KEYS or key.partition(".")[0] in ("sampler", "grid")


def latest_config(folder: RunFolder, allow: Iterable[Allowed] = ()) -> Config | None:
    """The latest configuration of the run in a folder; None if there is no run.

    A run stores it twice, first in config.toml and then in its newest checkpoint. If the two differ in keys that can be
    changed when resuming, config.toml is later: the run was stopped between the two writes, or an older checkpoint was
    put back. A config.toml that is missing or was edited is ignored if there is a checkpoint (see
    `refuse_edited_config`).

    Args:
        folder: folder of the run.
        allow: classes outside this package that the configuration may name (see `config.resolve`).

    Raises:
        ConfigError: config.toml was edited or cut short and there is no checkpoint, or the two are of different runs.
        CheckpointError: the newest checkpoint is damaged.
    """
    saved = resolve(folder.newest().sections, allow=allow) if folder.checkpoint.exists() else None
    text = _config_text(folder)
    if text is None:
        return saved
    if not is_unedited(text):
        if saved is None:
            raise ConfigError(f"{folder.config} {_how_changed(folder, text)}")
        return saved
    written_config = resolve(tomllib.loads(text), allow=allow)
    if saved is None:
        return written_config
    if changed := [key for key in saved.differences(written_config) if not _can_change(key, saved)]:
        raise ConfigError(
            f"config.toml and checkpoint.safetensors in {folder.path} are of different runs: "
            f"{_both_values(written_config.differences(saved), changed)}; put back the file that belongs "
            f"here, or remove {folder.config} to resume with the configuration of the checkpoint"
        )
    return written_config


def saved_weights(folder: RunFolder) -> dict[str, Tensor] | None:
    """Weights of the denoiser in the newest checkpoint of a run, without averaging; None if it has no checkpoint.

    Args:
        folder: folder of the run.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if not folder.checkpoint.exists():
        return None
    tensors = folder.newest().tensors
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def refuse_edited_config(folder: RunFolder, wanted: Config) -> None:
    """Refuse to resume a run whose config.toml was edited: its configuration is changed by settings instead.

    Args:
        folder: folder of the run.
        wanted: configuration to resume the run with; an edited file that agrees with it is accepted.

    Raises:
        ConfigError: config.toml was edited or cut short, and differs from the checkpoint.
    """
    text = _config_text(folder)
    if text is None or is_unedited(text) or not folder.checkpoint.exists():
        return
    try:
        found: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{folder.config} was cut short or damaged ({error}); remove it to resume with the configuration of the "
            "checkpoint"
        ) from None
    saved = resolve(folder.newest().sections, allow=wanted.allowed)
    edited = Config(found)
    changed = edited.differences(saved)
    if not changed or not edited.differences(wanted):
        return
    settings = " ".join(f"--set {as_setting(key, value)}" for key, (value, _) in changed.items())
    ways_out = [f"to resume unchanged, remove {folder.config}"]
    if all(value is not None for value, _ in changed.values()):
        ways_out.append(
            f"to change the run, type: stablefield train --resume {folder.path} {settings}"
            if all(_can_change(key, saved) for key in changed)
            else f"to start a new run, type: stablefield train --init-from {folder.path} --out FOLDER {settings}"
        )
    raise ConfigError(
        f"{folder.config} was edited or cut short: {_both_values(changed, list(changed))}. Keys of a run are changed "
        f"with --set when resuming, not in this file: {'; '.join(ways_out)}"
    )


def _config_text(folder: RunFolder) -> str | None:
    if not folder.config.exists():
        return None
    text = folder.config.read_text(encoding="utf-8-sig", errors="replace")
    refuse_other_format(text, folder.config)
    return text


def _how_changed(folder: RunFolder, text: str) -> str:
    """Error and way out for a changed config.toml in a folder without a checkpoint."""
    if CHECKSUM_LINE in text and text.endswith("\n"):
        return (
            f"was edited, but a run keeps the configuration that it was started with; undo the edit, or start a new "
            f"run with: stablefield train --config {folder.config} --out FOLDER"
        )
    return (
        f"was cut short (its last line, a checksum of the lines above, is missing), and there is no checkpoint; remove "
        f"{folder.path} and start the run again"
    )


def _both_values(changed: Mapping[str, tuple[Any, Any]], keys: Sequence[str], limit: int = 8) -> str:
    """Keys with their values in config.toml and in the checkpoint, for an error."""

    def shown(value: Any) -> str:
        return "not set" if value is None else toml_value(value)

    texts = [
        f"{key} is {shown(changed[key][0])} in config.toml, {shown(changed[key][1])} in the checkpoint" for key in keys
    ]
    return ", ".join([*texts[:limit], *([f"and {len(texts) - limit} more"] if len(texts) > limit else [])])


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Context in which this process alone can train in a folder, from which leftovers of killed processes are removed.

    Args:
        folder: folder of the run; created if it does not exist.

    Raises:
        ConfigError: another process is training in the folder.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(folder.path, wait=False))
        except BlockingIOError:
            raise ConfigError(f"another process is training in {folder.path}") from None
        folder.sweep()
        yield


class CheckpointManager:
    """Saves and restores the checkpoints of a run.

    Args:
        folder: folder of the run.
        config: configuration of the run.
        components: the parts of the run, for its data.

    Attributes:
        keep: number of checkpoints to keep, including the newest.
        identity: fingerprint of all data of the run, including held-out images.
        metadata: what checkpoints store besides tensors (see `run.describe`).
        best: score and images of the best checkpoint; empty if none was scored.
        newest_images: images seen by the newest checkpoint; -1 if there is none.
    """

    def __init__(self, folder: RunFolder, config: Config, components: Components) -> None:
        self.folder, self.config, self.keep = folder, config, config.training.keep_checkpoints
        self.identity = DataIdentity(components.data)
        self.metadata = describe(config, components.pool)
        self.best: dict[str, Any] = {}
        self.newest_images = -1
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def restore(self, state: TrainState, ranks: Ranks) -> None:
        """Restore the state from the newest checkpoint, if there is one.

        Args:
            state: the state, changed in place.
            ranks: this process and those it trains with; all must call this.

        Raises:
            CheckpointError: the checkpoint is damaged.
            ConfigError: the checkpoint has another configuration or other data, or has seen more images than are to be
                seen, or the ranks see different files or data.
        """
        if (before := latest_config(self.folder, self.config.allowed)) is not None:
            refuse_changed_config(before, self.config)
            refuse_edited_config(self.folder, self.config)
        saved = self.folder.newest() if self.folder.checkpoint.exists() else None
        if saved is not None:
            self._check(saved.config, saved.images)
            state.restore(saved.tensors, saved.images)
            self.newest_images, self.best = saved.images, _best_of(saved.config)
        if len(ranks.all_gather_int(self.newest_images).unique()) > 1:
            raise ConfigError(
                f"the ranks see different files in {self.folder.path}; use a folder that all of them share"
            )
        if len(ranks.all_gather_int(int(self.identity.found[:15], 16)).unique()) > 1:
            raise ConfigError("the ranks see different data; give all of them the same files")

    def save(self, state: TrainState, score: float | None = None, *, background: bool = False) -> None:
        """Save the state as the newest checkpoint, and as the best if its score is lower than all before.

        Args:
            state: the state.
            score: score of the first average; None if it was not scored.
            background: True to hash, flush and rename in a thread while training continues. Before that, the tensors
                are written to a temporary file on a CPU, and are copied to the host from a GPU. `raise_failure` and
                `wait` report an error of the thread. It, and the end of the run, wait until all data are hashed.

        Raises:
            ConfigError: the data are not those that the run was started with.
            OSError: this checkpoint could not be written, or the one before in the background; earlier ones are
                unchanged.
        """
        self.wait()
        if score is not None and score < self.best.get("score", float("inf")):
            self.best = {"score": score, "images": state.images}
        tensors, images = state.tensors(), state.images
        if not background:
            self._write(self._draft(tensors), images, wait=images >= self.config.training.images)
            return
        if state.device.type == "cpu":
            draft: Draft | dict[str, Tensor] = self._draft(tensors)
        else:  # a copy in the memory of the host takes less time than a slow disk
            draft = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        writer = threading.Thread(target=self._try_to_write, args=(draft, images), name="checkpoint")
        writer.start()
        self._writer = writer

    def _draft(self, tensors: Mapping[str, Tensor]) -> Draft:
        return Draft(self.folder.checkpoint, tensors, self._description(self.identity.found))

    def _description(self, data: str) -> dict[str, Any]:
        return self.metadata | {"data": data} | ({"best": self.best} if self.best else {})

    def raise_failure(self) -> None:
        """Report an error of a thread that wrote a checkpoint, once.

        Raises:
            OSError: a checkpoint could not be written; earlier ones are unchanged.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait until no checkpoint is being written, and report an error as `raise_failure` does."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.raise_failure()

    def _try_to_write(self, draft: Draft | dict[str, Tensor], images: int) -> None:
        try:
            self._write(draft if isinstance(draft, Draft) else self._draft(draft), images, wait=True)
        except Exception as error:  # it is raised again in the training loop
            self._failure = error

    def _write(self, draft: Draft, images: int, *, wait: bool) -> None:
        """Finish a checkpoint, and give it and the one before their other names."""
        with draft:
            data = self.identity.checked(wait=wait)
            if self.folder.metrics.exists():
                sync(self.folder.metrics)
            if self.keep > 1 and 0 <= self.newest_images != images:
                _add_name(self.folder.checkpoint, self.folder.older_checkpoint(self.newest_images))
            draft.finish(config=self._description(data), images=images)
        self.newest_images = images
        if self.best.get("images") == images:
            _add_name(self.folder.checkpoint, self.folder.best)
        older = [path for seen, path in self.folder.older_checkpoints().items() if seen < images]
        for path in older[: max(0, len(older) - (self.keep - 1))]:
            path.unlink(missing_ok=True)

    def _check(self, metadata: dict[str, Any], images: int) -> None:
        """Refuse a checkpoint of another configuration, of other data, or beyond the end of the run."""
        refuse_changed_config(resolve(metadata["config"], allow=self.config.allowed), self.config)
        self.identity.compare(metadata.get("data", ""))
        training = self.config.training
        if images > training.images + training.batch_size:
            raise ConfigError(
                f"training.images = {training.images}, but this run has seen {images} already; set a larger number"
            )


def _best_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Score and images of the best checkpoint, as a checkpoint holds them; empty if it holds none."""
    match metadata.get("best"):
        case {"score": int() | float() as score, "images": int() as images}:
            return {"score": score, "images": images}
    return {}


def _add_name(file: Path, name: Path) -> None:
    """Give a file a second name, replacing what has it; a copy on file systems without hard links."""
    with atomic_path(name) as beside:
        beside.unlink()
        try:
            os.link(file, beside)
        except OSError:
            shutil.copyfile(file, beside)
