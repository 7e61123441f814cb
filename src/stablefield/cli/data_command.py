"""`stablefield data`: convert a data set to a store, a ZIP file or an array archive, and inspect one."""

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

from stablefield.config import ConfigError, override, resolve
from stablefield.data import (
    DataSummary,
    Progress,
    Source,
    Store,
    content_hash,
    guess_kind,
    write_npz,
    write_store,
    write_zip,
)
from stablefield.generate.images import save_sheet
from stablefield.kinds import KINDS
from stablefield.objective import EDMWeight
from stablefield.pool import Pool
from stablefield.process import VE
from stablefield.studies.field import DataDistances, LinearDenoiser, NoiseProposal, VarianceReport, measure_field
from stablefield.studies.field.plots import plot_proposal

__all__ = [
    "contact_sheet",
    "convert",
    "data",
    "describe",
    "inspect",
    "open_source",
    "progress_bar",
    "propose",
    "section_of",
]

data = typer.Typer(
    help="""Convert data sets to stores that are mapped into memory, and inspect them.

    \b
    stablefield data convert cifar10-32x32.zip cifar10          EDM's ZIP file to a store
    stablefield data convert photos/ photos.zip --resolution 64x64 --transform center-crop
    stablefield data inspect cifar10                            size, classes, hash, a sheet, proposed noise levels
    stablefield train --data cifar10
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)

_KINDS = [kind for kind in KINDS["data"] if kind != "unknown"]
_SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A ZIP file, folder, array, IDX file, tar archive or store; or hf:NAME for a data set of the Hugging Face "
        "hub.",
    ),
]
_Kind = Annotated[str | None, typer.Option(help=f"Kind of the source: {', '.join(_KINDS)}. Default: guessed.")]
_Resolution = Annotated[str | None, typer.Option(metavar="WxH", help="Resize images to this width and height.")]
_Transform = Annotated[
    str | None,
    typer.Option(help="Crop before resizing: center-crop, or center-crop-wide. Default: images are stretched."),
]
_Mode = Annotated[str | None, typer.Option(help="Convert images to rgb or grey.")]
_MaxImages = Annotated[int | None, typer.Option(min=1, help="Use only the first N images.", metavar="N")]
_DropAlpha = Annotated[bool, typer.Option("--drop-alpha", help="Discard transparency instead of refusing it.")]
_NoLabels = Annotated[bool, typer.Option("--no-labels", help="Ignore labels.")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.KEY=VALUE", help="Set another key of the data. May be repeated."),
]


@data.command()
def convert(
    source: _SourceArgument,
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="A new folder (a store), a .zip file (EDM's layout) or an .npz file (arrays)."
        ),
    ],
    kind: _Kind = None,
    resolution: _Resolution = None,
    transform: _Transform = None,
    mode: _Mode = None,
    max_images: _MaxImages = None,
    drop_alpha: _DropAlpha = False,
    no_labels: _NoLabels = False,
    set_: _Set = None,
) -> None:
    """Convert a data set to a store, a ZIP file or an array archive.

    Images are decoded once, and training then maps the store into memory.
    """
    options = _options(resolution, transform, mode, max_images, drop_alpha, no_labels)
    opened = open_source(source, kind, options, set_ or [])
    contents = opened.contents()
    with progress_bar("decoding") as progress:
        if dest.suffix == ".zip":
            write_zip(dest, contents, progress=progress)
        elif dest.suffix == ".npz":
            write_npz(dest, contents, progress=progress)
        else:
            write_store(dest, contents, source=repr(opened), progress=progress)
    classes = "" if contents.labels is None else f" of {int(contents.labels.max()) + 1} classes"
    print(
        f"Wrote {contents.count:,} data points{classes} to {dest}. Inspect them with: stablefield data inspect {dest}"
    )


@data.command()
def inspect(
    source: _SourceArgument,
    sheet: Annotated[Path, typer.Option(help="Image file for a sheet of data points, if they are images.")] = Path(
        "sheet.png"
    ),
    noise: Annotated[bool, typer.Option(help="Propose noise levels, which takes some seconds.")] = True,
    plot: Annotated[Path, typer.Option(help="Image file for the plot of the proposed noise levels.")] = Path(
        "noise.png"
    ),
    kind: _Kind = None,
    resolution: _Resolution = None,
    transform: _Transform = None,
    mode: _Mode = None,
    max_images: _MaxImages = None,
    drop_alpha: _DropAlpha = False,
    no_labels: _NoLabels = False,
    set_: _Set = None,
) -> None:
    """Summarize a data set and propose noise levels.

    Prints size, type, range, classes and hash of the data, verifies a store, and saves a sheet of images.
    """
    options = _options(resolution, transform, mode, max_images, drop_alpha, no_labels)
    opened = open_source(source, kind, options, set_ or [])
    with progress_bar("decoding") as progress:
        pool = opened.load(progress)
    values = DataSummary.from_pool(pool)
    print("\n".join(describe(pool, values, opened.contents().classes)))
    checked = f"{opened.verify()} (verified)" if isinstance(opened, Store) else content_hash(pool)
    print(f"hash      {checked}")
    if pool.images:
        save_sheet(sheet, contact_sheet(pool))
        print(f"sheet     {sheet}")
    if noise and values.std > 0:
        print("\n".join(propose(pool, values.std, plot)))


def open_source(source: str, kind: str | None, options: dict[str, Any], settings: list[str]) -> Source:
    """The source of data at a path.

    Args:
        source: a path, or hf:NAME.
        kind: kind of the source; None to guess it, and print the guess.
        options: keys of the section `data`.
        settings: further keys, as data.KEY=VALUE.

    Raises:
        ConfigError: an option that this kind does not have, an invalid value, or a key of another section.
        ValueError: the path does not exist, or its kind cannot be guessed.
    """
    section = section_of(source) if kind is None else {"kind": kind, "path": source}
    if kind is None:
        print(f"kind      {section['kind']} (guessed; --kind overrides it)")
    section |= options
    if other := [setting for setting in settings if not setting.startswith("data.")]:
        raise ConfigError(f"{other[0]}: only keys of the section data can be set here, such as data.split=test")
    opened: Source = resolve(override({"data": section}, settings)).make("data")
    if opened.holdout:
        raise ConfigError(f"data.holdout={opened.holdout}: data are held out in training only; remove this setting")
    return opened


def section_of(source: str) -> dict[str, Any]:
    """Section `data` of a configuration for the data at a path, whose kind is guessed.

    Args:
        source: a path, or hf:NAME.

    Raises:
        ValueError: the path does not exist, or its kind cannot be guessed.
    """
    kind, path = guess_kind(source)
    return {"kind": kind, "path": path} if path else {"kind": kind}


def describe(pool: Pool, summary: DataSummary, classes: tuple[str, ...]) -> list[str]:
    """Lines of text with size, type, range and classes of data.

    Args:
        pool: the data.
        summary: their summary.
        classes: names of the classes, as far as they are known.
    """
    dtype = str(pool.data.dtype).removeprefix("torch.")
    levels = f", {pool.num_levels} levels" if pool.num_levels != 256 else ""
    moments = f"mean {summary.mean:.4f}, standard deviation {summary.std:.4f}"
    return [
        f"data      {len(pool):,} of shape {pool.shape}, {dtype}{levels}, values={pool.values}",
        f"range     {summary.minimum:.4g} to {summary.maximum:.4g}, {moments}",
        *_class_lines(summary.class_counts, classes),
    ]


def propose(pool: Pool, spread: float, plot: Path, examples: int = 16, draws: int = 4) -> list[str]:
    """Lines of text with proposed noise levels, as settings, and the reasons for them; also writes the plot.

    Args:
        pool: the data.
        spread: their standard deviation.
        plot: image file for the plot.
        examples: noisy examples per noise level.
        draws: reference batches per size.
    """
    few, description = _subset(pool)
    try:
        distances = DataDistances.from_pool(few)
    except ValueError as error:
        return [f"noise     no proposal: {error}"]
    linear, process, size = LinearDenoiser.from_pool(few), VE(), min(1024, max(2, len(few) // 4))
    proposal = NoiseProposal.from_pool(few, spread, distances, linear)
    with progress_bar("measuring") as progress:
        t = distances.noise_levels(13, process)
        field = measure_field(few, process, t, sizes=(size,), examples=examples, draws=draws, progress=progress)
    report = VarianceReport.from_field(field, process, proposal.times(), EDMWeight(proposal.sigma_data), linear)
    plot_proposal(
        plot, field, linear, proposal, "What a network can learn, and how much targets vary, at each noise level"
    )
    settings = proposal.settings()
    return [
        f"noise     for process.kind=ve (EDM); {examples} examples at each of 13 levels; data: {description}",
        *(
            f"          --set {first} --set {second}"
            for first, second in zip(settings[::2], settings[1::2], strict=True)
        ),
        *(f"          {line}" for line in proposal.reasons()),
        *(f"          {line}" for line in report.summary()),
        f"plot      {plot}",
    ]


def _subset(pool: Pool, most_values: int = 2 * 10**8) -> tuple[Pool, str]:
    """Evenly spaced data points of large data, and a description of them."""
    most = max(1024, most_values // math.prod(pool.shape))
    if len(pool) <= most:
        return pool, f"all {len(pool):,} data points"
    index = torch.arange(most) * len(pool) // most
    return pool.subset(index), f"{most:,} evenly spaced data points of {len(pool):,}"


def contact_sheet(pool: Pool, images: int = 100) -> torch.Tensor:
    """Evenly spaced images of a data set, which is often ordered by class.

    Args:
        pool: the images.
        images: largest number of images.

    Returns:
        Floats in [-1, 1] of shape (n, C, H, W).
    """
    n = min(images, len(pool))
    return pool.take(torch.arange(n) * len(pool) // n)


def _class_lines(counts: tuple[int, ...], classes: tuple[str, ...], most: int = 20) -> list[str]:
    """Number of data points of each class, for the first classes."""
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
    """The keys of the section `data` that are given by options."""
    values = {"resolution": resolution, "transform": transform, "mode": mode, "max_images": max_images}
    flags = ({"drop_alpha": True} if drop_alpha else {}) | ({"labels": False} if no_labels else {})
    return {key: value for key, value in values.items() if value is not None} | flags


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Context with a progress bar on a terminal, which appears when its callback is first called.

    Args:
        title: text beside the bar.

    Returns:
        The callback, called with (done, total).
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
