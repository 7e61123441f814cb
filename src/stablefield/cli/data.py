"""`stablefield data`: any data set into a store that is mapped into memory, and a look at what is in one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stablefield.config import PARTS, ConfigError, override, resolve
from stablefield.data import Progress, Source, Store, Summary, content_hash, guess_kind, write, write_npz, write_zip
from stablefield.evaluate.field import Advice, Extent, Linear, Proposal, measure_field
from stablefield.evaluate.field.plots import plot_proposal
from stablefield.evaluate.pictures import save_grid
from stablefield.objective import EDMWeight
from stablefield.process import VE
from stablefield.reference import Pool

data = typer.Typer(
    help="""Bring data in: decoded once, then mapped into memory.

    \b
    stablefield data convert cifar10-32x32.zip cifar10          EDM's zip into a store
    stablefield data convert photos/ photos.zip --resolution 64x64 --transform center-crop
    stablefield data inspect cifar10                            how many, of what, a picture, and noise that suits
    stablefield train --data cifar10
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)

KINDS = [kind for kind in PARTS["data"] if kind != "unnamed"]
From = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A zip, folder, array, IDX file, tar or store; or hf:NAME.")
]
Kind = Annotated[str | None, typer.Option(help=f"{', '.join(KINDS)}; else guessed.")]
Resolution = Annotated[str | None, typer.Option(metavar="WxH", help="Bring images to this size.")]
Transform = Annotated[str | None, typer.Option(help="center-crop or center-crop-wide; else images are stretched.")]
Mode = Annotated[str | None, typer.Option(help="rgb or grey, whatever the images are.")]
MaxImages = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
DropAlpha = Annotated[bool, typer.Option("--drop-alpha", help="Forget transparency, instead of refusing it.")]
NoLabels = Annotated[bool, typer.Option("--no-labels", help="Leave labels out.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.KEY=VALUE", help="Any other key of the kind; see docs/data.md."),
]


@data.command()
def convert(
    source: From,
    dest: Annotated[Path, typer.Argument(help="A new folder (a store), or a file .zip (EDM's layout) or .npz.")],
    kind: Kind = None,
    resolution: Resolution = None,
    transform: Transform = None,
    mode: Mode = None,
    max_images: MaxImages = None,
    drop_alpha: DropAlpha = False,
    no_labels: NoLabels = False,
    set_: Set = None,
) -> None:
    """Decode a data set once, into a store that training maps into memory; or into a zip or .npz for others."""
    options = _options(resolution, transform, mode, max_images, drop_alpha, no_labels)
    found = open_source(source, kind, options, set_ or [])
    contents = found.contents()
    with progress_bar("decoding") as progress:
        if dest.suffix == ".zip":
            write_zip(dest, contents, progress=progress)
        elif dest.suffix == ".npz":
            write_npz(dest, contents, progress=progress)
        else:
            write(dest, contents, source=repr(found), progress=progress)
    named = "" if contents.labels is None else f", {int(contents.labels.max()) + 1} classes"
    print(f"{contents.count:,} members{named}: {dest}. Look at it with: stablefield data inspect {dest}")


@data.command()
def inspect(
    source: From,
    sheet: Annotated[Path, typer.Option(help="Where the picture goes, if these are images.")] = Path("sheet.png"),
    noise: Annotated[bool, typer.Option(help="Propose noise levels, which takes some seconds.")] = True,
    plot: Annotated[Path, typer.Option(help="Where the plot of what varies at which noise goes.")] = Path("noise.png"),
    kind: Kind = None,
    resolution: Resolution = None,
    transform: Transform = None,
    mode: Mode = None,
    max_images: MaxImages = None,
    drop_alpha: DropAlpha = False,
    no_labels: NoLabels = False,
    set_: Set = None,
) -> None:
    """Say how many there are and of what, check a store's hash, show some if they are images, and propose noise."""
    options = _options(resolution, transform, mode, max_images, drop_alpha, no_labels)
    found = open_source(source, kind, options, set_ or [])
    with progress_bar("decoding") as progress:
        pool = found.load(progress)
    spread = Summary.of(pool)
    print("\n".join(describe(pool, spread, found.contents().classes)))
    checked = f"{found.verify()}, as it was written" if isinstance(found, Store) else content_hash(pool)
    print(f"hash      {checked}")
    if pool.images:
        save_grid(sheet, contact_sheet(pool))
        print(f"picture   {sheet}")
    if noise and spread.std > 0:
        print("\n".join(propose(pool, spread.std, plot)))


def open_source(source: str, kind: str | None, options: dict[str, Any], settings: list[str]) -> Source:
    """The source that a path leads to; its kind is guessed, and said, if it is not given.

    Raises:
        ConfigError: an option that this kind does not have, or of no meaning.
    """
    section = section_of(source) if kind is None else {"kind": kind, "path": source}
    if kind is None:
        print(f"taken as  {section['kind']} (--kind says otherwise)")
    section |= options
    if other := [setting for setting in settings if not setting.startswith("data.")]:
        raise ConfigError(f"{other[0]}: only keys of the data can be set here, as data.split=test")
    found: Source = resolve(override({"data": section}, settings)).make("data")
    if found.holdout:
        raise ConfigError(f"data.holdout={found.holdout}: members are held out by a training, not here")
    return found


def section_of(source: str) -> dict[str, Any]:
    """What a configuration says of the data that a path leads to.

    Raises:
        ValueError: nothing is there, or nothing that is known.
    """
    kind, path = guess_kind(source)
    return {"kind": kind, "path": path} if path else {"kind": kind}


def describe(pool: Pool, summary: Summary, classes: tuple[str, ...]) -> list[str]:
    """What there is to say of data, line by line."""
    dtype = str(pool.data.dtype).removeprefix("torch.")
    levels = f", {pool.levels} levels" if pool.levels != 256 else ""
    return [
        f"members   {len(pool):,} of shape {pool.shape}, {dtype}{levels}, values={pool.values}",
        f"values    {summary.least:.4g} to {summary.most:.4g}, mean {summary.mean:.4f}, deviation {summary.std:.4f}",
        *_class_lines(summary.counts, classes),
    ]


def propose(pool: Pool, spread: float, plot: Path, rows: int = 16, draws: int = 4) -> list[str]:
    """Noise for data, as settings, and what it rests on; the plot is written."""
    few, said = _some(pool)
    try:
        extent = Extent.of(few)
    except ValueError as error:
        return [f"noise     nothing to propose: {error}"]
    linear, process, size = Linear.of(few), VE(), min(1024, max(2, len(few) // 4))
    proposal = Proposal.of(few, spread, extent, linear)
    with progress_bar("measuring") as progress:
        field = measure_field(
            few, process, extent.levels(13, process), sizes=(size,), rows=rows, draws=draws, progress=progress
        )
    advice = Advice.of(field, process, proposal.times(), EDMWeight(proposal.sigma_data), linear)
    plot_proposal(plot, field, linear, proposal, "Where there is something to learn, and where targets vary")
    settings = proposal.settings()
    return [
        f"noise     for process.kind=ve (EDM); {rows} rows at 13 levels against {said}",
        *(
            f"          --set {first} --set {second}"
            for first, second in zip(settings[::2], settings[1::2], strict=True)
        ),
        *(f"          {line}" for line in proposal.reasons()),
        *(f"          {line}" for line in advice.summary()),
        f"plot      {plot}",
    ]


def _some(pool: Pool, numbers: int = 2 * 10**8) -> tuple[Pool, str]:
    """Members evenly spread over large data, and how many that are."""
    most = max(1024, numbers // math.prod(pool.shape))
    if len(pool) <= most:
        return pool, f"all {len(pool):,} members"
    index = torch.arange(most) * len(pool) // most
    return pool.subset(index), f"{most:,} members of {len(pool):,}, evenly spread"


def contact_sheet(pool: Pool, images: int = 100) -> torch.Tensor:
    """Images from all over the data, evenly spaced: classes often come one after the other."""
    n = min(images, len(pool))
    return pool.take(torch.arange(n) * len(pool) // n)


def _class_lines(counts: tuple[int, ...], classes: tuple[str, ...], most: int = 20) -> list[str]:
    if not counts:
        return ["classes   none"]
    names = [classes[label] if label < len(classes) else str(label) for label in range(len(counts))]
    lines = [f"          {count:>9,}  {name}" for name, count in zip(names[:most], counts[:most], strict=True)]
    more = [f"          and {len(counts) - most:,} more"] if len(counts) > most else []
    return [f"classes   {len(counts)}", *lines, *more]


def _options(
    resolution: str | None,
    transform: str | None,
    mode: str | None,
    max_images: int | None,
    drop_alpha: bool,
    no_labels: bool,
) -> dict[str, Any]:
    """The keys that were said."""
    said = {"resolution": resolution, "transform": transform, "mode": mode, "max_images": max_images}
    flags = ({"drop_alpha": True} if drop_alpha else {}) | ({"labels": False} if no_labels else {})
    return {key: value for key, value in said.items() if value is not None} | flags


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar that appears with the first news."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
