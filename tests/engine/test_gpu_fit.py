"""A run on a GPU equals one on the CPU: training, measuring, drawing, saving, resuming, and what uses it."""

from pathlib import Path

import pytest
import torch
from noisy_data import images
from pretend_gpu import CUDA, gpu
from short_runs import Interrupted, configured, interrupt_at, tensors, untimed

from stablefield.build import build
from stablefield.distributed import Ranks
from stablefield.engine.fit import fit
from stablefield.evaluate import evaluate
from stablefield.generate import SamplingPlan, sample_to
from stablefield.run import RunFolder, open_run
from stablefield.studies.field import measure

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
def test_a_run_on_the_gpu_equals_a_run_on_the_cpu(settings: list[str], tmp_path: Path) -> None:
    run(tmp_path / "cpu", "cpu", settings)
    with gpu() as device:
        with pytest.raises(Interrupted):
            run(tmp_path / "gpu", "cuda", settings, stop=32)
        run(tmp_path / "gpu", "cuda", settings)
    assert not device.mistakes
    here, there = contents(tmp_path / "cpu"), contents(tmp_path / "gpu")
    assert len(here["sheets"]) == len(there["sheets"]) == 1
    if device.rounding:  # bytes of PNG files differ with any rounding
        here["sheets"] = there["sheets"] = None
    torch.testing.assert_close(there, here, rtol=device.rounding, atol=device.rounding)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_a_run_in_any_precision_resumes_bit_for_bit_on_the_gpu(precision: str, tmp_path: Path) -> None:
    settings = [f"training.precision={precision}", "training.conditional=true", "training.deterministic=true"]
    with gpu() as device:
        run(tmp_path / "whole", "cuda", settings)
        with pytest.raises(Interrupted):
            run(tmp_path / "resumed", "cuda", settings, stop=32)
        run(tmp_path / "resumed", "cuda", settings)
    assert not device.mistakes
    torch.testing.assert_close(contents(tmp_path / "resumed"), contents(tmp_path / "whole"), rtol=0, atol=0)


def test_samples_and_scores_of_a_run_are_those_of_the_cpu(tmp_path: Path) -> None:
    run(tmp_path / "run", "cpu", ["training.conditional=true", "training.sample_every=0"])

    def use(device: str) -> tuple[list[torch.Tensor], dict[str, float]]:
        trained = open_run(tmp_path / "run", device=device)
        found = []
        for number, options in enumerate(({}, {"guidance": 2.0, "label": 1}, {"precision": "bfloat16"})):
            plan = SamplingPlan.for_run(trained, **options)
            store = sample_to(plan, tmp_path / device / str(number), seeds=range(5), batch_size=3)
            found.append(store.take(range(5)))
        ranks = Ranks(CUDA if device == "cuda" else torch.device("cpu"))
        scores = evaluate(
            SamplingPlan.for_run(trained), count=20, features="pixels", keep=tmp_path / device, ranks=ranks
        )
        return found, {name: score.mean for table in scores.tables for name, score in table.scores.items()}

    here = use("cpu")
    with gpu() as device:
        there = use("cuda")
    assert not device.mistakes
    tolerance = max(1e-9, 100 * device.rounding)  # one of the sets of samples is in bfloat16
    torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)


def test_the_variance_of_targets_is_that_of_the_cpu() -> None:
    found = []
    with gpu() as there:
        for device in ("cpu", "cuda"):
            study = measure(images(100), noise_levels=3, sizes=(4, 16), examples=8, draws=3, device=device)
            found.append([study.dsm.values, study.kl.values, study.ess_share.values, study.divergence.values])
    assert not there.mistakes
    tolerance = max(1e-9, there.rounding)
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
