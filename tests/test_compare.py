"""Comparisons: arms differ only in their target, resume bit for bit, and are evaluated with correct statistics."""

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

from stablefield import VE, DSMTarget, IdealDenoiser, Objective, Pool, Preconditioned, STFTarget
from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.cli.compare_command import check_targets
from stablefield.config import ConfigError, override, resolve
from stablefield.engine import StepReport
from stablefield.networks import MLP
from stablefield.objective import EDMWeight, LossReport
from stablefield.preconditioning import EDMPreconditioning
from stablefield.studies.compare import Arm, Experiment, cached_evaluator, gradient_variance, run_all
from stablefield.studies.compare.experiment import experiment_file
from stablefield.studies.compare.runs import Run, read_evaluations, step_metrics
from stablefield.studies.compare.statistics import (
    Estimate,
    images_to_reach,
    paired_difference,
    roughness,
    student_quantile,
)
from stablefield.targets import ExactTarget
from stablefield.times import LogNormal

pytestmark = pytest.mark.usefixtures("unchecked")


def images(path: Path, total: int = 90) -> Path:
    """A few small labelled images: a bright spot in one of three places."""
    random = np.random.default_rng(0)
    data, labels = random.integers(0, 60, (total, 1, 4, 4)), np.arange(total) % 3
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
    "training.learning_rate_warmup=0",
    "training.device=cpu",
    "sampler.kind=dpm",
    "sampler.steps=4",
)


def make_experiment(folder: Path, arms: str = "dsm,stf:1,stf:16,exact", seeds: tuple[int, ...] = (0, 1)):
    config = resolve(override({}, [*SETTINGS, f"data.path={images(folder / 'data.npz')}"]))
    return Experiment(config, tuple(map(Arm.parse, arms.split(","))), seeds, evaluations=3, samples=12, examples=6)


@pytest.fixture(autouse=True, scope="module")
def few_gradient_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stablefield.studies.compare.evaluator.GRADIENT_BATCHES", 2)
        yield


def finish(experiment: Experiment, out: Path, should_stop=lambda: False) -> bool:
    experiment.write(out)
    return run_all(experiment, out, 1, lambda *_: None, should_stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    experiment = make_experiment(out)
    assert finish(experiment, out / "whole")
    return experiment, out / "whole"


@pytest.mark.parametrize("declared", [(), ("data.values=image",)])
def test_sheets_of_samples_are_written_for_images_only(declared, tmp_path):
    np.save(tmp_path / "x.npy", np.tanh(np.random.default_rng(0).standard_normal((90, 1, 4, 4))).astype(np.float32))
    config = resolve(override({}, [*SETTINGS, f"data.path={tmp_path / 'x.npy'}", *declared]))
    arms = (Arm.parse("dsm"), Arm.parse("exact"))
    experiment = Experiment(config, arms, (0,), evaluations=1, samples=12, examples=6)
    assert finish(experiment, tmp_path / "out")
    assert bool(list(tmp_path.rglob("*.png"))) == bool(declared)


def test_all_arms_train_on_the_same_x_t(tmp_path):
    experiment = make_experiment(tmp_path)
    inputs = {}
    for arm in experiment.arms:
        run = Run(experiment, tmp_path, arm, 0)
        seen = inputs.setdefault(arm, [])
        run.parts.denoiser.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0].clone()))
        run.train_until(40, lambda: False)
    first, *others = inputs.values()
    assert len(first) == 5
    for other in others:
        assert torch.equal(torch.cat(first), torch.cat(other))


def test_a_comparison_resumes_with_the_data_it_was_started_with_and_no_others(tmp_path):
    experiment = make_experiment(tmp_path, "dsm,exact", (0,)).with_data_hash()
    assert len(experiment.data_hash) == 64
    assert experiment.with_data_hash() == experiment
    experiment.write(tmp_path / "out")
    assert Experiment.read(tmp_path / "out") == experiment
    images(tmp_path / "data.npz", 91)
    for again in (
        lambda: Experiment.read(tmp_path / "out").with_data_hash(),
        lambda: Run(experiment, tmp_path / "out", experiment.arms[0], 0),  # data of a later seed or arm are checked too
        lambda: cached_evaluator(tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"not the data that the run was trained on: .*91.*another --out"):
            again()


@pytest.mark.parametrize("version", [None, "stablefield comparison 0"])
def test_an_experiment_of_another_format_version_is_refused(version, tmp_path):
    make_experiment(tmp_path).write(tmp_path)
    content = json.loads(experiment_file(tmp_path).read_text())
    older = {key: value for key, value in content.items() if key != "format"} | ({"format": version} if version else {})
    experiment_file(tmp_path).write_text(json.dumps(older | {"looks": 3}))
    with pytest.raises(ConfigError, match=r"experiment\.json has .*format version.*another --out") as refusal:
        Experiment.read(tmp_path)
    assert "\n" not in str(refusal.value)
    assert version is None or version in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "stablefield comparison 1"}'])
def test_a_damaged_experiment_is_refused(text, tmp_path):
    experiment_file(tmp_path).write_text(text)
    with pytest.raises(ConfigError, match=r"experiment\.json (is damaged|has no format version)"):
        Experiment.read(tmp_path)


def test_prefetched_targets_are_kept_beyond_a_switch_point(tmp_path, monkeypatch):
    experiment, sizes, call = make_experiment(tmp_path), [], ExactTarget.__call__

    def counted(self, noisy, **arguments):
        sizes.append(len(noisy))
        return call(self, noisy, **arguments)

    monkeypatch.setattr(ExactTarget, "__call__", counted)
    run = Run(experiment, tmp_path, Arm.parse("exact"), 0)
    for count in (8, 40, 96):
        run.train_until(count, lambda: False)
    assert sizes == [1024]


def test_stf_with_one_reference_is_dsm_bit_for_bit_in_weights_and_scores(finished):
    experiment, out = finished
    dsm, stf_1, stf_16 = (Arm.parse(text) for text in ("dsm", "stf:1", "stf:16"))
    for seed in experiment.seeds:
        folders = [experiment.run_folder(out, arm, seed) for arm in (dsm, stf_1, stf_16)]
        one, same, other = (read(folder.checkpoint).tensors for folder in folders)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)
        assert read_evaluations(folders[0]) == read_evaluations(folders[1])


def test_an_experiment_stopped_anywhere_resumes_bit_for_bit(finished, tmp_path):
    experiment, whole = replace(finished[0], seeds=(0,)), finished[1]
    for limit in (1, 30, 25):  # of 48 steps
        steps = itertools.count()
        assert not finish(experiment, tmp_path, lambda steps=steps, limit=limit: next(steps) >= limit)
    assert finish(experiment, tmp_path)
    for arm in experiment.arms:
        folders = [experiment.run_folder(out, arm, 0) for out in (whole, tmp_path)]
        one, other = (read(folder.checkpoint).tensors for folder in folders)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert read_evaluations(folders[0]) == read_evaluations(folders[1])
        counts = [line["progress/kimg"] for line in folders[1].history()]
        assert counts == sorted(set(counts))


def test_finished_runs_are_not_repeated_and_seeds_can_be_added(finished, tmp_path):
    experiment, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.safetensors")}
    more = experiment.extended_by(replace(experiment, seeds=(2,), arms=experiment.arms[:2]))
    assert more.seeds == (0, 1, 2)
    assert finish(replace(more, seeds=(0, 1)), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.safetensors")} == before


def test_an_experiment_can_be_extended_by_arms_and_seeds_only(tmp_path):
    experiment = make_experiment(tmp_path)
    other = replace(
        experiment, config=resolve(override(experiment.config.sections, ["network.width=8"])), evaluations=2
    )
    with pytest.raises(ConfigError, match=r"cannot change network\.width, evaluations .*another --out"):
        experiment.extended_by(other)
    experiment.write(tmp_path)
    assert Experiment.read(tmp_path) == experiment


def test_evaluation_points_are_whole_steps_that_grow_by_equal_factors(tmp_path):
    points = np.array(replace(make_experiment(tmp_path), evaluations=3).evaluation_points)
    assert points[-1] == 96
    assert not (points % 8).any()
    config = resolve(override({}, ["training.images=64000", "training.batch_size=10"]))
    points = np.array(Experiment(config, (Arm("dsm"), Arm("exact")), (0,), evaluations=5).evaluation_points)
    assert np.allclose(points[1:] / points[:-1], 2, rtol=1e-2)
    with pytest.raises(ConfigError, match="96 images are too few for 30 evaluations"):
        replace(make_experiment(tmp_path), evaluations=30)


@pytest.mark.parametrize("text", ["stf", "dsm:3", "stf:x", "stable", "exact:"])
def test_an_unknown_target_is_refused(text):
    with pytest.raises(ConfigError, match=f"cannot compare the target '{text}'; write it as one of dsm, stf:NUMBER"):
        Arm.parse(text)


def test_configurations_of_arms_differ_only_in_the_target(tmp_path):
    experiment = make_experiment(tmp_path)
    configs = [arm.configure(experiment.config, 3) for arm in experiment.arms]
    for config in configs:
        assert all(key.startswith("target.") for key in config.differences(configs[0]))
        assert config.training.seed == 3


def test_the_ideal_denoiser_has_no_exact_error_and_training_data_are_copies(finished):
    evaluator = cached_evaluator(finished[1])
    scores = evaluator.score_denoiser(IdealDenoiser(evaluator.pool, VE()))
    assert scores["exact_error"] < 1e-10 < scores["held_out_loss"]
    assert all(len(scores[f"{name}_by_level"]) == len(evaluator.levels) for name in ("exact_error", "held_out_loss"))
    x = evaluator.pool.take(torch.arange(12))
    assert evaluator.score_samples(x)["copies"] == 1
    assert evaluator.score_samples(x)["nearest_ratio"] < 1e-3
    assert sum(evaluator.description["shares"]) == pytest.approx(1)


def gradient_problem(batch_size: int, count: int):
    pool = Pool(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(2)
    denoiser = Preconditioned(MLP((5,), width=8, layers=2), VE(), EDMPreconditioning())
    batches = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        index = torch.randint(30, (batch_size,), generator=random)
        x, t = pool.take(index), LogNormal(0, 0.3).draw(batch_size, random).float()
        noisy = VE().perturb(x, t, torch.randn(x.shape, generator=random), index=index)
        batches.append((noisy, ExactTarget(pool, missing_mass=0.0)(noisy).mean))
    return pool, denoiser, batches


def test_gradient_variance_uses_the_gradient_of_the_loss():
    _, denoiser, batches = gradient_problem(4, 1)
    objective = Objective(LogNormal(), DSMTarget(), EDMWeight())
    variance = gradient_variance(denoiser, objective, batches * 2)
    noisy = batches[0][0]
    objective.loss(denoiser, denoiser.process, noisy, DSMTarget()(noisy)).loss.backward()
    expected = sum(float(p.grad.double().square().sum()) for p in denoiser.parameters() if p.grad is not None)
    assert variance.total == pytest.approx(0, abs=1e-6 * expected)  # twice the same batch
    assert variance.squared_mean == pytest.approx(expected, rel=1e-5)


def test_gradient_variance_is_that_of_the_exact_target_plus_the_part_of_the_target():
    pool, denoiser, batches = gradient_problem(4, 100)
    exact, dsm, stable = (
        gradient_variance(denoiser, Objective(LogNormal(), target, EDMWeight()), batches)
        for target in (ExactTarget(pool, missing_mass=0.0), DSMTarget(), STFTarget(pool, 8))
    )
    assert exact.target < 1e-10
    assert stable.target < dsm.target / 2
    for variance in (dsm, stable):
        assert variance.total == pytest.approx(exact.total + variance.target, rel=0.25)


def test_skipped_steps_do_not_count_in_metrics():
    def step(loss: float, taken: bool) -> StepReport:
        losses = torch.full((4,), loss)
        return StepReport(8, LossReport(losses.mean(), losses, losses, torch.ones(4)), 1e-3, torch.tensor(loss), taken)

    expected = step_metrics([step(1.0, True), step(3.0, True)])
    assert step_metrics([step(1.0, True), step(float("inf"), False), step(3.0, True)]) == expected
    assert step_metrics([step(float("nan"), False)]).keys() == {"progress/kimg", "loss/learning_rate"}


def test_scores_of_the_evaluate_command_do_not_disturb_a_comparison(finished, tmp_path):
    experiment, out = finished
    shutil.copytree(out, tmp_path / "experiment")
    for arm in experiment.arms:
        (experiment.run_folder(tmp_path / "experiment", arm, 0).path / "scores.jsonl").write_text('{"scores": {}}\n')
    assert finish(experiment, tmp_path / "experiment")


def test_intervals_are_students_and_cover_with_their_confidence():
    assert [round(student_quantile(n), 3) for n in (1, 4, 30)] == [12.706, 2.776, 2.042]
    assert student_quantile(10**7) == pytest.approx(1.95996, abs=1e-4)
    random = np.random.default_rng(0)
    estimates = [Estimate.from_values(list(random.normal(3, 2, 4))) for _ in range(2000)]
    assert np.mean([e.low <= 3 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.015)
    assert Estimate.from_values([1.0]).half_width == inf


def test_paired_differences_cancel_what_two_arms_share_by_seed():
    shared = {seed: 100.0 * seed for seed in range(4)}
    difference = paired_difference({seed: value - 1 for seed, value in shared.items()} | {9: 1e9}, shared)
    assert (difference.mean, difference.std, difference.n) == (-1, 0, 4)
    assert difference.significant


def test_images_to_reach_a_quality_are_interpolated_in_log_images():
    counts = [1000, 2000, 4000, 8000]
    curve = [50 - 5 * log(count) for count in counts]
    for needed in (1500.0, 3999.0, 7000.0):
        assert images_to_reach(50 - 5 * log(needed), counts, curve) == pytest.approx(needed)
    assert images_to_reach(0.0, counts, curve) == inf
    assert images_to_reach(1e9, counts, curve) == 1000
    assert images_to_reach(1.0, [10, 20, 40], [2.0, 1.0, 3.0]) == pytest.approx(20)  # the first time counts


def test_roughness_is_zero_for_a_power_law_and_the_std_of_independent_errors_around_it():
    counts = [2.0**k for k in range(1, 9)]
    power_law = [7 * count**-0.4 for count in counts]
    assert roughness(power_law) == pytest.approx(0, abs=1e-12)
    random = np.random.default_rng(0)
    squares = [roughness([v * exp(0.1 * random.normal()) for v in power_law]) ** 2 for _ in range(4000)]
    assert np.mean(squares) ** 0.5 == pytest.approx(0.1, rel=0.05)


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_trains_reports_and_resumes(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS[2:-2], "data.kind=arrays", f"data.path={data}") for part in ("--set", s)]
    small = ["--evaluations", 2, "--samples", 8, "--examples", 4]
    result = command("--out", out, "--targets", "dsm,stf:8", "--seeds", 0, *flags, *small)
    assert result.exit_code == 0, result.output
    assert "One seed cannot separate a difference from chance" in result.output.replace("\n", " ")
    config = json.loads((out / "experiment.json").read_text())["config"]
    assert config["data"]["holdout"] == 15  # a sixth
    assert config["sampler"]["kind"] == "dpm"
    assert {"report.html", "summary.md", "summary.svg", "results.json", "results.csv"} <= {
        f.name for f in out.iterdir()
    }

    refused = command("--out", out, "--set", "network.width=12")
    assert "cannot change network.width of an existing comparison" in str(refused.exception)
    result = command("--out", out, "--seeds", "0-1", "--targets", "exact")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (out / "runs").iterdir()} == {"dsm", "stf-8", "exact"}
    assert len(list(out.rglob("evaluations.jsonl"))) == 6
    page = tmp_path / "docs" / "tiny.md"
    result = command("--out", out, "--report-only", "--summary", page)
    assert result.exit_code == 0
    assert "](tiny.svg)" in page.read_text()
    assert page.with_suffix(".svg").exists()


def test_a_target_that_does_not_fit_the_data_is_refused_before_any_training(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS, f"data.path={data}") for part in ("--set", s)]
    result = command("--out", out, "--targets", "dsm,knn:500", "--evaluations", 2, *flags)
    assert "between 1 and the pool's 70 data points, not 500" in str(result.exception)
    assert not out.exists()
    assert "there is no comparison in" in str(command("--out", out, "--report-only").exception)


def test_a_recipe_and_a_path_are_enough_to_compare(tmp_path):
    random = np.random.default_rng(0)
    data = make_mnist(
        tmp_path / "mnist", random.integers(0, 256, (90, 4, 4), dtype=np.uint8), (np.arange(90) % 3).astype("u1")
    )
    small = (
        "training.batch_size=8",
        "training.learning_rate_warmup=0",
        "network.channels=8",
        "network.multipliers=[1]",
    )
    flags = [part for s in (*small, "sampler.kind=dpm", "sampler.steps=2") for part in ("--set", s)]
    flags += ["--evaluations", 1, "--samples", 8, "--examples", 4, "--seeds", 0, "--images", 16]
    options = ["--recipe", "fashion-mnist", "--data", data, "--targets", "dsm,exact"]
    result = command("--out", tmp_path / "out", *options, *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    config = Experiment.read(tmp_path / "out").config
    assert (config["data"]["kind"], config["data"]["path"]) == ("idx", str(data))
    assert config["weight"]["sigma_data"] == 0.7  # the recipe's
    assert config.training.conditional
    assert (config.training.batch_size, config.training.images) == (8, 16)  # --set and --images win over the recipe
    again = command("--out", tmp_path / "out", *options, *flags)  # nothing is left to do
    assert again.exit_code == 0, again.output + repr(again.exception)
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.html", "summary.md")]
    for page in pages:
        assert "exact against DSM." in page
        assert "E[x | x_t] over all 75 data points" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "no-such"), "no-such"),
        (("--data", "no-such"), "no-such"),
        (("--config", "no-such.toml"), "no-such.toml"),
        (("--targets", "dsm,stable:3"), "stable:3"),
        (("--targets", "dsm"), "at least two different targets"),
        (("--seeds", "x"), "'x'"),
        (("--set", "training.imagse=3"), "imagse"),
        (("--recipe", "cifar10-ncsnpp-edm-stf"), "--data PATH at the terminal"),
        (("--report-only",), "there is no comparison in out"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("--out", "out", *arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not Path("out").exists()


def test_progress_is_reported_before_the_first_step(tmp_path, monkeypatch):
    stages: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def watched(title):
        yield lambda done, total: stages.setdefault(title, []).append((done, total))

    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    experiment = make_experiment(tmp_path, "dsm,exact", (0,))
    check_targets(experiment, tmp_path, watched)
    assert list(stages) == ["exact: nearest neighbours"]
    check_targets(experiment, tmp_path, watched)
    experiment.write(tmp_path)
    cached_evaluator(tmp_path, watched)
    cached_evaluator(tmp_path, watched)
    for calls in stages.values():
        done, totals = zip(*calls, strict=True)
        assert sorted(set(done)) == list(done)  # increasing, and each value once
        assert len(set(totals)) == 1
        assert done[-1] == totals[-1]


@pytest.mark.slow
def test_several_jobs_give_the_results_of_one(finished, tmp_path):
    experiment, whole = finished
    experiment.write(tmp_path)
    reports, stages = [], []

    def report(*message):
        reports.append(message)

    def report_stage(*message):
        stages.append(message)

    assert run_all(experiment, tmp_path, 2, report, lambda: False, report_stage)
    assert {seed for seed, _, _ in reports} == {0, 1}
    assert any("exact targets" in stage for _, stage in stages)
    for arm in experiment.arms:
        folders = [experiment.run_folder(out, arm, 1) for out in (whole, tmp_path)]
        one, other = (read(folder.checkpoint).tensors for folder in folders)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_nan_scores_never_become_finite_statistics():
    estimate = Estimate.from_values([1.0, nan, 2.0])
    assert isnan(estimate.mean)
    assert isnan(estimate.std)
    assert not estimate.significant
    for values in ([3.0, nan, 1.0], [nan, 1.0, 1.0]):
        assert isnan(images_to_reach(2.0, [1, 2, 3], values))
    assert images_to_reach(2.0, [1, 2, 3], [1.0, nan, nan]) == 1  # later values do not matter
    assert isnan(images_to_reach(nan, [1, 2], [3.0, 1.0]))
