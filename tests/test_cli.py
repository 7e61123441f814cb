"""What a person does at the terminal: train, stop, go on, sample, and be told what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stablefield
from stablefield.cli import app
from stablefield.config import resolve
from stablefield.run import Folder

pytestmark = pytest.mark.usefixtures("unchecked")

QUICK = [
    "training.images=2048",
    "training.log_every=1024",
    "training.ramp=0",
    "target.size=64",
    "network.channels=8",
    "network.blocks=1",
]


def command(*arguments: str):
    """A command, in this process: its result, with the error a user would see as its exception."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(out: Path, *settings: str):
    flags = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
    return command("train", "--out", out, *flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = train(out)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_is_a_folder_with_config_checkpoint_and_metrics(run):
    names = {"config.toml", "checkpoint.safetensors", "metrics.jsonl", "tensorboard"}
    assert {file.name for file in run.iterdir()} == names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [1.024, 2.048]
    assert all(line["Loss/loss"] > 0 and 1 <= line["Target/ess"] <= 64 for line in lines)


def test_load_gives_the_denoiser_back(run):
    denoiser = stablefield.load(run)
    assert not denoiser.training
    x = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]))
    assert x.shape == (2, 1, 8, 8)
    assert not torch.equal(stablefield.load(run, weights="model")(torch.ones(1, 1, 8, 8), torch.ones(1)), x[:1])
    with pytest.raises(ValueError, match="but average, model"):
        stablefield.load(run, weights="average-500")
    with pytest.raises(ValueError, match="no best checkpoint"):
        stablefield.load(run, weights="best")


def test_the_same_seed_gives_the_same_image_in_any_batch(run, tmp_path):
    assert command("sample", run, "--seeds", "0-4", "--steps", 4, "--out", tmp_path / "a", "--batch", 5).exit_code == 0
    assert command("sample", run, "--seeds", "3,1", "--steps", 4, "--out", tmp_path / "b", "--batch", 1).exit_code == 0
    for seed in (1, 3):
        one, other = (np.asarray(Image.open(tmp_path / f / "000000" / f"{seed:06d}.png"), int) for f in "ab")
        assert abs(one - other).max() <= 1
    assert (tmp_path / "a" / "grid.png").exists()


def test_an_archive_holds_bytes_in_the_fields_layout(run, tmp_path):
    result = command("sample", run, "--seeds", "0-2", "--steps", 3, "--sampler", "euler", "--out", tmp_path / "x.npz")
    assert "3 network evaluations" in result.output.replace("\n", " ")
    found = np.load(tmp_path / "x.npz")
    assert found["arr_0"].shape == (3, 8, 8, 1)
    assert found["arr_0"].dtype == np.uint8
    assert found["seeds"].tolist() == [0, 1, 2]


def test_a_folder_that_holds_a_run_is_refused_and_untouched(run):
    before = (run / "checkpoint.safetensors").read_bytes()
    result = train(run)
    assert "holds a run already" in str(result.exception)
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_a_run_goes_on_for_longer_but_not_as_another(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    refused = command("train", "--resume", out, "--set", "target.kind=single")
    assert "target.kind" in str(refused.exception)
    result = command("train", "--resume", out, "--set", "training.images=3072")
    assert result.exit_code == 0, result.output
    assert [line["Progress/kimg"] for line in Folder(out).history()] == [1.024, 2.048, 3.072]

    whole = tmp_path / "whole"
    train(whole, "training.images=3072")
    from stablefield.checkpoint import read

    one, other = read(out / "checkpoint.safetensors"), read(whole / "checkpoint.safetensors")
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path):
    flags = [part for setting in QUICK for part in ("--set", setting)]
    result = command("train", "--dry-run", "--out", tmp_path / "none", *flags)
    assert result.exit_code == 0
    assert "size = 64" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["target.sise=3"], "did you mean target.size"),
        (["target.size=5000"], "between 1 and the pool's 1797 members, not 5000"),
        (["network.multipliers=[1,2,2,2,2]"], "sides divisible by 16, not (1, 8, 8)"),
        (["process.kind=flow", "times.kind=lognormal"], "ends at t = 1"),
        (["data.kind=arrays", "data.path=nothing.npz"], "there is no file nothing.npz"),
    ],
)
def test_a_mistake_is_refused_before_any_work(tmp_path, settings, message):
    result = train(tmp_path / "out", *settings)
    assert result.exit_code == 1
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_config_file_says_what_is_special(tmp_path):
    (tmp_path / "run.toml").write_text('[target]\nkind = "single"\n[process]\nkind = "vp"\n')
    result = command("train", "--dry-run", "--config", tmp_path / "run.toml", "--set", "training.seed=9")
    assert 'kind = "vp"' in result.output
    assert "SingleSample()" in result.output
    assert "seed = 9" in result.output


@pytest.mark.parametrize("settings", [["training.conditional=true"], ["process.kind=flow", "training.stratified=true"]])
def test_conditional_and_other_processes_train_and_sample(tmp_path, settings):
    result = train(tmp_path / "run", *settings)
    assert result.exit_code == 0, result.output
    flags = ["--class", 3] if "conditional" in settings[0] else []
    assert command("sample", tmp_path / "run", "--seeds", "0-3", "--steps", 3, *flags).exit_code == 0
    assert (tmp_path / "run" / "samples" / "grid.png").exists()
    unknown = command("sample", tmp_path / "run", "--seeds", "0", "--class", 12)
    assert "no class 12" in str(unknown.exception)


def test_vectors_are_trained_on_and_sampled_as_arrays(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", data=rng.standard_normal((100, 5)), labels=rng.integers(0, 3, 100))
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'data.npz'}", "network.kind=mlp", "training.images=1024"]
    flags = [part for setting in (*settings, "target.size=32") for part in ("--set", setting)]
    assert command("train", "--out", tmp_path / "run", *flags).exit_code == 0
    assert command("sample", tmp_path / "run", "--seeds", "0-9").exit_code == 0
    assert np.load(tmp_path / "run" / "samples.npz")["arr_0"].shape == (10, 5)


NETWORK = """
import torch
class Net(torch.nn.Module):
    def __init__(self, shape, depth: int = 1):
        super().__init__()
        self.conv = torch.nn.Sequential(*[torch.nn.Conv2d(shape[0], shape[0], 3, padding=1) for _ in range(depth)])
    def forward(self, x, noise):
        return self.conv(x)
"""


def stablefield_command(*arguments: str, cwd: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stablefield", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_anyones_network_is_trained_from_the_folder_it_is_in(tmp_path):
    (tmp_path / "mine.py").write_text(NETWORK)
    settings = ["--set", "training.images=512", "--set", "target.size=16", "--set", "network.depth=2"]
    process = stablefield_command("train", "--network", "mine:Net", *settings, cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    process = stablefield_command("sample", "runs/digits-reference", "--seeds", "0-3", "--steps", "3", cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "--allow mine:Net" in error
    steps = ["--seeds", "0-3", "--steps", "3", "--allow", "mine:Net"]
    process = stablefield_command("sample", "runs/digits-reference", *steps, cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_trained(tmp_path, number, code):
    flags = [part for setting in (*QUICK, "training.images=10000000") for part in ("--set", setting)]
    process = stablefield_command(
        "train", "--out", "run", *flags, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, out + error
    assert "--resume run" in out
    assert stablefield.run.open_run(tmp_path / "run").images >= 1024


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    process = stablefield_command("sample", "nowhere", cwd=tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("stablefield: there is no checkpoint")
    assert "Traceback" not in error


def test_help_teaches_the_commands():
    for arguments in (["--help"], ["train", "--help"], ["sample", "--help"], ["demo", "--help"]):
        result = command(*arguments)
        assert result.exit_code == 0
    assert "stablefield sample" in command("--help").output


BROKEN = """
import torch
class Nan(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))
        self.asked = 0
    def forward(self, x, noise):
        self.asked += 1
        return x * self.gain / (0 if self.asked > 12 else 1)
class Fails(torch.nn.Module):
    def __init__(self, shape):
        raise KeyError("no such thing")
class Empty(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
    def forward(self, x, noise):
        return x
class Flat(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, noise):
        return self.gain * x.flatten(1)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    return lambda name, *settings: command(
        *("train", "--network", f"broken:{name}", "--out", tmp_path / "run", "--set", "target.size=8"),
        *(part for setting in settings for part in ("--set", setting)),
    )


def test_an_error_while_training_keeps_what_was_trained(broken, tmp_path):
    result = broken("Nan", "training.images=10000")
    assert "not finite in 26 steps in a row, up to 2368 images" in str(result.exception)
    saved = stablefield.run.read(tmp_path / "run" / "checkpoint.safetensors")
    assert saved.images == 2368
    assert torch.isfinite(saved.tensors["model.network.gain"]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fails", "KeyError: 'no such thing'"),
        ("Empty", "no parameters"),
        ("Flat", "cannot be asked about|answers"),
        ("Absent", "has no 'Absent'"),
    ],
)
def test_a_network_that_cannot_work_is_refused_before_any_work(broken, tmp_path, name, message):
    result = broken(name)
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()


def test_a_network_without_labels_cannot_be_told_any(broken, tmp_path):
    assert "label_dim" in str(broken("Nan", "training.conditional=true").exception)


def test_a_run_that_was_killed_before_its_first_checkpoint_can_begin(run, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()
    (out / "config.toml").write_bytes((run / "config.toml").read_bytes())
    assert command("train", "--resume", out).exit_code == 0
    assert stablefield.run.open_run(out).images == 2048


def test_a_line_that_was_cut_off_is_forgotten(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"Progress/kimg": 1.0, "Lo')
    assert command("train", "--resume", out, "--set", "training.images=3072").exit_code == 0
    assert [line["Progress/kimg"] for line in Folder(out).history()] == [1.024, 2.048, 3.072]


def test_a_run_is_not_taken_over_by_another(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    before = (out / "checkpoint.safetensors").read_bytes()
    assert "a run goes on as what it is" in str(command("demo", "--out", out, "--images", 4096).exception)
    assert "has seen 2048 already" in str(command("train", "--resume", out, "--set", "training.images=64").exception)
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_only_one_of_two_that_begin_at_once_gets_the_folder(tmp_path):
    folder, config = Folder(tmp_path / "run"), resolve({})
    folder.claim(config)
    with pytest.raises(ValueError, match="holds a run already"):
        folder.claim(config)


def test_classes_with_a_gap_are_refused_where_they_are_told(tmp_path):
    np.savez(tmp_path / "gap.npz", data=np.zeros((6, 5), np.float32), labels=np.array([0, 5, 0, 5, 0, 5]))
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'gap.npz'}", "network.kind=mlp", "target.size=2"]
    flags = [part for setting in (*settings, "training.conditional=true") for part in ("--set", setting)]
    result = command("train", "--out", tmp_path / "run", *flags)
    assert "class 1 has no member, but there is a class 5" in str(result.exception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.device=cudaa"], "no device 'cudaa' here"),
        (["sampler.steps=0"], "sampler: .*at least 1 step"),
        (["sampler.churn=-3"], "sampler: .*churn"),
        (["training.learning_rate=nan"], "learning_rate must be positive"),
        (["target.size=0"], "target: size must be"),
        (["network.channels=-8"], "network 'unet' cannot be made"),
        (["process.kind=edm"], "'edm' is none of ve, vp"),
    ],
)
def test_what_parts_refuse_is_said_in_a_line(tmp_path, settings, message):
    result = train(tmp_path / "run", *settings)
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()


def test_a_new_process_brings_what_suits_it_to_trained_weights(run, tmp_path):
    flags = ["--set", "process.kind=flow", "--set", "training.images=64"]
    result = command("train", "--from", run, "--out", tmp_path / "flow", *flags)
    assert result.exit_code == 0, result.exception
    sections = stablefield.run.open_run(tmp_path / "flow").config.sections
    assert [sections[name]["kind"] for name in ("times", "weight", "grid")] == ["uniform", "velocity", "uniform"]


def test_nothing_that_sampling_did_not_write_is_written_over(run, tmp_path):
    mine = tmp_path / "mine.npz"
    np.savez(mine, x=np.ones(3))
    before = mine.read_bytes()
    assert "not written by this command" in str(command("sample", run, "--seeds", "0", "--out", mine).exception)
    assert mine.read_bytes() == before
    assert "not written by this command" in str(command("sample", run, "--seeds", "0", "--out", run).exception)


def test_files_are_for_whom_the_umask_allows(run):
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in run.iterdir() if path.is_file()} == {0o666 & ~mask}
