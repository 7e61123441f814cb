"""The examples run as they are written, with fewer images."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stablefield import Pool
from stablefield.data import write_zip
from stablefield.data.contents import Contents
from stablefield.run import RunFolder

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder: Path, *arguments: object, **environment: str) -> str:
    command = [str(a) for a in arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launcher(folder: Path) -> str:
    """PATH that begins with a folder in which `stablefield` starts this checkout."""
    script = folder / "bin" / "stablefield"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m stablefield "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_cifar10_is_decoded_trained_stopped_resumed_and_sampled(tmp_path):
    script = shutil.copy(EXAMPLES / "cifar10.sh", tmp_path)  # away from any .venv
    images = torch.randint(0, 256, (1100, 3, 32, 32), dtype=torch.uint8)
    write_zip(tmp_path / "images.zip", Contents.from_pool(Pool(images)))
    smaller = ["network.model_channels=8", "network.num_blocks=1", "training.images=256", "training.log_every=64"]
    flags = [part for setting in smaller for part in ("--set", setting)]
    output = run(tmp_path, "sh", script, "images.zip", "out", *flags, PATH=launcher(tmp_path))
    assert "Stopped and saved" in output
    assert "Done" in output
    progress = [line["progress/kimg"] for line in RunFolder(tmp_path / "out" / "run").history()]
    assert progress[-1] == 0.256
    assert progress == sorted(set(progress))
    assert (tmp_path / "out" / "run" / "samples.png").exists()


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.slow
def test_fashion_mnist_is_trained_by_class_and_sampled_with_and_without_guidance(tmp_path):
    draw = np.random.default_rng(0)
    idx(tmp_path / "train-images-idx3-ubyte.gz", draw.integers(256, size=(200, 28, 28), dtype=np.uint8))
    idx(tmp_path / "train-labels-idx1-ubyte.gz", (np.arange(200) % 10).astype(np.uint8))
    settings = [f"--set={s}" for s in ("training.images=64", "target.size=16", "network.channels=8")]
    output = run(tmp_path, sys.executable, EXAMPLES / "fashion_mnist.py", "--data", tmp_path, *settings)
    assert all((tmp_path / "runs" / "fashion-mnist" / name).exists() for name in ("classes.png", "guided.png"))
    assert "guided.png" in output


def test_latents_are_encoded_trained_sampled_and_decoded(tmp_path):
    settings = [f"--set={s}" for s in ("training.images=128", "network.width=16", "sampler.steps=3", "target.size=16")]
    command = (sys.executable, EXAMPLES / "latents.py", "--run", tmp_path / "run", *settings)
    assert "samples.png" in run(tmp_path, *command)
    with np.load(tmp_path / "run-data" / "latents.npz") as file:
        assert file["data"].dtype == np.float32
        assert file["data"].shape == (1797, 16)
        assert abs(file["data"].mean()) < 1e-5
        assert file["data"].std() == pytest.approx(0.5, rel=1e-3)
    assert (tmp_path / "run" / "samples.png").exists()
    assert "samples.png" in run(tmp_path, *command)  # resumes


@pytest.mark.slow
def test_emoji_are_drawn_trained_by_class_and_compared_with_their_training_images(tmp_path):
    font = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    if not font.exists():
        pytest.skip("needs Debian's fonts-noto-color-emoji")
    settings = [f"--set={s}" for s in ("training.images=64", "network.channels=8", "sampler.steps=2")]
    output = run(tmp_path, sys.executable, EXAMPLES / "emoji.py", *settings)
    assert len(list((tmp_path / "data" / "emoji").glob("*/*.png"))) == 350
    assert (tmp_path / "runs" / "emoji" / "emoji.png").exists()
    assert "0% are copies" in output
    missing = subprocess.run(
        [sys.executable, EXAMPLES / "emoji.py", "--font", "none.ttf"], capture_output=True, text=True
    )
    assert "there is no font none.ttf" in missing.stderr


def test_the_table_of_results_is_made_from_the_records():
    results = EXAMPLES.parent / "docs" / "results"
    lines = (results / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| page |"))
    table = lines[start : lines.index("", start)]
    folders = list(dict.fromkeys(re.findall(r"\| \[([\w-]+)\]", "\n".join(table))))
    assert folders
    output = run(results, sys.executable, EXAMPLES / "results_table.py", *folders)
    assert output.splitlines() == table
