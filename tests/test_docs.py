"""What the documents show runs as it is shown."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import make_zip, png
from PIL import Image
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from stablefield.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["--set", "training.images=256", "--set", "target.size=64"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = (line.partition("#")[0].strip() for block in blocks("console") for line in block.splitlines())
    return [shlex.split(line) for line in lines if line.startswith("stablefield")]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1])
def test_the_readmes_python_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stablefield", *arguments], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_commands_run_with_less_to_train(tmp_path):
    assert len(commands()) >= 5
    for _, *arguments in commands():
        shorter = SHORT if arguments[0] == "train" and "target.kind=single" not in arguments else SHORT[:2]
        run([*arguments, *(shorter if arguments[0] == "train" else [])], tmp_path)


@pytest.mark.slow
def test_the_readmes_commands_run_as_written(tmp_path):
    for _, *arguments in commands():
        run(arguments, tmp_path)


def test_a_short_demo_writes_everything_it_names(tmp_path):
    run(["demo", "--out", "demo", "--images", "1024", "--samples", "64"], tmp_path)
    found = {file.name for file in (tmp_path / "demo").iterdir()}
    assert {"samples.png", "loss.png", "variance.png", "scores.json", "checkpoint.safetensors"} <= found


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_make_says_what_is_missing_where_python_is_too_old(python, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout + done.stderr


PAGES = sorted((ROOT / "README.md", *ROOT.glob("docs/**/*.md")))
SHOWN = re.compile(r"(?:stablefield|torchrun .*(?:-m|--no-python) stablefield) (.*)")


def shown(text: str) -> list[list[str]]:
    """What follows `stablefield`, in blocks of a console and between backticks."""
    fenced = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in fenced for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [match[1] for line in lines if (match := SHOWN.fullmatch(line))]
    return [shlex.split(line.rstrip("\\").replace("...", "")) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_is_understood(page):
    for arguments in (each for each in shown(page.read_text()) if each != ["--help"]):
        command, rest, context = get_command(app), arguments, None
        while isinstance(command, TyperGroup):
            context = command.make_context(None, list(rest), parent=context, resilient_parsing=True)
            name, command, rest = command.resolve_command(context, list(rest))
            assert command is not None, f"{page.name}: no command {name}"
            if not rest:
                break  # named, and not shown in use
        else:
            command.make_context(None, list(rest), parent=context)


PLAN = (ROOT / "docs" / "results" / "README.md").read_text().partition("## What needs eight GPUs")[2]
SMALL = ("target.size=4", "training.images=2", "training.batch_size=2", "training.ramp=0", "training.sample_every=0")
NARROW = ("network.model_channels=8", "network.num_blocks=1", "training.precision=float32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("row", [row for row in PLAN.splitlines() if "`torchrun" in row], ids=lambda row: row[2:30])
def test_what_needs_eight_gpus_runs_from_end_to_end_on_one_core_with_less_to_do(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = np.random.default_rng(0)
    if "celeba" in row:
        for number in range(6):
            picture = source.integers(0, 256, (218, 178, 3), dtype=np.uint8)
            place = tmp_path / "img_align_celeba" / f"{number:06d}.jpg"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(place)
    else:
        images = [png(picture) for picture in source.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)]
        make_zip(tmp_path / "cifar10-32x32.zip", {f"{n}.png": picture for n, picture in enumerate(images)})
    means = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.jit.trace(means, torch.zeros(2, 3, 8, 8)).save(tmp_path / "means.pt")  # for what must be downloaded
    train, *evaluations = shown(row)
    assert evaluations
    less = [part for setting in (*SMALL, *NARROW) for part in ("--set", setting)]
    for arguments in (
        [*train, *less],
        *(
            [*arguments, "--samples", "2", *([] if "rk45" in arguments else ["--steps", "2"])]
            for arguments in evaluations
        ),
    ):
        said = ["means.pt" if part == "inception" else part for part in arguments]
        result = CliRunner().invoke(app, said)
        assert result.exit_code == 0, (said, result.output, result.exception)
    assert "means" in result.output


def test_pictures_and_pages_that_are_linked_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_and_the_contributors_page_are_short():
    assert len(README.splitlines()) <= 120
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
