"""A run killed by SIGKILL at any moment, on one rank or two, loses only the steps since the last checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import forked
from short_runs import SHORT, SMALL, same, seen, trained

from stablefield.checkpoint import read
from stablefield.run import RunFolder

QUICK = [part for setting in (*SMALL, *SHORT, "network.dropout=0") for part in ("--set", setting)]


def images(folder: Path) -> int:
    """Images seen by the newest checkpoint; -1 if there is none yet."""
    return read(RunFolder(folder).checkpoint).images if RunFolder(folder).checkpoint.exists() else -1


def kill_repeatedly(folder: Path, kills: int, total: int) -> None:
    settings = (f"training.images={total}", "training.save_every=32", "training.keep_checkpoints=2", "data.holdout=40")
    trained(folder.with_name("whole"), *settings)
    moments, before = random.Random(0), -1
    for kill in range(kills):
        child = forked(lambda: trained(folder, *settings))
        if kill % 2 == 0:  # after a checkpoint; the others are killed when they start or soon after
            wait_for(folder, before + 32)
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert images(folder) >= before
        before = images(folder)
        for seen_before, path in RunFolder(folder).older_checkpoints().items():
            assert read(path).images == seen_before
        assert len([line for line in seen(folder) if line > before + 32]) == 0
    assert before > 0
    trained(folder, *settings)
    assert not list(folder.rglob(".*"))
    assert seen(folder) == list(range(32, total + 1, 32))
    assert same(folder, folder.with_name("whole"))


def test_a_run_killed_repeatedly_ends_with_the_tensors_of_an_uninterrupted_run(tmp_path):
    kill_repeatedly(tmp_path / "run", kills=4, total=320)


@pytest.mark.slow
def test_a_run_killed_at_many_moments_ends_with_the_tensors_of_an_uninterrupted_run(tmp_path):
    kill_repeatedly(tmp_path / "run", kills=60, total=3200)


def launched(
    folder: Path, *settings: str, ranks: int = 2, resume: bool = False, launcher: Sequence[str] = (), options=()
) -> subprocess.Popen:
    """Start the command line on several ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher]
    flags = [*(QUICK if not resume else []), *options]
    extra = [part for setting in settings for part in ("--set", setting)]
    where = ["--resume" if resume else "--out", str(folder)]
    return subprocess.Popen(
        [*launch, "-m", "stablefield", "train", *where, *flags, *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(folder: Path, enough: int = 128) -> None:
    """Wait until the newest checkpoint has seen enough images."""
    deadline = time.monotonic() + 120
    while images(folder) < enough and time.monotonic() < deadline:
        time.sleep(0.01)
    assert images(folder) >= enough


def children(process: subprocess.Popen) -> list[int]:
    """Numbers of the processes that a process has started, one for each rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


@pytest.mark.slow
def test_two_ranks_write_the_metrics_of_one_rank_once(tmp_path):
    process = launched(tmp_path / "two", "data.holdout=60")
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, out + error
    assert out.count("Done: ") == out.count("on 2 ranks") == 1
    assert not error.strip().replace("*", "") or "Warning" not in error
    trained(tmp_path / "one", "network.dropout=0", "data.holdout=60")
    one, two = RunFolder(tmp_path / "one").history(), RunFolder(tmp_path / "two").history()
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if name.split("/")[0] not in ("timing", "resources", "timestamp"):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_ranks_is_killed_the_other_reports_it_and_the_run_resumes(tmp_path, rank):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    os.kill(children(process)[rank], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"rank {1 - rank} of 2 has lost the others" in error
    assert "RuntimeError" not in error
    saved = images(tmp_path / "run")
    assert saved >= 128
    again = launched(tmp_path / "run", f"training.images={saved + 64}", ranks=1, resume=True)
    out, error = again.communicate(timeout=120)
    assert again.returncode == 0, out + error
    steps = seen(tmp_path / "run")
    assert steps == sorted(set(steps))
    assert images(tmp_path / "run") == saved + 64


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_all_ranks_after_the_same_step(tmp_path, number):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert out.count("Stopped and saved. Resume with: stablefield train --resume") == 1, out + error
    assert "has lost the others" not in error


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(tmp_path):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    os.kill(children(process)[1], signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert out.count("Stopped and saved. Resume with: stablefield train --resume") == 1, out + error


@pytest.mark.slow
def test_only_the_main_rank_reports_an_error(tmp_path):
    trained(tmp_path / "run", "training.images=32")
    process = launched(tmp_path / "run")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("stablefield: ") == 1, error
    assert "holds a run already" in error


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    settings = ("training.images=3200", "training.save_every=320", "training.probe_every=0")
    whole = launched(tmp_path / "whole", *settings)
    out, error = whole.communicate(timeout=240)
    assert whole.returncode == 0, out + error
    process = launched(tmp_path / "run", *settings, launcher=["--max-restarts=1"], options=["--resume-if-exists"])
    wait_for(tmp_path / "run", 320)
    os.kill(children(process)[1], signal.SIGKILL)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, out + error
    assert out.count("Done: ") == 1
    assert images(tmp_path / "run") == 3200
    assert set(seen(tmp_path / "whole")) <= set(seen(tmp_path / "run"))
    assert same(tmp_path / "run", tmp_path / "whole")
