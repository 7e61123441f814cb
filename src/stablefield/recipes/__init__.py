"""Recipes: configurations with hyper-parameters that were published, one TOML file each beside this one.

    stablefield train --recipe cifar10-ncsnpp-edm-stf --data cifar10-32x32.zip

A recipe says what is special, and in comments who published it; its first line says what it is. It names no file: where
the data are is for the user to say. All train with stable targets; `--set target.kind=single` makes the twin without.
"""

import tomllib
from importlib.resources import files
from typing import Any

from stablefield.config import ConfigError


def recipes() -> dict[str, str]:
    """What each recipe is, in one line, by name."""
    found = (file for file in files(__name__).iterdir() if file.name.endswith(".toml"))
    return {name: _title(name) for name in sorted(file.name.removesuffix(".toml") for file in found)}


def recipe_text(name: str) -> str:
    """The file of a recipe, with its sources.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in (known := recipes()):
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(known)}")
    return _text(name)


def read_recipe(name: str) -> dict[str, Any]:
    """The sections of a recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    return tomllib.loads(recipe_text(name))


def _text(name: str) -> str:
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def _title(name: str) -> str:
    return _text(name).partition("\n")[0].removeprefix("# ")
