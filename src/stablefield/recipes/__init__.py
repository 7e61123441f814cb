"""Recipes: configurations with published hyper-parameters, one TOML file each in this package.

    stablefield train --recipe cifar10-ncsnpp-edm-stf --data cifar10-32x32.zip

The first line of a recipe is its title, and its comments name the sources of its values. It contains no paths: the user
gives the data. All recipes train with stable targets; `--set target.kind=dsm` gives the same run with DSM targets.
"""

import tomllib
from importlib.resources import files
from typing import Any

from stablefield.kinds import ConfigError

__all__ = ["list_recipes", "read_recipe", "recipe_text"]


def list_recipes() -> dict[str, str]:
    """Title of every recipe, by name."""
    recipes = (file for file in files(__name__).iterdir() if file.name.endswith(".toml"))
    return {name: _title(name) for name in sorted(file.name.removesuffix(".toml") for file in recipes)}


def recipe_text(name: str) -> str:
    """Text of the TOML file of a recipe, with its comments.

    Args:
        name: name of the recipe, a key of `list_recipes`.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    if name not in (known := list_recipes()):
        raise ConfigError(f"there is no recipe {name!r}; choose one of {', '.join(known)}")
    return _text(name)


def read_recipe(name: str) -> dict[str, Any]:
    """Sections of a recipe, as dictionaries.

    Args:
        name: name of the recipe, a key of `list_recipes`.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    return tomllib.loads(recipe_text(name))


def _text(name: str) -> str:
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def _title(name: str) -> str:
    return _text(name).partition("\n")[0].removeprefix("# ")
