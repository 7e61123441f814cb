"""`stablefield data`: convert a data set to a store, a ZIP file or an array archive, and inspect one."""

import shlex
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stablefield.cli.progress import progress_bar
from stablefield.cli.training import section_of
from stablefield.config import ConfigError, override, resolve
from stablefield.data import Inspection, Source, printable
from stablefield.data import convert as convert_data
from stablefield.data import inspect as inspect_data
from stablefield.data.store import refuse_existing
from stablefield.generate.images import save_sheet
from stablefield.kinds import KINDS
from stablefield.objective import EDMWeight
from stablefield.pool import Pool
from stablefield.studies.field import VarianceReport, propose_noise
from stablefield.studies.field.plots import plot_proposal

__all__ = [
    "contact_sheet",
    "convert",
    "data",
    "describe",
    "inspect",
    "open_source",
    "propose",
]

data = typer.Typer(
    help="""Convert data sets to stores that are mapped into memory, and inspect them.

    \b
    stablefield data convert cifar10-32x32.zip cifar10          EDM's ZIP file to a store
    stablefield data convert photos/ photos.zip --resolution 64x64 --transform center-crop
    stablefield data inspect cifar10                            size, classes, hash, proposed noise levels
    stablefield train --data cifar10
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)

_KINDS = [kind for kind in KINDS["data"] if kind != "unknown"]


def _opens_source(command: Callable[..., None]) -> Callable[..., None]:
    """Command that takes the arguments and options of `_open` in place of its parameter `source`."""

    @wraps(command)
    def opening(**arguments: Any) -> None:
        opened = _open(**{name: arguments.pop(name) for name in options})
        command(source=opened, **arguments)

    options = signature(_open, eval_str=True).parameters
    own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "source"]
    arguments = [p for p in own if p.default is p.empty]
    keywords = [p for p in [*own, *options.values()] if p.default is not p.empty]
    parameters = [options["source"], *arguments, *keywords]
    opening.__signature__ = Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    opening.__annotations__ = {p.name: p.annotation for p in parameters}
    return opening


def _open(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A ZIP file, folder, array, IDX file, tar archive or store; or hf:NAME for a data set of the Hugging "
            "Face hub.",
        ),
    ],
    kind: Annotated[
        str | None, typer.Option(help=f"Kind of the source: {', '.join(_KINDS)}. Default: guessed.")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(metavar="WxH", help="Resize images to this width and height.")
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(help="Crop before resizing: center-crop, or center-crop-wide. Default: images are stretched."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Convert images to rgb or grey.")] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Use only the first N images.", metavar="N")] = None,
    background: Annotated[
        str | None,
        typer.Option(metavar="COLOUR", help="Colour behind transparent images: a name or #rrggbb. Default: white."),
    ] = None,
    drop_alpha: Annotated[
        bool, typer.Option("--drop-alpha", help="Discard transparency and keep the colours without it.")
    ] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded.")
    ] = False,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Ignore labels.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="data.KEY=VALUE", help="Set another key of the data. May be repeated."),
    ] = None,
) -> Source:
    """The source that the arguments and options of a command describe."""
    values = {
        "resolution": resolution,
        "transform": transform,
        "mode": mode,
        "max_images": max_images,
        "background": background,
        "drop_alpha": drop_alpha or None,
        "skip_unreadable": skip_unreadable or None,
        "labels": False if no_labels else None,
    }
    given = {key: value for key, value in values.items() if value is not None}
    return open_source(source, kind, given, settings or [])


@data.command()
@_opens_source
def convert(
    source: Source,
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="A new folder (a store), a .zip file (EDM's layout) or an .npz file (arrays)."
        ),
    ],
) -> None:
    """Convert a data set to a store, a ZIP file or an array archive.

    Images are decoded once, and training then maps the store into memory.
    """
    with progress_bar("decoding") as progress:
        made = convert_data(source, dest, progress=progress)
    classes = f" of {made.num_classes} classes" if made.num_classes else ""
    shown = shlex.quote(printable(dest))
    print(f"Wrote {made.count:,} data points{classes} to {shown}. Inspect them with: stablefield data inspect {shown}")


@data.command()
@_opens_source
def inspect(
    source: Source,
    sheet: Annotated[
        Path | None, typer.Option(help="New image file for a sheet of data points, if they are images.")
    ] = None,
    noise: Annotated[bool, typer.Option(help="Propose noise levels, which takes some seconds.")] = True,
    plot: Annotated[Path | None, typer.Option(help="New image file for a plot of the proposed noise levels.")] = None,
) -> None:
    """Summarize a data set and propose noise levels.

    Prints size, type, range, classes and hash of the data, and verifies a store. --sheet and --plot write images.
    """
    for path in (sheet, plot):
        if path is not None:
            refuse_existing(path)
    with progress_bar("decoding") as progress:
        found = inspect_data(source, progress=progress)
    if sheet and not found.pool.images:
        raise ConfigError(f"--sheet is for images, and these data are {found.pool} with values={found.pool.values}")
    print("\n".join(describe(found)))
    if sheet:
        save_sheet(sheet, contact_sheet(found.pool))
        print(f"sheet     {printable(sheet)}")
    if noise and found.summary.std > 0:
        print("\n".join(propose(found.pool, found.summary.std, plot)))


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


def describe(found: Inspection) -> list[str]:
    """Lines of text with size, type, range, classes and hash of data.

    Args:
        found: the data.
    """
    pool, summary = found.pool, found.summary
    dtype = str(pool.data.dtype).removeprefix("torch.")
    levels = f", {pool.num_levels} levels" if pool.num_levels != 256 else ""
    moments = f"mean {summary.mean:.4f}, standard deviation {summary.std:.4f}"
    return [
        f"data      {len(pool):,} of shape {pool.shape}, {dtype}{levels}, values={pool.values}",
        f"range     {summary.minimum:.4g} to {summary.maximum:.4g}, {moments}",
        *([f"note      {found.question}"] if found.question else []),
        *_class_lines(summary.class_counts, found.classes),
        f"hash      {found.hash}{' (verified)' if found.verified else ''}",
    ]


def propose(pool: Pool, spread: float, plot: Path | None, examples: int = 16) -> list[str]:
    """Lines of text with proposed noise levels, as settings, and the reasons for them.

    Args:
        pool: the data.
        spread: their standard deviation.
        plot: image file for a plot; None for no plot.
        examples: noisy examples per noise level.
    """
    try:
        with progress_bar("measuring") as progress:
            proposal, study = propose_noise(pool, spread, examples=examples, progress=progress)
    except ValueError as error:
        return [f"noise     no proposal: {error}"]
    report = VarianceReport.from_study(study, proposal.times(), EDMWeight(proposal.sigma_data))
    if plot:
        title = "What a network can learn, and how much targets vary, at each noise level"
        plot_proposal(plot, study, proposal, title)
    settings, examined = proposal.settings(), study.num_data_points
    part = f"all {examined:,} data points"
    if examined < len(pool):
        part = f"{examined:,} evenly spaced data points of {len(pool):,}"
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return [
        f"noise     for process.kind=ve (EDM); {examples} examples at each of {len(study.t)} levels; data: {part}",
        *(f"          --set {first} --set {second}" for first, second in pairs),
        *(f"          {line}" for line in (*proposal.reasons(), *report.summary())),
        *([f"plot      {printable(plot)}"] if plot else []),
    ]


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
