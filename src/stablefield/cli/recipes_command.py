"""`stablefield recipes`: list the published settings, or print one of them."""

from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print, with its sources in comments.")] = None,
) -> None:
    """List the published settings, or print one; use them with `stablefield train --recipe NAME --data PATH`."""
    from stablefield.recipes import list_recipes, recipe_text

    if name:
        print(recipe_text(name).rstrip())
        return
    titles = list_recipes()
    width = max(map(len, titles))
    print("\n".join(f"{name:{width}}  {title}" for name, title in titles.items()))
