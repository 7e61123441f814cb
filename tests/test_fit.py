"""A run loses nothing: whatever ends it, it goes on from its newest checkpoint as if it had never stopped."""

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
from typer.testing import CliRunner

from stablefield import checkpoint
from stablefield.checkpoint import CheckpointError, read
from stablefield.cli import app
from stablefield.cli.train import continued
from stablefield.config import MARK, Allowed, Config, ConfigError, override, resolve, unedited
from stablefield.data import content_hash
from stablefield.engine import saving
from stablefield.engine.begin import begun
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


def edited(folder: Path, *changes: tuple[str, str]) -> str:
    """Change a run's config.toml as a person would; what it was."""
    before = text = Folder(folder).config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Folder(folder).config.write_text(text)
    return before


@pytest.mark.parametrize(
    ("saved", "step"), [(False, 1), (True, 7), pytest.param(True, 1, marks=pytest.mark.slow)], ids=str
)
def test_a_configuration_that_was_cut_anywhere_is_never_another_run(whole, tmp_path, saved, step, monkeypatch):
    folder = Folder(tmp_path)
    shutil.copy(Folder(whole).config, folder.config)
    if saved:
        shutil.copy(Folder(whole).checkpoint, folder.checkpoint)
        found = folder.newest()
        monkeypatch.setattr(Folder, "newest", lambda self: found)  # it is read twice for each cut
        monkeypatch.setattr(saving, "resolve", cache_of(saving.resolve))
    wanted, text = continued(folder, []), folder.config.read_text()
    assert wanted == configured(*HELD_OUT)
    for cut in range(0, len(text), step):
        folder.config.write_text(text[:cut])
        if saved and cut >= text.index(MARK) - 5:  # the last value is there, and says what the checkpoint says
            with suppress(ConfigError):
                assert continued(folder, []) == wanted
        else:
            with pytest.raises(ConfigError, match=r"config\.toml was (edited or )?cut short"):
                continued(folder, [])
    for section in ("training", "grid", "data"):
        start = text.index(f"[{section}]")
        folder.config.write_text(text[:start] + text[text.index("\n\n", start) + 2 :])
        with pytest.raises(ConfigError, match=r"config\.toml was (edited|cut)"):
            continued(folder, [])


def cache_of(resolve: Callable) -> Callable:
    found: dict[str, Config] = {}

    def cached(raw: dict, *, allow: Iterable[Allowed] = ()) -> Config:
        key = repr(raw)
        return found[key] if key in found else found.setdefault(key, resolve(raw, allow=allow))

    return cached


def test_a_run_without_a_checkpoint_begins_as_it_was_claimed_and_not_as_it_was_edited(tmp_path):
    folder = Folder(tmp_path)
    folder.claim(configured())
    before = edited(tmp_path, ("images = 320", "images = 96"))
    for begin in (lambda: continued(folder, []), lambda: trained(tmp_path)):
        with pytest.raises(ConfigError, match=r"was edited.*stablefield train --config .*config\.toml --out FOLDER"):
            begin()
    folder.config.write_text(before)
    with pytest.raises(ConfigError, match=r"target\.size"):  # nor as another
        trained(tmp_path, "target.size=8")
    assert continued(folder, ["training.images=96"]) == configured("training.images=96")
    assert trained(tmp_path) == 0
    assert read(folder.checkpoint).images == 320


def test_a_configuration_edited_by_hand_is_refused_with_what_to_type_and_what_to_restore(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = edited(run, ("images = 320", "images = 384"), ("save_every = 64", "save_every = 128"))
    text = Folder(run).config.read_text()
    for resume in (lambda: continued(Folder(run), []), lambda: trained(run, *HELD_OUT)):
        with pytest.raises(ConfigError) as refused:
            resume()
        for part in (
            "training.images is 384 in it, 320 in the checkpoint",
            "training.save_every is 128 in it, 64 in the checkpoint",
            f"stablefield train --resume {run} --set training.images=384 --set training.save_every=128",
            f"remove {run / 'config.toml'}",
        ):
            assert part in str(refused.value)
    with pytest.raises(ConfigError, match="edited"):  # one of both is not what the file says
        continued(Folder(run), ["training.images=384"])
    assert Folder(run).config.read_text() == text
    settings = ["training.images=384", "training.save_every=128"]
    assert continued(Folder(run), settings) == configured(*HELD_OUT, *settings)
    assert trained(run, *HELD_OUT, *settings) == 0
    assert continued(Folder(run), []) == configured(*HELD_OUT, *settings)

    shutil.rmtree(run)
    shutil.copytree(whole, run)
    edited(run, ("width = 8", "width = 16"))
    with pytest.raises(ConfigError, match=r"network\.width is 16 in it, 8 in .*--from .* --set network\.width=16"):
        continued(Folder(run), [])
    Folder(run).config.unlink()
    assert continued(Folder(run), []) == configured(*HELD_OUT)
    assert trained(run, *HELD_OUT) == 0
    assert Folder(run).config.read_text() == before


@pytest.mark.parametrize("other", ["training.seed=1", "target.size=8", "data.holdout=59", "training.learning_rate=0.5"])
def test_a_checkpoint_of_another_run_is_refused_by_the_keys_that_differ(whole, tmp_path, other):
    run, key, value = tmp_path / "run", *other.split("=")
    trained(tmp_path / "other", *HELD_OUT, "training.images=64", other)
    shutil.copytree(whole, run)
    shutil.copy(Folder(tmp_path / "other").checkpoint, Folder(run).checkpoint)
    section, _, name = key.partition(".")
    said = rf"different runs: {key} is {configured(*HELD_OUT)[section][name]} in it, {value} in the checkpoint; put"
    for settings in ([], [other]):
        with pytest.raises(ConfigError, match=said):
            continued(Folder(run), settings)
        with pytest.raises(ConfigError, match=said):
            trained(run, *HELD_OUT, *settings)
    assert read(Folder(run).checkpoint).images == 64


def test_where_a_cosine_ends_is_the_same_in_both_homes(tmp_path):
    for name, count in (("long", 128), ("short", 64)):
        trained(tmp_path / name, "training.decay=cosine", f"training.images={count}")
    shutil.copy(Folder(tmp_path / "short").checkpoint, Folder(tmp_path / "long").checkpoint)
    with pytest.raises(ConfigError, match=r"training\.images is 128 in it, 64 in the checkpoint"):
        continued(Folder(tmp_path / "long"), [])


def test_a_change_that_is_cut_off_between_any_two_system_calls_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch):
    before, longer = (configured(*HELD_OUT, f"training.images={n}", "training.keep=2") for n in (320, 384))
    parts = assemble(before)
    first = tmp_path / "first"
    shutil.copytree(whole, first, ignore=shutil.ignore_patterns("tensorboard"))
    assert fit(before, parts, Folder(first)) == 0  # which has a shorter history to keep, once

    def dies(images: int, line: object) -> None:
        raise Dead

    reached = []
    for lives in range(100):
        run = Folder(tmp_path / str(lives))
        shutil.copytree(first, run.path, ignore=shutil.ignore_patterns("tensorboard"))
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, lives)
            with pytest.raises(Dead):
                fit(longer, parts, run, watch=dies)
        reached.append(continued(run, []))
        assert continued(run, ["training.images=384"]) == longer
        for told in (reached[-1], longer):  # as it was told last, and as it is told again
            state = begun(told, parts)
            Saver(run, told, parts).restore(state, Ranks(torch.device("cpu")))
            assert state.images == 320
        if mortal.lives > 0:
            break
    assert mortal.lives > 0
    assert reached.index(longer) > 2  # and from there on it is
    assert reached == [before] * reached.index(longer) + [longer] * (len(reached) - reached.index(longer))
    assert fit(longer, parts, run) == 0
    assert same(run.path, first) is False
    assert read(run.checkpoint).images == 384


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_begin_at_once_exactly_one_does_and_what_is_seen_is_whole(tmp_path, monkeypatch, links):
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    wanted = [configured(f"training.seed={seed}") for seed in range(8)]
    for place in range(6):
        folder, start = Folder(tmp_path / str(place)), threading.Barrier(len(wanted))

        def begin(config: Config, folder: Folder = folder, start: threading.Barrier = start) -> Config | str:
            start.wait()
            try:
                folder.claim(config)
            except (ConfigError, OSError) as error:
                found = str(error)
            else:
                return config
            assert not folder.config.exists() or unedited(folder.config.read_text())
            return found

        with ThreadPoolExecutor(len(wanted)) as pool:
            made = list(pool.map(begin, wanted))
        winners, refusals = ([one for one in made if isinstance(one, kind)] for kind in (Config, str))
        assert len(winners) == 1
        expected = "holds a run already" if links else "holds a run already|another process is writing it"
        assert all(re.search(expected, refusal) for refusal in refusals)
        assert continued(folder, []) == winners[0]
        assert [file.name for file in folder.path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("most", [0, 1, 100, 500])
def test_a_full_disk_leaves_no_claimed_run(tmp_path, most):
    folder = Folder(tmp_path / "run")
    with full_disk(most), pytest.raises(OSError, match=r"could not write .*config\.toml"):
        folder.claim(configured())
    assert not folder.occupied()
    assert not list(folder.path.iterdir())
    folder.claim(configured())
    assert continued(folder, []) == configured()


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


def test_floats_have_grids_only_where_they_are_declared_images(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "data.npy", np.tanh(x))
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "sampler.steps=2"]
    with pytest.raises(
        ConfigError, match=r"\(1, 8, 8\) with values=float are no pictures.*say 0, or data.values=image"
    ):
        trained(tmp_path / "run", *settings, "training.sample_every=96")
    trained(tmp_path / "run", *settings)
    assert not Folder(tmp_path / "run").grids.exists()
    # the declaration changes no step, so a run may be told later
    trained(tmp_path / "run", *settings, "training.images=416", "training.sample_every=96", "data.values=image")
    assert [p.name for p in Folder(tmp_path / "run").grids.iterdir()] == ["000000384.png"]
    assert Folder(tmp_path / "run").newest().config["values"] == "image"


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
