"""A run on a pretended GPU equals one on the CPU: training, measurements, sheets, checkpoints and resuming."""

from pathlib import Path

import pytest
import torch
from pretend_gpu import PretendGPU
from short_runs import Interrupted, configured, interrupt_at, tensors, untimed

from stablefield.build import build
from stablefield.engine.fit import fit
from stablefield.run import RunFolder

SETTINGS = [
    "data.holdout=64",
    "training.images=96",
    "training.sample_every=96",
    "training.probe_every=96",
    "training.probes=2",
    "training.gradient_clip=1.0",
    "sampler.steps=2",
]
RUNS = {
    "stf": [],
    "labels": ["training.conditional=true", "training.label_dropout=0.2", "training.micro_batch_size=8"],
    "EDM maps": ["augmentation.kind=edm"],
    "adaptive times": ["times.kind=adaptive", "times.every=96"],
}


def run(folder: Path, device: str, settings: list[str], stop: int | None = None) -> None:
    config = configured(*SETTINGS, *settings, f"training.device={device}")
    fit(config, build(config), RunFolder(folder), on_step=None if stop is None else interrupt_at(stop))


def contents(folder: Path) -> dict[str, object]:
    sheets = {path.name: path.read_bytes() for path in RunFolder(folder).sheets.iterdir()}
    return {"lines": untimed(folder), "sheets": sheets, "tensors": tensors(folder)}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[] if name == "labels" else pytest.mark.slow)
        for name, settings in RUNS.items()
    ],
)
def test_a_run_on_the_pretended_gpu_equals_a_run_on_the_cpu_bit_for_bit(settings: list[str], tmp_path: Path) -> None:
    run(tmp_path / "cpu", "cpu", settings)
    with PretendGPU() as gpu:
        with pytest.raises(Interrupted):
            run(tmp_path / "gpu", "cuda", settings, stop=32)
        run(tmp_path / "gpu", "cuda", settings)
    assert not gpu.mistakes
    here, there = contents(tmp_path / "cpu"), contents(tmp_path / "gpu")
    assert len(here["sheets"]) == 1
    torch.testing.assert_close(there, here, rtol=0, atol=0)
