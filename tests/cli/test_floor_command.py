"""The command that measures the floor of a loss."""

import json
from pathlib import Path

import pytest
from short_runs import trained
from typer.testing import CliRunner

from stablefield import Pool
from stablefield.cli import app
from stablefield.data import Digits
from stablefield.floor import LossFloor, SquaredError
from stablefield.objective import EDMWeight
from stablefield.studies import floor as studies_floor
from stablefield.times import LogNormal

pytestmark = pytest.mark.usefixtures("unchecked")

FEW = ["--bins", "2", "--examples", "4"]


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["floor", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))


def test_the_command_measures_the_floor_and_keeps_it_in_the_cache(tmp_path, monkeypatch):
    first = invoke("digits", "--out", tmp_path, *FEW)
    assert "a DSM loss cannot go below" in first
    assert "stf:1024" in first
    written = json.loads((tmp_path / "floor.json").read_text())
    pool = Pool(Digits().load().data, None, 17)
    loss = SquaredError(times=LogNormal(), weight=EDMWeight(0.75))
    wanted = LossFloor.measure(pool, loss, bins=2, per_bin=4).floors["dsm"]
    assert written["floors"]["dsm"]["value"] == pytest.approx(wanted.value)
    assert (tmp_path / "floor.png").stat().st_size > 0
    monkeypatch.setattr(studies_floor.LossFloor, "measure", None)  # another measurement would fail
    assert invoke("digits", "--out", tmp_path, *FEW) == first


def test_another_weight_is_another_entry_of_the_cache(tmp_path):
    invoke("digits", "--out", tmp_path, *FEW)
    one = json.loads((tmp_path / "floor.json").read_text())
    invoke("digits", "--out", tmp_path, "--set", "weight.sigma_data=0.5", *FEW)
    other = json.loads((tmp_path / "floor.json").read_text())
    assert other["floors"]["dsm"]["value"] > one["floors"]["dsm"]["value"]


def test_a_run_has_an_excess_and_a_share_of_noise(tmp_path):
    run = tmp_path / "run"
    trained(run, "training.images=64")
    text = invoke("--run", run, "--out", tmp_path, "--targets", "dsm", *FEW)
    assert "% of what it reports for this network is noise of the targets" in text
    written = json.loads((tmp_path / "floor.json").read_text())
    assert written["excess"]["value"] > 0


def test_targets_are_named_as_for_training(tmp_path):
    text = invoke("digits", "--out", tmp_path, "--targets", "exact, stf:8,references=dataset, stf:5000, knn:8", *FEW)
    written = json.loads((tmp_path / "floor.json").read_text())["floors"]
    assert list(written) == ["exact", "stf:8", "stf:1797", "knn:8"]
    assert written["stf:8"]["value"] > written["exact"]["value"] == written["stf:1797"]["value"] == 0
    assert "a loss with stf:8 targets cannot go below" in text


def test_conditional_settings_have_a_smaller_floor(tmp_path):
    values = []
    for conditional in ("false", "true"):
        invoke("digits", "--out", tmp_path, "--set", f"training.conditional={conditional}", "--examples", 16)
        values.append(json.loads((tmp_path / "floor.json").read_text())["floors"]["dsm"]["value"])
    assert values[1] < values[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--targets", "huber"], "'huber' is none of stf, dsm"),
        (["digits", "--targets", "stf-published:8"], "the floor of the target .stf-published:8. is not known"),
        (["digits", "--targets", "knn:8,search=faiss"], "'knn:8,search=faiss' is not known: it depends on its index"),
        (["digits", "--targets", "stf:many"], "not a whole number"),
        ([], "no data given"),
        (["digits", "--run", "missing"], "cannot be combined with DATA"),
        (["--run", "missing"], "missing"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str):
    with pytest.raises((ValueError, OSError), match=message):
        invoke(*arguments, "--out", tmp_path, *FEW)
