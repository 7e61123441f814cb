"""Options that several commands have."""

from typing import Annotated

import typer

__all__ = ["Allow"]

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="Allow a file to name this class of yours; importing it runs its code. May be repeated.",
    ),
]
