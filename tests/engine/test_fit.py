"""Whatever ends a run, it resumes from its newest checkpoint as if it had never stopped."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import Interrupted, configured, interrupt_at, same, seen, tensors, trained, untimed
from typer.testing import CliRunner

from stablefield import checkpoint, files
from stablefield.build import build
from stablefield.checkpoint import CheckpointError, read
from stablefield.cli import app
from stablefield.cli.training import resumed_config
from stablefield.config import CHECKSUM_LINE, Allowed, Config, ConfigError, is_unedited
from stablefield.distributed import Ranks
from stablefield.engine import checkpoints
from stablefield.engine.checkpoints import CheckpointManager, locked, refuse_changed_config
from stablefield.engine.fit import fit
from stablefield.engine.session import initial_state
from stablefield.engine.state import TrainState
from stablefield.run import RunFolder, load

HELD_OUT = ("data.holdout=60", "training.keep_checkpoints=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained(folder, *HELD_OUT)
    return folder


@pytest.mark.parametrize("stop", [32, 64, 96, 256])
def test_a_run_interrupted_anywhere_resumes_bit_for_bit(whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        trained(tmp_path, *HELD_OUT, on_step=interrupt_at(stop))
    assert read(RunFolder(tmp_path).checkpoint).images == stop  # the interrupted step was saved
    assert trained(tmp_path, *HELD_OUT) == 0
    assert same(tmp_path, whole)
    assert seen(tmp_path) == seen(whole) == list(range(32, 321, 32))
    assert untimed(tmp_path) == untimed(whole)
    assert read(RunFolder(tmp_path).best).images == read(RunFolder(whole).best).images


def test_keep_checkpoints_is_the_number_of_checkpoints_including_the_newest(whole, tmp_path):
    assert read(RunFolder(whole).checkpoint).images == 320
    older = RunFolder(whole).older_checkpoints()
    assert {images: read(path).images for images, path in older.items()} == {192: 192, 256: 256}
    trained(tmp_path)
    assert not RunFolder(tmp_path).older_checkpoints()
    assert not RunFolder(tmp_path).best.exists()


@pytest.mark.parametrize("keep", [2, 4, 5, 6, 9])
def test_any_number_of_checkpoints_can_be_kept(keep, tmp_path):
    trained(tmp_path, f"training.keep_checkpoints={keep}")
    assert list(RunFolder(tmp_path).older_checkpoints()) == [0, 64, 128, 192, 256][-(keep - 1) :]


def test_a_run_resumed_with_a_smaller_keep_checkpoints_removes_the_oldest(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    trained(tmp_path / "run", "data.holdout=60", "training.keep_checkpoints=2", "training.images=384")
    assert list(RunFolder(tmp_path / "run").older_checkpoints()) == [320]


def test_the_best_checkpoint_has_the_lowest_held_out_loss(whole):
    losses = {
        i: line["held_out/loss"]
        for i, line in zip(seen(whole), RunFolder(whole).history(), strict=True)
        if "held_out/loss" in line
    }
    assert list(losses) == [64, 128, 192, 256, 320]
    best = read(RunFolder(whole).best)
    assert losses[best.images] == min(losses.values()) == best.config["best"]["score"]


def test_a_custom_score_decides_the_best_checkpoint_also_after_resuming(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    trained(tmp_path, score=lambda denoiser: next(scores))
    assert read(RunFolder(tmp_path).best).images == 128
    trained(tmp_path, "training.images=384", score=lambda denoiser: 1.5)
    assert read(RunFolder(tmp_path).best).images == 128
    trained(tmp_path, "training.images=448", score=lambda denoiser: 0.5)
    assert read(RunFolder(tmp_path).best).images == 448
    assert [line.get("score/score") for line in RunFolder(tmp_path).history()][-1] == 0.5
    x = torch.ones(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(load(tmp_path, weights="best")(*x), load(tmp_path)(*x))


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs."""


class LimitedCalls:
    """Replaces the system calls of a save, and raises `Killed` instead of the n-th and all later ones."""

    calls = ("open", "replace", "rename", "link", "unlink", "fsync", "mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.left = limit
        for name in self.calls:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        for name in ("__init__", "finish"):
            monkeypatch.setattr(checkpoint.Draft, name, self._counted(getattr(checkpoint.Draft, name)))

    def _counted(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return call(*arguments, **options)

        return counted


def manager_of(folder: Path) -> tuple[CheckpointManager, TrainState]:
    config = configured("training.keep_checkpoints=2")
    components = build(config)
    state, manager = TrainState(components.denoiser), CheckpointManager(RunFolder(folder), config, components)
    manager.restore(state, Ranks(torch.device("cpu")))
    return manager, state


def test_a_save_killed_between_any_two_system_calls_leaves_a_run_that_resumes(tmp_path, monkeypatch):
    done = False
    for limit in range(100):
        folder = tmp_path / str(limit)
        folder.mkdir()
        manager, state = manager_of(folder)
        for state.images, score in ((32, 3.0), (64, 4.0)):
            manager.save(state, score)
        state.images = 96
        with monkeypatch.context() as patch:
            limited = LimitedCalls(patch, limit)
            try:
                manager.save(state, 1.0)
                done = limited.left > 0
            except Killed:
                pass
        with locked(RunFolder(folder)):
            assert not [file for file in folder.rglob(".*")]
        manager, state = manager_of(folder)
        assert state.images in (64, 96)
        manager.save(state)  # a resumed run saves first
        assert read(RunFolder(folder).best).images == (32 if state.images == 64 else 96)
        assert all(read(path).images == images for images, path in RunFolder(folder).older_checkpoints().items())
        assert len(RunFolder(folder).older_checkpoints()) >= 1
        if done:
            break
    assert done
    assert limit > 12


def test_training_continues_while_a_checkpoint_of_the_state_as_it_was_is_written(tmp_path, monkeypatch):
    manager, state = manager_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    released, finish = threading.Event(), checkpoint.Draft.finish
    monkeypatch.setattr(
        checkpoint.Draft,
        "finish",
        lambda *arguments, **options: released.wait(60) and finish(*arguments, **options),
    )
    state.images = 32
    manager.save(state, background=True)
    with torch.no_grad():
        for parameter in state.denoiser.parameters():
            parameter.zero_()
    state.images = 64
    assert not RunFolder(tmp_path).checkpoint.exists()
    released.set()
    manager.wait()
    found = read(RunFolder(tmp_path).checkpoint)
    assert found.images == 32
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_that_fails_in_the_background_is_reported_once_and_never_lost(tmp_path, monkeypatch):
    manager, state = manager_of(tmp_path)

    def full(*arguments, **options):
        raise OSError("could not write it")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Draft, "finish", full)
        for report in (manager.wait, lambda: manager.save(state)):
            manager.save(state, background=True)
            with pytest.raises(OSError, match="could not write it"):
                report()
        manager.save(state, background=True)
        assert manager._writer is not None
        manager._writer.join()
        with pytest.raises(OSError, match="could not write it"):
            manager.raise_failure()
        manager.raise_failure()
    manager.save(state)
    assert read(RunFolder(tmp_path).checkpoint).images == 0


def edited(folder: Path, *changes: tuple[str, str]) -> str:
    """Edit a run's config.toml without its checksum, and return the text it had before."""
    before = text = RunFolder(folder).config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    RunFolder(folder).config.write_text(text)
    return before


@pytest.mark.parametrize(
    ("saved", "step"), [(False, 1), (True, 7), pytest.param(True, 1, marks=pytest.mark.slow)], ids=str
)
def test_a_config_file_cut_short_anywhere_never_starts_another_run(whole, tmp_path, saved, step, monkeypatch):
    folder = RunFolder(tmp_path)
    shutil.copy(RunFolder(whole).config, folder.config)
    if saved:
        shutil.copy(RunFolder(whole).checkpoint, folder.checkpoint)
        found = folder.newest()
        monkeypatch.setattr(RunFolder, "newest", lambda self: found)  # it is read twice for each cut
        monkeypatch.setattr(checkpoints, "resolve", cache_of(checkpoints.resolve))
    wanted, text = resumed_config(folder, []), folder.config.read_text()
    assert wanted == configured(*HELD_OUT)
    for cut in range(0, len(text), step):
        folder.config.write_text(text[:cut])
        if saved and cut >= text.index(CHECKSUM_LINE) - 5:  # all values are there, and agree with the checkpoint
            with suppress(ConfigError):
                assert resumed_config(folder, []) == wanted
        else:
            with pytest.raises(ConfigError, match=r"config\.toml was (edited or )?cut short"):
                resumed_config(folder, [])
    for section in ("training", "grid", "data"):
        start = text.index(f"[{section}]")
        folder.config.write_text(text[:start] + text[text.index("\n\n", start) + 2 :])
        with pytest.raises(ConfigError, match=r"config\.toml was (edited|cut)"):
            resumed_config(folder, [])


def cache_of(resolve: Callable) -> Callable:
    found: dict[str, Config] = {}

    def cached(raw: dict, *, allow: Iterable[Allowed] = ()) -> Config:
        key = repr(raw)
        return found[key] if key in found else found.setdefault(key, resolve(raw, allow=allow))

    return cached


def test_a_run_without_a_checkpoint_starts_with_its_claimed_config_and_refuses_an_edited_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(configured())
    before = edited(tmp_path, ("images = 320", "images = 96"))
    for start in (lambda: resumed_config(folder, []), lambda: trained(tmp_path)):
        with pytest.raises(ConfigError, match=r"was edited.*stablefield train --config .*config\.toml --out FOLDER"):
            start()
    folder.config.write_text(before)
    with pytest.raises(ConfigError, match=r"target\.size"):  # another configuration is refused too
        trained(tmp_path, "target.size=8")
    assert resumed_config(folder, ["training.images=96"]) == configured("training.images=96")
    assert trained(tmp_path) == 0
    assert read(folder.checkpoint).images == 320


def test_an_edited_config_file_is_refused_with_the_commands_to_change_or_restore_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = edited(run, ("images = 320", "images = 384"), ("save_every = 64", "save_every = 128"))
    text = RunFolder(run).config.read_text()
    for resume in (lambda: resumed_config(RunFolder(run), []), lambda: trained(run, *HELD_OUT)):
        with pytest.raises(ConfigError) as refused:
            resume()
        for part in (
            "training.images is 384 in config.toml, 320 in the checkpoint",
            "training.save_every is 128 in config.toml, 64 in the checkpoint",
            f"stablefield train --resume {run} --set training.images=384 --set training.save_every=128",
            f"remove {run / 'config.toml'}",
        ):
            assert part in str(refused.value)
    with pytest.raises(ConfigError, match="edited"):  # the other changed key is not set
        resumed_config(RunFolder(run), ["training.images=384"])
    assert RunFolder(run).config.read_text() == text
    settings = ["training.images=384", "training.save_every=128"]
    assert resumed_config(RunFolder(run), settings) == configured(*HELD_OUT, *settings)
    assert trained(run, *HELD_OUT, *settings) == 0
    assert resumed_config(RunFolder(run), []) == configured(*HELD_OUT, *settings)

    shutil.rmtree(run)
    shutil.copytree(whole, run)
    edited(run, ("width = 8", "width = 16"))
    with pytest.raises(ConfigError, match=r"network\.width is 16 in .*, 8 in .*--init-from .* --set network\.width=16"):
        resumed_config(RunFolder(run), [])
    RunFolder(run).config.unlink()
    assert resumed_config(RunFolder(run), []) == configured(*HELD_OUT)
    assert trained(run, *HELD_OUT) == 0
    assert RunFolder(run).config.read_text() == before


@pytest.mark.parametrize("other", ["training.seed=1", "target.size=8", "data.holdout=59", "training.learning_rate=0.5"])
def test_a_checkpoint_of_another_run_is_refused_naming_the_keys_that_differ(whole, tmp_path, other):
    run, key, value = tmp_path / "run", *other.split("=")
    trained(tmp_path / "other", *HELD_OUT, "training.images=64", other)
    shutil.copytree(whole, run)
    shutil.copy(RunFolder(tmp_path / "other").checkpoint, RunFolder(run).checkpoint)
    section, _, name = key.partition(".")
    ours = configured(*HELD_OUT).values(section)[name]
    message = rf"runs: {key} is {ours} in config.toml, {value} in the checkpoint; put"
    for settings in ([], [other]):
        with pytest.raises(ConfigError, match=message):
            resumed_config(RunFolder(run), settings)
        with pytest.raises(ConfigError, match=message):
            trained(run, *HELD_OUT, *settings)
    assert read(RunFolder(run).checkpoint).images == 64


def test_a_checkpoint_with_another_end_of_a_cosine_decay_is_refused(tmp_path):
    for name, count in (("long", 128), ("short", 64)):
        trained(tmp_path / name, "training.learning_rate_decay=cosine", f"training.images={count}")
    shutil.copy(RunFolder(tmp_path / "short").checkpoint, RunFolder(tmp_path / "long").checkpoint)
    with pytest.raises(ConfigError, match=r"training\.images is 128 in config\.toml, 64 in the checkpoint"):
        resumed_config(RunFolder(tmp_path / "long"), [])


def test_a_config_change_killed_between_any_two_system_calls_leaves_a_run_that_resumes(whole, tmp_path, monkeypatch):
    before, longer = (configured(*HELD_OUT, f"training.images={n}", "training.keep_checkpoints=2") for n in (320, 384))
    components = build(before)
    first = tmp_path / "first"
    shutil.copytree(whole, first, ignore=shutil.ignore_patterns("tensorboard"))
    assert fit(before, components, RunFolder(first)) == 0  # removes the checkpoint that is one too many

    def die(images: int, metrics: object) -> None:
        raise Killed

    reached = []
    for limit in range(100):
        run = RunFolder(tmp_path / str(limit))
        shutil.copytree(first, run.path, ignore=shutil.ignore_patterns("tensorboard"))
        with monkeypatch.context() as patch:
            limited = LimitedCalls(patch, limit)
            with pytest.raises(Killed):
                fit(longer, components, run, on_step=die)
        reached.append(resumed_config(run, []))
        assert resumed_config(run, ["training.images=384"]) == longer
        for config in (reached[-1], longer):  # the stored configuration, and the same change again
            state = initial_state(config, components)
            CheckpointManager(run, config, components).restore(state, Ranks(torch.device("cpu")))
            assert state.images == 320
        if limited.left > 0:
            break
    assert limited.left > 0
    assert reached.index(longer) > 2
    assert reached == [before] * reached.index(longer) + [longer] * (len(reached) - reached.index(longer))
    assert fit(longer, components, run) == 0
    assert same(run.path, first) is False
    assert read(run.checkpoint).images == 384


@pytest.mark.parametrize("links", [True, False])
def test_of_many_processes_that_claim_a_folder_at_once_exactly_one_succeeds(tmp_path, monkeypatch, links):
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    wanted = [configured(f"training.seed={seed}") for seed in range(8)]
    for place in range(6):
        folder, start = RunFolder(tmp_path / str(place)), threading.Barrier(len(wanted))

        def claim(config: Config, folder: RunFolder = folder, start: threading.Barrier = start) -> Config | str:
            start.wait()
            try:
                folder.claim(config)
            except (ConfigError, OSError) as error:
                found = str(error)
            else:
                return config
            assert not folder.config.exists() or is_unedited(folder.config.read_text())
            return found

        with ThreadPoolExecutor(len(wanted)) as pool:
            made = list(pool.map(claim, wanted))
        winners, refusals = ([one for one in made if isinstance(one, kind)] for kind in (Config, str))
        assert len(winners) == 1
        expected = "holds a run already" if links else "holds a run already|another process is writing it"
        assert all(re.search(expected, refusal) for refusal in refusals)
        assert resumed_config(folder, []) == winners[0]
        assert [file.name for file in folder.path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("most", [0, 1, 100, 500])
def test_a_full_disk_leaves_no_claimed_run(tmp_path, most):
    folder = RunFolder(tmp_path / "run")
    with full_disk(most), pytest.raises(OSError, match=r"could not write .*config\.toml"):
        folder.claim(configured())
    assert not folder.occupied()
    assert not list(folder.path.iterdir())
    folder.claim(configured())
    assert resumed_config(folder, []) == configured()


def test_an_incomplete_step_is_never_saved(tmp_path, monkeypatch):
    end_step = TrainState.end_step

    def fail(state: TrainState, batch_size: int, step_taken: bool) -> None:
        if state.images == 96:
            raise Interrupted
        end_step(state, batch_size, step_taken)

    monkeypatch.setattr(TrainState, "end_step", fail)
    with pytest.raises(Interrupted):
        trained(tmp_path)
    assert read(RunFolder(tmp_path).checkpoint).images == 64


def test_a_signal_stops_the_run_after_the_step_and_a_second_one_immediately(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stopped = trained(
        tmp_path, on_step=lambda images, metrics: os.kill(os.getpid(), signal.SIGTERM) if images == 96 else None
    )
    assert stopped == signal.SIGTERM
    assert read(RunFolder(tmp_path).checkpoint).images == 128
    assert signal.getsignal(signal.SIGTERM) is before

    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("stablefield.engine.stopping.monotonic", lambda: next(clock))

    def twice(images: int, metrics: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, on_step=twice)
    assert read(RunFolder(tmp_path).checkpoint).images == 128


def test_a_signal_delivered_twice_at_once_counts_once(tmp_path):
    def on_step(images: int, metrics: object) -> None:
        if images == 32:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert trained(tmp_path, on_step=on_step) == signal.SIGINT


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Context in which no file can become longer than `most` bytes; pytest itself writes outside of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [100, 1_000, 10_000])
def test_a_full_disk_raises_an_error_of_one_line_and_leaves_the_checkpoint_unchanged(tmp_path, most):
    trained(tmp_path, "training.images=64")
    before = RunFolder(tmp_path).checkpoint.read_bytes()
    with full_disk(most), pytest.raises(OSError, match=r"could not write|File too large"):
        trained(tmp_path)
    assert RunFolder(tmp_path).checkpoint.read_bytes() == before
    assert trained(tmp_path) == 0
    assert seen(tmp_path) == list(range(32, 321, 32))


def test_a_disk_that_fills_up_during_a_run_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_step(images: int, metrics: object) -> None:
        if images == 96:
            monkeypatch.setattr(files, "sync", full)

    with pytest.raises(OSError, match=r"could not write .*checkpoint.safetensors .*No space left.* untouched"):
        trained(tmp_path, on_step=on_step)
    assert read(RunFolder(tmp_path).checkpoint).images in (0, 64)  # that of 64 images may still have been written
    monkeypatch.undo()
    assert trained(tmp_path) == 0
    assert seen(tmp_path) == list(range(32, 321, 32))


def test_events_that_cannot_be_written_raise_an_error_of_one_line(tmp_path, capfd):
    disk = ExitStack()

    def on_step(images: int, metrics: object) -> None:
        if images == 96:
            disk.enter_context(full_disk(next(RunFolder(tmp_path).tensorboard.iterdir()).stat().st_size + 10))

    with disk, pytest.raises(OSError, match=r"could not write .*(events|metrics).*File too large"):
        trained(tmp_path, "training.save_every=100000", on_step=on_step)
    assert "Traceback" not in capfd.readouterr().err


class LastRank(Ranks):
    """A rank whose companions die: what is exchanged with them fails from then on."""

    dead = False

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        if self.dead:
            raise ConnectionError("rank 0 of 2 has lost the others")
        return super().all_gather(values)


@pytest.mark.parametrize("log_every", [32, 64])
def test_the_metrics_of_the_step_in_which_another_rank_dies_are_written(tmp_path, monkeypatch, log_every):
    settings = (*HELD_OUT, "training.probe_every=0", f"training.log_every={log_every}")
    assert trained(tmp_path / "whole", *settings) == 0
    ranks = LastRank(torch.device("cpu"))
    end_step = TrainState.end_step

    def die(state: TrainState, *arguments: object) -> None:
        end_step(state, *arguments)
        ranks.dead = state.images == 192

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "end_step", die)
        with pytest.raises(ConnectionError, match="lost the others"):
            trained(tmp_path / "run", *settings, ranks=ranks)
    assert read(RunFolder(tmp_path / "run").checkpoint).images == 192
    assert seen(tmp_path / "run")[-1] == 192
    assert trained(tmp_path / "run", *settings) == 0
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_best_checkpoint_that_cannot_be_written_in_the_background_is_reported_and_made_up_for(tmp_path, monkeypatch):
    add_name = checkpoints._add_name
    settings = (*HELD_OUT, "training.probe_every=0", "training.keep_checkpoints=1")
    assert trained(tmp_path / "whole", *settings) == 0

    def full(file: Path, name: Path) -> None:
        if name.name == "best.safetensors" and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device", str(name))
        add_name(file, name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_add_name", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*best\.safetensors'"):
            trained(tmp_path / "run", *settings)
    newest = read(RunFolder(tmp_path / "run").checkpoint)
    assert newest.images >= 64
    assert newest.config["best"]["images"] <= newest.images
    assert trained(tmp_path / "run", *settings) == 0
    for path in (RunFolder.checkpoint, RunFolder.best):
        mine, theirs = (path.fget(RunFolder(tmp_path / name)).read_bytes() for name in ("run", "whole"))
        assert mine == theirs
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.fixture
def arrays(tmp_path) -> list[str]:
    """Settings for a data set in a file."""
    data = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "data.npy", data)
    return ["data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "data.channels_last=false"]


def test_resuming_refuses_other_data_and_accepts_the_same_data_at_another_path(tmp_path, arrays):
    run, data = tmp_path / "run", tmp_path / "data.npy"
    trained(run, *arrays)
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    moved = data.rename(tmp_path / "moved.npy")
    with pytest.raises(ValueError, match=r"there is no file .*data\.npy"):
        trained(run, *arrays)
    other = np.load(moved)
    other[7, 0, 0, 0] ^= 1
    np.save(data, other)
    with pytest.raises(ConfigError, match="not the data that the run was trained on"):
        trained(run, *arrays)
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    arrays[1] = f"data.path={moved}"
    assert trained(run, *arrays) == 0


def test_a_damaged_image_is_named_before_a_run_starts(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(photos / f"{name}.png")
    os.truncate(photos / "b.png", 80)
    with pytest.raises(ValueError, match=r"b\.png"):
        trained(tmp_path / "run", "data.kind=images", f"data.path={photos}", "target.size=2")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_naming_an_older_one(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.best.unlink()
    os.truncate(folder.checkpoint, 10_000)
    with pytest.raises(CheckpointError, match=r"cut short.*copy .*000000256\.safetensors to .*checkpoint"):
        trained(folder.path, *HELD_OUT)
    shutil.copy(folder.older_checkpoint(256), folder.checkpoint)
    trained(folder.path, *HELD_OUT)
    assert same(folder.path, whole)


def test_keys_that_define_a_run_cannot_change_when_resuming_and_its_length_can():
    before = configured()
    for setting in (
        "images=640",
        "save_every=5",
        "keep_checkpoints=4",
        "log_every=7",
        "sample_every=9",
        "micro_batch_size=3",
    ):
        refuse_changed_config(before, configured(f"training.{setting}"))
    for other in ("training.precision=bfloat16", "training.batch_size=16", "target.size=8", "data.holdout=3"):
        with pytest.raises(ConfigError, match=other.partition("=")[0]):
            refuse_changed_config(before, configured(other))
    cosine = configured("training.learning_rate_decay=cosine")
    with pytest.raises(ConfigError, match=r"cannot change training\.images when resuming: the cosine decay"):
        refuse_changed_config(cosine, configured("training.learning_rate_decay=cosine", "training.images=640"))


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with locked(RunFolder(tmp_path)), pytest.raises(ConfigError, match="another process is training"):
        trained(tmp_path)
    assert trained(tmp_path) == 0


def test_only_temporary_files_of_runs_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    left = [f".tmp-0123456789ab.{name}" for name in ("checkpoint.safetensors", "metrics.jsonl", "config.toml")]
    left.append("checkpoints/.tmp-0123456789ab.000000064.safetensors")
    others = [".tmp-0123456789ab", ".notes", ".tmp-notes", "tmp-0123456789ab.metrics.jsonl"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    with locked(RunFolder(tmp_path)):
        assert {file.name for file in tmp_path.iterdir()} == {*others, "checkpoints"}
        assert not list((tmp_path / "checkpoints").iterdir())


def test_sheets_of_samples_are_reproducible_and_removed_with_the_steps_that_are_repeated(tmp_path):
    settings = ("training.sample_every=96", "sampler.steps=2", "training.conditional=true")
    trained(tmp_path, *settings)
    assert sorted(p.name for p in RunFolder(tmp_path).sheets.iterdir()) == [f"{n:09d}.png" for n in (96, 192, 288)]
    before = (RunFolder(tmp_path).sheets / "000000288.png").read_bytes()
    RunFolder(tmp_path).rewind(200)
    assert sorted(p.name for p in RunFolder(tmp_path).sheets.iterdir()) == [f"{n:09d}.png" for n in (96, 192)]
    shutil.rmtree(tmp_path)
    trained(tmp_path, *settings)
    assert (RunFolder(tmp_path).sheets / "000000288.png").read_bytes() == before


def test_sheets_of_data_that_are_not_images_are_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32))
    with pytest.raises(ConfigError, match="cannot draw sheets"):
        trained(tmp_path / "run", "data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "training.sample_every=5")
    assert not (tmp_path / "run").exists()  # the folder is still free


def test_floats_have_sheets_only_if_declared_as_images(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "data.npy", np.tanh(x))
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "sampler.steps=2"]
    with pytest.raises(
        ConfigError, match=r"\(1, 8, 8\) and values=float; set training.sample_every=0, or data.values=image"
    ):
        trained(tmp_path / "run", *settings, "training.sample_every=96")
    trained(tmp_path / "run", *settings)
    assert not RunFolder(tmp_path / "run").sheets.exists()
    # the declaration changes no step, so it can be made when resuming
    trained(tmp_path / "run", *settings, "training.images=416", "training.sample_every=96", "data.values=image")
    assert [p.name for p in RunFolder(tmp_path / "run").sheets.iterdir()] == ["000000384.png"]
    assert RunFolder(tmp_path / "run").newest().config["values"] == "image"


def test_each_set_of_weights_can_be_sampled_by_its_name(tmp_path):
    run = tmp_path / "run"
    averages = ("training.ema_half_life=[100, 1000]", "training.ema_rampup_ratio=9", "training.learning_rate_warmup=0")
    trained(run, *averages, "training.learning_rate=0.01", "sampler.steps=2", *HELD_OUT)

    def sampled(weights: str, out: str) -> np.ndarray:
        arguments = ["sample", run, "--seeds", "0-1", "--weights", weights, "--out", tmp_path / out]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception:
            raise result.exception
        return np.load(tmp_path / out)["arr_0"].astype(int)

    made = [sampled(weights, f"{weights}.npz") for weights in ("average", "average-1000", "model")]
    assert all(np.abs(made[i] - made[j]).max() > 0 for i, j in ((0, 1), (0, 2), (1, 2)))
    best = read(RunFolder(run).best).images
    assert best == 320 or np.abs(sampled("best", "best.npz") - made[0]).max() > 0
    assert np.array_equal(sampled("best", "best.npz"), sampled("best", "best.npz"))
    with pytest.raises(ConfigError, match="samples of another run"):
        sampled("model", "average.npz")
    with pytest.raises(ValueError, match="choose one of average, average-1000, model, or best"):
        sampled("average-7", "none.npz")


def test_tensorboard_has_the_metrics_and_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sheets = ("training.sample_every=96", "sampler.steps=1")
    with pytest.raises(Interrupted):
        trained(tmp_path, *sheets, "training.save_every=100000", on_step=interrupt_at(160))
    run = RunFolder(tmp_path)
    # as after a kill: the newest checkpoint is older than the last events
    trained(tmp_path / "short", *sheets, "training.images=64")
    shutil.copy(tmp_path / "short" / "checkpoint.safetensors", run.checkpoint)
    trained(tmp_path, *sheets)
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    lines = {round(1000 * line["progress/kimg"]): line["loss/loss"] for line in run.history()}
    events = {event.step: event.value for event in found.Scalars("loss/loss")}
    assert [event.step for event in found.Scalars("loss/loss")] == list(lines)
    assert [event.step for event in found.Images("samples")] == [96, 192, 288]
    assert events == pytest.approx(lines, rel=1e-6)


def test_every_line_of_the_metrics_is_strict_json_whatever_the_gradient(tmp_path, monkeypatch):
    config = configured()
    components = build(config)
    hook = components.denoiser.network.leave.register_full_backward_hook
    calls = iter(range(1000))
    hook(lambda module, gradients, _: (gradients[0] * (torch.nan if next(calls) in (2, 3) else 1),))
    fit(config, components, RunFolder(tmp_path))
    text = RunFolder(tmp_path).metrics.read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["steps/skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert ["loss/loss" in line for line in lines] == [True, True, False, False, *[True] * 6]


def test_deterministic_algorithms_are_enabled_during_the_run_only(tmp_path):
    states = []
    trained(
        tmp_path,
        "training.deterministic=true",
        on_step=lambda *_: states.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert all(states)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # the checks themselves cannot be compiled
def test_a_compiled_network_keeps_the_names_and_values_of_its_weights(tmp_path, whole):
    trained(tmp_path, *HELD_OUT, "training.compile=true")
    mine, theirs = tensors(tmp_path), tensors(whole)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
