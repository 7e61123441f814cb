"""Commands with hostile options and settings end with a result or an error of a few lines: no traceback and no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import noise
from short_runs import trained


def fuzzed(folder: Path, seed: int, rounds: int) -> dict[str, int]:
    """The number of commands by their exit status."""
    pytest.importorskip("resource")  # limits on memory and alarms exist on Unix only
    trained(folder / "run", "training.images=32")
    np.savez(folder / "data.npz", data=noise(60, 1, 8, 8), labels=np.arange(60) % 3)
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32))
    (folder / "cut.npz").write_bytes((folder / "data.npz").read_bytes()[:500])
    (folder / "page.html").write_text("<html>")
    (folder / "empty").mkdir()
    script = Path(__file__).with_name("options_fuzz.py")
    command = [sys.executable, str(script), str(seed), str(rounds), str(folder)]
    environment = os.environ | {"STABLEFIELD_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["failures"]
    return found["counts"]


def test_hostile_options_are_refused_or_used(tmp_path):
    counts = fuzzed(tmp_path, 0, 100)
    assert counts["1"] > 20
    assert counts["0"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_hostile_options_are_refused_or_used(seed, tmp_path):
    assert fuzzed(tmp_path, seed, 4000)["1"] > 1000
