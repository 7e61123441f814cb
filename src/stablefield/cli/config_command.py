"""`stablefield config`: list the configuration keys."""

from typing import Annotated

import typer


def config(
    place: Annotated[
        str | None, typer.Argument(metavar="SECTION[.KIND]", help="Print only this section, or this kind of it.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/configuration.md.")] = False,
) -> None:
    """List all configuration keys with their types, defaults and meanings."""
    from stablefield.config.reference import describe_config, markdown_reference, text_reference

    print(markdown_reference().rstrip() if markdown else text_reference(describe_config(place or "")))
