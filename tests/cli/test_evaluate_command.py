"""`stablefield evaluate` on runs, on their samples and on other data, and the record of what scores depend on."""

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


def scores(line: dict) -> dict[str, float]:
    return {name: summary["mean"] for name, summary in line["scores"].items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    settings = [
        "training.images=640",
        "training.learning_rate_warmup=0",
        "target.size=16",
        "network.channels=8",
        "network.blocks=1",
    ]
    assert command("train", "--out", out, *(p for s in settings for p in ("--set", s))).exit_code == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_scores_of_a_run_are_stored_with_everything_they_depend_on(run):
    output = evaluate(run, "--samples", 40, "--repeats", 3, *QUICK)
    first, near = lines(run / "scores.jsonl")
    samples = first["samples"]
    assert samples["checkpoint"] == read(run / "checkpoint.safetensors").checksum
    assert samples["seeds"] == ["0-39", "40-79", "80-119"]
    assert (samples["n"], samples["repeats"], samples["evaluations"]) == (40, 3, [5, 5])
    assert "Heun(steps=3" in samples["sampler"]
    assert first["reference"] == {"name": "Digits()", "n": 1797, "hash": content_hash(Digits().load())}
    assert first["features"] == {"name": "pixels", "identity": "pixels", "dimension": 64, "pairs": [40, 1797]}
    assert "covariance is singular" in first["notes"][0]
    for summary in first["scores"].values():
        values = torch.tensor(summary["values"], dtype=torch.float64)
        assert summary["mean"] == pytest.approx(float(values.mean()))
        assert summary["std"] == pytest.approx(float(values.std()))
        assert summary["min"] == float(values.min())
    assert {"nearest_distance", "nearest_distance_held_out", "nearest_ratio", "copies", "copies_held_out"} == set(
        near["scores"]
    )
    assert "Frechet distance" in output
    assert "FID" not in output
    assert (run / "nearest.png").exists()


def test_samples_are_made_once_and_scores_do_not_depend_on_the_batch(run):
    evaluate(run, "--samples", 30, *QUICK)
    times = {path: path.stat().st_mtime_ns for path in run.glob("evaluated/*/*/*.png")}
    (removed := next(iter(times))).unlink()
    evaluate(run, "--seeds", "0-29", "--batch", 7, *QUICK)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != removed)
    first, _, again, _ = map(scores, lines(run / "scores.jsonl"))
    assert first == pytest.approx(again, rel=1e-9, abs=1e-12)
    evaluate(run, "--samples", 8, "--features", "pixels", "--steps", 2)  # another sampler has another folder
    assert len(list((run / "evaluated").glob("*/"))) == 2


def test_existing_samples_have_the_scores_of_the_run(run, tmp_path):
    evaluate(run, "--samples", 24, *QUICK)
    (folder,) = (run / "evaluated").glob("*/")
    file = tmp_path / "scores.jsonl"
    evaluate(folder, "--reference", "digits", "--features", "pixels", "--out", file)
    assert command("sample", run, "--seeds", "0-23", "--steps", 3, "--out", tmp_path / "x.npz").exit_code == 0
    evaluate(tmp_path / "x.npz", "--reference", "digits", "--features", "pixels")
    ours, theirs, archive = (
        lines(p)[0] for p in (run / "scores.jsonl", file, Path(f"{tmp_path / 'x.npz'}.scores.jsonl"))
    )
    assert scores(theirs) == scores(ours)
    assert scores(archive) == pytest.approx(scores(ours), rel=0.05)  # another batch rounds a few bytes differently
    for line in (theirs, archive):
        assert line["samples"]["checkpoint"] == ours["samples"]["checkpoint"]
        assert line["samples"]["evaluations"] == [5, 5]
        assert line["samples"]["seeds"] == ["0-23"]


@pytest.mark.slow
def test_two_ranks_compute_the_scores_of_one(run, tmp_path):
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
        # other batches round a few pixels differently
        assert scores(two) == pytest.approx(scores(one), rel=0.05, abs=1e-3)
    # existing samples are not rounded again
    evaluate(*arguments, "--out", tmp_path / "again.jsonl")
    for again, two in zip(lines(tmp_path / "again.jsonl"), lines(tmp_path / "two.jsonl"), strict=True):
        assert scores(again) == pytest.approx(scores(two), rel=1e-9, abs=1e-12)


def test_statistics_as_reference_give_the_frechet_distance_of_their_data(run, tmp_path):
    data, stored = tmp_path / "digits.npz", tmp_path / "statistics.npz"
    pool = Digits().load()
    np.savez(data, data=pool.data[:300], labels=pool.labels[:300], num_levels=17)
    assert "300 in features" in evaluate(
        data, "--statistics", stored
    )  # features of a classifier, because there are labels
    read_back = Statistics.read(stored)
    assert read_back.features.startswith("classifier:")
    assert (read_back.n, read_back.data) == (300, content_hash(Arrays(data).load()))
    evaluate(run, "--samples", 20, "--steps", 3, "--reference", stored)
    evaluate(run, "--samples", 20, "--steps", 3, "--reference", data)
    by_statistics, by_data, _ = lines(run / "scores.jsonl")
    assert by_statistics["scores"]["frechet"]["mean"] == pytest.approx(scores(by_data)["frechet"], rel=1e-9)
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
    """A run that was trained on a file with some data held out, and that file."""
    data, out = some(tmp_path / "data.npz", 0), tmp_path / "on-arrays"
    settings = ["training.images=64", "data.holdout=20", "target.size=8", "network.kind=mlp", "network.width=8"]
    result = command("train", "--data", data, "--out", out, *(p for s in settings for p in ("--set", s)))
    assert result.exit_code == 0, result.output
    return out, data


def test_a_run_is_scored_only_against_the_data_it_was_trained_on(on_arrays, tmp_path):
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
    evaluate(run, "--samples", 8, "--reference", data, *QUICK)  # a reference that is named is not checked
    np.savez(tmp_path / "same.npz", labels=np.zeros(60, int), data=whole)
    shutil.move(tmp_path / "same.npz", data)
    assert "not the data" in str(command("evaluate", run, "--samples", 8, *QUICK).exception)  # labels are data
    np.savez(data, data=whole)
    evaluate(run, "--samples", 8, *QUICK)


def test_a_checkpoint_without_a_data_hash_is_scored_only_against_a_named_reference(on_arrays):
    run, data = on_arrays
    old = read(run / "checkpoint.safetensors")
    del old.config["data"]
    save(run / "checkpoint.safetensors", old.tensors, config=old.config, images=old.images)
    for name, arguments in (("evaluate", (run, "--samples", 8, *QUICK)), ("train", ("--resume", run))):
        refused = str(command(name, *arguments).exception)
        assert "does not record which data the run was trained on" in refused
    evaluate(run, "--samples", 8, "--reference", data, *QUICK)


def test_field_with_a_runs_configuration_measures_only_the_data_it_was_trained_on(on_arrays, tmp_path):
    run, data = on_arrays
    quick = ("--examples", 4, "--draws", 3, "--noise-levels", 2, "--sizes", 4, "--out", tmp_path / "field")
    assert command("field", "--config", run / "config.toml", *quick).exit_code == 0
    some(data, 1)
    refused = str(command("field", "--config", run / "config.toml", *quick).exception)
    assert "not the data that the run was trained on" in refused
    assert command("field", data, "--config", run / "config.toml", *quick).exit_code == 0


def test_a_run_initialised_from_another_reports_that_the_data_have_changed(on_arrays, tmp_path):
    run, data = on_arrays
    arguments = ("train", "--init-from", run, "--dry-run", "--out", tmp_path / "next")
    assert "have changed since" not in command(*arguments).output
    some(data, 1)
    assert f"the data have changed since {run} was trained" in command(*arguments).output.replace("\n", " ")
    other = some(tmp_path / "other.npz", 2)
    assert "have changed since" not in command(*arguments, "--data", other).output  # they are named


def test_a_truncated_archive_gives_one_line_of_error_as_samples_and_as_reference(tmp_path):
    whole = some(tmp_path / "whole.npz", 0)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:500])
    for arguments in ((cut, "--reference", whole), (whole, "--reference", cut)):
        result = command("evaluate", *arguments, "--features", "pixels")
        assert isinstance(result.exception, ValueError)
        assert re.fullmatch(r".*cut\.npz is damaged, or cut short .*", str(result.exception))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1j])
def test_an_invalid_reference_is_refused_and_nothing_is_scored(tmp_path, scale):
    samples, broken = some(tmp_path / "samples.npz", 0), tmp_path / "broken.npz"
    np.savez(broken, mu=np.zeros(64), sigma=np.eye(64) * scale)
    refused = command("evaluate", samples, "--reference", broken, "--features", "pixels")
    assert refused.exit_code == 1
    assert re.search(r"broken\.npz holds no usable statistics: sigma", str(refused.exception))
    assert not Path(f"{samples}.scores.jsonl").exists()


def test_copies_are_found_and_held_out_images_are_not_mistaken_for_them(tmp_path):
    pool = Digits().load()
    order = torch.randperm(
        1797, generator=torch.Generator().manual_seed(0)
    )  # in their original order, writers change along the data
    x = ((pool.take(order) + 1) * 127.5).round().to(torch.uint8)
    np.savez(tmp_path / "train.npz", data=x[:900])
    np.savez(tmp_path / "copies.npz", arr_0=x[:200].movedim(1, -1).numpy())
    np.savez(tmp_path / "new.npz", arr_0=x[1000:1200].movedim(1, -1).numpy())
    np.savez(tmp_path / "held_out.npz", data=x[1200:1400])
    found = {}
    for name in ("copies", "new"):
        arguments = (tmp_path / f"{name}.npz", "--reference", tmp_path / "train.npz")
        evaluate(*arguments, "--held-out", tmp_path / "held_out.npz")
        evaluate(*arguments)
        _, held_out, _, by_default = lines(tmp_path / f"{name}.npz.scores.jsonl")
        assert held_out["features"]["held_out"] == "held-out data"
        found[name] = scores(held_out)
        distance = scores(by_default)["nearest_distance_held_out"]
        assert found[name]["nearest_distance_held_out"] == pytest.approx(distance, rel=0.1)
    assert (tmp_path / "copies.npz.nearest.png").exists()
    assert (found["copies"]["copies"], found["copies"]["nearest_ratio"]) == (1.0, 0.0)
    assert found["new"]["copies"] == 0
    assert found["new"]["nearest_ratio"] == pytest.approx(1, abs=0.15)


def test_vectors_are_scored_without_a_sheet_of_pairs(tmp_path):
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
        (["RUN", "--samples", "8", "--seeds", "0-7"], "--samples and --seeds exclude each other"),
        (["RUN", "--seeds", "7-0"], "write the smaller seed first"),
        (["RUN", "--set", "target.size=3"], "only sampler.* and grid.* can be set when sampling"),
        (["RUN", "--reference", "other.npz", "--features", "pixels"], "of shape (1, 8, 8) cannot be compared with"),
        (["RUN", "--weights", "w.pth", "--features", "pixels"], "add --features inception"),
        (["RUN", "--statistics", "s.npz", "--features", "pixels", "--features", "classifier"], "pass --features once"),
        (["RUN", "--reference", "five.npz"], "add --features"),
        (["RUN", "--held-out", "five.npz", "--features", "pixels"], "--held-out needs data, not statistics"),
        (["other.npz"], "pass --reference DATA"),
        (["other.npz", "--statistics", "st.npz", "--out", "o.jsonl"], "--out is for scores"),
        (["other.npz", "--statistics", "st.npz", "--held-out", "other.npz"], "--held-out needs data, not statistics"),
        (["other.npz", "--reference", "other.npz", "--held-out", "digits"], "of shape (7,) cannot be compared with"),
        (["other.npz", "--reference", "digits", "--steps", "3"], "--steps is for runs"),
        (["other.npz", "--reference", "digits", "--repeats", "2"], "--repeats 2 needs new samples"),
        (["other.npz", "--reference", "other.npz", "--samples", "99"], "holds 9 samples, fewer than --samples 99"),
        (["other.npz", "--reference", "five.npz", "--features", "pixels"], "cannot be compared"),
    ],
)
def test_invalid_options_are_refused_before_any_sample_is_made(trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", data=np.zeros((9, 7), np.float32))
    np.savez("five.npz", mu=np.zeros(5), sigma=np.eye(5))
    result = command("evaluate", *[str(trained) if a == "RUN" else a for a in arguments])
    assert message in str(result.exception)
    assert not (trained / "evaluated").exists()


def test_commands_and_code_of_the_documentation_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/digits-stf")
    assert command("sample", "runs/digits-stf", "--seeds", "0-9", "--steps", 2, "--out", "samples.npz").exit_code == 0
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    for line in "".join(blocks).splitlines():
        arguments = re.sub(r"--samples \d+", "", line).split()
        few = ["--samples", "16", "--steps", "2"] if "runs/digits-stf" in arguments else []
        evaluate(*arguments[2:], *few)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "evaluation.md", "exec"), {"__name__": "page"})
    assert "'copies': 0.0" in capsys.readouterr().out


def fields(n: int = 200, channels: int = 1) -> np.ndarray:
    """Normalised fields, a third of whose values are outside [-1, 1]."""
    return np.random.default_rng(0).standard_normal((n, channels, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1000, 500), (1e-4, 0)])
def test_floats_scored_against_themselves_have_distance_zero(channels, scale, shift, tmp_path):
    x = scale * fields(channels=channels) + np.float32(shift)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "samples.npz", arr_0=x)
    for samples in ("x.npy", "samples.npz"):
        evaluate(tmp_path / samples, "--reference", tmp_path / "x.npy", "--features", "pixels")
        found, near = map(scores, lines(tmp_path / f"{samples}.scores.jsonl"))
        assert found["frechet"] <= 1e-9 * x.var() * x[0].size
        assert (found["precision"], found["recall"], near["nearest_distance"]) == (1, 1, 0)
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_on_floats_is_scored_on_the_values_of_its_sampler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", fields())
    settings = ["training.images=64", "training.batch_size=32", "target.size=16", "network.channels=8"]
    settings += ["network.blocks=1", "preconditioning.sigma_data=1"]
    assert (
        command("train", "--data", "fields.npy", "--out", "run", *(p for s in settings for p in ("--set", s))).exit_code
        == 0
    )
    assert command("sample", "run", "--seeds", "0-63", "--steps", 3, "--out", "x.npz").exit_code == 0
    made = torch.from_numpy(np.load("x.npz")["arr_0"])
    expected = frechet_distance(*(Statistics.from_features(x.flatten(1)) for x in (made, torch.from_numpy(fields()))))
    evaluate("run", "--samples", 64, *QUICK)
    evaluate("x.npz", "--reference", "fields.npy", "--features", "pixels")
    for file in ("run/scores.jsonl", "x.npz.scores.jsonl"):
        line = lines(Path(file))[0]
        assert scores(line)["frechet"] == pytest.approx(expected, rel=1e-5)
        assert (line["samples"]["values"], line["samples"]["seeds"]) == ("float", ["0-63"])
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("samples", ["fields.npy", "bytes.npy"])
def test_inception_refuses_floats(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", fields())
    np.save("bytes.npy", np.zeros((9, 1, 4, 4), np.uint8))
    refused = command("evaluate", samples, "--reference", "fields.npy", "--features", "inception")
    assert "Inception needs images, but fields.npy holds floats; pass --features pixels" in str(refused.exception)
    refused = command("evaluate", "fields.npy", "--statistics", "s.npz", "--features", "inception")
    assert "fields.npy holds floats" in str(refused.exception)


def test_comparing_floats_with_images_gives_a_note_and_no_sheet_of_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    np.save("bytes.npy", data)
    np.save("floats.npy", data.astype(np.float32) / 127.5 - 1)
    assert command("data", "convert", "floats.npy", "images", "--set", "data.values=image").exit_code == 0
    output = evaluate("floats.npy", "--reference", "bytes.npy", "--features", "pixels")
    assert "samples are floats, the reference images: compared as they are" in output
    assert not list(tmp_path.rglob("*.png"))
    output = evaluate("images", "--reference", "bytes.npy", "--features", "pixels")
    assert "note: samples are" not in output
    assert Path("images.nearest.png").exists()
    for file in ("floats.npy", "images"):
        assert scores(lines(Path(f"{file}.scores.jsonl"))[0])["frechet"] == pytest.approx(0, abs=1e-6)
