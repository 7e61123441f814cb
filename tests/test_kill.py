"""kill -9 at any moment, alone or one of two ranks, costs what was done since the last checkpoint and nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fit import SHORT, SMALL, same, seen, trained

from stablefield.checkpoint import read
from stablefield.run import Folder

QUICK = [part for setting in (*SMALL, *SHORT, "network.dropout=0") for part in ("--set", setting)]


def forked(work: Callable[[], object]) -> int:
    """Do it in a copy of this process; its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def images(folder: Path) -> int:
    """How far the newest checkpoint is; -1 if there is none yet."""
    return read(Folder(folder).checkpoint).images if Folder(folder).checkpoint.exists() else -1


def killed_again_and_again(folder: Path, kills: int, total: int) -> None:
    settings = (f"training.images={total}", "training.save_every=32", "training.keep=2", "data.holdout=40")
    trained(folder.with_name("whole"), *settings)
    moments, before = random.Random(0), -1
    for kill in range(kills):
        child = forked(lambda: trained(folder, *settings))
        if kill % 2 == 0:  # somewhere on the way; the others are killed as they begin, or soon after
            wait_for(folder, before + 32)
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert images(folder) >= before
        before = images(folder)
        for seen_by_then, path in Folder(folder).olders().items():
            assert read(path).images == seen_by_then
        assert len([line for line in seen(folder) if line > before + 32]) == 0
    assert before > 0
    trained(folder, *settings)
    assert not list(folder.rglob(".*"))
    assert seen(folder) == list(range(32, total + 1, 32))
    assert same(folder, folder.with_name("whole"))


def test_a_run_that_is_killed_again_and_again_arrives_where_it_would_have(tmp_path):
    killed_again_and_again(tmp_path / "run", kills=4, total=320)


@pytest.mark.slow
def test_a_run_that_is_killed_at_many_moments_arrives_where_it_would_have(tmp_path):
    killed_again_and_again(tmp_path / "run", kills=60, total=3200)


def launched(folder: Path, *settings: str, ranks: int = 2, resume: bool = False) -> subprocess.Popen:
    """The command line on several ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    flags = QUICK if not resume else []
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
    deadline = time.monotonic() + 120
    while images(folder) < enough and time.monotonic() < deadline:
        time.sleep(0.01)
    assert images(folder) >= enough


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


@pytest.mark.slow
def test_two_ranks_write_once_what_one_would(tmp_path):
    process = launched(tmp_path / "two", "data.holdout=60")
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, out + error
    assert out.count("Done: ") == out.count("on 2 ranks") == 1
    assert not error.strip().replace("*", "") or "Warning" not in error
    trained(tmp_path / "one", "network.dropout=0", "data.holdout=60")
    one, two = Folder(tmp_path / "one").history(), Folder(tmp_path / "two").history()
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if name.split("/")[0] not in ("Timing", "Resources", "timestamp"):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_ranks_is_killed_the_other_says_so_and_the_run_goes_on(tmp_path, rank):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    os.kill(children(process)[rank], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"rank {1 - rank} of 2 has lost the others" in error
    assert "RuntimeError" not in error
    kept = images(tmp_path / "run")
    assert kept >= 128
    again = launched(tmp_path / "run", f"training.images={kept + 64}", ranks=1, resume=True)
    out, error = again.communicate(timeout=120)
    assert again.returncode == 0, out + error
    steps = seen(tmp_path / "run")
    assert steps == sorted(set(steps))
    assert images(tmp_path / "run") == kept + 64


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_or_to_any_rank_stops_all_after_the_same_step(tmp_path, number):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert out.count("Stopped and saved. Go on with: stablefield train --resume") == 1, out + error
    assert "has lost the others" not in error


@pytest.mark.slow
def test_a_signal_that_one_rank_sees_stops_both(tmp_path):
    process = launched(tmp_path / "run", "training.images=1000000")
    wait_for(tmp_path / "run")
    os.kill(children(process)[1], signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert out.count("Stopped and saved. Go on with: stablefield train --resume") == 1, out + error


@pytest.mark.slow
def test_a_mistake_is_told_by_the_first_rank_alone(tmp_path):
    trained(tmp_path / "run", "training.images=32")
    process = launched(tmp_path / "run")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("stablefield: ") == 1, error
    assert "holds a run already" in error
