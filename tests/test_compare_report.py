"""The report is self-contained, claims no more than the numbers show, and fits screens of any width."""

import csv
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablefield.config import override, resolve
from stablefield.files import atomic_path
from stablefield.studies.compare import Arm, Experiment, Results, summarize, write_report
from stablefield.studies.compare.experiment import SUPPORT_SIZE_KEYS

pytestmark = pytest.mark.usefixtures("unchecked")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LEVELS = [0.02, 0.2, 2.0]


def scores(images: int, **changed: float) -> dict:
    """Scores of an evaluation, in round numbers."""
    values = {"frechet": 5e4 / images, "held_out_loss": 0.5, "exact_error": 0.2, "nearest_ratio": 1.0, "copies": 0.0}
    values |= {"frechet_held_out": 6e4 / images, "gradient_variance": 0.3, "gradient_variance_of_target": 0.1}
    values |= {"gradient_squared_mean": 0.2, "network_evaluations": 12, "images": images} | changed
    return values | {
        f"{name}_by_level": [values[name] * (1 + k) for k in range(3)] for name in ("exact_error", "held_out_loss")
    }


DSM_AND_STF = (Arm("dsm"), Arm("stf", 64))


def write_experiment(
    out: Path,
    factors: dict[str, float],
    seeds: int = 4,
    seconds_per_kimg: float = 2.1,
    arms: tuple[Arm, ...] = DSM_AND_STF,
) -> Path:
    """Write an experiment without training, in which the second arm has scores times given factors and some scatter."""
    random = np.random.default_rng(0)
    config = resolve(override({}, ["training.images=16000", "training.batch_size=10", "data.holdout=100"]))
    experiment = Experiment(
        config, arms, tuple(range(seeds)), evaluations=5, samples=50, examples=8, command="stablefield <compare>"
    )
    experiment.write(out)
    evaluator = {
        "levels": LEVELS,
        "shares": [0.2, 0.5, 0.3],
        "weights": [1.0, 1.0, 1.0],
        "features": "pixels",
        "accuracy": 0.9,
        "train_size": 1697,
        "held_out_size": 100,
        "frechet_of_held_out": 2.0,
        "nearest_of_held_out": 1.0,
        "copies_of_held_out": 0.0,
    }
    (out / "evaluator.json").write_text(json.dumps(evaluator))
    machine = {"device": "cpu", "cores": 2, "threads": 1, "jobs": 1, "torch": "2", "python": "3"}
    (out / "machine.json").write_text(json.dumps(machine))
    for arm in arms:
        for seed in range(seeds):
            folder = experiment.run_folder(out, arm, seed)
            (folder.path / "samples").mkdir(parents=True)
            for images in experiment.evaluation_points:
                scatter = 1 + 0.02 * random.normal()
                changed = {
                    name: scores(images)[name] * factor * scatter for name, factor in factors.items() if arm.number
                }
                with (folder.path / "evaluations.jsonl").open("a") as file:
                    file.write(json.dumps(scores(images, **changed)) + "\n")
                Image.fromarray(random.integers(0, 255, (80, 80), dtype=np.uint8)).save(
                    folder.path / "samples" / f"{images:09d}.png"
                )
                folder.log(
                    {"progress/kimg": images / 1000, "loss/loss": 0.5, "target/ess": 3.0}
                    | {"timing/sec_per_kimg": seconds_per_kimg if arm.number else 2.0}
                )
    return out


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = write_experiment(tmp_path_factory.mktemp("experiment"), {"frechet": 0.8})
    write_report(out)
    return out


class Page(HTMLParser):
    """References and tags of an HTML page; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.links, self.tags, self.cells = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.images += [values] if tag == "img" else []
        self.links += [value for name, value in attributes if name in ("href", "src", "srcset", "action", "data")]
        self.open += [tag] if tag not in ("img", "meta", "br") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?:|//cdn|@import|url\(|<script|<link", text)
    assert {"h1", "table", "dl", "figure", "figcaption"} <= set(page.tags)
    assert all(image["alt"] for image in page.images)
    kinds = [image["src"].split(";")[0] for image in page.images]
    assert kinds.count("data:image/svg+xml") == 10
    assert kinds.count("data:image/png") == 4  # two arms, early and at the end
    assert "stablefield &lt;compare&gt;" in text


def test_every_plot_labels_its_axes(report):
    page = Page((report / "report.html").read_text())
    for image in page.images:
        if "svg" in image["src"][:20]:
            drawing = ElementTree.fromstring(b64decode(image["src"].partition(",")[2]))
            words = " ".join(drawing.itertext())
            assert re.search(r"images seen|training time \(s\)|noise level sigma / alpha \(data units\)", words)
            assert re.search(r"units|%|weighted, per dimension|effective sample size", words)
            assert "STF, n = 64" in words


def test_every_number_is_in_the_json_and_the_csv(report):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((report / "results.json").read_text(), parse_constant=refuse)
    with (report / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    # an evaluation has 10 numbers, two at three noise levels and its time; a line of training metrics has three
    assert len(rows) == len(results["scores"]) * 17 + len(results["training"]) * 3 == 40 * 20
    last = [r for r in rows if (r["arm"], r["images"], r["name"]) == ("stf:64", "16000", "frechet")]
    estimate = results["statistics"]["arms"]["stf:64"]["scores"]["frechet"]
    assert np.mean([float(r["value"]) for r in last]) == pytest.approx(estimate["mean"])
    assert estimate["n"] == 4
    assert results["statistics"]["arms"]["dsm"]["overhead"] == 0
    assert results["statistics"]["arms"]["stf:64"]["overhead"] == pytest.approx(0.05)
    assert {r["noise_level"] for r in rows} == {"", *(f"{level:g}" for level in LEVELS)}


def test_the_summary_has_the_tables_of_the_page(report):
    page, summary = ((report / name).read_text() for name in ("report.html", "summary.md"))
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert len(cells) > 20
    assert all(cell in summary for cell in cells)
    assert "](summary.svg)" in summary
    assert "`stablefield <compare>`" in summary


def test_a_target_that_takes_twice_as_long_has_seen_half_as_many_images_after_equal_time(tmp_path):
    # the Frechet distance falls as 1 / images
    results = Results.read(write_experiment(tmp_path, {"frechet": 0.8}, seconds_per_kimg=4.0))
    dsm, stf = results.experiment.arms
    assert results.equal_time == pytest.approx(32)
    assert [results.images_at_equal_time(arm) for arm in (dsm, stf)] == [16000, 8000]
    assert results.by_seed_at_equal_time(dsm, "frechet") == results.by_seed(dsm, 16000, "frechet")
    assert results.by_seed_at_equal_time(stf, "frechet") == results.by_seed(stf, 8000, "frechet")
    seconds = results.log_ratio_of_seconds(stf, 10)
    for change, factor in ((results.log_ratio_at_equal_time(stf, "frechet"), 1.6), (seconds, 1.6)):
        assert exp(change.mean) == pytest.approx(factor, rel=0.05)
    assert seconds.mean == pytest.approx(results.log_ratio_of_images(stf, 10).mean + log(2))
    text = " ".join(summarize(results))
    assert re.search(r"samples to the training data: lower, -(19|20|21)\.\d %", text)
    assert re.search(r"after equal time, 32 s: higher, \+[56]\d\.\d %", text)


def test_the_fastest_target_sets_the_equal_time_even_if_it_is_not_the_baseline(tmp_path):
    results = Results.read(write_experiment(tmp_path, {"frechet": 1.0}, seconds_per_kimg=1.0))
    dsm, stf = results.experiment.arms
    assert results.equal_time == pytest.approx(16)
    assert [results.images_at_equal_time(arm) for arm in (dsm, stf)] == [8000, 16000]
    assert exp(results.log_ratio_at_equal_time(stf, "frechet").mean) == pytest.approx(0.5, rel=0.05)


def test_a_busy_machine_does_not_change_relative_times(tmp_path):
    out = write_experiment(tmp_path, {"frechet": 0.8})
    experiment = Experiment.read(out)
    before = Results.read(out)
    for arm in experiment.arms:  # both arms of one seed trained while the machine was busy
        file = experiment.run_folder(out, arm, 2).metrics
        lines = [json.loads(text) for text in file.read_text().splitlines()]
        slow = [line | {"timing/sec_per_kimg": 3 * line["timing/sec_per_kimg"]} for line in lines]
        with atomic_path(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in slow))
    after = Results.read(out)
    for arm in experiment.arms:
        ratio = after.paired_seconds_per_kimg(arm) / after.paired_seconds_per_kimg(after.baseline)
        assert ratio == pytest.approx(before.paired_seconds_per_kimg(arm) / 2.0)
        assert after.images_at_equal_time(arm) == pytest.approx(before.images_at_equal_time(arm))


@pytest.mark.parametrize("images", [3_000, 16_000, 150_000, 640_000])
def test_the_time_of_prefetched_targets_is_spread_over_the_steps_that_use_them(images):
    config = resolve(override({}, [f"training.images={images}", "training.batch_size=72", "network.kind=mlp"]))
    arms = Arm("dsm"), Arm("exact")
    experiment = Experiment(config, arms, (0, 1), evaluations=3)
    assert experiment.segment_images == 14 * 72  # at most 1,024 examples
    training = {(arm, seed): [] for arm in arms for seed in (0, 1)}
    for (arm, _), lines in training.items():
        before = 0
        for point in experiment.switch_points:
            # a step takes 1 s, and exact targets take 7 s for 14 steps, in the first of them
            steps = range(before, point, 72)
            seconds = len(steps) + (7 * sum(step % (14 * 72) == 0 for step in steps) if arm == arms[1] else 0)
            lines.append({"progress/kimg": point / 1000, "timing/sec_per_kimg": 1000 * seconds / (point - before)})
            before = point
    results = Results(experiment, {}, training, {}, {})
    assert results.seconds_per_kimg(arms[0]) == pytest.approx(1000 / 72)
    assert results.overhead(arms[1]) == pytest.approx(0.5)


def test_a_segment_is_finished_with_its_last_image_in_spite_of_rounding(tmp_path):
    config = resolve(override({}, ["training.images=50000", "training.batch_size=77", "network.kind=mlp"]))
    arms = Arm("dsm"), Arm("exact")
    experiment = Experiment(config, arms, (0,), evaluations=2)
    assert experiment.segment_images == 1001  # 1000 * 1.001 is a little less in floating point
    for images, segments in ((924, [0]), (1001, [0]), (1078, [0]), (2002, [0, 1])):
        counts = [count for count in (924, 1001, 1078, 2002) if count <= images]
        lines = [{"progress/kimg": count / 1000, "timing/sec_per_kimg": 10.0} for count in counts]
        results = Results(experiment, {}, {(arm, 0): lines for arm in arms}, {}, {})
        assert list(results.segment_seconds_per_kimg(arms[0], 0)) == segments


def test_without_training_metrics_arms_are_compared_at_equal_images_only(tmp_path):
    out = write_experiment(tmp_path, {"frechet": 0.8})
    for file in out.rglob("metrics.jsonl"):
        file.unlink()
    write_report(out)
    text = (out / "report.html").read_text()
    assert "After 16,000 images" in text
    assert "equal time" not in text
    assert json.loads((out / "results.json").read_text())["statistics"]["seconds"] is None


def summary_text(folder: Path, **factors: float) -> str:
    return " ".join(summarize(Results.read(write_experiment(folder, factors))))


def test_a_significant_gain_is_claimed(tmp_path):
    text = summary_text(tmp_path, frechet=0.8)
    assert "Samples significantly better than DSM's: STF, n = 64." in text
    assert re.search(r"samples to the training data: lower, -(19|20|21)\.\d %", text)
    assert "A step took 5 % more time." in text
    assert "memorisation" not in text


def test_no_significant_difference_is_reported_as_such(tmp_path):
    text = summary_text(tmp_path, frechet=1.0, held_out_loss=1.0)
    assert "No significant difference in samples: STF, n = 64." in text


def test_a_significant_loss_is_reported(tmp_path):
    assert "Samples significantly worse than DSM's: STF, n = 64." in summary_text(tmp_path, frechet=1.3)


def test_a_gain_in_the_exact_error_alone_is_called_memorisation(tmp_path):
    assert "this is memorisation, not quality" in summary_text(tmp_path / "alone", exact_error=0.7)
    assert "memorisation" not in summary_text(tmp_path / "both", exact_error=0.7, held_out_loss=0.8)
    text = summary_text(tmp_path / "worse", exact_error=0.7, frechet=0.7, held_out_loss=1.2)
    assert "a possible sign of memorisation" in text


def test_nothing_is_claimed_from_one_seed(tmp_path):
    text = " ".join(summarize(Results.read(write_experiment(tmp_path, {"frechet": 0.5}, seeds=1))))
    assert "One seed cannot separate a difference from chance" in text
    assert "significant" not in text


def test_an_unfinished_experiment_is_compared_at_equal_images_over_common_seeds(tmp_path):
    out = write_experiment(tmp_path, {"frechet": 0.8})
    experiment = Experiment.read(out)
    for seed, kept in ((0, 5), (1, 4), (2, 4), (3, 0)):
        file = experiment.run_folder(out, experiment.arms[1], seed).path / "evaluations.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        with atomic_path(file) as temporary:
            temporary.write_text("".join(lines[:kept]))
    results = Results.read(out)
    assert results.compared_at == experiment.evaluation_points[3]
    assert results.common_seeds(results.compared_at) == {0, 1, 2}
    write_report(out)
    text = (out / "report.html").read_text()
    assert f"After {experiment.evaluation_points[3]:,} images" in text
    assert "The experiment is not finished" in text


def test_an_experiment_without_any_evaluation_has_a_report_that_says_so(tmp_path):
    out = write_experiment(tmp_path, {})
    for file in out.rglob("evaluations.jsonl"):
        file.unlink()
    write_report(out)
    assert "Nothing has been evaluated yet" in (out / "report.html").read_text()


def chromium(*arguments: object) -> str:
    assert CHROMIUM is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    process = subprocess.run([CHROMIUM, *flags, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page_without_overflow_on_screens_and_phones(report, tmp_path, width):
    shot, profile = tmp_path / "shot.png", f"--user-data-dir={tmp_path / 'profile'}"
    chromium(profile, f"--window-size={width},5000", f"--screenshot={shot}", (report / "report.html").as_uri())
    grey = np.asarray(Image.open(shot).convert("L"))
    assert grey.shape == (5000, width)
    assert 0.02 < (grey < 128).mean() < 0.5
    measured = tmp_path / "measured.html"
    script = "<script>document.body.dataset.width = document.documentElement.scrollWidth;\
document.body.dataset.shown = [...document.images].filter(i => i.naturalWidth > 0).length</script></body>"
    measured.write_text((report / "report.html").read_text().replace("</body>", script))
    page = chromium(profile, f"--window-size={width},5000", "--dump-dom", measured.as_uri())
    values = dict(re.findall(r'data-(width|shown)="(\d+)"', page))
    assert int(values["width"]) <= width  # nothing overflows
    assert int(values["shown"]) == 14


def test_the_summary_describes_every_kind_of_target(tmp_path):
    arms = tuple(Arm(kind, 64 if key else None) for kind, key in SUPPORT_SIZE_KEYS.items())
    out = write_experiment(tmp_path, {"frechet": 0.8}, seeds=1, arms=arms)
    write_report(out, tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text()
    assert all(f"{arm.title}: " in text for arm in arms)
