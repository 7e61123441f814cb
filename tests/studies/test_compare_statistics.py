"""The instrument of comparisons on simulated records: no effect is rarely found, a planted one is; closed forms."""

from itertools import pairwise
from math import exp, isfinite, isnan, log, nan, sqrt

import numpy as np
import pytest

from stablefield.config import override, resolve
from stablefield.studies.compare import Comparison, Endpoint, Estimate, Experiment, summarize, write_page
from stablefield.studies.compare.endpoints import (
    Finding,
    as_percent,
    endpoints_hash,
    fixed_endpoints,
    measure_endpoint,
)
from stablefield.studies.compare.statistics import Curve, holm, spread_ratio

pytestmark = pytest.mark.usefixtures("unchecked")

SPACES = ("classifier", "efficientnet-lite0")


def simulate(
    seeds: int = 6,
    *,
    factors: dict[str, float] | None = None,
    noisier: float = 1.0,
    random: np.random.Generator | None = None,
    targets: tuple[str, ...] = ("dsm", "stf:64"),
    ratio: float = 1.1,
) -> Comparison:
    """A finished comparison without training; quantities of the later targets are multiplied by factors."""
    random = random or np.random.default_rng(0)
    config = resolve(override({}, ["training.images=16000", "training.batch_size=10", "data.holdout=100"]))
    experiment = Experiment(config, targets, tuple(range(seeds)), SPACES, commands=(("2026-01-01", "a command"),))
    names = [*SPACES, *(f"{space}, held-out" for space in SPACES), "held-out loss", "excess"]
    lines = {}
    for seed in range(seeds):
        shared = {(w, name): 0.1 * random.normal() for w in ("average", "raw") for name in names}
        for arm in experiment.arms:
            lines[arm, seed] = records = []
            treated = arm.target != targets[0]
            own = {key: (noisier if treated else 1.0) * 0.05 * random.normal() for key in shared}
            for images in experiment.evaluation_points:
                line = {"images": images, "gradient_variance": 1.0, "gradient_variance_of_target": 0.2}
                line["endpoints"] = endpoints_hash(experiment.endpoints)
                for weights in ("average", "raw"):
                    line[weights] = {"copies": 0.0}
                    for name in names:
                        scatter = shared[weights, name] + own[weights, name] + 0.02 * random.normal()
                        factor = (factors or {}).get(name, 1.0) if treated else 1.0
                        line[weights][name] = factor * 1e3 * images**-0.4 * exp(scatter)
                records.append(line)
    machine = {
        "device": "cpu",
        "reference": {
            "train_size": 1697,
            "held_out_size": 100,
            "held_out_distance": dict.fromkeys(SPACES, 2.0),
            "features": {"classifier": {"identity": "classifier:0", "accuracy": 0.99}},
        },
    }
    times = {str(arm): [1.0 if arm.target == targets[0] else ratio] * 3 for arm in experiment.arms}
    return Comparison(experiment, lines, machine, {"date": "2026-01-02", "load": 0.0, "sec_per_kimg": times})


def test_pages_without_any_effect_claim_something_in_at_most_five_per_cent():
    random, pages = np.random.default_rng(1), 300
    claims = [
        any(f.direction.endswith("creases") for f in simulate(random=random, ratio=1.0).findings) for _ in range(pages)
    ]
    assert np.mean(claims) <= 0.05 + 3 * sqrt(0.05 * 0.95 / pages)


@pytest.mark.parametrize(("factor", "word"), [(0.7, "decreases"), (1 / 0.7, "increases")])
def test_a_planted_effect_is_found_with_its_sign_and_size_and_nothing_else(factor, word):
    comparison = simulate(12, factors={"classifier": factor, "held-out loss": factor})
    for name in ("classifier/area", "classifier/end", "held-out loss/end", "held-out loss/time"):
        for weights in ("average", "raw"):
            found = comparison.finding("stf:64", f"{weights}/{name}")
            assert found.direction == word
            assert found.estimate.low < log(factor) + 0.05
            assert found.estimate.high > log(factor) - 0.05
    others = {str(f.endpoint) for f in comparison.findings if f.direction == "not distinguishable"}
    assert {"average/efficientnet-lite0/end", "raw/excess/end", "average/classifier/roughness"} <= others
    assert word in summarize(comparison)[0]


def test_a_planted_spread_over_seeds_is_found():
    found = simulate(30, noisier=8.0).finding("stf:64", "raw/classifier/spread")
    assert found.direction == "increases"
    assert found.endpoint.title == "distance (classifier), spread over seeds"


def test_equal_time_gives_the_slower_target_fewer_images():
    # values fall as images^-0.4, so 10 % more time per image costs a factor of 1.1^0.4
    plain, slow, fast = (simulate(200, ratio=ratio) for ratio in (1.0, 1.1, 1 / 1.1))
    end = plain.finding("stf:64", "average/held-out loss/end").estimate.mean
    means = [each.finding("stf:64", "average/held-out loss/time").estimate.mean for each in (plain, slow, fast)]
    assert means[0] == pytest.approx(end)
    assert means[1] - end == pytest.approx(0.4 * log(1.1), abs=0.005)
    assert means[2] - end == pytest.approx(-0.4 * log(1.1), abs=0.005)
    curves = [Curve([1, 2], [2.0, 1.0])] * 3
    assert isnan(measure_endpoint(Endpoint("raw", "held-out loss", "time"), curves, curves).mean)


def test_the_paired_variance_test_agrees_with_its_closed_form_and_its_interval():
    # Pitman (1939): t = (w - 1) sqrt(n - 2) / (2 sqrt(w (1 - r^2))) with the ratio w of variances
    from scipy.stats import t as student

    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        shared = random.normal(size=9)
        first, second = 1.5 * (shared + 0.7 * random.normal(size=9)), shared + 0.7 * random.normal(size=9)
        found = spread_ratio(list(first), list(second))
        w, r = first.var() / second.var(), np.corrcoef(first, second)[0, 1]
        statistic = (w - 1) * sqrt(7) / (2 * sqrt(w * (1 - r * r)))
        assert found.p == pytest.approx(2 * student.sf(abs(statistic), 7), rel=1e-6)
        assert found.mean == pytest.approx(0.5 * log(w))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        covered += found.low < log(1.5) < found.high
    assert covered / 300 == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(("pairs", "measured"), [(0, False), (3, False), (4, False), (5, True), (6, True)])
def test_a_spread_over_seeds_is_measured_from_five_pairs_on(pairs: int, measured: bool):
    found = simulate(pairs or 1, noisier=8.0).finding("stf:64", "raw/classifier/spread")
    assert (found.direction != "not measured") == measured
    values = [float(n * n) for n in range(pairs)]
    assert isfinite(spread_ratio([2 * value for value in values], values[::-1]).p) == measured


def test_the_area_does_not_depend_on_the_evaluation_points():
    def area(points: int) -> float:
        images = np.geomspace(1000, 16000, points)
        curves = [
            Curve(
                images.tolist(), (factor * images**-0.4 * (1 + bump * np.exp(-(np.log(images / 4000) ** 2)))).tolist()
            )
            for factor, bump in ((0.8, 0.3), (1.0, 0.0))
        ]
        return measure_endpoint(Endpoint("raw", "classifier", "area"), curves[:1], curves[1:]).mean

    fine = area(2000)
    assert area(10) == pytest.approx(fine, abs=0.002)
    assert area(14) == pytest.approx(fine, abs=0.002)
    assert Curve([1, 10, 50], [3.0, 3.0, 3.0]).area() == pytest.approx(log(3))  # uneven spacing weighs nothing
    assert Curve([1, 10], [1.0, 100.0]).area() == pytest.approx(log(10))


def test_intervals_are_students_and_cover_with_their_confidence():
    random = np.random.default_rng(0)
    estimates = [Estimate.from_values(list(random.normal(3, 2, 4))) for _ in range(2000)]
    assert np.mean([e.low <= 3 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([Estimate.from_values(list(random.normal(0, 2, 4))).p < 0.05 for _ in range(2000)]) < 0.065
    for estimate in (Estimate.from_values([1.0]), Estimate.from_values([1.0, nan]), Estimate.from_values([])):
        assert isnan(estimate.p)


def test_holm_adjusts_as_published_and_counts_tests_that_could_not_be_done():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_missing = holm([0.01, nan, 0.04, nan])
    assert with_missing[0] == pytest.approx(0.04)
    assert isnan(with_missing[1])
    p = list(np.random.default_rng(0).uniform(size=30))
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(sorted(range(30), key=lambda i: p[i])))
    assert min(adjusted) == pytest.approx(30 * min(p))


def test_roughness_is_zero_for_a_power_law_and_the_std_of_independent_errors_around_it():
    images = [2**k for k in range(1, 9)]
    power_law = [7 * count**-0.4 for count in images]
    assert not Curve(images, power_law).roughness() > log(1e-12)
    random = np.random.default_rng(0)
    curves = (Curve(images, [v * exp(0.1 * random.normal()) for v in power_law]) for _ in range(4000))
    assert np.mean([exp(2 * curve.roughness()) for curve in curves]) ** 0.5 == pytest.approx(0.1, rel=0.05)
    assert Curve([1000, 4000], [8.0, 8 * 4**-0.4]).at(3000) == pytest.approx(log(8 * 3**-0.4))
    assert isnan(Curve([1000, 4000], [8.0, 2.0]).at(500))
    for statistic in (Curve.area, Curve.end, Curve.roughness):
        assert isnan(statistic(Curve(images, [*power_law[:-1], 0.0])))


def test_every_change_is_named_by_its_direction_and_never_as_infinite():
    endpoint = Endpoint("raw", "excess", "end")
    for mean, p, word in ((0.1, 0.01, "increases"), (-0.1, 0.01, "decreases"), (0.1, 0.2, "not distinguishable")):
        found = Finding("", "stf:64", "dsm", endpoint, Estimate(mean, mean - 0.05, mean + 0.05, p, 5), p)
        assert found.direction == word
        assert found.change.count("%") == 3
    for size in (-2000.0, -1e-9, 0.0, 5.0, 2000.0):
        assert "inf" not in as_percent(size)
    alone = Finding("", "stf:64", "dsm", endpoint, Estimate.from_values([0.1]), nan)
    assert (alone.direction, alone.change) == ("not measured", "+10.5 % (no interval)")


def test_endpoints_are_complete_and_their_hash_changes_with_any_of_them():
    endpoints = fixed_endpoints(SPACES)
    assert len(endpoints) == len(set(map(str, endpoints))) == 22
    assert {e.weights for e in endpoints} == {"average", "raw"}
    assert all(Endpoint.parse(str(e)) == e for e in endpoints)
    assert endpoints_hash(endpoints) != endpoints_hash(endpoints[1:]) != endpoints_hash(endpoints[::-1])


def test_the_page_reports_every_endpoint_with_increases_called_increases(tmp_path):
    comparison = simulate(10, factors={"classifier": 0.7, "held-out loss": 1.3}, targets=("dsm", "stf:64", "exact"))
    write_page(comparison, tmp_path / "docs" / "page.md")
    text = (tmp_path / "docs" / "page.md").read_text()
    table = text.partition("## All endpoints")[2]
    rows = [line for line in table.splitlines() if line.startswith(("| distance", "| held-out", "| excess"))]
    assert len(rows) == 22
    assert all("stf:64 against dsm" in text and "increases" in row for row in rows if "held-out loss, at the" in row)
    assert "Of 44 endpoints fixed before the runs" in text
    for word in ("inf", "nan", "no difference", "FID is"):
        assert word not in text.partition("## Methods")[0]
    assert all(f"](page-{name}.png)" in text for name in ("distance", "endpoints", "loss"))
    assert len(list((tmp_path / "docs").glob("page-*.png"))) == 3
    for detail in ("a command", "2026-01-02", "0-9", endpoints_hash(comparison.experiment.endpoints), "device cpu"):
        assert detail in text
