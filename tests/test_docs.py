"""What the documents show runs as it is shown."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_pictures_and_pages_that_are_linked_exist():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_and_the_contributors_page_are_short():
    assert len(README.splitlines()) <= 120
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
