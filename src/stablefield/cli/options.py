"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="Allow a file to name this class of yours; importing it runs its code. May be repeated.",
    ),
]
DataPath = Annotated[
    str | None,
    typer.Argument(metavar="DATA", help='Data: a store, zip, folder, array, ..., "digits" or "hf:NAME".'),
]
Kind = Annotated[str | None, typer.Option(help="Kind of the data.", show_default="guessed from DATA")]
TrainingConfig = Annotated[
    Path | None, typer.Option(help="Training configuration: its process, times and weight (and data) are used.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key of the configuration; may be repeated."),
]
Device = Annotated[str, typer.Option(help='Device: "auto", "cpu", "cuda", ...')]
