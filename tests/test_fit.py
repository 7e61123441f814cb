"""A run loses nothing: whatever ends it, it goes on from its newest checkpoint as if it had never stopped."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stablefield import checkpoint
from stablefield.checkpoint import CheckpointError, read
from stablefield.cli import app
from stablefield.config import Config, ConfigError, override, resolve
from stablefield.data import content_hash
from stablefield.engine.fit import fit
from stablefield.engine.saving import Saver, alone, refuse_another
from stablefield.engine.state import TrainState
from stablefield.ranks import Ranks
from stablefield.reference import Pool
from stablefield.run import Folder, assemble, fingerprint, load

SMALL = ["network.kind=mlp", "network.width=8", "network.layers=1", "target.size=16", "training.batch_size=32"]
SHORT = ["training.images=320", "training.save_every=64", "training.log_every=32"]


def configured(*settings: str) -> Config:
    return resolve(override({}, [*SMALL, *SHORT, *settings]))


def trained(folder: Path, *settings: str, **options) -> int:
    config = configured(*settings)
    return fit(config, assemble(config), Folder(folder), **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read(Folder(folder).checkpoint).tensors


def same(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def seen(folder: Path) -> list[int]:
    return [round(1000 * line["Progress/kimg"]) for line in Folder(folder).history()]


def untimed(folder: Path) -> list[dict]:
    lines = Folder(folder).history()
    return [{k: v for k, v in line.items() if not k.startswith(("Timing", "Resources", "timestamp"))} for line in lines]


class Broken(Exception):
    """Something that goes wrong in the middle."""


def break_at(images: int) -> Callable:
    def watch(now: int, line: object) -> None:
        if now >= images:
            raise Broken

    return watch


HELD_OUT = ("data.holdout=60", "training.keep=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained(folder, *HELD_OUT)
    return folder


@pytest.mark.parametrize("stop", [32, 64, 96, 256])
def test_a_run_that_broke_anywhere_becomes_what_it_would_have_been(whole, tmp_path, stop):
    with pytest.raises(Broken):
        trained(tmp_path, *HELD_OUT, watch=break_at(stop))
    assert read(Folder(tmp_path).checkpoint).images == stop  # nothing was lost
    assert trained(tmp_path, *HELD_OUT) == 0
    assert same(tmp_path, whole)
    assert seen(tmp_path) == seen(whole) == list(range(32, 321, 32))
    assert untimed(tmp_path) == untimed(whole)
    assert read(Folder(tmp_path).best).images == read(Folder(whole).best).images


def test_as_many_of_the_last_checkpoints_stay_as_are_kept(whole, tmp_path):
    assert read(Folder(whole).checkpoint).images == 320
    assert {images: read(path).images for images, path in Folder(whole).olders().items()} == {192: 192, 256: 256}
    trained(tmp_path)
    assert not Folder(tmp_path).olders()
    assert not Folder(tmp_path).best.exists()


@pytest.mark.parametrize("keep", [2, 4, 5, 6, 9])
def test_any_number_of_them_can_be_kept(keep, tmp_path):
    trained(tmp_path, f"training.keep={keep}")
    assert list(Folder(tmp_path).olders()) == [0, 64, 128, 192, 256][-(keep - 1) :]


def test_fewer_are_kept_when_a_run_goes_on_with_fewer(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    trained(tmp_path / "run", "data.holdout=60", "training.keep=2", "training.images=384")
    assert list(Folder(tmp_path / "run").olders()) == [320]


def test_the_best_is_where_the_loss_on_held_out_images_was_lowest(whole):
    losses = {
        i: line["Held_out/loss"]
        for i, line in zip(seen(whole), Folder(whole).history(), strict=True)
        if "Held_out/loss" in line
    }
    assert list(losses) == [64, 128, 192, 256, 320]
    best = read(Folder(whole).best)
    assert losses[best.images] == min(losses.values()) == best.config["best"]["score"]


def test_a_score_of_ones_own_decides_which_is_best_and_is_remembered(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    trained(tmp_path, score=lambda denoiser: next(scores))
    assert read(Folder(tmp_path).best).images == 128
    trained(tmp_path, "training.images=384", score=lambda denoiser: 1.5)
    assert read(Folder(tmp_path).best).images == 128
    trained(tmp_path, "training.images=448", score=lambda denoiser: 0.5)
    assert read(Folder(tmp_path).best).images == 448
    assert [line.get("Score/score") for line in Folder(tmp_path).history()][-1] == 0.5
    x = torch.ones(1, 1, 8, 8), torch.ones(1)
    assert torch.equal(load(tmp_path, weights="best")(*x), load(tmp_path)(*x))


class Dead(BaseException):
    """A process that was killed does nothing any more."""


class Mortal:
    """The system calls of a save, the n-th of which, and all after it, are never made."""

    calls = ("replace", "rename", "link", "unlink", "fsync", "chmod", "mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lives: int) -> None:
        self.lives = lives
        for name in self.calls:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "save_file", self._counted(checkpoint.save_file))

    def _counted(self, call: Callable) -> Callable:
        def made(*arguments, **options):
            if self.lives == 0:
                raise Dead
            self.lives -= 1
            return call(*arguments, **options)

        return made


def saver_of(folder: Path) -> tuple[Saver, TrainState]:
    config = configured("training.keep=2")
    parts = assemble(config)
    state, saver = TrainState(parts.denoiser), Saver(Folder(folder), config, parts)
    saver.restore(state, Ranks(torch.device("cpu")))
    return saver, state


def test_a_save_that_is_cut_off_between_any_two_system_calls_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    done = False
    for lives in range(100):
        folder = tmp_path / str(lives)
        folder.mkdir()
        saver, state = saver_of(folder)
        for state.images, score in ((32, 3.0), (64, 4.0)):
            saver.save(state, score)
        state.images = 96
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, lives)
            try:
                saver.save(state, 1.0)
                done = mortal.lives > 0
            except Dead:
                pass
        with alone(Folder(folder)):
            assert not [file for file in folder.rglob(".*")]
        saver, state = saver_of(folder)
        assert state.images in (64, 96)
        saver.save(state)  # what goes on saves first
        assert read(Folder(folder).best).images == (32 if state.images == 64 else 96)
        assert all(read(path).images == images for images, path in Folder(folder).olders().items())
        assert len(Folder(folder).olders()) >= 1
        if done:
            break
    assert done
    assert lives > 12


def test_a_half_taken_step_is_never_saved(tmp_path, monkeypatch):
    count = TrainState.count

    def fails(state: TrainState, batch: int, taken: bool) -> None:
        if state.images == 96:
            raise Broken
        count(state, batch, taken)

    monkeypatch.setattr(TrainState, "count", fails)
    with pytest.raises(Broken):
        trained(tmp_path)
    assert read(Folder(tmp_path).checkpoint).images == 64


def test_a_signal_is_obeyed_after_the_step_and_a_second_one_at_once(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stopped = trained(
        tmp_path, watch=lambda images, line: os.kill(os.getpid(), signal.SIGTERM) if images == 96 else None
    )
    assert stopped == signal.SIGTERM
    assert read(Folder(tmp_path).checkpoint).images == 128
    assert signal.getsignal(signal.SIGTERM) is before

    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("stablefield.engine.fit.monotonic", lambda: next(clock))

    def twice(images: int, line: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, watch=twice)
    assert read(Folder(tmp_path).checkpoint).images == 128


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    def watch(images: int, line: object) -> None:
        if images == 32:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert trained(tmp_path, watch=watch) == signal.SIGINT


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may become longer than that; lifted before pytest itself has anything to write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [100, 1_000, 10_000])
def test_a_disk_that_is_full_is_said_in_a_line_and_takes_nothing_with_it(tmp_path, most):
    trained(tmp_path, "training.images=64")
    before = Folder(tmp_path).checkpoint.read_bytes()
    with full_disk(most), pytest.raises(OSError, match=r"could not write|File too large"):
        trained(tmp_path)
    assert Folder(tmp_path).checkpoint.read_bytes() == before
    assert trained(tmp_path) == 0
    assert seen(tmp_path) == list(range(32, 321, 32))


def test_a_disk_that_fills_up_on_the_way_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def watch(images: int, line: object) -> None:
        if images == 96:
            monkeypatch.setattr(checkpoint, "save_file", full)

    with pytest.raises(OSError, match=r"could not write .*checkpoint.safetensors .*No space left.* untouched"):
        trained(tmp_path, watch=watch)
    assert read(Folder(tmp_path).checkpoint).images == 64
    monkeypatch.undo()
    assert trained(tmp_path) == 0
    assert seen(tmp_path) == list(range(32, 321, 32))


def test_events_that_cannot_be_written_are_an_error_of_one_line(tmp_path, capfd):
    disk = ExitStack()

    def watch(images: int, line: object) -> None:
        if images == 96:
            disk.enter_context(full_disk(next(Folder(tmp_path).tensorboard.iterdir()).stat().st_size + 10))

    with disk, pytest.raises(OSError, match=r"could not write .*(events|metrics).*File too large"):
        trained(tmp_path, "training.save_every=100000", watch=watch)
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def arrays(tmp_path) -> list[str]:
    """A data set in a file, and the settings that lead to it."""
    data = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "data.npy", data)
    return ["data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "data.channels_last=false"]


def test_other_data_are_refused_and_the_same_elsewhere_are_not(tmp_path, arrays):
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


def test_an_image_that_is_damaged_is_named_before_any_work(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(photos / f"{name}.png")
    os.truncate(photos / "b.png", 80)
    with pytest.raises(ValueError, match=r"b\.png"):
        trained(tmp_path / "run", "data.kind=images", f"data.path={photos}", "target.size=2")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_one_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    folder = Folder(tmp_path / "run")
    folder.best.unlink()
    os.truncate(folder.checkpoint, 10_000)
    with pytest.raises(CheckpointError, match=r"cut short.*copy .*000000256\.safetensors to .*checkpoint"):
        trained(folder.path, *HELD_OUT)
    shutil.copy(folder.older(256), folder.checkpoint)
    trained(folder.path, *HELD_OUT)
    assert same(folder.path, whole)


def test_what_a_run_is_cannot_change_and_how_far_it_goes_can():
    before = configured()
    for setting in ("images=640", "save_every=5", "keep=4", "log_every=7", "sample_every=9", "micro_batch=3"):
        refuse_another(before, configured(f"training.{setting}"))
    for other in ("training.precision=bfloat16", "training.batch_size=16", "target.size=8", "data.holdout=3"):
        with pytest.raises(ConfigError, match=other.partition("=")[0]):
            refuse_another(before, configured(other))
    cosine = configured("training.decay=cosine")
    with pytest.raises(ConfigError, match="where the cosine"):
        refuse_another(cosine, configured("training.decay=cosine", "training.images=640"))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with alone(Folder(tmp_path)), pytest.raises(ConfigError, match="another process is training"):
        trained(tmp_path)
    assert trained(tmp_path) == 0


def test_only_our_own_leftovers_are_swept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    left = [".12.checkpoint.safetensors", ".12.metrics.jsonl", ".7.config.toml", "checkpoints/.3.000000064.safetensors"]
    others = [".12.samples.npz", ".notes", ".12.notes.safetensors.txt", "12.metrics.jsonl"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    with alone(Folder(tmp_path)):
        assert {file.name for file in tmp_path.iterdir()} == {*others, "checkpoints"}
        assert not list((tmp_path / "checkpoints").iterdir())


def test_a_fingerprint_is_of_all_of_small_data_and_of_some_of_large_data():
    data = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert fingerprint(Pool(data)) == content_hash(Pool(data))
    assert len({fingerprint(Pool(d), most=12_000) for d in (data, data[:-1], data.flip(0), data.clone().mul_(2))}) == 4
    assert fingerprint(Pool(data), most=12_000) == fingerprint(Pool(data.clone()), most=12_000)


def test_grids_are_pictures_and_go_with_the_part_of_the_run_that_is_undone(tmp_path):
    settings = ("training.sample_every=96", "sampler.steps=2", "training.conditional=true")
    trained(tmp_path, *settings)
    assert sorted(p.name for p in Folder(tmp_path).grids.iterdir()) == [f"{n:09d}.png" for n in (96, 192, 288)]
    before = (Folder(tmp_path).grids / "000000288.png").read_bytes()
    Folder(tmp_path).rewind(200)
    assert sorted(p.name for p in Folder(tmp_path).grids.iterdir()) == [f"{n:09d}.png" for n in (96, 192)]
    shutil.rmtree(tmp_path)
    trained(tmp_path, *settings)
    assert (Folder(tmp_path).grids / "000000288.png").read_bytes() == before


def test_grids_of_what_is_no_picture_are_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32))
    with pytest.raises(ConfigError, match="no pictures"):
        trained(tmp_path / "run", "data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "training.sample_every=5")
    assert not (tmp_path / "run").exists()  # the run can still be begun here


def test_each_set_of_weights_is_sampled_from_by_its_name(tmp_path):
    run = tmp_path / "run"
    averages = ("training.ema_half_life=[100, 1000]", "training.ema_ramp_up=9", "training.ramp=0")
    trained(run, *averages, "training.learning_rate=0.01", "sampler.steps=2", *HELD_OUT)

    def sampled(weights: str, out: str) -> np.ndarray:
        arguments = ["sample", run, "--seeds", "0-1", "--weights", weights, "--out", tmp_path / out]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception:
            raise result.exception
        return np.load(tmp_path / out)["arr_0"].astype(int)

    made = [sampled(weights, f"{weights}.npz") for weights in ("average", "average-1000", "model")]
    assert all(np.abs(made[i] - made[j]).max() > 0 for i, j in ((0, 1), (0, 2), (1, 2)))
    best = read(Folder(run).best).images
    assert best == 320 or np.abs(sampled("best", "best.npz") - made[0]).max() > 0
    assert np.array_equal(sampled("best", "best.npz"), sampled("best", "best.npz"))
    with pytest.raises(ConfigError, match="samples of another run"):
        sampled("model", "average.npz")
    with pytest.raises(ValueError, match="but average, average-1000, model; or best"):
        sampled("average-7", "none.npz")


def test_tensorboard_shows_the_metrics_and_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pictures = ("training.sample_every=96", "sampler.steps=1")
    with pytest.raises(Broken):
        trained(tmp_path, *pictures, "training.save_every=100000", watch=break_at(160))
    run = Folder(tmp_path)
    # as if killed: the newest checkpoint is older than the last events
    trained(tmp_path / "short", *pictures, "training.images=64")
    shutil.copy(tmp_path / "short" / "checkpoint.safetensors", run.checkpoint)
    trained(tmp_path, *pictures)
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    lines = {round(1000 * line["Progress/kimg"]): line["Loss/loss"] for line in run.history()}
    events = {event.step: event.value for event in found.Scalars("Loss/loss")}
    assert [event.step for event in found.Scalars("Loss/loss")] == list(lines)
    assert [event.step for event in found.Images("samples")] == [96, 192, 288]
    assert events == pytest.approx(lines, rel=1e-6)


def test_every_line_of_the_metrics_is_strict_json_whatever_the_gradient(tmp_path, monkeypatch):
    config = configured()
    parts = assemble(config)
    hook = parts.denoiser.network.leave.register_full_backward_hook
    calls = iter(range(1000))
    hook(lambda module, given, out: (given[0] * (torch.nan if next(calls) in (2, 3) else 1),))
    fit(config, parts, Folder(tmp_path))
    text = Folder(tmp_path).metrics.read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["Steps/skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert ["Loss/loss" in line for line in lines] == [True, True, False, False, *[True] * 6]


def test_deterministic_operations_are_for_the_run_alone(tmp_path):
    states = []
    trained(
        tmp_path,
        "training.deterministic=true",
        watch=lambda *_: states.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert all(states)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # the checks themselves cannot be compiled
def test_a_compiled_network_has_the_same_weights_by_the_same_names(tmp_path, whole):
    trained(tmp_path, *HELD_OUT, "training.compile=true")
    mine, theirs = tensors(tmp_path), tensors(whole)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
