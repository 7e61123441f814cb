"""Help, version and recipes start without torch, and nothing heavy is imported where it is not used."""

import os
import subprocess
import sys

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from stablefield.cli import app
from stablefield.kinds import list_kinds

HEAVY = {"torch", "sympy", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "accelerate", "tensorboard", "datasets"}


def commands(group: TyperGroup, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Names of all groups and commands, each with those before it."""
    found = [path]
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, TyperGroup) else [(*path, name)]
    return found


def imported(*arguments: str) -> tuple[set[str], str]:
    """Heavy packages that a command imports in a process of its own, and what it prints."""
    code = (
        "import sys\n"
        "from stablefield.cli import app\n"
        f"sys.argv = ['stablefield', *{list(arguments)}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('IMPORTED', *({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    printed, _, names = done.stdout.rpartition("IMPORTED")
    return set(names.split()), printed


@pytest.mark.parametrize("path", commands(get_command(app)), ids=" ".join)
def test_the_help_of_every_command_is_printed_without_a_heavy_import(path):
    packages, printed = imported(*path, "--help")
    assert packages == set()
    assert " ".join(["Usage: stablefield", *path]) in printed


def test_the_version_and_the_recipes_are_printed_without_a_heavy_import():
    packages, printed = imported("--version")
    assert packages == set()
    assert printed.startswith("stablefield 0.")
    packages, printed = imported("recipes")
    assert packages == set()
    assert "cifar10-ncsnpp-edm-stf" in printed
    packages, printed = imported("recipes", "digits")
    assert packages == set()
    assert printed.startswith("# ")


def test_help_lists_the_kinds():
    for command, section in (("sample", "sampler"), ("train", "target")):
        help_text = "".join(imported(command, "--help")[1].split())  # lines may break at hyphens
        assert list_kinds(section).replace(" ", "") in help_text


def test_a_dry_run_imports_nothing_that_draws_or_plots_or_joins_ranks():
    packages, printed = imported("train", "--dry-run")
    assert "This was a dry run" in printed
    assert packages & {"sympy", "matplotlib", "accelerate", "tensorboard", "scipy", "sklearn", "datasets"} == set()
