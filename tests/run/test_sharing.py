"""The page about sharing runs as it is shown; a program of torch.export computes what the denoiser computes."""

import pytest
import torch
from sharing_page import BLOCKS, COMMANDS, denoiser_and_inputs, export_as_shown
from typer.testing import CliRunner

from stablefield.cli import app

pytestmark = pytest.mark.usefixtures("unchecked")


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_as_shown()
    names: dict[str, object] = {}
    for code in BLOCKS[:-1]:  # tests/interop/test_onnx.py runs the last one
        exec(compile(code, "sharing.md", "exec"), names)
    smaller = {
        "sample": ["--steps", "2"],
        "evaluate": ["--steps", "2", "--samples", "4", "--features", "pixels"],
        "train": ["--set", "training.images=32"],
    }
    assert [command[1] for command in COMMANDS] == ["export", *smaller]
    for _, name, *arguments in COMMANDS[1:]:
        done = CliRunner().invoke(app, [name, *arguments, *smaller[name]])
        assert done.exit_code == 0, (name, done.output, done.exception)


@pytest.mark.parametrize(
    "kind", ["mlp", "unet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddpmpp", "adm"))]
)
def test_an_exported_program_computes_what_the_denoiser_computes_for_any_batch_size(kind, tmp_path):
    denoiser, example, inputs = denoiser_and_inputs(kind)
    batch = torch.export.Dim("batch")
    program = torch.export.export(denoiser, example, dynamic_shapes=tuple({0: batch} for _ in example))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.equal(loaded(*inputs), denoiser(*inputs))
    assert not torch.allclose(loaded(*inputs), denoiser(inputs[0], inputs[1] / 2, *inputs[2:]))
