"""Arms of an experiment differ in their target and in nothing else, and can be stopped anywhere."""

import itertools
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from math import exp, inf, isnan, log, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import make_mnist
from typer.testing import CliRunner

from stablefield import (
    EDM,
    MLP,
    VE,
    EDMWeight,
    FullDataset,
    Ideal,
    LogNormal,
    Objective,
    Pool,
    Preconditioned,
    ReferenceBatch,
    SingleSample,
)
from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.cli.compare import tried
from stablefield.compare import Arm, Experiment, gradient_variance, run_all, yardstick_of
from stablefield.compare.runs import Run, noted, scores
from stablefield.compare.statistics import Estimate, images_to_reach, paired, roughness, student
from stablefield.config import ConfigError, override, resolve
from stablefield.engine import StepReport
from stablefield.objective import LossReport

pytestmark = pytest.mark.usefixtures("unchecked")


def images(path: Path, total: int = 90) -> Path:
    """A few small labelled pictures: a bright spot in one of three places."""
    source = np.random.default_rng(0)
    data, labels = source.integers(0, 60, (total, 1, 4, 4)), np.arange(total) % 3
    data[np.arange(total), 0, labels, labels] += 180
    np.savez(path, data=data.astype(np.uint8), labels=labels)
    return path


SETTINGS = (
    "data.kind=arrays",
    "data.holdout=20",
    "network.kind=mlp",
    "network.width=16",
    "network.layers=2",
    "training.batch_size=8",
    "training.images=96",
    "training.ramp=0",
    "training.device=cpu",
    "sampler.kind=dpm",
    "sampler.steps=4",
)


def planned(folder: Path, arms: str = "single,reference:1,reference:16,full", seeds: tuple[int, ...] = (0, 1)):
    config = resolve(override({}, [*SETTINGS, f"data.path={images(folder / 'data.npz')}"]))
    return Experiment(config, tuple(map(Arm.parse, arms.split(","))), seeds, looks=3, samples=12, rows=6)


@pytest.fixture(autouse=True, scope="module")
def few_gradients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stablefield.compare.yardstick.GRADIENT_BATCHES", 2)
        yield


def finish(experiment: Experiment, out: Path, stop=lambda: False) -> bool:
    experiment.write(out)
    return run_all(experiment, out, 1, lambda *_: None, stop)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    experiment = planned(out)
    assert finish(experiment, out / "whole")
    return experiment, out / "whole"


@pytest.mark.parametrize("declared", [(), ("data.values=image",)])
def test_samples_are_drawn_of_images_only(declared, tmp_path):
    np.save(tmp_path / "x.npy", np.tanh(np.random.default_rng(0).standard_normal((90, 1, 4, 4))).astype(np.float32))
    config = resolve(override({}, [*SETTINGS, f"data.path={tmp_path / 'x.npy'}", *declared]))
    arms = (Arm.parse("single"), Arm.parse("full"))
    assert finish(Experiment(config, arms, (0,), looks=1, samples=12, rows=6), tmp_path / "out")
    assert bool(list(tmp_path.rglob("*.png"))) == bool(declared)


def test_every_arm_is_asked_about_the_same_x_t(tmp_path):
    experiment = planned(tmp_path)
    asked = {}
    for arm in experiment.arms:
        run = Run(experiment, tmp_path, arm, 0)
        seen = asked.setdefault(arm, [])
        run.parts.denoiser.register_forward_pre_hook(lambda _, question, seen=seen: seen.append(question[0].clone()))
        run.advance(40, lambda: False)
    first, *others = asked.values()
    assert len(first) == 5
    for other in others:
        assert torch.equal(torch.cat(first), torch.cat(other))


def test_a_comparison_goes_on_with_the_data_it_was_begun_with_and_no_others(tmp_path):
    experiment = planned(tmp_path, "single,full", (0,)).with_data()
    assert len(experiment.data) == 64
    assert experiment.with_data() == experiment
    experiment.write(tmp_path / "out")
    assert Experiment.read(tmp_path / "out") == experiment
    images(tmp_path / "data.npz", 91)
    for again in (
        lambda: Experiment.read(tmp_path / "out").with_data(),
        lambda: Run(experiment, tmp_path / "out", experiment.arms[0], 0),  # the data of a later seed or arm, too
        lambda: yardstick_of(tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"not the data that the run was trained on: .*91.*another --out"):
            again()


def test_what_is_asked_for_beforehand_is_kept_from_turn_to_turn(tmp_path, monkeypatch):
    experiment, asked, call = planned(tmp_path), [], FullDataset.__call__

    def counted(self, noisy, **known):
        asked.append(len(noisy))
        return call(self, noisy, **known)

    monkeypatch.setattr(FullDataset, "__call__", counted)
    run = Run(experiment, tmp_path, Arm.parse("full"), 0)
    for goal in (8, 40, 96):
        run.advance(goal, lambda: False)
    assert asked == [1024]


def test_one_reference_is_dsm_bit_for_bit_scores_included(done):
    experiment, out = done
    single, alone, more = (Arm.parse(text) for text in ("single", "reference:1", "reference:16"))
    for seed in experiment.seeds:
        folders = [experiment.folder(out, arm, seed) for arm in (single, alone, more)]
        one, same, other = (read(folder.checkpoint).tensors for folder in folders)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)
        assert scores(folders[0]) == scores(folders[1])


def test_an_experiment_stopped_anywhere_goes_on_bit_for_bit(done, tmp_path):
    experiment, whole = replace(done[0], seeds=(0,)), done[1]
    for patience in (1, 30, 25):  # steps, of 48
        steps = itertools.count()
        assert not finish(experiment, tmp_path, lambda steps=steps, most=patience: next(steps) >= most)
    assert finish(experiment, tmp_path)
    for arm in experiment.arms:
        folders = [experiment.folder(out, arm, 0) for out in (whole, tmp_path)]
        one, other = (read(folder.checkpoint).tensors for folder in folders)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert scores(folders[0]) == scores(folders[1])
        seen = [line["Progress/kimg"] for line in folders[1].history()]
        assert seen == sorted(set(seen))


def test_what_is_done_is_not_done_again_and_seeds_can_be_added(done, tmp_path):
    experiment, out = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.safetensors")}
    more = experiment.joined(replace(experiment, seeds=(2,), arms=experiment.arms[:2]))
    assert more.seeds == (0, 1, 2)
    assert finish(replace(more, seeds=(0, 1)), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.safetensors")} == before


def test_an_experiment_cannot_become_another(tmp_path):
    experiment = planned(tmp_path)
    other = replace(experiment, config=resolve(override(experiment.config.sections, ["network.width=8"])), looks=2)
    with pytest.raises(ConfigError, match=r"network\.width, looks"):
        experiment.joined(other)
    experiment.write(tmp_path)
    assert Experiment.read(tmp_path) == experiment


def test_looks_are_at_whole_steps_that_grow_by_equal_factors(tmp_path):
    marks = np.array(replace(planned(tmp_path), looks=3).marks)
    assert marks[-1] == 96
    assert not (marks % 8).any()
    config = resolve(override({}, ["training.images=64000", "training.batch_size=10"]))
    marks = np.array(Experiment(config, (Arm("single"), Arm("full")), (0,), looks=5).marks)
    assert np.allclose(marks[1:] / marks[:-1], 2, rtol=1e-2)
    with pytest.raises(ConfigError, match="too few for 30 looks"):
        replace(planned(tmp_path), looks=30)


@pytest.mark.parametrize("text", ["reference", "single:3", "reference:x", "stable", "full:"])
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="looks like one of"):
        Arm.parse(text)


def test_no_target_may_differ_in_anything_but_the_target(tmp_path):
    experiment = planned(tmp_path)
    configs = [arm.configured(experiment.config, 3) for arm in experiment.arms]
    for config in configs:
        assert all(key.startswith("target.") for key in config.differences(configs[0]))
        assert config.training.seed == 3


def test_the_exact_denoiser_has_no_error_and_its_samples_are_copies(done):
    measured = yardstick_of(done[1])
    ideal = Ideal(measured.pool, VE())
    found = measured.question(ideal)
    assert found["exact_error"] < 1e-10 < found["held_out_loss"]
    assert all(len(found[f"{name}_by_level"]) == len(measured.levels) for name in ("exact_error", "held_out_loss"))
    x = measured.pool.take(torch.arange(12))
    assert measured.judge(x)["copies"] == 1
    assert measured.judge(x)["nearest_ratio"] < 1e-3
    assert sum(measured.about["shares"]) == pytest.approx(1)


def gradient_problem(rows: int, count: int):
    pool = Pool(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(2)
    denoiser = Preconditioned(MLP((5,), width=8, layers=2), VE(), EDM())
    batches = []
    for number in range(count):
        source = torch.Generator().manual_seed(number)
        index = torch.randint(30, (rows,), generator=source)
        x, t = pool.take(index), LogNormal(0, 0.3).draw(rows, source).float()
        noisy = VE().perturb(x, t, torch.randn(x.shape, generator=source), index=index)
        batches.append((noisy, FullDataset(pool)(noisy).mean))
    return pool, denoiser, batches


def test_the_gradients_whose_variance_is_taken_are_those_of_the_loss():
    _, denoiser, batches = gradient_problem(4, 1)
    objective = Objective(LogNormal(), SingleSample(), EDMWeight())
    found = gradient_variance(denoiser, objective, batches * 2)
    noisy = batches[0][0]
    objective.loss(denoiser, denoiser.process, noisy, SingleSample()(noisy)).loss.backward()
    expected = sum(float(p.grad.double().square().sum()) for p in denoiser.parameters() if p.grad is not None)
    assert found.total == pytest.approx(0, abs=1e-6 * expected)  # twice the same batch
    assert found.squared_mean == pytest.approx(expected, rel=1e-5)


def test_the_variance_of_a_gradient_is_that_of_the_exact_one_and_the_targets_part():
    pool, denoiser, batches = gradient_problem(4, 100)
    exact, single, stable = (
        gradient_variance(denoiser, Objective(LogNormal(), target, EDMWeight()), batches)
        for target in (FullDataset(pool), SingleSample(), ReferenceBatch(pool, 8))
    )
    assert exact.target < 1e-10
    assert stable.target < single.target / 2
    for found in (single, stable):
        assert found.total == pytest.approx(exact.total + found.target, rel=0.25)


def test_a_step_that_was_not_taken_has_no_part_in_what_is_noted():
    def step(loss: float, taken: bool) -> StepReport:
        each = torch.full((4,), loss)
        return StepReport(8, LossReport(each.mean(), each, each, torch.ones(4)), 1e-3, torch.tensor(loss), taken)

    whole = noted([step(1.0, True), step(3.0, True)])
    assert noted([step(1.0, True), step(float("inf"), False), step(3.0, True)]) == whole
    assert noted([step(float("nan"), False)]).keys() == {"Progress/kimg", "Loss/learning_rate"}


def test_a_run_that_was_scored_by_hand_can_still_be_compared(done, tmp_path):
    experiment, out = done
    shutil.copytree(out, tmp_path / "experiment")
    for arm in experiment.arms:
        (experiment.folder(tmp_path / "experiment", arm, 0).path / "scores.jsonl").write_text('{"scores": {}}\n')
    assert finish(experiment, tmp_path / "experiment")


def test_intervals_are_students_and_cover_as_often_as_they_say():
    assert [round(student(n), 3) for n in (1, 4, 30)] == [12.706, 2.776, 2.042]
    assert student(10**7) == pytest.approx(1.95996, abs=1e-4)
    source = np.random.default_rng(0)
    covered = [Estimate.of(list(source.normal(3, 2, 4))) for _ in range(2000)]
    assert np.mean([e.low <= 3 <= e.high for e in covered]) == pytest.approx(0.95, abs=0.015)
    assert Estimate.of([1.0]).half == inf


def test_what_two_arms_share_by_seed_is_no_difference():
    luck = {seed: 100.0 * seed for seed in range(4)}
    found = paired({seed: value - 1 for seed, value in luck.items()} | {9: 1e9}, luck)
    assert (found.mean, found.deviation, found.n) == (-1, 0, 4)
    assert found.sure


def test_images_to_reach_a_quality_are_read_off_a_line_in_log_images():
    seen = [1000, 2000, 4000, 8000]
    curve = [50 - 5 * log(images) for images in seen]
    for needed in (1500.0, 3999.0, 7000.0):
        assert images_to_reach(50 - 5 * log(needed), seen, curve) == pytest.approx(needed)
    assert images_to_reach(0.0, seen, curve) == inf
    assert images_to_reach(1e9, seen, curve) == 1000
    assert images_to_reach(1.0, [10, 20, 40], [2.0, 1.0, 3.0]) == pytest.approx(20)  # the first time counts


def test_roughness_is_nothing_for_a_power_and_the_jumps_beside_it():
    seen = [2.0**k for k in range(1, 9)]
    power = [7 * images**-0.4 for images in seen]
    assert roughness(power) == pytest.approx(0, abs=1e-12)
    source = np.random.default_rng(0)
    jumps = [roughness([v * exp(0.1 * source.normal()) for v in power]) ** 2 for _ in range(4000)]
    assert np.mean(jumps) ** 0.5 == pytest.approx(0.1, rel=0.05)


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_trains_reports_and_goes_on(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS[2:-2], "data.kind=arrays", f"data.path={data}") for part in ("--set", s)]
    less = ["--looks", 2, "--samples", 8, "--rows", 4]
    result = command("--out", out, "--targets", "single,reference:8", "--seeds", 0, *flags, *less)
    assert result.exit_code == 0, result.output
    assert "One seed cannot tell" in result.output.replace("\n", " ")
    said = json.loads((out / "experiment.json").read_text())
    assert said["config"]["data"]["holdout"] == 15  # a sixth
    assert said["config"]["sampler"]["kind"] == "dpm"
    assert {"report.html", "summary.md", "summary.svg", "results.json", "results.csv"} <= {
        f.name for f in out.iterdir()
    }

    refused = command("--out", out, "--set", "network.width=12")
    assert "this experiment was begun otherwise" in str(refused.exception)
    result = command("--out", out, "--seeds", "0-1", "--targets", "full")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (out / "runs").iterdir()} == {"single", "reference-8", "full"}
    assert len(list(out.rglob("looks.jsonl"))) == 6
    page = tmp_path / "docs" / "tiny.md"
    result = command("--out", out, "--report-only", "--summary", page)
    assert result.exit_code == 0
    assert "](tiny.svg)" in page.read_text()
    assert page.with_suffix(".svg").exists()


def test_a_target_that_the_data_cannot_serve_is_refused_before_any_work(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS, f"data.path={data}") for part in ("--set", s)]
    result = command("--out", out, "--targets", "single,reference:500", "--looks", 2, *flags)
    assert "between 1 and the pool's 70 members, not 500" in str(result.exception)
    assert not out.exists()
    assert "holds no experiment" in str(command("--out", out, "--report-only").exception)


def test_a_recipe_and_a_path_are_enough_to_compare(tmp_path):
    source = np.random.default_rng(0)
    data = make_mnist(
        tmp_path / "mnist", source.integers(0, 256, (90, 4, 4), dtype=np.uint8), (np.arange(90) % 3).astype("u1")
    )
    small = ("training.batch_size=8", "training.ramp=0", "network.channels=8", "network.multipliers=[1]")
    flags = [part for s in (*small, "sampler.kind=dpm", "sampler.steps=2") for part in ("--set", s)]
    flags += ["--looks", 1, "--samples", 8, "--rows", 4, "--seeds", 0, "--images", 16]
    begin = ["--recipe", "fashion-mnist", "--data", data, "--targets", "single,pruned"]
    result = command("--out", tmp_path / "out", *begin, *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    config = Experiment.read(tmp_path / "out").config
    assert (config["data"]["kind"], config["data"]["path"]) == ("idx", str(data))
    assert config["weight"]["sigma_data"] == 0.7  # the recipe's
    assert config.training.conditional
    assert (config.training.batch_size, config.training.images) == (8, 16)  # a setting speaks over the recipe
    again = command("--out", tmp_path / "out", *begin, *flags)  # as it was begun: nothing is left to do
    assert again.exit_code == 0, again.output + repr(again.exception)
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.html", "summary.md")]
    for page in pages:
        assert "exact (pruned) against DSM." in page
        assert "E[x | x_t] over all 75 members" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "no-such"), "no-such"),
        (("--data", "no-such"), "no-such"),
        (("--config", "no-such.toml"), "no-such.toml"),
        (("--targets", "single,stable:3"), "stable:3"),
        (("--targets", "single"), "at least two different targets"),
        (("--seeds", "x"), "'x'"),
        (("--set", "training.imagse=3"), "imagse"),
        (("--recipe", "cifar10-ncsnpp-edm-stf"), "at the terminal as --data PATH"),
        (("--report-only",), "holds no experiment"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_words(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--out", "out", *arguments)
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)
    assert not Path("out").exists()


def test_what_takes_long_before_the_first_step_is_told_as_it_goes(tmp_path, monkeypatch):
    stages: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def watched(title):
        yield lambda done, total: stages.setdefault(title, []).append((done, total))

    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    experiment = planned(tmp_path, "single,pruned", (0,))
    tried(experiment, tmp_path, watched)
    assert list(stages) == ["exact (pruned): nearest neighbours"]
    tried(experiment, tmp_path, watched)
    experiment.write(tmp_path)
    yardstick_of(tmp_path, watched)
    yardstick_of(tmp_path, watched)
    for news in stages.values():
        done, totals = zip(*news, strict=True)
        assert sorted(set(done)) == list(done)  # forward, and each once
        assert len(set(totals)) == 1
        assert done[-1] == totals[-1]


@pytest.mark.slow
def test_several_jobs_make_what_one_makes(done, tmp_path):
    experiment, whole = done
    experiment.write(tmp_path)
    told, prepared = [], []
    note = lambda *event: prepared.append(event)  # noqa: E731
    assert run_all(experiment, tmp_path, 2, lambda *event: told.append(event), lambda: False, note)
    assert {seed for seed, _, _ in told} == {0, 1}
    assert any("exact answers" in what for _, what in prepared)
    for arm in experiment.arms:
        folders = [experiment.folder(out, arm, 1) for out in (whole, tmp_path)]
        one, other = (read(folder.checkpoint).tensors for folder in folders)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_score_that_is_not_a_number_never_becomes_one():
    found = Estimate.of([1.0, nan, 2.0])
    assert isnan(found.mean)
    assert isnan(found.deviation)
    assert not found.sure
    for values in ([3.0, nan, 1.0], [nan, 1.0, 1.0]):
        assert isnan(images_to_reach(2.0, [1, 2, 3], values))
    assert images_to_reach(2.0, [1, 2, 3], [1.0, nan, nan]) == 1  # what came before is known
    assert isnan(images_to_reach(nan, [1, 2], [3.0, 1.0]))
