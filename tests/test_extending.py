"""Every example of docs/extending.md runs: its Python blocks are one file, its commands use that file."""

import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stablefield import VE
from stablefield.cli import app
from stablefield.run import RunFolder

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (64, 16), generator=draw).tolist()
    lines = (" ".join(map(str, (number % 3, *row))) for number, row in enumerate(rows))
    (folder / "images.txt").write_text("\n".join(lines))
    yield folder
    sys.modules.pop("mine", None)


def test_every_command_of_the_page_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert {line.split()[1] for line in COMMANDS} == {"train", "sample"}
    for line in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert RunFolder(Path("runs/data")).checkpoint.exists()
    assert len(list(Path("runs/midpoint").rglob("*.png"))) >= 4


def test_the_metric_of_the_page_decides_which_checkpoint_is_best(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runpy.run_path("mine.py", run_name="__main__")
    assert RunFolder(Path("runs/metric")).best.exists()
    assert RunFolder(Path("runs/metric")).history()[-1]["score/score"] > 0


def test_the_process_and_the_sampler_of_the_page_obey_their_laws(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import mine

    t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0):
        process = mine.ShiftedFlow(shift)
        alpha, sigma = process.scales(t)
        torch.testing.assert_close(process.time(sigma / alpha), t)
        torch.testing.assert_close(sigma / alpha, shift * t / (1 - t))

    class Normal:
        """E[x | x_t] of standard normal data."""

        process = VE()

        def __call__(self, x, t):
            return x / (1 + t**2)

    errors = []
    for steps in (8, 16):
        x, times = torch.ones(1, 1, dtype=torch.float64), torch.linspace(2.0, 1.0, steps + 1, dtype=torch.float64)
        for t, s in pairwise(times):
            x = mine.Midpoint().step(Normal(), x, t, s, None)
        errors.append(abs(float(x) - (2 / 5) ** 0.5))  # the flow keeps x / sqrt(1 + t^2)
    assert errors[0] / errors[1] > 3.5  # at least second order
