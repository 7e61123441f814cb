"""`stablefield train`: from a configuration to a run.

Under `torchrun` or `accelerate launch` every rank does this; the first one speaks and writes.
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

from stablefield.cli.data import progress_bar, section_of
from stablefield.config import Allowed, Config, ConfigError, overlay, override, read_toml, resolve, typed
from stablefield.engine.choice import decided
from stablefield.engine.fit import Watch, fit
from stablefield.engine.saving import last_told, refuse_another, refuse_edited
from stablefield.ranks import Ranks, joined
from stablefield.recipes import read_recipe
from stablefield.run import Folder, Parts, Trained, assemble, choose_device, fingerprint, open_run

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="A network of this name may be imported if a file names it, which runs its code; may be repeated.",
    ),
]


def train(
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from published settings: see stablefield recipes.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A store, zip, folder, array, IDX file or tar, or hf:NAME: its kind is guessed."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE-TARGET.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file that says what is special.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Your own network, made as Class(shape), or Class(shape, label_dim=...) if conditional; allows it.",
        ),
    ] = None,
    allow: Allow = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Start from the weights of this run or checkpoint, and its recipe.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """Train a denoiser. Without any option: the digits, with EDM's recipe and stable targets."""
    settings = [*(set_ or []), *([f"network.kind={network}"] if network else [])]
    allowed = typed(settings, allow)
    if resume and (recipe or data or config or out or from_):
        raise ConfigError(
            "--resume goes on with a run as it is; it goes with none of --recipe, --data, --config, --out and --from"
        )
    base = open_run(from_, device="cpu", allow=allowed) if from_ else None
    if resume:
        folder, wanted = Folder(resume), continued(Folder(resume), settings, allowed)
    else:
        raw = layered(base.config.sections if base else {}, recipe, config, data)
        wanted = resolve(override(raw, settings), allow=allowed)
        folder = Folder(out or Path("runs") / f"{recipe or wanted['data']['kind']}-{wanted['target']['kind']}")
    with joined(choose_device(wanted.training.device)) as ranks:
        if not (resume or dry_run):
            ranks.lead(folder.refuse_if_occupied)
        with progress_bar("decoding") as progress:
            parts = assemble(wanted, progress, ranks)
        if base:
            start_from(base, parts)
        say: Callable[[str], None] = print if ranks.first else lambda text: None
        with progress_bar("choosing targets") as progress:
            wanted, parts, choice = decided(wanted, parts, ranks, progress, folder=folder if resume else None)
        say(summary(wanted, parts, folder, ranks) + (f"\n\n{choice}\n" if choice else ""))
        if base and ranks.first and other_data(base, wanted, parts):
            say(f"note      the data are no longer those that {from_} was trained on")
        if dry_run:
            say(f"\n{wanted.toml()}\nThis was a dry run: nothing was trained or written.")
            return
        if not resume:
            ranks.lead(lambda: folder.claim(wanted))
        if stopped := run(wanted, parts, folder, ranks):
            say(f"Stopped and saved. Go on with: stablefield train --resume {folder.path}{allowing(wanted)}")
            raise typer.Exit(128 + stopped)
        say(f"Done: {folder.path}. Look at it with: stablefield sample {folder.path} --seeds 0-63{allowing(wanted)}")


def allowing(config: Config) -> str:
    """The option that the next command needs, if the network is the user's own."""
    kind = config["network"]["kind"]
    return f" --allow {kind}" if ":" in kind else ""


def layered(raw: dict[str, Any], recipe: str | None, config: Path | None, data: str | None) -> dict[str, Any]:
    """What is said of a new run, the special over the general: recipe, file, data.

    Raises:
        ValueError: no such recipe or file, or data of no known kind.
    """
    layers = (
        read_recipe(recipe) if recipe else {},
        read_toml(config) if config else {},
        {"data": section_of(data)} if data else {},
    )
    return reduce(overlay, layers, raw)


def start_from(base: Trained, parts: Parts) -> None:
    """Give a fresh denoiser the weights of a trained one.

    Raises:
        ConfigError: they are of another network, or for data of another shape.
    """
    theirs, ours = (base.shape, base.denoiser.label_dim), (parts.pool.shape, parts.denoiser.label_dim)
    if theirs != ours:
        raise ConfigError(
            f"the weights are for data {theirs[0]} with {theirs[1]} classes, and do not fit {ours[0]} with {ours[1]}"
        )
    try:
        parts.denoiser.load_state_dict(base.denoiser.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ConfigError(f"the weights do not fit this network; first of all: {first}") from None


def other_data(base: Trained, config: Config, parts: Parts) -> bool:
    """Whether a run that starts from another finds other data where that one found its own."""
    before, now = ({**each["data"], "holdout": 0} for each in (base.config, config))
    return before == now and fingerprint(parts.data) != base.data


def continued(folder: Folder, settings: list[str], allow: Iterable[Allowed] = ()) -> Config:
    """The configuration of a run that goes on, with what may change changed.

    Raises:
        ConfigError: no run is there, its config.toml was edited, or the settings would make it another run.
    """
    # without a checkpoint the run was stopped before its first one: then it begins
    before = last_told(folder, allow)
    if before is None:
        raise ConfigError(f"there is no run in {folder.path}: begin one with --out {folder.path}")
    after = resolve(override(before.sections, settings), allow=allow)
    refuse_another(before, after)
    refuse_edited(folder, after)
    return after


def summary(config: Config, parts: Parts, folder: Folder, ranks: Ranks | None = None) -> str:
    """What is about to happen, in a few lines."""
    training = config.training
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    device = next(parts.denoiser.parameters()).device
    shared = f", on {ranks.total} ranks" if ranks and ranks.total > 1 else ""
    arithmetic = parts.objective.target.arithmetic(device)
    return "\n".join(
        (
            f"data      {parts.data!r}",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"target    {parts.objective.target}",
            *([f"products  {arithmetic}"] if arithmetic else []),
            f"network   {config['network']['kind']}, {numbers:,} parameters, on {device}",
            f"training  {training.images:,} images, {training.batch_size} a step{shared}, seed {training.seed}",
            f"run       {folder.path}",
        )
    )


def run(config: Config, parts: Parts, folder: Folder, ranks: Ranks | None = None) -> int:
    """Train with something to look at; as `fit` otherwise."""
    with _watching(config.training.images, ranks is None or ranks.first) as watch:
        return fit(config, parts, folder, ranks=ranks, watch=watch)


@contextmanager
def _watching(images: int, aloud: bool) -> Iterator[Watch]:
    """A bar at a terminal; elsewhere a line a minute."""
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn(compact=True))
    shown = aloud and console.is_terminal
    with Progress(TextColumn("training"), *columns, TextColumn("left"), console=console, disable=not shown) as bar:
        task, told = bar.add_task("", total=images, said=""), monotonic()

        def watch(seen: int, line: Mapping[str, Any]) -> None:
            nonlocal told
            bar.update(task, completed=seen, said=glance(line))
            if aloud and not shown and line and monotonic() - told > 60:
                console.print(f"{seen:,} of {images:,} images  {glance(line)}", highlight=False, soft_wrap=True)
                told = monotonic()

        yield watch


def glance(line: Mapping[str, Any]) -> str:
    """The numbers to look at while training."""
    if not line:
        return ""
    parts = [f"{1000 / line['Timing/sec_per_kimg']:,.0f} img/s"]
    if "Loss/loss" in line:
        changed = f"changed {line['Target/changed']:.0%}"
        parts += [f"loss {line['Loss/loss']:.4f}", f"ESS {line['Target/ess']:.1f}", changed]
    return "  ".join([*parts, *([f"{line['Steps/skipped']} skipped"] if line["Steps/skipped"] else [])])
