"""Commands that are killed at any change of a file, or whose disk is full, leave whole files and can be run again."""

import json
import random
import re
import shutil
from pathlib import Path

import edm_files
import matplotlib.figure  # noqa: F401  # imported once here, and not in every fork
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
from disturbances import command, contents, leftovers
from short_runs import trained

import stablefield.evaluate
import stablefield.interop.edm
import stablefield.studies.compare
import stablefield.studies.field
import stablefield.studies.floor  # noqa: F401

pytestmark = pytest.mark.usefixtures("unchecked")

COMPARED = ("network.kind=mlp", "network.width=4", "network.layers=1", "training.batch_size=8", "training.images=240")
COMPARED += ("training.learning_rate_warmup=0", "sampler.steps=2", "target.size=8", "data.holdout=10")
SAMPLED = "run --samples 4 --steps 2 --batch 2 --features pixels"
COMMANDS = {
    "sample": "sample run --seeds 0-4 --batch 2 --steps 2 --out samples",
    "sample to a file": "sample run --seeds 0-4 --batch 2 --steps 2 --out samples.npz",
    "evaluate": f"evaluate {SAMPLED} --statistics statistics.npz --repeats 2",
    "convert to a store": "data convert data.npz store",
    "convert to a ZIP file": "data convert data.npz data.zip",
    "convert to an archive": "data convert images.zip data2.npz",
    "inspect": "data inspect images.zip --sheet sheet.png --plot plot.png",
    "field": "field vectors.npy --noise-levels 2 --sizes 4 --examples 4 --draws 3",
    "floor": "floor vectors.npy --bins 2 --examples 4",
    "convert": "convert edm.pkl edm",
    "convert to EDM": "convert converted weights.safetensors --to edm",
    "compare": "compare --out compared --data vectors.npy --targets dsm,stf:8 --seeds 0 --evaluations 10 --samples 4 "
    f"--examples 4 --set {' --set '.join(COMPARED)}",
}
QUICK = ("sample", "sample to a file", "evaluate", "convert to a store", "convert to a ZIP file", "convert")
ROOM = (0, 1, 30, 300, 1_000, 3_000, 10_000, 100_000)


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    """A folder with a run, data and a foreign checkpoint."""
    folder = tmp_path_factory.mktemp("begin") / "begin"
    trained(folder / "run", "training.images=64")
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (24, 1, 8, 8), dtype=np.uint8), np.arange(24) % 3
    np.savez(folder / "data.npz", data=pixels, labels=labels)
    np.save(folder / "vectors.npy", random.standard_normal((60, 4)).astype(np.float32))
    (folder / "edm.pkl").write_bytes(edm_files.snapshot("ddpmpp-edm"))
    for words in ("convert edm.pkl converted", "data convert data.npz images.zip"):
        done = command(folder, words.split())
        assert done.status == 0, done.output
    return folder


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """Runs a command undisturbed: its number of changes, and its folder."""
    found = {}

    def run(name: str) -> tuple[int, Path]:
        if name not in found:
            folder = shutil.copytree(begin, tmp_path_factory.mktemp("whole") / "whole")
            done = command(folder, COMMANDS[name].split())
            assert done.status == 0, done.output
            assert not leftovers(folder)
            found[name] = (done.changes, folder)
        return found[name]

    return run


def results(folder: Path) -> dict[str, object]:
    """Contents of the files of a folder; a file that each call of a command adds to is a set of lines."""
    found: dict[str, object] = dict(contents(folder))
    for name in found:
        if name.endswith("evaluations.txt"):
            found[name] = set((folder / name).read_text().splitlines())
        elif name.endswith("scores.jsonl"):
            lines = map(json.loads, (folder / name).read_text().splitlines())
            found[name] = {json.dumps({key: line[key] for key in line if key != "date"}) for line in lines}
    return found


def assert_whole(folder: Path, begin: Path, whole: Path) -> None:
    """Every file is as it was before, or as the undisturbed command writes it, or temporary."""
    before, after = results(begin), results(whole)
    for name, content in results(folder).items():
        if ".tmp-" in name:
            continue
        known = [files[name] for files in (before, after) if name in files]
        if isinstance(content, set):
            assert any(content <= lines for lines in known), name
        elif not IN_PROGRESS.fullmatch(name):
            assert content in known, name


IN_PROGRESS = re.compile(r"compared/(checkpoints/.*(checkpoint\.safetensors)|records/.*\.jsonl)")


def assert_repeated(folder: Path, name: str, whole: Path) -> None:
    """The command, run again, leaves what it leaves if it is not disturbed."""
    again = command(folder, COMMANDS[name].split())
    finished = re.search(r"exists already|holds a run already", again.output)
    assert again.status == 0 or finished, again.output
    if finished and name == "inspect":  # which never replaces an image, and so may leave the second one to be asked for
        found = {file: content for file, content in results(folder).items() if ".tmp-" not in file}
        assert found.items() <= results(whole).items()
        return
    assert results(folder) == results(whole)
    assert finished or not leftovers(folder)  # the next command that uses the cache removes those in the cache


def kill_at(name: str, moments: list[int], begin: Path, whole: Path, folder: Path) -> None:
    for moment in moments:
        place = shutil.copytree(begin, folder / str(moment))
        done = command(place, COMMANDS[name].split(), kill=moment)
        assert done.status == -9, done.output
        assert_whole(place, begin, whole)
        assert_repeated(place, name, whole)
        shutil.rmtree(place)


def fill(name: str, begin: Path, whole: Path, place: Path, **limit: int) -> bool:
    """Run a command on a full disk, and then with room again; True if it failed the first time."""
    shutil.copytree(begin, place)
    done = command(place, COMMANDS[name].split(), **limit)
    assert done.status in (0, 1), done.output
    assert "Traceback" not in done.output
    if done.status:
        reason = r"No space left on device|File too large"
        assert re.search(rf"could not (write|create) .*({reason})|cannot use the cache|({reason}): '", done.message)
        assert "\n" not in done.message.strip()
    assert not leftovers(place)
    assert_whole(place, begin, whole)
    assert_repeated(place, name, whole)
    shutil.rmtree(place)
    return done.status == 1


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_a_run_in_a_folder_that_cannot_be_written_is_sampled_and_scored_with_out(name, begin, tmp_path):
    place = shutil.copytree(begin, tmp_path / "place")
    before = contents(place / "run")
    words = [word for word in COMMANDS[name].split() if word not in ("--out", "samples")]
    refused = command(place, words, read_only=place / "run")
    assert refused.status == 1
    assert re.search(r"(choose another|pass) --out", refused.message)
    out = "made/scores.jsonl" if name == "evaluate" else "made"
    done = command(place, [*words, "--out", out], read_only=place / "run")
    assert done.status == 0, done.output
    assert contents(place / "run") == before
    assert (place / "made").is_dir()


def moments(name: str, changes: int, count: int) -> list[int]:
    """Some of the changes of a command, at random."""
    return sorted(random.Random(name).sample(range(changes), min(count, changes)))


@pytest.mark.parametrize("name", QUICK)
def test_a_command_that_was_killed_does_the_rest_when_it_is_run_again(name, begin, whole, tmp_path):
    changes, folder = whole(name)
    kill_at(name, moments(name, changes, 1), begin, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_change_of_a_file_does_the_rest_when_it_is_run_again(name, begin, whole, tmp_path):
    changes, folder = whole(name)
    kill_at(name, moments(name, changes, 30), begin, folder, tmp_path)


@pytest.mark.parametrize("name", QUICK)
def test_a_command_on_a_full_disk_names_a_file_and_leaves_whole_files(name, begin, whole, tmp_path):
    _, folder = whole(name)
    assert fill(name, begin, folder, tmp_path / "room", room=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_disk_fills_up_at_any_time_leaves_whole_files(name, begin, whole, tmp_path):
    changes, folder = whole(name)
    for room in ROOM:
        fill(name, begin, folder, tmp_path / "room", room=room)
    for moment in moments(name, changes, 30):
        fill(name, begin, folder, tmp_path / "full", full=moment)
