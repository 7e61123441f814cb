"""`stablefield train`: start a run or resume one.

    recipe < --config FILE < --data PATH < --target TARGET < --set SECTION.KEY=VALUE

A configuration is merged from these layers, each of which overrides those before it; keys that none of them sets have
their defaults. Under `torchrun` or `accelerate launch` this runs on every rank, and the main rank prints and writes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stablefield.build import Components, build, choose_device
from stablefield.cli.data_command import progress_bar, section_of
from stablefield.config import (
    Allowed,
    Config,
    ConfigError,
    allowed_names,
    overlay,
    override,
    read_toml,
    resolve,
    target_kind,
    target_section,
)
from stablefield.distributed import Ranks, process_group
from stablefield.engine.checkpoints import latest_config, refuse_changed_config, refuse_edited_config
from stablefield.engine.fit import OnStep, fit
from stablefield.kinds import list_kinds
from stablefield.recipes import read_recipe
from stablefield.run import RunFolder, TrainedRun, fingerprint, open_run

__all__ = [
    "Allow",
    "allow_option",
    "init_from_run",
    "is_other_data",
    "merge_layers",
    "progress_text",
    "resumed_config",
    "run",
    "summary",
    "train",
]

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="Allow a file to name this class of yours; importing it runs its code. May be repeated.",
    ),
]


def train(
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from published settings; stablefield recipes lists them.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Data to train on: a store, ZIP file, folder, array, IDX file or tar archive, or hf:NAME for a data "
            "set of the Hugging Face hub. The kind is guessed.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run. Default: runs/RECIPE-TARGET.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the keys that differ from the defaults.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key. May be repeated.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help=f"Training target, one of {list_kinds('target')}, with its size and keys: dsm, stf:256, knn:32, "
            "exact, stf:256,references=recent.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Train a network of your own, built as Class(shape), or as Class(shape, num_classes=...) with "
            "training.conditional=true. Implies --allow.",
        ),
    ] = None,
    allow: Allow = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Initialize the weights and the configuration from this run or checkpoint; a new run."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Resume the run in this folder; --set can change a few keys, such as images."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
) -> None:
    """Train a denoiser. By default: scikit-learn's digits, EDM's settings, stable targets from 1,024 references."""
    settings = [*(set_ or []), *([f"network.kind={network}"] if network else [])]
    allowed = allowed_names([*settings, *([f"target.kind={target_kind(target)}"] if target else [])], allow)
    if resume:
        others = {"--recipe": recipe, "--data": data, "--config": config, "--out": out, "--init-from": init_from}
        others |= {"--target": target}
        if given := [option for option, value in others.items() if value]:
            raise ConfigError(
                f"--resume cannot be combined with {', '.join(given)}: a run keeps its own configuration; change "
                "single keys with --set, or start a new run with --init-from"
            )
    base = open_run(init_from, device="cpu", allow=allowed) if init_from else None
    if resume:
        folder, wanted = RunFolder(resume), resumed_config(RunFolder(resume), settings, allowed)
    else:
        raw = merge_layers(base.config.sections if base else {}, recipe, config, data)
        raw = overlay(raw, {"target": target_section(target, allowed)} if target else {})
        wanted = resolve(override(raw, settings), allow=allowed)
        folder = RunFolder(out or Path("runs") / f"{recipe or wanted['data']['kind']}-{wanted['target']['kind']}")
    with process_group(choose_device(wanted.training.device)) as ranks:
        if not (resume or dry_run):
            ranks.on_main(folder.refuse_if_occupied)
        with progress_bar("decoding") as progress:
            parts = build(wanted, progress, ranks)
        if base:
            init_from_run(base, parts)
        report: Callable[[str], None] = print if ranks.is_main else lambda text: None
        report(summary(wanted, parts, folder, ranks))
        if base and ranks.is_main and is_other_data(base, wanted, parts):
            report(f"note      the data have changed since {init_from} was trained")
        if dry_run:
            report(f"\n{wanted.toml()}\nThis was a dry run: nothing was trained or written.")
            return
        if not resume:
            ranks.on_main(lambda: folder.claim(wanted))
        if stopped := run(wanted, parts, folder, ranks):
            report(f"Stopped and saved. Resume with: stablefield train --resume {folder.path}{allow_option(wanted)}")
            raise typer.Exit(128 + stopped)
        report(f"Done: {folder.path}. Sample with: stablefield sample {folder.path} --seeds 0-63{allow_option(wanted)}")


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
        {"data": section_of(data)} if data else {},
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


def is_other_data(base: TrainedRun, config: Config, parts: Components) -> bool:
    """True if the same data section gives other data than it gave the run that the weights are from.

    Args:
        base: the run that the weights are from.
        config: configuration of the new run.
        parts: components of the new run.
    """
    before, now = ({**each["data"], "holdout": 0} for each in (base.config, config))
    return before == now and fingerprint(parts.data) != base.data


def resumed_config(folder: RunFolder, settings: list[str], allow: Iterable[Allowed] = ()) -> Config:
    """Configuration of a run that is resumed, with the given settings applied.

    Args:
        folder: folder of the run.
        settings: keys to change, each as `section.key=value`.
        allow: classes outside this package that the configuration may name.

    Raises:
        ConfigError: there is no run, its config.toml was edited, or a setting cannot be changed when resuming.
    """
    # a run that was stopped before its first checkpoint has only config.toml, and starts from the beginning
    before = latest_config(folder, allow)
    if before is None:
        raise ConfigError(f"there is no run in {folder.path}; start one with --out {folder.path}")
    after = resolve(override(before.sections, settings), allow=allow)
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
    device = next(parts.denoiser.parameters()).device
    shared = f" on {ranks.world_size} ranks" if ranks and ranks.world_size > 1 else ""
    return "\n".join(
        (
            f"data      {parts.data!r}",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"target    {parts.objective.target}",
            f"network   {config['network']['kind']}, {parameters:,} parameters, on {device}",
            f"training  {training.images:,} images in batches of {training.batch_size}{shared}, seed {training.seed}",
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
        line: the latest line of the metrics; may be empty.
    """
    if not line:
        return ""
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
