"""The page about sharing, and denoisers of every network for its programs."""

import re
import shlex
from pathlib import Path

import torch
from short_runs import trained
from typer.testing import CliRunner

from stablefield.build import build_denoiser
from stablefield.cli import app
from stablefield.config import resolve
from stablefield.denoise import Denoiser

PAGE = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(command)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command in block.splitlines()
]
# sections of a configuration, the shape of the data, and the number of classes
DENOISERS = {
    "mlp": ({"network": {"kind": "mlp", "width": 8}}, (2,), 0),
    "unet": ({"network": {"kind": "unet", "channels": 8, "blocks": 1}, "process": {"kind": "vp"}}, (1, 8, 8), 3),
    "ddpmpp": ({"network": {"kind": "ddpmpp", "model_channels": 8, "num_blocks": 1}}, (3, 16, 16), 0),
    "adm": ({"network": {"kind": "adm", "model_channels": 8, "num_blocks": 1}}, (3, 16, 16), 3),
}


def denoiser_and_inputs(kind: str) -> tuple[Denoiser, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A denoiser with random weights in every layer, and inputs of 2 and of 5 examples."""
    sections, shape, classes = DENOISERS[kind]
    denoiser = build_denoiser(resolve(sections), shape, classes).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # the last layers of networks start with zeros
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    x_t, t = torch.randn(5, *shape, generator=draw), torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9])
    inputs = (x_t, t, torch.tensor([0, -1, 2, 1, 0])) if classes else (x_t, t)
    return denoiser, tuple(value[:2] for value in inputs), inputs


def export_as_shown() -> None:
    """Train a run for the page in the current folder, and export it with its first command."""
    trained(Path("runs/digits-stf"), "training.images=64")
    _, *arguments = COMMANDS[0]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
