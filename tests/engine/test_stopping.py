"""A signal stops a run at once, wherever it is, and what was due at its checkpoint is made up for when it resumes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from short_runs import SHORT, SMALL, same, seen, trained, untimed
from typer.testing import CliRunner

from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.distributed import Ranks
from stablefield.engine import fit as driver
from stablefield.engine.checkpoints import CheckpointManager
from stablefield.engine.stopping import Interruptible, StopRequest, stop_signals
from stablefield.floor import Probes
from stablefield.kernel.accumulator import Posterior
from stablefield.run import RunFolder
from stablefield.sample.ode import Heun
from stablefield.targets import DSMTarget, STFTarget


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs."""


DUE = (
    "training.images=192",
    "training.save_every=64",
    "training.sample_every=96",
    "training.probe_every=64",
    "training.probes=2",
    "sampler.steps=2",
    "data.holdout=60",
    "times.kind=adaptive",
    "times.reweight=false",
    "times.every=64",
    "network.dropout=0",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert trained(folder, *DUE) == 0
    return folder


def sheets(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RunFolder(folder).sheets.glob("*.png")}


def assert_nothing_lost(folder: Path, whole: Path) -> None:
    assert untimed(folder) == untimed(whole)
    assert sheets(folder) == sheets(whole)
    assert same(folder, whole)
    for path in (RunFolder.best, RunFolder.checkpoint):
        mine, theirs = read(path.fget(RunFolder(folder))), read(path.fget(RunFolder(whole)))
        assert mine.config["best"] == theirs.config["best"]
    assert not list(folder.rglob(".*"))


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def calling(before: Callable[[], object], method: Callable) -> Callable:
    """The method, with a call of a function before each call of it."""

    def called(*arguments, **options):
        before()
        return method(*arguments, **options)

    return called


@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=[] if at == 32 else pytest.mark.slow) for at in range(32, 192, 32)]
)
def test_a_run_stopped_after_any_step_loses_no_metric_no_sheet_and_no_best_checkpoint(whole, tmp_path, at):
    assert trained(tmp_path, *DUE, on_step=lambda images, metrics: stop() if images == at else None) == signal.SIGTERM
    assert read(RunFolder(tmp_path).checkpoint).images == at + 32
    assert trained(tmp_path, *DUE) == 0
    assert_nothing_lost(tmp_path, whole)


PLACES = {
    "targets": (STFTarget, "__call__"),
    "held-out loss": (DSMTarget, "__call__"),
    "excess": (Probes, "squares"),
    "sheet": (Heun, "step"),
    "figure": (RunFolder, "log"),
    "checkpoint": (CheckpointManager, "save"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", [1, *(pytest.param(call, marks=pytest.mark.slow) for call in (2, 3, 4))])
def test_a_signal_at_any_work_stops_it_at_once_and_loses_nothing(whole, tmp_path, monkeypatch, place, call):
    owner, name = PLACES[place]
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, calling(count, getattr(owner, name)))
        stopped = trained(tmp_path, *DUE)
    if place in ("targets", "held-out loss", "excess", "sheet"):
        assert stopped == signal.SIGTERM
        assert calls == call
        assert read(RunFolder(tmp_path).checkpoint).images == ([0, *seen(tmp_path)][-1])
    assert trained(tmp_path, *DUE) == 0
    assert_nothing_lost(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("at", [96, 192])
def test_a_sheet_that_a_kill_prevented_is_drawn_when_the_run_resumes(whole, tmp_path, monkeypatch, at):
    draw = driver.samples

    def die(*arguments):
        if not (RunFolder(tmp_path / "run").sheets / f"{at - 96:09d}.png").exists() and at > 96:
            return draw(*arguments)
        raise Killed

    settings = [*DUE, "training.save_every=32"]
    trained(tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "samples", die)
        with pytest.raises(Killed):
            trained(tmp_path / "run", *settings)
    trained(tmp_path / "run", *settings)
    assert_nothing_lost(tmp_path / "run", tmp_path / "whole")


def test_a_signal_while_a_custom_score_is_computed_is_heard_and_the_score_is_computed_when_resuming(tmp_path):
    def slow(denoiser: object) -> float:
        stop()
        raise AssertionError("the signal was not heard")

    assert trained(tmp_path, score=slow) == signal.SIGTERM
    assert read(RunFolder(tmp_path).checkpoint).images == 64
    trained(tmp_path, score=lambda denoiser: 1.0)
    assert [n for n, line in zip(seen(tmp_path), RunFolder(tmp_path).history(), strict=True) if "score/score" in line]
    assert read(RunFolder(tmp_path).best).images == 64


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_every_signal_that_asks_for_an_end_saves_the_run(tmp_path, name):
    number = getattr(signal, name)
    assert trained(tmp_path, on_step=lambda images, metrics: stop(number) if images == 32 else None) == number
    assert read(RunFolder(tmp_path).checkpoint).images == 64


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals() as request:
            stop(signal.SIGHUP)
            assert request.number == 0
            stop(signal.SIGUSR1)
            assert request.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_is_ended_by_the_first_signal_and_not_begun_after_it():
    request = StopRequest()
    work = Interruptible(request, Ranks(torch.device("cpu")))
    assert work(lambda: 3) == 3
    assert work(lambda: request(signal.SIGTERM, None)) is None
    assert work.stopped
    assert work(lambda: pytest.fail("the work was begun")) is None
    assert work.number() == signal.SIGTERM


def test_a_run_in_which_every_step_was_skipped_is_not_complete(tmp_path, monkeypatch):
    def infinite(self, noisy, **options):
        return Posterior(noisy.x * torch.inf, torch.ones(len(noisy)), torch.zeros(len(noisy)))

    monkeypatch.setattr(STFTarget, "__call__", infinite)
    for _ in range(2):  # the same when it is resumed
        with pytest.raises(FloatingPointError, match="not finite in any of the 10 steps, so nothing was trained"):
            trained(tmp_path, "training.probe_every=0")
    assert read(RunFolder(tmp_path).checkpoint).images == 320


def command(folder: Path, *settings: str) -> Result:
    flags = [part for setting in (*SMALL, *SHORT, "training.probe_every=0", *settings) for part in ("--set", setting)]
    return CliRunner().invoke(app, ["train", "--out", str(folder), "--resume-if-exists", *flags])


@pytest.mark.usefixtures("unchecked")
def test_one_command_starts_a_run_resumes_it_and_refuses_another_configuration(tmp_path):
    started = command(tmp_path / "run")
    assert started.exit_code == 0, started.exception
    again = command(tmp_path / "run", "training.images=384")
    assert again.exit_code == 0, again.exception
    assert read(RunFolder(tmp_path / "run").checkpoint).images == 384
    trained(tmp_path / "whole", "training.images=384", "training.probe_every=0")
    assert same(tmp_path / "run", tmp_path / "whole")
    other = command(tmp_path / "run", "target.size=8", "training.seed=3")
    assert "cannot change target.size, training.seed when resuming" in str(other.exception)
    without_out = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run"), "--resume-if-exists"])
    assert "--resume cannot be combined with --resume-if-exists" in str(without_out.exception)
