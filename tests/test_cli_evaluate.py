"""Scoring from the terminal: a run, its samples, anybody's samples; the numbers say what they are numbers of."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stablefield.checkpoint import read, save
from stablefield.cli import app
from stablefield.data import Arrays, Digits, content_hash
from stablefield.evaluate import Statistics, frechet_distance

pytestmark = pytest.mark.usefixtures("unchecked")
QUICK = ["--features", "pixels", "--steps", 3]


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def evaluate(*arguments: object) -> str:
    result = command("evaluate", *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(line: dict) -> dict[str, float]:
    return {name: summary["mean"] for name, summary in line["scores"].items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    settings = ["training.images=640", "training.ramp=0", "target.size=16", "network.channels=8", "network.blocks=1"]
    assert command("train", "--out", out, *(p for s in settings for p in ("--set", s))).exit_code == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_runs_numbers_say_all_that_they_depend_on(run):
    output = evaluate(run, "--samples", 40, "--repeats", 3, *QUICK)
    first, near = lines(run / "scores.jsonl")
    samples = first["samples"]
    assert samples["checkpoint"] == read(run / "checkpoint.safetensors").checksum
    assert samples["seeds"] == ["0-39", "40-79", "80-119"]
    assert (samples["n"], samples["repeats"], samples["evaluations"]) == (40, 3, [5, 5])
    assert "Heun(steps=3" in samples["sampler"]
    assert first["reference"] == {"from": "Digits()", "n": 1797, "hash": content_hash(Digits().load())}
    assert first["features"] == {"name": "pixels", "identity": "pixels", "dimension": 64, "pairs": [40, 1797]}
    assert "covariance is singular" in first["remarks"][0]
    for summary in first["scores"].values():
        each = torch.tensor(summary["each"], dtype=torch.float64)
        assert summary["mean"] == pytest.approx(float(each.mean()))
        assert summary["deviation"] == pytest.approx(float(each.std()))
        assert summary["least"] == float(each.min())
    assert {"nearest", "nearest_held_out", "nearest_ratio", "copies", "copies_held_out"} == set(near["scores"])
    assert "Frechet distance" in output
    assert "FID" not in output
    assert (run / "nearest.png").exists()


def test_samples_are_made_once_and_numbers_do_not_depend_on_the_batch(run):
    evaluate(run, "--samples", 30, *QUICK)
    marks = {path: path.stat().st_mtime_ns for path in run.glob("evaluated/*/*/*.png")}
    (lost := next(iter(marks))).unlink()
    evaluate(run, "--seeds", "0-29", "--batch", 7, *QUICK)
    assert all(path.stat().st_mtime_ns == mark for path, mark in marks.items() if path != lost)
    first, _, again, _ = map(numbers, lines(run / "scores.jsonl"))
    assert first == pytest.approx(again, rel=1e-9, abs=1e-12)
    evaluate(run, "--samples", 8, "--features", "pixels", "--steps", 2)  # another sampler has another folder
    assert len(list((run / "evaluated").iterdir())) == 2


def test_samples_that_are_there_have_the_numbers_of_the_run(run, tmp_path):
    evaluate(run, "--samples", 24, *QUICK)
    (folder,) = (run / "evaluated").iterdir()
    scored = tmp_path / "scores.jsonl"
    evaluate(folder, "--reference", "digits", "--features", "pixels", "--out", scored)
    assert command("sample", run, "--seeds", "0-23", "--steps", 3, "--out", tmp_path / "x.npz").exit_code == 0
    evaluate(tmp_path / "x.npz", "--reference", "digits", "--features", "pixels")
    ours, theirs, archive = (
        lines(p)[0] for p in (run / "scores.jsonl", scored, Path(f"{tmp_path / 'x.npz'}.scores.jsonl"))
    )
    assert numbers(theirs) == numbers(ours)
    assert numbers(archive) == pytest.approx(numbers(ours), rel=0.05)  # bytes that were rounded in another batch
    for line in (theirs, archive):
        assert line["samples"]["checkpoint"] == ours["samples"]["checkpoint"]
        assert line["samples"]["evaluations"] == [5, 5]
        assert line["samples"]["seeds"] == ["0-23"]


@pytest.mark.slow
def test_two_ranks_find_the_numbers_of_one(run, tmp_path):
    arguments = [str(run), "--samples", "21", "--repeats", "2", *map(str, QUICK), "--batch", "4"]
    evaluate(*arguments, "--out", tmp_path / "one.jsonl")
    shutil.rmtree(run / "evaluated")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command_line = [
        "-m",
        "stablefield",
        "evaluate",
        *arguments,
        "--out",
        str(tmp_path / "two.jsonl"),
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command_line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(lines(tmp_path / "one.jsonl"), lines(tmp_path / "two.jsonl"), strict=True):
        # other batches round a few pixels otherwise
        assert numbers(two) == pytest.approx(numbers(one), rel=0.05, abs=1e-3)
    # of samples that are there, nothing is rounded otherwise
    evaluate(*arguments, "--out", tmp_path / "again.jsonl")
    for again, two in zip(lines(tmp_path / "again.jsonl"), lines(tmp_path / "two.jsonl"), strict=True):
        assert numbers(again) == pytest.approx(numbers(two), rel=1e-9, abs=1e-12)


def test_statistics_stand_in_for_the_data_they_are_of(run, tmp_path):
    data, stored = tmp_path / "digits.npz", tmp_path / "statistics.npz"
    pool = Digits().load()
    np.savez(data, data=pool.data[:300], labels=pool.labels[:300], levels=17)
    assert "300 in features" in evaluate(data, "--statistics", stored)  # of a classifier, as there are labels
    kept = Statistics.read(stored)
    assert kept.features.startswith("classifier:")
    assert (kept.n, kept.data) == (300, content_hash(Arrays(data).load()))
    evaluate(run, "--samples", 20, "--steps", 3, "--reference", stored)
    evaluate(run, "--samples", 20, "--steps", 3, "--reference", data)
    by_statistics, by_data, _ = lines(run / "scores.jsonl")
    assert by_statistics["scores"]["frechet"]["mean"] == pytest.approx(numbers(by_data)["frechet"], rel=1e-9)
    assert by_statistics["reference"]["hash"] == by_data["reference"]["hash"]
    assert by_statistics["features"]["accuracy"] > 0.5
    refused = command("evaluate", run, "--reference", stored, "--features", "pixels")
    assert "cannot be compared in pixels" in str(refused.exception)


def some(path: Path, seed: int, n: int = 60, shape: tuple[int, ...] = (1, 8, 8)) -> Path:
    data = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    np.savez(path, data=data)
    return path


@pytest.fixture
def on_arrays(tmp_path) -> tuple[Path, Path]:
    """A run that was trained on a file, with some of it held out, and the file."""
    data, out = some(tmp_path / "data.npz", 0), tmp_path / "on-arrays"
    settings = ["training.images=64", "data.holdout=20", "target.size=8", "network.kind=mlp", "network.width=8"]
    result = command("train", "--data", data, "--out", out, *(p for s in settings for p in ("--set", s)))
    assert result.exit_code == 0, result.output
    return out, data


def test_a_run_is_scored_against_the_data_it_was_trained_on_and_no_others(on_arrays, tmp_path):
    run, data = on_arrays
    evaluate(run, "--samples", 8, *QUICK)
    before = (run / "scores.jsonl").read_bytes()
    whole = np.load(data)["data"]
    for other in (whole[::-1], whole[:-1], np.where(np.arange(60)[:, None, None, None] == 7, 255 - whole, whole)):
        np.savez(data, data=other)
        for arguments in ((run,), (run / "checkpoint.safetensors",), (run, "--held-out", data)):
            refused = str(command("evaluate", *arguments, "--samples", 8, *QUICK).exception)
            known = read(run / "checkpoint.safetensors").config["data"]
            found = content_hash(Arrays(data).load())
            assert "not the data that the run was trained on" in refused
            assert known[:16] in refused
            assert found[:16] in refused
            assert "--reference PATH" in refused
            assert str(other.shape) in refused
    assert (run / "scores.jsonl").read_bytes() == before
    evaluate(run, "--samples", 8, "--reference", data, *QUICK)  # knowingly
    np.savez(tmp_path / "same.npz", labels=np.zeros(60, int), data=whole)
    shutil.move(tmp_path / "same.npz", data)
    assert "not the data" in str(command("evaluate", run, "--samples", 8, *QUICK).exception)  # labels are data
    np.savez(data, data=whole)
    evaluate(run, "--samples", 8, *QUICK)


def test_a_checkpoint_that_remembers_no_data_is_scored_only_against_named_ones(on_arrays):
    run, data = on_arrays
    old = read(run / "checkpoint.safetensors")
    del old.config["data"]
    save(run / "checkpoint.safetensors", old.tensors, config=old.config, images=old.images)
    for name, arguments in (("evaluate", (run, "--samples", 8, *QUICK)), ("train", ("--resume", run))):
        refused = str(command(name, *arguments).exception)
        assert "does not say which data the run was trained on" in refused
    evaluate(run, "--samples", 8, "--reference", data, *QUICK)


def test_a_field_of_a_runs_configuration_is_measured_on_its_data_and_no_others(on_arrays, tmp_path):
    run, data = on_arrays
    quick = ("--rows", 4, "--draws", 3, "--levels", 2, "--sizes", 4, "--out", tmp_path / "field")
    assert command("field", "--config", run / "config.toml", *quick).exit_code == 0
    some(data, 1)
    refused = str(command("field", "--config", run / "config.toml", *quick).exception)
    assert "not the data that the run was trained on" in refused
    assert command("field", data, "--config", run / "config.toml", *quick).exit_code == 0


def test_a_run_that_starts_from_another_says_so_if_the_data_have_changed(on_arrays, tmp_path):
    run, data = on_arrays
    arguments = ("train", "--from", run, "--dry-run", "--out", tmp_path / "next")
    assert "no longer those" not in command(*arguments).output
    some(data, 1)
    assert f"the data are no longer those that {run} was trained on" in command(*arguments).output.replace("\n", " ")
    other = some(tmp_path / "other.npz", 2)
    assert "no longer those" not in command(*arguments, "--data", other).output  # they are named


def test_a_cut_archive_is_an_error_of_one_line_as_data_and_as_a_reference(tmp_path):
    whole = some(tmp_path / "whole.npz", 0)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:500])
    for arguments in ((cut, "--reference", whole), (whole, "--reference", cut)):
        result = command("evaluate", *arguments, "--features", "pixels")
        assert isinstance(result.exception, ValueError)
        assert re.fullmatch(r".*cut\.npz is damaged, or no array file: .*", str(result.exception))


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -1.0, 1j])
def test_a_broken_reference_makes_nobody_perfect(tmp_path, spoil):
    samples, broken = some(tmp_path / "samples.npz", 0), tmp_path / "broken.npz"
    np.savez(broken, mu=np.zeros(64), sigma=np.eye(64) * spoil)
    refused = command("evaluate", samples, "--reference", broken, "--features", "pixels")
    assert refused.exit_code == 1
    assert re.search(r"broken\.npz holds no usable statistics: sigma", str(refused.exception))
    assert not Path(f"{samples}.scores.jsonl").exists()


def test_real_images_are_near_and_copies_are_found_out(tmp_path):
    pool = Digits().load()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))  # as they come, their writers differ
    x = ((pool.take(order) + 1) * 127.5).round().to(torch.uint8)
    np.savez(tmp_path / "train.npz", data=x[:900])
    np.savez(tmp_path / "copies.npz", arr_0=x[:200].movedim(1, -1).numpy())
    np.savez(tmp_path / "fresh.npz", arr_0=x[1000:1200].movedim(1, -1).numpy())
    np.savez(tmp_path / "unseen.npz", data=x[1200:1400])
    found = {}
    for name in ("copies", "fresh"):
        arguments = (tmp_path / f"{name}.npz", "--reference", tmp_path / "train.npz")
        evaluate(*arguments, "--held-out", tmp_path / "unseen.npz")
        evaluate(*arguments)
        _, unseen, _, left_out = lines(tmp_path / f"{name}.npz.scores.jsonl")
        assert unseen["features"]["fresh"] == "held-out data"
        found[name] = numbers(unseen)
        assert found[name]["nearest_held_out"] == pytest.approx(numbers(left_out)["nearest_held_out"], rel=0.1)
    assert (tmp_path / "copies.npz.nearest.png").exists()
    assert (found["copies"]["copies"], found["copies"]["nearest_ratio"]) == (1.0, 0.0)
    assert found["fresh"]["copies"] == 0
    assert found["fresh"]["nearest_ratio"] == pytest.approx(1, abs=0.15)


def test_data_without_pictures_are_scored_too(tmp_path):
    source = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", arr_0=source.normal(size=(50, 6)).astype(np.float32))
    np.savez(tmp_path / "b.npz", data=source.normal(size=(60, 6)).astype(np.float32))
    evaluate(tmp_path / "a.npz", "--reference", tmp_path / "b.npz", "--samples", 40)
    first, _ = lines(tmp_path / "a.npz.scores.jsonl")
    assert (first["samples"]["n"], first["features"]["name"]) == (40, "pixels")
    assert not list(tmp_path.glob("*nearest.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--reference", "nowhere"], "no file or folder nowhere"),
        (["RUN", "--features", "incepton"], "there is no file incepton"),
        (["RUN", "--samples", "8", "--seeds", "0-7"], "say one of both"),
        (["RUN", "--seeds", "7-0"], "runs backwards"),
        (["RUN", "--set", "target.size=3"], "sampler.* and grid.* only"),
        (["RUN", "--reference", "other.npz", "--features", "pixels"], "of shape (1, 8, 8) cannot be compared with"),
        (["RUN", "--weights", "w.pth", "--features", "pixels"], "add --features inception"),
        (["RUN", "--statistics", "s.npz", "--features", "pixels", "--features", "classifier"], "name one"),
        (["RUN", "--reference", "five.npz"], "add --features"),
        (["RUN", "--held-out", "five.npz", "--features", "pixels"], "and not with statistics"),
        (["other.npz"], "say what to compare with"),
        (["other.npz", "--statistics", "st.npz", "--out", "o.jsonl"], "--out is for scores"),
        (["other.npz", "--statistics", "st.npz", "--held-out", "other.npz"], "--held-out compares data with data"),
        (["other.npz", "--reference", "other.npz", "--held-out", "digits"], "of shape (7,) cannot be compared with"),
        (["other.npz", "--reference", "digits", "--steps", "3"], "--steps is for runs"),
        (["other.npz", "--reference", "digits", "--repeats", "2"], "needs fresh samples"),
        (["other.npz", "--reference", "other.npz", "--samples", "99"], "there are 9 samples"),
        (["other.npz", "--reference", "five.npz", "--features", "pixels"], "cannot be compared"),
    ],
)
def test_a_wrong_word_is_refused(trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", data=np.zeros((9, 7), np.float32))
    np.savez("five.npz", mu=np.zeros(5), sigma=np.eye(5))
    result = command("evaluate", *[str(trained) if a == "RUN" else a for a in arguments])
    assert message in str(result.exception)
    assert not (trained / "evaluated").exists()


def test_what_the_page_shows_runs(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/digits-reference")
    assert (
        command("sample", "runs/digits-reference", "--seeds", "0-9", "--steps", 2, "--out", "samples.npz").exit_code
        == 0
    )
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    for line in "".join(blocks).splitlines():
        words = re.sub(r"--samples \d+", "", line).split()
        few = ["--samples", "16", "--steps", "2"] if "runs/digits-reference" in words else []
        evaluate(*words[2:], *few)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "evaluation.md", "exec"), {"__name__": "page"})
    assert "'copies': 0.0" in capsys.readouterr().out


def fields(n: int = 200, channels: int = 1) -> np.ndarray:
    """Normalised fields: a third of their values lie beyond [-1, 1]."""
    return np.random.default_rng(0).standard_normal((n, channels, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1000, 500), (1e-4, 0)])
def test_real_floats_scored_against_themselves_have_distance_zero(channels, scale, shift, tmp_path):
    x = scale * fields(channels=channels) + np.float32(shift)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "samples.npz", arr_0=x)
    for samples in ("x.npy", "samples.npz"):
        evaluate(tmp_path / samples, "--reference", tmp_path / "x.npy", "--features", "pixels")
        found, near = map(numbers, lines(tmp_path / f"{samples}.scores.jsonl"))
        assert found["frechet"] <= 1e-9 * x.var() * x[0].size
        assert (found["precision"], found["recall"], near["nearest"]) == (1, 1, 0)
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_of_floats_is_scored_on_the_values_that_its_sampler_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", fields())
    settings = ["training.images=64", "training.batch_size=32", "target.size=16", "network.channels=8"]
    settings += ["network.blocks=1", "scaling.sigma_data=1"]
    assert (
        command("train", "--data", "fields.npy", "--out", "run", *(p for s in settings for p in ("--set", s))).exit_code
        == 0
    )
    assert command("sample", "run", "--seeds", "0-63", "--steps", 3, "--out", "x.npz").exit_code == 0
    made = torch.from_numpy(np.load("x.npz")["arr_0"])
    expected = frechet_distance(*(Statistics.of(x.flatten(1)) for x in (made, torch.from_numpy(fields()))))
    evaluate("run", "--samples", 64, *QUICK)
    evaluate("x.npz", "--reference", "fields.npy", "--features", "pixels")
    for file in ("run/scores.jsonl", "x.npz.scores.jsonl"):
        line = lines(Path(file))[0]
        assert numbers(line)["frechet"] == pytest.approx(expected, rel=1e-5)
        assert (line["samples"]["values"], line["samples"]["seeds"]) == ("float", ["0-63"])
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("samples", ["fields.npy", "octets.npy"])
def test_inception_sees_no_floats(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", fields())
    np.save("octets.npy", np.zeros((9, 1, 4, 4), np.uint8))
    refused = command("evaluate", samples, "--reference", "fields.npy", "--features", "inception")
    assert "Inception sees images, and fields.npy holds floats: --features pixels" in str(refused.exception)
    refused = command("evaluate", "fields.npy", "--statistics", "s.npz", "--features", "inception")
    assert "fields.npy holds floats" in str(refused.exception)


def test_floats_beside_images_are_noted_and_not_drawn_unless_both_are_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    octets = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    np.save("octets.npy", octets)
    np.save("floats.npy", octets.astype(np.float32) / 127.5 - 1)
    assert command("data", "convert", "floats.npy", "images", "--set", "data.values=image").exit_code == 0
    output = evaluate("floats.npy", "--reference", "octets.npy", "--features", "pixels")
    assert "samples are floats, the reference images: compared as they are" in output
    assert not list(tmp_path.rglob("*.png"))
    output = evaluate("images", "--reference", "octets.npy", "--features", "pixels")
    assert "note: samples are" not in output
    assert Path("images.nearest.png").exists()
    for file in ("floats.npy", "images"):
        assert numbers(lines(Path(f"{file}.scores.jsonl"))[0])["frechet"] == pytest.approx(0, abs=1e-6)
