"""`stablefield data`: convert a data set to a store, a ZIP file or an array archive, and inspect one."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from stablefield.cli.options import given_by
from stablefield.cli.progress import progress_bar
from stablefield.kinds import KINDS, ConfigError

_KINDS = [kind for kind in KINDS["data"] if kind != "unknown"]

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
) -> Any:
    """The `Source` that the arguments and options of a command describe."""
    from stablefield.config import override, resolve
    from stablefield.data import data_section

    section = data_section(source, kind)
    if kind is None:
        print(f"kind      {section['kind']} (guessed; --kind overrides it)")
    section |= {
        "resolution": resolution,
        "transform": transform,
        "mode": mode,
        "max_images": max_images,
        "background": background,
        "drop_alpha": drop_alpha or None,
        "skip_unreadable": skip_unreadable or None,
        "labels": False if no_labels else None,
    }
    if other := [setting for setting in settings or [] if not setting.startswith("data.")]:
        raise ConfigError(f"{other[0]}: only keys of the section data can be set here, such as data.split=test")
    given = {key: value for key, value in section.items() if value is not None}
    opened = resolve(override({"data": given}, settings or [])).make("data")
    if opened.holdout:
        raise ConfigError(f"data.holdout={opened.holdout}: data are held out in training only; remove this setting")
    return opened


@data.command()
@given_by("source", _open)
def convert(
    source: Any,  # a Source
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
    from stablefield.data import convert as convert_data
    from stablefield.data import printable

    with progress_bar("decoding") as progress:
        made = convert_data(source, dest, progress=progress)
    classes = f" of {made.num_classes} classes" if made.num_classes else ""
    shown = shlex.quote(printable(dest))
    print(f"Wrote {made.count:,} data points{classes} to {shown}. Inspect them with: stablefield data inspect {shown}")


@data.command()
@given_by("source", _open)
def inspect(
    source: Any,  # a Source
    sheet: Annotated[
        Path | None, typer.Option(help="New image file for a sheet of data points, if they are images.")
    ] = None,
    noise: Annotated[bool, typer.Option(help="Propose noise levels, which takes some seconds.")] = True,
    plot: Annotated[Path | None, typer.Option(help="New image file for a plot of the proposed noise levels.")] = None,
) -> None:
    """Summarize a data set and propose noise levels.

    Prints size, type, range, classes and hash of the data, and verifies a store. --sheet and --plot write images.
    """
    from stablefield.cli.inspecting import describe, propose
    from stablefield.data import inspect as inspect_data
    from stablefield.data import printable
    from stablefield.data.store import refuse_existing
    from stablefield.generate.images import save_sheet

    for option, path, formats in (("--sheet", sheet, (".png",)), ("--plot", plot, (".png", ".pdf", ".svg"))):
        if path is not None:
            refuse_existing(path)
            if path.suffix.lower() not in formats:
                raise ConfigError(f"{option} {path}: the file must end in {' or '.join(formats)}")
    with progress_bar("decoding") as progress:
        found = inspect_data(source, progress=progress)
    if sheet and not found.pool.images:
        raise ConfigError(f"--sheet is for images, and these data are {found.pool} with values={found.pool.values}")
    print("\n".join(describe(found)))
    if sheet:
        save_sheet(sheet, found.pool.take(found.pool.evenly_spaced(100)))
        print(f"sheet     {printable(sheet)}")
    if noise and found.summary.std > 0:
        print("\n".join(propose(found.pool, found.summary.std, plot)))
