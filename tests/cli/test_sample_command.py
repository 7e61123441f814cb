"""`stablefield sample`: samples are made once, and depend neither on batches nor on the number of ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from stablefield.build import build_sampler
from stablefield.checkpoint import read, save
from stablefield.cli import app
from stablefield.cli.stopping import stoppable
from stablefield.run import open_run

pytestmark = pytest.mark.usefixtures("unchecked")


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    settings = ["training.images=3072", "training.learning_rate=1e-2", "training.conditional=true"]
    settings += ["target.size=16", "network.channels=8", "network.blocks=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    assert command("train", "--out", out, *flags).exit_code == 0
    return out


def read_images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path), int) for path in sorted(folder.glob("*/*.png"))}


def test_an_interrupted_command_resumes_and_keeps_finished_images(run, tmp_path):
    out = tmp_path / "out"
    assert command("sample", run, "--seeds", "0-5", "--steps", 3, "--out", out).exit_code == 0
    first = read_images(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    (out / "000000" / "000002.png").unlink()
    result = command("sample", run, "--seeds", "0-7", "--steps", 3, "--out", out)
    assert "8 samples (5 existed already)" in result.output
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "000002.png")
    again = read_images(out)
    assert len(again) == 8
    assert all(abs(again[name] - first[name]).max() <= 1 for name in first)


def test_an_archive_can_be_extended_and_equals_the_png_files(run, tmp_path):
    assert command("sample", run, "--seeds", "0-2", "--steps", 3, "--out", tmp_path / "x.npz").exit_code == 0
    assert command("sample", run, "--seeds", "0-5", "--steps", 3, "--out", tmp_path / "x.npz").exit_code == 0
    assert command("sample", run, "--seeds", "0-5", "--steps", 3, "--out", tmp_path / "x").exit_code == 0
    found = np.load(tmp_path / "x.npz")
    assert found["seeds"].tolist() == list(range(6))
    assert found["labels"].shape == (6,)
    shown = np.stack(list(read_images(tmp_path / "x").values()))
    assert abs(found["arr_0"][..., 0].astype(int) - shown).max() <= 1


@pytest.mark.parametrize(
    "change",
    [["--steps", 4], ["--sampler", "euler"], ["--class", 3], ["--guidance", 2], ["--precision", "bfloat16"]],
)
def test_a_store_refuses_samples_made_with_other_settings(run, tmp_path, change):
    base = ["sample", run, "--seeds", "0-1", "--out", tmp_path / "out"]
    assert command(*base, "--steps", 3).exit_code == 0
    refused = command(*base, *([] if "--steps" in change else ["--steps", 3]), *change)
    assert "another run or sampler" in str(refused.exception)


def test_an_unknown_precision_is_refused_by_name(run):
    refused = command("sample", run, "--precision", "half")
    assert "one of float32, tf32, bfloat16, float16, not 'half'" in str(refused.exception)


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"),
    [
        ("heun", 4, "7"),
        ("euler", 4, "4"),
        ("dpm", 4, "4"),
        ("ancestral", 4, "4"),
        ("euler-maruyama", 4, "4"),
        ("reverse-diffusion", 4, "4"),
        ("predictor-corrector", 4, "8"),
    ],
)
def test_every_sampler_reports_its_network_evaluations(run, tmp_path, sampler, steps, evaluations):
    result = command("sample", run, "--seeds", "0", "--sampler", sampler, "--steps", steps, "--out", tmp_path / "o")
    assert f"\n{evaluations} network evaluations per sample" in result.output


def test_an_adaptive_solver_reports_its_network_evaluations(run, tmp_path):
    result = command("sample", run, "--seeds", "0-3", "--batch", 2, "--sampler", "rk45", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert "network evaluations per sample: RK45" in result.output


def test_guidance_changes_images_and_scale_1_changes_nothing(run, tmp_path):
    base = ["sample", run, "--seeds", "0-3", "--class", 5, "--steps", 4, "--out"]
    for name, flags in (("plain", []), ("one", ["--guidance", 1]), ("three", ["--guidance", 3])):
        assert command(*base, tmp_path / name, *flags).exit_code == 0
    plain, one, three = (np.stack(list(read_images(tmp_path / name).values())) for name in ("plain", "one", "three"))
    assert abs(plain - one).max() <= 1
    assert abs(plain - three).max() > 1
    guided = command(*base, tmp_path / "by", "--guidance", 2, "--guide", run)
    assert guided.exit_code == 0
    assert (
        abs(np.stack(list(read_images(tmp_path / "by").values())) - plain).max() <= 1
    )  # a run guided by itself is not changed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "5-3"], "write the smaller seed first"),
        (["--seeds", "a"], "seeds must be numbers and ranges"),
        (["--sampler", "huen"], "did you mean heun"),
        (["--class", "12"], "no class 12"),
        (["--set", "target.size=3"], "only sampler.* and grid.* can be set when sampling"),
        (["--guide", "nowhere"], "--guide requires --guidance"),
    ],
)
def test_invalid_options_are_refused_before_any_sample_is_made(run, tmp_path, flags, message):
    result = command("sample", run, "--out", tmp_path / "out", *flags)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_two_ranks_make_the_images_of_one(run, tmp_path):
    assert (
        command("sample", run, "--seeds", "0-6", "--steps", 3, "--batch", 7, "--out", tmp_path / "one").exit_code == 0
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    arguments = [
        "sample",
        str(run),
        "--seeds",
        "0-6",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "two"),
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "-m", "stablefield", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = read_images(tmp_path / "one"), read_images(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(abs(one[name] - two[name]).max() <= 1 for name in one)
    assert json.loads((tmp_path / "one" / "samples.json").read_text())["class"] is None


def train_on(data: np.ndarray, folder: Path, *more: str) -> Path:
    np.save(folder / "data.npy", data)
    settings = ["training.images=64", "training.batch_size=32", "target.size=16", "network.channels=8", *more]
    settings += ["network.blocks=1", "sampler.steps=3", "preconditioning.sigma_data=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    done = command("train", "--data", folder / "data.npy", "--out", folder / "run", *flags)
    assert done.exit_code == 0, repr(done.exception)
    return folder / "run"


# normalised fields, images in [-1, 1] that are not declared as images, Hounsfield units, latents
FIELDS = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
FLOATS = {
    "fields": FIELDS[:, :1],
    "colours": FIELDS,
    "narrow": np.tanh(FIELDS),
    "tomography": 1000 * FIELDS[:, :1] + 500,
    "latents": np.concatenate([FIELDS, FIELDS[:, :1]], 1),
}


@pytest.mark.parametrize("name", FLOATS)
def test_float_samples_are_written_bit_for_bit(name, tmp_path):
    run = train_on(FLOATS[name], tmp_path)
    opened = open_run(run, device="cpu")
    made = build_sampler(opened.config)(opened.denoiser, opened.shape, seeds=range(6)).x.numpy()
    assert abs(made).max() > 1
    for out in ((), ("--out", tmp_path / "x.npz"), ("--out", tmp_path / "x.npy")):
        assert command("sample", run, "--seeds", "0-5", *out, "--device", "cpu").exit_code == 0
    archive = np.load(run / "samples.npz")
    for found in (archive["arr_0"], np.load(tmp_path / "x.npz")["arr_0"], np.load(tmp_path / "x.npy")):
        assert found.dtype == np.float32
        assert np.array_equal(found, made)
    assert archive["seeds"].tolist() == list(range(6))
    assert not list(tmp_path.rglob("*.png"))


def test_a_file_of_floats_keeps_the_name_given_by_out(tmp_path):
    run = train_on(FLOATS["fields"], tmp_path)
    for typed, written in (("a.v1", "a.v1.npz"), ("a.v2", "a.v2.npz"), ("b.npz", "b.npz"), ("b.npy", "b.npy")):
        done = command("sample", run, "--seeds", "0-1", "--out", tmp_path / typed)
        assert str(tmp_path / written) in done.output.replace("\n", "")
        assert (tmp_path / written).is_file()


def test_floats_declared_as_images_are_written_as_images(tmp_path):
    run = train_on(FLOATS["narrow"], tmp_path, "data.values=image")
    assert command("sample", run, "--seeds", "0-5", "--out", tmp_path / "x").exit_code == 0
    assert command("sample", run, "--seeds", "0-5", "--out", tmp_path / "x.npz").exit_code == 0
    found = np.load(tmp_path / "x.npz")["arr_0"]
    assert (found.dtype, found.shape) == (np.uint8, (6, 8, 8, 3))
    assert abs(found.astype(int) - np.stack(list(read_images(tmp_path / "x").values()))).max() <= 1
    assert (tmp_path / "x.png").exists()


def test_images_are_not_written_as_npy(run, tmp_path):
    refused = command("sample", run, "--out", tmp_path / "x.npy")
    assert "images are written to a folder of PNG files, or to a file.npz" in str(refused.exception)
    assert not (tmp_path / "x.npy").exists()


def test_bytes_declared_as_floats_give_floats(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    run = train_on(data, tmp_path, "data.values=float", "data.channels_last=false")
    assert command("sample", run, "--seeds", "0-3").exit_code == 0
    found = np.load(run / "samples.npz")["arr_0"]
    assert (found.dtype, found.shape) == (np.float32, (4, 1, 8, 8))


def test_a_checkpoint_without_the_kind_of_its_values_is_refused(tmp_path):
    file = train_on(FLOATS["narrow"], tmp_path) / "checkpoint.safetensors"
    found = read(file)
    assert found.config.pop("values") == "float"
    save(file, found.tensors, config=found.config, images=found.images)
    with pytest.raises(ValueError, match=r"the description in .* is incomplete: 'values' is missing"):
        open_run(file, device="cpu")


def test_float_samples_are_not_added_to_a_store_of_clipped_ones(tmp_path):
    run = train_on(FLOATS["fields"], tmp_path)
    assert command("sample", run, "--seeds", "0-1", "--out", tmp_path / "x.npz").exit_code == 0
    identity_file = tmp_path / "x.parts" / "samples.json"
    identity = json.loads(identity_file.read_text())
    assert identity.pop("values") == "float"
    identity_file.write_text(json.dumps(identity))  # as in stores of images, which are clipped to bytes
    refused = command("sample", run, "--seeds", "0-2", "--out", tmp_path / "x.npz")
    assert "another run or sampler" in str(refused.exception)


def test_a_signal_ends_a_command_with_what_is_done_and_how_to_resume_it(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def interrupted():
        with stoppable("sampling", lambda: "3 of 4 samples exist"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(typer.Exit) as stopped:
        interrupted()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert re.match(r"sampling was stopped by SIGTERM: 3 of 4 .*\nresume it with: stablefield", said)
    assert signal.getsignal(signal.SIGTERM) is before
