"""Laws of the choice between targets: made once, within its budget, and without a trace in the training."""

import copy
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stablefield import FullDataset, Perturbed, Posterior
from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.compare import Arm, Experiment
from stablefield.compare.runs import Run
from stablefield.config import Config, override, resolve
from stablefield.engine import choice as choosing
from stablefield.engine import trial as trying
from stablefield.engine.choice import Choice, bands_of, choose, decided, most_generous, plans
from stablefield.engine.fit import fit
from stablefield.engine.trial import SHARES, Level, Trial
from stablefield.ranks import Ranks
from stablefield.run import Folder, assemble

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = ("network.kind=mlp", "network.width=8", "network.layers=1", "training.batch_size=32", "training.device=cpu")
SHORT = ("training.images=128", "training.log_every=64")


def configured(*settings: str) -> Config:
    return resolve(override({}, [*SMALL, *SHORT, "target.kind=auto", *settings]))


def chosen(*settings: str) -> Choice:
    config = configured(*settings)
    return choose(config, assemble(config))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "REPEATS", 1)
    monkeypatch.setattr(trying, "SIZES", (8, 64))
    monkeypatch.setattr(choosing, "BATCHES", 2)


# ---- deciding, from numbers


def trial() -> Trial:
    """A level without variance, two of more and more, for which the exact target costs more and more."""
    variance = (
        {"single": 0.0, "pruned": 0.0, "full": 0.0},
        {"single": 1.0, "reference:8": 0.4, "pruned": 0.0, "full": 0.0},
        {"single": 9.0, "reference:8": 3.0, "pruned": 0.0, "full": 0.0},
    )
    seconds = (
        {"single": 0.0, "pruned": 0.0, "full": 9.0},
        {"single": 0.0, "reference:8": 1.0, "pruned": 2.0, "full": 9.0},
        {"single": 0.0, "reference:8": 1.0, "pruned": 20.0, "full": 9.0},
    )
    edges = (1.0, 2.0, math.inf)
    levels = [Level(1 / 3, edge, *both) for edge, both in zip(edges, zip(variance, seconds, strict=True), strict=True)]
    return Trial(tuple(levels), {"single": 0.0, "reference:8": 0.5, "pruned": 0.1, "full": 0.1})


def left(plan: tuple[str, ...]) -> float:
    return sum(level.variance[choice] for level, choice in zip(trial().levels, plan, strict=True))


def expected(plan: tuple[str, ...]) -> float:
    once = sum(trial().once[choice] for choice in set(plan))
    return once + sum(level.seconds[choice] for level, choice in zip(trial().levels, plan, strict=True))


def test_plans_leave_more_and_cost_less_from_exact_everywhere_to_single_samples() -> None:
    found = plans(trial())
    assert found[0] == ("pruned",) * 3
    assert found[-1] == ("single",) * 3
    assert [left(plan) for plan in found[1:]] == sorted({left(plan) for plan in found[1:]})
    assert [expected(plan) for plan in found] == sorted((expected(plan) for plan in found), reverse=True)


@pytest.mark.parametrize("allowed", [0.0, 0.4, 1.6, 3.0, 5.0, 12.0, math.inf])
def test_no_other_plan_on_the_hull_leaves_less_for_as_little(allowed: float) -> None:
    found, cost = most_generous(plans(trial()), lambda plan, enough: expected(plan), allowed)
    assert cost == expected(found) <= allowed
    others = [plan for plan in plans(trial()) if expected(plan) <= allowed]
    assert left(found) == min(map(left, others))


def test_neighbours_with_the_same_target_are_one_band() -> None:
    levels = trial().levels
    assert bands_of(levels, ("single", "single", "full")) == ((2.0, "single"), (math.inf, "full"))
    assert bands_of(levels, ("full",) * 3) == ((math.inf, "full"),)


# ---- deciding, from a run


def test_without_a_budget_all_are_single_and_with_any_all_are_exact() -> None:
    nothing, all_of_it = chosen("target.budget=0"), chosen("target.budget=inf")
    assert nothing.bands == ((math.inf, "single"),)
    assert nothing.left == 1
    assert all_of_it.bands in (((math.inf, "pruned"),), ((math.inf, "full"),))
    assert all_of_it.left == 0
    assert "0.0% of DSM's variance is left" in str(all_of_it)
    assert "100.0%" in str(nothing)


@pytest.mark.parametrize(
    "settings",
    [
        ("process.kind=flow",),
        ("process.kind=flow", "times.kind=logitnormal", "training.stratified=true"),
        ("process.kind=vp",),
        ("training.conditional=true", "training.label_dropout=0.3"),
        ("augmentation.kind=mirror",),
        ("augmentation.kind=edm",),
        ("training.batch_size=1",),
        ("training.micro_batch=8",),
    ],
    ids=" ".join,
)
def test_any_training_finds_its_bands(settings: tuple[str, ...]) -> None:
    config = configured(*settings, "target.budget=0.3")
    found = choose(config, parts := assemble(config))
    assert found.bands[-1][0] == math.inf
    assert sum(level.share for level in found.levels) == sum(SHARES) == 1
    assert 0 <= found.left <= 1
    _, parts, _ = decided(resolve(override(config.sections, ["target.bands=[[1.0,'single'],[inf,'full']]"])), parts)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_data_that_are_almost_none_find_theirs(total: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    import numpy as np

    np.savez(tmp_path / "x.npz", data=np.random.default_rng(0).standard_normal((total, 1, 2, 2)).astype(np.float32))
    found = chosen("data.kind=arrays", f"data.path={tmp_path / 'x.npz'}", "target.budget=inf")
    assert found.left == 0
    assert total > 1 or found.bands == ((math.inf, "single"),)
    assert total > 1 or "no target varies here" in str(found)


def test_deciding_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    config = configured("target.budget=0.5")
    parts = assemble(config)
    weights, state = copy.deepcopy(parts.denoiser.state_dict()), torch.random.get_rng_state()
    said, parts, choice = decided(config, parts)
    assert choice is not None
    assert all(torch.equal(value, parts.denoiser.state_dict()[name]) for name, value in weights.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    fit(said, parts, Folder(tmp_path / "decided"))
    fit(said, assemble(said), Folder(tmp_path / "given"))
    one, other = (read(tmp_path / name / "checkpoint.safetensors").tensors for name in ("decided", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_decides_once_and_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = configured("training.images=256", "target.budget=0.5")
    shorter = configured("target.budget=0.5")
    fit(shorter, assemble(shorter), Folder(tmp_path / "run"))
    kept = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["target"]["bands"]
    assert kept[-1][0] == math.inf
    assert read(tmp_path / "run" / "checkpoint.safetensors").config["config"]["target"]["bands"] == kept
    monkeypatch.setattr(choosing, "choose", lambda *_: pytest.fail("decided again"))
    fit(longer, assemble(longer), Folder(tmp_path / "run"))
    whole = resolve({**longer.sections, "target": {"kind": "auto", "budget": 0.5, "bands": kept}})
    fit(whole, assemble(whole), Folder(tmp_path / "whole"))
    one, other = (read(tmp_path / name / "checkpoint.safetensors").tensors for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bands_that_are_given_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "choose", lambda *_: pytest.fail("decided"))
    config = configured("target.bands=[[0.5, 'single'], [inf, 'reference:16']]")
    parts = assemble(config)
    assert decided(config, parts) == (config, parts, None)
    assert parts.objective.target.bands == ((0.5, "single"), (math.inf, "reference:16"))


def test_what_one_rank_finds_all_are_told() -> None:
    assert Ranks(torch.device("cpu")).told(lambda: ("a", 1)) == ("a", 1)
    with pytest.raises(ValueError, match="so"):
        Ranks(torch.device("cpu")).told(lambda: (_ for _ in ()).throw(ValueError("so")))


def test_a_dry_run_shows_the_decision_and_the_bands() -> None:
    flags = [part for setting in (*SMALL, "target.kind=auto", "target.budget=inf") for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["train", "--dry-run", *flags])
    assert result.exit_code == 0, result.output
    assert "of DSM's variance" in result.output
    assert tomllib.loads(result.output[result.output.index("[data]") : result.output.index("This was")])["target"][
        "bands"
    ]


def test_an_experiment_decides_once_for_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(override({}, [*SMALL, *SHORT, "data.holdout=20"]))
    experiment = Experiment(config, (Arm("single"), Arm("auto")), (0, 1), looks=2, samples=4, rows=4).decided()
    experiment.write(tmp_path)
    monkeypatch.setattr(choosing, "choose", lambda *_: pytest.fail("decided again"))
    again = Experiment.read(tmp_path).decided()
    bands = [again.config["target"]["bands"]] + [
        Run(again, tmp_path, Arm("auto"), seed).config["target"]["bands"] for seed in (0, 1)
    ]
    assert bands[0]
    assert bands[0] == bands[1] == bands[2]
    assert Run(again, tmp_path, Arm("single"), 0).config["target"] == {"kind": "single"}


def test_a_pass_over_the_data_counts_as_often_as_a_run_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    call = FullDataset.__call__

    def counted(self: FullDataset, noisy: Perturbed, **known: Any) -> Posterior:
        passes.append(len(noisy))
        return call(self, noisy, **known)

    def clock(act: Callable[[], object], device: torch.device) -> float:
        before = len(passes)
        act()
        return 8.0 * len(passes[before:]) + sum(passes[before:])

    monkeypatch.setattr(FullDataset, "__call__", counted)
    monkeypatch.setattr(trying, "_seconds", clock)
    for at_once, steps in ((32, 1), (255, 7), (256, 8)):
        config = configured(f"target.at_once={at_once}", "target.bands=[[inf, 'full']]")
        target = (parts := assemble(config)).objective.target
        batches = [choosing.batch_of_the_run(config, parts, number) for number in range(2 * steps)]
        assert target.steps(32) == steps
        assert trying.seconds_of_targets(target, batches) == 32 + 8 / steps
        found = trying.measure(config, parts)
        assert sum(level.seconds["full"] for level in found.levels) == pytest.approx(32)
        assert found.once["full"] == (8 + 1) / steps  # with its first row


@pytest.mark.parametrize(
    ("size", "at_once", "batches"), [(144, 1024, 14), (200, 1024, 10), (64, 128, 8), (32, 1024, 32)]
)
def test_real_costs_are_measured_on_whole_look_aheads(
    size: int, at_once: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr(choosing, "BATCHES", 8)
    monkeypatch.setattr(choosing, "seconds_of_targets", lambda target, some, enough: asked.append(len(some)) or 0.0)
    chosen(f"training.batch_size={size}", f"target.at_once={at_once}")
    assert set(asked) == {batches}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_what_another_device_does_is_waited_for_and_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # it works while this thread has nothing to do
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: time.sleep(0.05))
    assert trying._seconds(lambda: None, torch.device(kind)) >= 0.05


def test_on_a_cpu_the_time_of_others_does_not_count() -> None:
    assert trying._seconds(lambda: time.sleep(0.05), torch.device("cpu")) < 0.05
