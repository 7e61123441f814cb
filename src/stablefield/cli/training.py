"""The work of `stablefield train`: merging layers of a configuration, resuming, and the progress of a run."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stablefield.build import Components
from stablefield.config import Allowed, Config, ConfigError, overlay, read_toml
from stablefield.data import data_section
from stablefield.distributed import Ranks
from stablefield.engine.checkpoints import latest_config, refuse_changed_config, refuse_edited_config
from stablefield.engine.fit import OnStep, fit
from stablefield.recipes import read_recipe
from stablefield.run import RunFolder, TrainedRun


def allow_option(config: Config) -> str:
    """The `--allow` options that later commands need for a run with classes of the user's own; else nothing.

    Args:
        config: configuration of the run.
    """
    return "".join(f" --allow {name}" for name in config.own_classes)


def merge_layers(raw: dict[str, Any], recipe: str | None, config: Path | None, data: str | None) -> dict[str, Any]:
    """Sections of a new run, merged from its layers: later ones override earlier ones.

    Args:
        raw: sections to start from.
        recipe: name of a recipe.
        config: a TOML file.
        data: a path (or hf:NAME) whose kind is guessed.

    Raises:
        ValueError: there is no such recipe or file, or the kind of the data cannot be guessed.
    """
    layers = (
        read_recipe(recipe) if recipe else {},
        read_toml(config) if config else {},
        {"data": data_section(data)} if data else {},
    )
    return reduce(overlay, layers, raw)


def init_from_run(base: TrainedRun, parts: Components) -> None:
    """Copy the weights of a trained denoiser into a new one.

    Args:
        base: the run whose weights are copied.
        parts: components of the new run; its denoiser is changed in place.

    Raises:
        ConfigError: the weights are for data of another shape, for another number of classes or for another network.
    """
    theirs, ours = (base.shape, base.denoiser.num_classes), (parts.pool.shape, parts.denoiser.num_classes)
    if theirs != ours:
        raise ConfigError(
            f"the weights do not fit the new run: they are for data of shape {theirs[0]} with {theirs[1]} classes, not "
            f"{ours[0]} with {ours[1]}; use such data, or start without --init-from"
        )
    try:
        parts.denoiser.load_state_dict(base.denoiser.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ConfigError(f"the weights do not fit the network of the new run: {first}") from None


def resumed_config(folder: RunFolder, settings: list[str], allow: Iterable[Allowed] = ()) -> Config:
    """Configuration of a run that is resumed, with the given settings applied.

    Args:
        folder: folder of the run.
        settings: keys to change, each as `section.key=value`.
        allow: classes outside this package that the configuration may name.

    Raises:
        ConfigError: there is no run, or only an export; its config.toml was edited; or a setting cannot be changed when
            resuming.
    """
    # a run that was stopped before its first checkpoint has only config.toml, and starts from the beginning
    before = latest_config(folder, allow)
    if before is None and folder.exported.exists():
        raise ConfigError(
            f"{folder.path} is an export, which has no state of the optimizer; start a new run with --init-from "
            f"{folder.path}"
        )
    if before is None:
        raise ConfigError(f"there is no run in {folder.path}; start one with --out {folder.path}")
    after = before.changed(settings)
    refuse_changed_config(before, after)
    refuse_edited_config(folder, after)
    return after


def summary(config: Config, parts: Components, folder: RunFolder, ranks: Ranks | None = None) -> str:
    """Description of a run in a few lines, for the terminal.

    Args:
        config: its configuration.
        parts: its components.
        folder: its folder.
        ranks: the processes that train together; by default only this one.
    """
    training = config.training
    parameters = sum(p.numel() for p in parts.denoiser.parameters())
    count = ranks.world_size if ranks else 1
    shared = f"{count} ranks" if count > 1 else "1 rank"
    return "\n".join(
        (
            f"data      {parts.data!r}",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"target    {parts.objective.target}",
            f"network   {config.kind('network')}, {parameters:,} parameters, on {parts.denoiser.device}",
            f"training  {training.images:,} images in batches of {training.batch_size} on {shared}, "
            f"seed {training.seed}",
            f"run       {folder.path}",
        )
    )


def run(config: Config, parts: Components, folder: RunFolder, ranks: Ranks | None = None) -> int:
    """Train or resume as `fit` does, with a progress bar.

    Args:
        config: configuration of the run.
        parts: its components, trained in place.
        folder: its folder.
        ranks: the processes that train together; by default only this one.

    Returns:
        The number of the signal that stopped training, or 0 if it is complete.
    """
    with _progress(config.training.images, ranks is None or ranks.is_main) as watch:
        return fit(config, parts, folder, ranks=ranks, on_step=watch)


@contextmanager
def _progress(images: int, visible: bool) -> Iterator[OnStep]:
    """A progress bar at a terminal; elsewhere one line per minute."""
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True))
    has_bar = visible and console.is_terminal
    with Progress(TextColumn("training"), *columns, TextColumn("left"), console=console, disable=not has_bar) as bar:
        task, last_line = bar.add_task("", total=images, text=""), monotonic()

        def watch(seen: int, line: Mapping[str, Any]) -> None:
            nonlocal last_line
            bar.update(task, completed=seen, text=progress_text(line))
            if visible and not has_bar and line and monotonic() - last_line > 60:
                console.print(f"{seen:,} of {images:,} images  {progress_text(line)}", highlight=False, soft_wrap=True)
                last_line = monotonic()

        yield watch


def progress_text(line: Mapping[str, Any]) -> str:
    """The main metrics in a few words: speed, loss and effective sample size.

    Args:
        line: the latest line of the metrics; may be empty or, after a resume, have the excess alone.
    """
    if "timing/sec_per_kimg" not in line:
        return _over_floor(line).removeprefix(", ")
    parts = [f"{1000 / line['timing/sec_per_kimg']:,.0f} img/s"]
    if "loss/loss" in line:
        averaged = f"ESS > 1.01: {line['target/fraction_ess_above_1.01']:.0%}"
        parts += [f"loss {line['loss/loss']:.4f}{_over_floor(line)}", f"ESS {line['target/ess']:.1f}", averaged]
    return "  ".join([*parts, *([f"{line['steps/skipped']} skipped"] if line["steps/skipped"] else [])])


def _over_floor(line: Mapping[str, Any]) -> str:
    """The excess and the floor that were measured last; nothing before."""
    if "loss/floor" not in line:
        return ""
    return f", excess {line['loss/excess']:.4f}, floor {line['loss/floor']:.4f} ({line['target/name']})"
