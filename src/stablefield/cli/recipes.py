"""`stablefield recipes`: published settings, ready to train."""

from typing import Annotated

import typer

from stablefield.recipes import recipe_text
from stablefield.recipes import recipes as known


def recipes(name: Annotated[str | None, typer.Argument(help="Show this one, with its sources.")] = None) -> None:
    """List the recipes, or show one: published settings, for `stablefield train --recipe NAME --data PATH`."""
    if name:
        print(recipe_text(name).rstrip())
        return
    titles = known()
    width = max(map(len, titles))
    print("\n".join(f"{name:{width}}  {title}" for name, title in titles.items()))
