"""The examples about losses: rank correlations on records with a known one, and floors of samples of Gaussians."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from stablefield.config import override, resolve
from stablefield.studies.compare import Arm, Comparison, Experiment
from stablefield.studies.compare.endpoints import endpoints_hash

pytestmark = pytest.mark.usefixtures("unchecked")

EXAMPLES = Path(__file__).parents[2] / "examples"
ARMS = (Arm("", "dsm"), Arm("", "exact"))


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example("two_gaussians")
correlations, samples = example("loss_correlation"), example("floor_of_samples")


def runs(excess: np.ndarray, distance: np.ndarray, arms=ARMS) -> list:
    """Runs of each seed from final values (seeds, arms)."""
    return [
        [(arm, {"excess": np.array([e]), "distance": np.array([d])}) for arm, e, d in zip(arms, *row, strict=True)]
        for row in zip(excess, distance, strict=True)
    ]


def flat(by_seed: list) -> list:
    return [run for each in by_seed for run in each]


def test_the_rank_correlation_is_that_of_scipy_with_ties_too():
    random = np.random.default_rng(0)
    for _ in range(20):
        first, second = random.integers(0, 6, (2, 15)).astype(float)
        assert correlations.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert math.isnan(correlations.spearman(first[:2], second[:2]))
    assert math.isnan(correlations.spearman(first, np.ones(15)))


@pytest.mark.parametrize(("power", "wanted"), [(3.0, 1.0), (-0.5, -1.0)])
def test_a_monotone_relation_has_correlation_one_for_every_bootstrap_sample(power, wanted):
    excess = np.random.default_rng(0).uniform(0.1, 1, (8, 2))
    by_seed = runs(excess, excess**power)

    def statistic(each):
        return correlations.correlation(each, "all runs", "excess")

    assert statistic(flat(by_seed)) == pytest.approx(wanted)
    assert correlations.interval(by_seed, statistic, 50) == pytest.approx((wanted, wanted))
    assert all(map(math.isnan, correlations.interval(by_seed[:4], statistic, 50)))


def test_targets_that_differ_correlate_over_all_runs_and_not_over_those_of_one_target():
    random = np.random.default_rng(0)
    excess, distance = random.normal(size=(2, 200, 2)) + np.array([0.0, 20.0])
    all_runs, one_target = (
        correlations.correlation(flat(runs(excess, distance)), q, "excess") for q in ("all runs", "one target")
    )
    assert all_runs > 0.7
    assert abs(one_target) < 4 / 400**0.5
    own = [spearmanr(excess[:, arm], distance[:, arm]).statistic for arm in (0, 1)]
    assert one_target == pytest.approx(np.mean(own))


def test_the_interval_covers_the_rank_correlation_of_a_normal_distribution():
    random, r, covered = np.random.default_rng(0), 0.7, 0
    for _ in range(40):
        first, other = random.normal(size=(2, 24, 1))
        by_seed = runs(first, r * first + (1 - r * r) ** 0.5 * other, ARMS[:1])
        low, high = correlations.interval(by_seed, lambda e: correlations.correlation(e, "all runs", "excess"), 100)
        covered += low < 6 / math.pi * math.asin(r / 2) < high  # Kendall 1970
    assert covered >= 34


def write_records(folder: Path, seeds: int = 5) -> Experiment:
    """A finished comparison: over all points the distance grows with the excess and falls with the held-out loss."""
    config = resolve(override({}, ["training.images=16000", "training.batch_size=10", "data.holdout=100"]))
    targets, command = ("dsm", "dsm+times.kind=adaptive"), (("2026-01-01", "stablefield compare --seeds 0-4"),)
    experiment = Experiment(config, targets, tuple(range(seeds)), ("classifier",), commands=command)
    experiment.write(folder)
    for number, (arm, seed) in enumerate((a, s) for a in experiment.arms for s in experiment.seeds):
        lines = []
        for images in experiment.evaluation_points:
            value = {"classifier": number + 1e5 / images, "excess": number + 1e4 / images, "held-out loss": 9 - number}
            values = value | {"held-out loss": 9 - number + images / 1e6, "classifier, held-out": 1.0}
            lines.append({"images": images, "raw": values, "average": values})
        text = "".join(json.dumps(line | {"endpoints": endpoints_hash(experiment.endpoints)}) + "\n" for line in lines)
        experiment.record_file(folder, arm, seed).write_text(text)
    (folder / "records" / "machine.json").write_text(json.dumps({"device": "cpu", "cores": 2}))
    return experiment


def test_the_page_has_command_seeds_machine_and_correlations_of_both_weights(tmp_path):
    experiment = write_records(tmp_path / "digits")
    head, about, commands, table = correlations.section(tmp_path / "digits", 20, {experiment.arms[0]: 0.5})
    assert head == "### digits"
    assert "10 of 10 runs are finished: dsm; dsm with adaptive times. Seeds 0-4; 16,000 images per run" in about
    assert "device cpu, cores 2" in about
    assert commands == "* 2026-01-01: `stablefield compare --seeds 0-4`"
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [(row[1], row[3]) for row in rows] == [(w, q) for w in ("average", "raw") for q in correlations.QUESTIONS]
    for row in rows:
        assert row[5] == "+1.00 (+1.00 to +1.00)"
        assert row[6] == "-1.00 (-1.00 to -1.00)"
        assert row[8].startswith("+2.00")
    assert rows[0][7] == "not measured"  # the floor of one target is not known


def test_the_floor_of_each_target_is_added_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    settings = ["network.kind=mlp", "network.width=8", "network.layers=1", "data.holdout=1500", "training.images=6400"]
    config = resolve(override({}, settings))
    experiment = Experiment(config, ("dsm", "stf:16", "exact"), (0,), ("classifier",))
    floors = correlations.floors_of_arms(Comparison(experiment, {}, {}, {}))
    values = [floors[arm] for arm in experiment.arms]
    assert values[0] > values[1] > values[2] == 0


def test_the_floor_of_a_sample_is_that_of_its_distribution_at_large_noise_and_zero_at_small():
    sigma = torch.tensor([1e-6, 3.0], dtype=torch.float64)
    for name, make in samples.POPULATIONS.items():
        ratio = samples.measure(make(2), sigma, n=4000, examples=64, seed=0)
        assert ratio.by_bin[0] < 1e-3, name  # up to rounding
        # the variance of the sample itself differs from that of its distribution
        assert abs(ratio.by_bin[1] - 1) < 4 * (ratio.errors_by_bin[1] ** 2 + 2 / 4000) ** 0.5, name
