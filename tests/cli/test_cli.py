"""The commands train and sample: a run is trained, stopped, resumed and sampled, and mistakes have clear messages."""

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
from safetensors.torch import save_file
from typer.testing import CliRunner

import stablefield
from stablefield.build import _split, build
from stablefield.checkpoint import checksum, read
from stablefield.cli import app
from stablefield.config import ConfigError, resolve
from stablefield.distributed import Ranks
from stablefield.pool import Pool
from stablefield.run import RunFolder
from stablefield.targets import Prefetched, STFTarget

pytestmark = pytest.mark.usefixtures("unchecked")

QUICK = [
    "training.images=512",
    "training.log_every=256",
    "training.learning_rate_warmup=0",
    "target.size=64",
    "network.channels=8",
    "network.blocks=1",
]


def command(*arguments: str):
    """Result of a command in this process; the error that a user would see is its exception."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def train(out: Path, *settings: str):
    quick = [key for key in QUICK if "target.size" not in key or not any("target.kind" in each for each in settings)]
    flags = [part for setting in (*quick, *settings) for part in ("--set", setting)]
    return command("train", "--out", out, *flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = train(out)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_is_a_folder_with_configuration_checkpoint_and_metrics(run):
    names = {"config.toml", "checkpoint.safetensors", "metrics.jsonl", "tensorboard"}
    assert {file.name for file in run.iterdir()} == names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["progress/kimg"] for line in lines] == [0.256, 0.512]
    assert all(line["loss/loss"] > 0 and 1 <= line["target/ess"] <= 64 for line in lines)


def test_load_returns_the_denoiser_of_a_run(run):
    denoiser = stablefield.load(run)
    assert not denoiser.training
    x = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]))
    assert x.shape == (2, 1, 8, 8)
    assert not torch.equal(stablefield.load(run, weights="model")(torch.ones(1, 1, 8, 8), torch.ones(1)), x[:1])
    with pytest.raises(ValueError, match="choose one of average, model, or best"):
        stablefield.load(run, weights="average-500")
    with pytest.raises(ValueError, match="no best checkpoint"):
        stablefield.load(run, weights="best")


def test_the_same_seed_gives_the_same_image_in_any_batch(run, tmp_path):
    assert command("sample", run, "--seeds", "0-4", "--steps", 4, "--out", tmp_path / "a", "--batch", 5).exit_code == 0
    assert command("sample", run, "--seeds", "3,1", "--steps", 4, "--out", tmp_path / "b", "--batch", 1).exit_code == 0
    for seed in (1, 3):
        one, other = (np.asarray(Image.open(tmp_path / f / "000000" / f"{seed:06d}.png"), int) for f in "ab")
        assert abs(one - other).max() <= 1
    assert (tmp_path / "a.png").exists()


def test_an_archive_has_bytes_in_the_layout_of_guided_diffusion(run, tmp_path):
    result = command("sample", run, "--seeds", "0-2", "--steps", 3, "--sampler", "euler", "--out", tmp_path / "x.npz")
    assert "3 network evaluations" in result.output.replace("\n", " ")
    found = np.load(tmp_path / "x.npz")
    assert found["arr_0"].shape == (3, 8, 8, 1)
    assert found["arr_0"].dtype == np.uint8
    assert found["seeds"].tolist() == [0, 1, 2]


def test_a_folder_with_a_run_is_refused_and_untouched(run):
    before = (run / "checkpoint.safetensors").read_bytes()
    result = train(run)
    assert "holds a run already" in str(result.exception)
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_a_run_resumes_for_longer_bit_for_bit_but_not_with_another_target(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    refused = command("train", "--resume", out, "--set", "target.kind=dsm")
    assert "target.kind" in str(refused.exception)
    result = command("train", "--resume", out, "--set", "training.images=768")
    assert result.exit_code == 0, result.output
    assert [line["progress/kimg"] for line in RunFolder(out).history()] == [0.256, 0.512, 0.768]

    whole = tmp_path / "whole"
    train(whole, "training.images=768")
    one, other = read(out / "checkpoint.safetensors"), read(whole / "checkpoint.safetensors")
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    flags = [part for setting in QUICK for part in ("--set", setting)]
    result = command("train", "--dry-run", "--out", tmp_path / "none", *flags)
    assert result.exit_code == 0
    assert "size = 64" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["target.sise=3"], "did you mean target.size"),
        (["target.kind=knn", "target.neighbours=5000"], "between 1 and the pool's 1797 data points, not 5000"),
        (["network.multipliers=[1,2,2,2,2]"], "sides divisible by 16, not (1, 8, 8)"),
        (["process.kind=flow", "times.kind=lognormal"], "ends at t = 1"),
        (["data.kind=arrays", "data.path=nothing.npz"], "there is no file nothing.npz"),
    ],
)
def test_a_mistake_is_refused_before_the_run_begins(tmp_path, settings, message):
    result = train(tmp_path / "out", *settings)
    assert result.exit_code == 1
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_settings_replace_values_of_a_configuration_file(tmp_path):
    (tmp_path / "run.toml").write_text('[target]\nkind = "dsm"\n[process]\nkind = "vp"\n')
    result = command("train", "--dry-run", "--config", tmp_path / "run.toml", "--set", "training.seed=9")
    assert 'kind = "vp"' in result.output
    assert "DSMTarget()" in result.output
    assert "seed = 9" in result.output


@pytest.mark.parametrize("settings", [["training.conditional=true"], ["process.kind=flow", "training.stratified=true"]])
def test_conditional_and_other_processes_train_and_sample(tmp_path, settings):
    result = train(tmp_path / "run", *settings)
    assert result.exit_code == 0, result.output
    flags = ["--class", 3] if "conditional" in settings[0] else []
    assert command("sample", tmp_path / "run", "--seeds", "0-3", "--steps", 3, *flags).exit_code == 0
    assert (tmp_path / "run" / "samples.png").exists()
    unknown = command("sample", tmp_path / "run", "--seeds", "0", "--class", 12)
    assert "no class 12" in str(unknown.exception)


def test_vectors_are_trained_and_sampled_as_arrays(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", data=rng.standard_normal((100, 5)), labels=rng.integers(0, 3, 100))
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'data.npz'}", "network.kind=mlp", "training.images=256"]
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
    def forward(self, x, c_noise):
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


def test_a_user_s_own_network_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(NETWORK)
    settings = ["--set", "training.images=64", "--set", "target.size=16", "--set", "network.depth=2"]
    process = stablefield_command("train", "--network", "mine:Net", *settings, cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    steps = ["--seeds", "0-3", "--steps", "3", "--allow", "mine:Net"]
    monkeypatch.chdir(tmp_path)
    sampled = command("sample", "runs/digits-stf", *steps)
    sys.modules.pop("mine", None)
    assert sampled.exit_code == 0, sampled.output


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_run(tmp_path, number, code):
    flags = [
        part
        for setting in (*QUICK, "training.log_every=128", "training.images=10000000")
        for part in ("--set", setting)
    ]
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
    assert stablefield.run.open_run(tmp_path / "run").images >= 128


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    process = stablefield_command("sample", "nowhere", cwd=tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("stablefield: there is no checkpoint")
    assert "Traceback" not in error


def test_help_of_every_command_is_printed_and_shows_its_options():
    for arguments in (["--help"], ["train", "--help"], ["sample", "--help"], ["demo", "--help"]):
        result = command(*arguments)
        assert result.exit_code == 0
    assert "stablefield sample" in command("--help").output
    text = " ".join(command("train", "--help").output.split())
    assert "Print the resolved configuration and exit." in text
    assert "--init-from RUN" in text
    assert "--resume RUN" in text


@pytest.mark.parametrize("option", ["--recipe", "--data", "--config", "--out", "--init-from"])
def test_resume_refuses_options_of_a_new_run_by_name(tmp_path, option):
    result = command("train", "--resume", tmp_path / "run", option, "digits")
    assert f"--resume cannot be combined with {option}" in str(result.exception)


BROKEN = """
import torch
class Nan(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))
        self.calls = 0
    def forward(self, x, c_noise):
        self.calls += 1
        return x * self.gain / (0 if self.calls > 12 else 1)
class Fails(torch.nn.Module):
    def __init__(self, shape):
        raise KeyError("no such thing")
class Empty(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
    def forward(self, x, c_noise):
        return x
class Flat(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, c_noise):
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


def test_an_error_during_training_saves_the_run(broken, tmp_path):
    result = broken("Nan", "training.images=10000")
    assert "not finite in 26 steps in a row, up to 2368 images" in str(result.exception)
    saved = read(tmp_path / "run" / "checkpoint.safetensors")
    assert saved.images == 2368
    assert torch.isfinite(saved.tensors["model.network.gain"]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fails", "KeyError: 'no such thing'"),
        ("Empty", "no parameters"),
        ("Flat", "network fails for data of shape|network returns the shape"),
        ("Absent", "has no 'Absent'"),
    ],
)
def test_a_network_that_fails_is_refused_before_the_run_begins(broken, tmp_path, name, message):
    result = broken(name)
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()


def test_a_network_without_labels_cannot_be_trained_conditionally(broken, tmp_path):
    assert "num_classes" in str(broken("Nan", "training.conditional=true").exception)


def test_a_run_that_was_killed_before_its_first_checkpoint_resumes_from_the_start(run, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()
    (out / "config.toml").write_bytes((run / "config.toml").read_bytes())
    assert command("train", "--resume", out).exit_code == 0
    assert stablefield.run.open_run(out).images == 512


def test_an_incomplete_line_of_the_metrics_is_removed(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"progress/kimg": 1.0, "Lo')
    assert command("train", "--resume", out, "--set", "training.images=768").exit_code == 0
    assert [line["progress/kimg"] for line in RunFolder(out).history()] == [0.256, 0.512, 0.768]


def test_a_run_cannot_be_continued_by_another_command_or_made_shorter(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    before = (out / "checkpoint.safetensors").read_bytes()
    assert "start a new run with --init-from" in str(command("demo", "--out", out, "--images", 4096).exception)
    assert "has seen 512 already" in str(command("train", "--resume", out, "--set", "training.images=64").exception)
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_only_one_of_two_processes_can_claim_a_folder(tmp_path):
    folder, config = RunFolder(tmp_path / "run"), resolve({})
    folder.claim(config)
    with pytest.raises(ValueError, match="holds a run already"):
        folder.claim(config)


def test_labels_with_a_gap_are_refused_in_conditional_training():
    pool = Pool(torch.zeros(6, 5), torch.tensor([0, 5, 0, 5, 0, 5]))  # as a data source of the user's own may return it
    with pytest.raises(ConfigError, match="class 1 has no data points, but there is a class 5; renumber the labels"):
        _split(pool, 0)


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
def test_values_out_of_range_are_refused_in_one_line(tmp_path, settings, message):
    result = train(tmp_path / "run", *settings)
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "run").exists()


def test_a_new_process_replaces_the_sections_that_depend_on_it(run, tmp_path):
    flags = ["--set", "process.kind=flow", "--set", "training.images=64"]
    result = command("train", "--init-from", run, "--out", tmp_path / "flow", *flags)
    assert result.exit_code == 0, result.exception
    sections = stablefield.run.open_run(tmp_path / "flow").config.sections
    assert [sections[name]["kind"] for name in ("times", "weight", "grid")] == ["uniform", "velocity", "uniform"]


def test_sampling_never_overwrites_files_that_it_did_not_write(run, tmp_path):
    mine = tmp_path / "mine.npz"
    np.savez(mine, x=np.ones(3))
    before = mine.read_bytes()
    assert "not written by this command" in str(command("sample", run, "--seeds", "0", "--out", mine).exception)
    assert mine.read_bytes() == before
    assert "not written by this command" in str(command("sample", run, "--seeds", "0", "--out", run).exception)


def test_files_have_the_permissions_of_the_umask(run):
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in run.iterdir() if path.is_file()} == {0o666 & ~mask}


# --- a small data set


def small(path: Path, classes: int = 0) -> Path:
    """318 images of 8 x 8 pixels, with or without labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (318, 1, 8, 8), dtype=np.uint8)
    np.savez(path, data=images, **({"labels": np.arange(318) % classes} if classes else {}))
    return path


USES_EXACT = "target.size = 1024 is not below the 318 data points: using the exact target over all of them"


@pytest.mark.parametrize("settings", [(), ("training.conditional=true",)], ids=["plain", "conditional"])
def test_data_smaller_than_the_reference_batch_train_with_all_defaults(tmp_path, settings, caplog):
    flags = [part for setting in ("training.images=128", *settings) for part in ("--set", setting)]
    data = small(tmp_path / "x.npz", classes=3 if settings else 0)
    result = command("train", "--data", data, "--out", tmp_path / "run", *flags)
    assert result.exit_code == 0, result.exception
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [("stablefield", "WARNING", USES_EXACT)]
    assert "ExactTarget" in result.output
    assert RunFolder(tmp_path / "run").newest().images == 128


@pytest.mark.parametrize(("size", "exact"), [(317, False), (318, True), (319, True)])
def test_the_exact_target_is_used_from_the_size_of_the_data_on(tmp_path, size, exact, caplog):
    data = {"kind": "arrays", "path": str(small(tmp_path / "x.npz"))}
    config = resolve({"data": data, "target": {"size": size}, "network": {"kind": "mlp"}})
    target = build(config).objective.target
    assert isinstance(target, Prefetched if exact else STFTarget)
    assert len(caplog.records) == exact


def test_only_the_main_rank_logs_that_the_exact_target_is_used(tmp_path, caplog):
    data = {"kind": "arrays", "path": str(small(tmp_path / "x.npz"))}
    config = resolve({"data": data, "network": {"kind": "mlp"}})
    build(config, ranks=Ranks(torch.device("cpu"), rank=1, world_size=2))
    assert not caplog.records


@pytest.mark.parametrize("target", [("dsm",), ("knn",), ("stf", "target.size=64")], ids=lambda target: target[0])
def test_sharding_is_refused_for_targets_that_do_not_stream_the_data(tmp_path, target):
    kind, *more = target
    settings = [f"target.kind={kind}", *more, "network.kind=mlp", "training.target_sharding=true"]
    flags = [part for setting in settings for part in ("--set", setting)]
    refused = str(command("train", "--out", tmp_path / "run", *flags).exception)
    assert f"training.target_sharding is for targets that average over all data, not target.kind='{kind}'" in refused
    assert "set target.kind=exact or leave it out" in refused


# --- formats


EARLIER = (
    "was written by an earlier version (format 1) and cannot be read; train it again or use the version that wrote it"
)


def as_format_1(run: Path, out: Path) -> Path:
    """A copy of a run as an earlier version would have written it."""
    out.mkdir()
    found = read(run / "checkpoint.safetensors")
    metadata = {"format": "stablefield/1", "config": json.dumps(found.config), "images": str(found.images)}
    path = out / "checkpoint.safetensors"
    save_file(found.tensors, path, metadata | {"checksum": checksum(found.tensors, metadata)})
    text = (run / "config.toml").read_text().replace("# stablefield 2, ", "# ")
    (out / "config.toml").write_text(text)
    return out


@pytest.mark.parametrize("left", ["both", "config.toml", "checkpoint.safetensors"])
def test_a_run_of_an_earlier_format_is_refused_in_one_line(run, tmp_path, left):
    old = as_format_1(run, tmp_path / "old")
    for name in {"config.toml", "checkpoint.safetensors"} - {left} if left != "both" else ():
        (old / name).unlink()
    before = {file: file.read_bytes() for file in old.iterdir()}
    commands = [["train", "--resume", old]]
    commands += [] if left == "config.toml" else [["sample", old, "--seeds", "0"]]
    commands += [] if left == "checkpoint.safetensors" else [["train", "--config", old / "config.toml", "--dry-run"]]
    for words in commands:
        message = str(command(*words).exception)
        assert message.endswith(EARLIER)
        assert len(message.splitlines()) == 1
    assert {file: file.read_bytes() for file in old.iterdir()} == before


def test_a_damaged_checkpoint_names_an_older_one_only_if_that_can_be_read(run, tmp_path):
    folder = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    for images in (128, 256):
        folder.older_checkpoint(images).parent.mkdir(exist_ok=True)
        shutil.copy(folder.checkpoint, folder.older_checkpoint(images))
    for file in (folder.checkpoint, folder.older_checkpoint(256)):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"; to resume from an older one, copy .*000000128\.safetensors to "):
        folder.newest()
    folder.older_checkpoint(128).write_bytes(b"")
    with pytest.raises(ValueError, match="not a checkpoint, or was cut short") as found:
        folder.newest()
    assert "older one" not in str(found.value)
