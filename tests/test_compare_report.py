"""The report stands alone, says no more than the numbers do, and can be looked at on a screen and on a phone."""

import csv
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from math import exp, inf, log
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablefield.checkpoint import replacing
from stablefield.compare import Arm, Experiment, Results, findings, write_report
from stablefield.compare.experiment import NUMBER
from stablefield.config import overlay, override, resolve

pytestmark = pytest.mark.usefixtures("unchecked")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LEVELS = [0.02, 0.2, 2.0]


def line(images: int, **changed: float) -> dict:
    """What a look finds, in round numbers."""
    told = {"frechet": 5e4 / images, "held_out_loss": 0.5, "exact_error": 0.2, "nearest_ratio": 1.0, "copies": 0.0}
    told |= {"frechet_held_out": 6e4 / images, "gradient_variance": 0.3, "gradient_variance_of_target": 0.1}
    told |= {"gradient_squared_mean": 0.2, "evaluations": 12, "images": images} | changed
    return told | {
        f"{name}_by_level": [told[name] * (1 + k) for k in range(3)] for name in ("exact_error", "held_out_loss")
    }


TWO = (Arm("single"), Arm("reference", 64))


def made(out: Path, gains: dict[str, float], seeds: int = 4, pace: float = 2.1, arms: tuple[Arm, ...] = TWO) -> Path:
    """An experiment whose second arm is so many times the first, up to a little luck; no training needed."""
    source = np.random.default_rng(0)
    config = resolve(override({}, ["training.images=16000", "training.batch_size=10", "data.holdout=100"]))
    experiment = Experiment(
        config, arms, tuple(range(seeds)), looks=5, samples=50, rows=8, command="stablefield <compare>"
    )
    experiment.write(out)
    real = {"real": 2.0, "nearest_held_out": 1.0, "copies_held_out": 0.0, "trained": 1697, "held_out": 100}
    said = {
        "levels": LEVELS,
        "shares": [0.2, 0.5, 0.3],
        "weights": [1.0, 1.0, 1.0],
        "features": "pixels",
        "accuracy": 0.9,
    }
    (out / "yardstick.json").write_text(json.dumps(said | real))
    machine = {"device": "cpu", "cores": 2, "threads": 1, "jobs": 1, "torch": "2", "python": "3"}
    (out / "machine.json").write_text(json.dumps(machine))
    for arm in arms:
        for seed in range(seeds):
            folder = experiment.folder(out, arm, seed)
            (folder.path / "samples").mkdir(parents=True)
            for mark in experiment.marks:
                luck = 1 + 0.02 * source.normal()
                changed = {name: line(mark)[name] * gain * luck for name, gain in gains.items() if arm.number}
                with (folder.path / "looks.jsonl").open("a") as file:
                    file.write(json.dumps(line(mark, **changed)) + "\n")
                Image.fromarray(source.integers(0, 255, (80, 80), dtype=np.uint8)).save(
                    folder.path / "samples" / f"{mark:09d}.png"
                )
                folder.log(
                    {"Progress/kimg": mark / 1000, "Loss/loss": 0.5, "Target/ess": 3.0}
                    | {"Timing/sec_per_kimg": pace if arm.number else 2.0}
                )
    return out


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = made(tmp_path_factory.mktemp("made"), {"frechet": 0.8})
    write_report(out)
    return out


class Page(HTMLParser):
    """What a page refers to, and whether what it opens is closed."""

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


def test_the_page_needs_nothing_else_and_is_well_formed(report):
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


def test_every_plot_says_what_its_axes_are(report):
    page = Page((report / "report.html").read_text())
    for image in page.images:
        if "svg" in image["src"][:20]:
            drawing = ElementTree.fromstring(b64decode(image["src"].partition(",")[2]))
            words = " ".join(drawing.itertext())
            assert re.search(r"images seen|training time \(s\)|noise level sigma / alpha \(data units\)", words)
            assert re.search(r"units|%|weighted, per dimension|effective number", words)
            assert "STF, n = 64" in words


def test_every_number_is_in_the_json_and_the_csv(report):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    whole = json.loads((report / "results.json").read_text(), parse_constant=refuse)
    with (report / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    # a score is 10 numbers, two at three levels and its time; a turn three numbers
    assert len(rows) == len(whole["scores"]) * 17 + len(whole["training"]) * 3 == 40 * 20
    last = [r for r in rows if (r["arm"], r["images"], r["name"]) == ("reference:64", "16000", "frechet")]
    found = whole["statistics"]["arms"]["reference:64"]["scores"]["frechet"]
    assert np.mean([float(r["value"]) for r in last]) == pytest.approx(found["mean"])
    assert found["n"] == 4
    assert whole["statistics"]["arms"]["single"]["overhead"] == 0
    assert whole["statistics"]["arms"]["reference:64"]["overhead"] == pytest.approx(0.05)
    assert {r["noise_level"] for r in rows} == {"", *(f"{level:g}" for level in LEVELS)}


def test_the_summary_has_the_tables_of_the_page(report):
    page, summary = ((report / name).read_text() for name in ("report.html", "summary.md"))
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert len(cells) > 20
    assert all(cell in summary for cell in cells)
    assert "](summary.svg)" in summary
    assert "`stablefield <compare>`" in summary


def test_a_target_that_takes_twice_as_long_has_seen_half_as_much_after_equal_time(tmp_path):
    results = Results.read(made(tmp_path, {"frechet": 0.8}, pace=4.0))  # and Frechet falls as 1 / images
    single, stable = results.experiment.arms
    assert results.deadline == pytest.approx(32)
    assert [results.by_then(arm) for arm in (single, stable)] == [16000, 8000]
    assert results.at_equal_time(single, "frechet") == results.at(single, 16000, "frechet")
    assert results.at_equal_time(stable, "frechet") == results.at(stable, 8000, "frechet")
    for change, factor in ((results.ratio_at_equal_time(stable, "frechet"), 1.6), (results.faster(stable, 10), 1.6)):
        assert exp(change.mean) == pytest.approx(factor, rel=0.05)
    assert results.faster(stable, 10).mean == pytest.approx(results.speed(stable, 10).mean + log(2))
    text = " ".join(findings(results))
    assert re.search(r"samples to the data: lower, -(19|20|21)\.\d %", text)
    assert re.search(r"after equal time, 32 s: higher, \+[56]\d\.\d %", text)


def test_the_faster_target_sets_the_time_also_where_it_is_not_the_first(tmp_path):
    results = Results.read(made(tmp_path, {"frechet": 1.0}, pace=1.0))
    single, stable = results.experiment.arms
    assert results.deadline == pytest.approx(16)
    assert [results.by_then(arm) for arm in (single, stable)] == [8000, 16000]
    assert exp(results.ratio_at_equal_time(stable, "frechet").mean) == pytest.approx(0.5, rel=0.05)


def test_what_slows_the_machine_down_slows_no_target_down_more(tmp_path):
    out = made(tmp_path, {"frechet": 0.8})
    experiment = Experiment.read(out)
    before = Results.read(out)
    for arm in experiment.arms:  # one seed of both, while something else was running
        place = experiment.folder(out, arm, 2).metrics
        lines = [json.loads(text) for text in place.read_text().splitlines()]
        slow = [line | {"Timing/sec_per_kimg": 3 * line["Timing/sec_per_kimg"]} for line in lines]
        with replacing(place) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in slow))
    after = Results.read(out)
    for arm in experiment.arms:
        assert after.pace(arm) / after.pace(after.baseline) == pytest.approx(before.pace(arm) / 2.0)
        assert after.by_then(arm) == pytest.approx(before.by_then(arm))


@pytest.mark.parametrize("images", [3_000, 16_000, 150_000, 640_000])
def test_what_is_paid_beforehand_counts_for_the_steps_that_it_was_paid_for(images):
    config = resolve(override({}, [f"training.images={images}", "training.batch_size=72", "network.kind=mlp"]))
    arms = Arm("single"), Arm("full")
    experiment = Experiment(config, arms, (0, 1), looks=3)
    assert experiment.stretch == 14 * 72  # of 1,024 rows
    training = {(arm, seed): [] for arm in arms for seed in (0, 1)}
    for (arm, _), lines in training.items():
        before = 0
        for goal in experiment.goals:
            # a step takes 1 s, and that all data pass 7 s for 14 steps, at the first of them
            steps = range(before, goal, 72)
            spent = len(steps) + (7 * sum(step % (14 * 72) == 0 for step in steps) if arm == arms[1] else 0)
            lines.append({"Progress/kimg": goal / 1000, "Timing/sec_per_kimg": 1000 * spent / (goal - before)})
            before = goal
    results = Results(experiment, {}, training, {}, {})
    assert results.seconds(arms[0]) == pytest.approx(1000 / 72)
    assert results.overhead(arms[1]) == pytest.approx(0.5)


def test_a_stretch_counts_from_its_last_image_on(tmp_path):
    config = resolve(override({}, ["training.images=50000", "training.batch_size=77", "network.kind=mlp"]))
    arms = Arm("single"), Arm("full")
    experiment = Experiment(config, arms, (0,), looks=2)
    assert experiment.stretch == 1001  # 1.001 thousands are a little less than that, as floating numbers are
    for images, stretches in ((924, [0]), (1001, [0]), (1078, [0]), (2002, [0, 1])):
        turns = [end for end in (924, 1001, 1078, 2002) if end <= images]
        lines = [{"Progress/kimg": end / 1000, "Timing/sec_per_kimg": 10.0} for end in turns]
        results = Results(experiment, {}, {(arm, 0): lines for arm in arms}, {}, {})
        assert list(results.paces(arms[0], 0)) == stretches


def test_an_experiment_without_any_time_is_compared_at_equal_images_alone(tmp_path):
    out = made(tmp_path, {"frechet": 0.8})
    for place in out.rglob("metrics.jsonl"):
        place.unlink()
    write_report(out)
    text = (out / "report.html").read_text()
    assert "After 16,000 images" in text
    assert "equal time" not in text
    assert json.loads((out / "results.json").read_text())["statistics"]["seconds"] is None


def said(folder: Path, **gains: float) -> str:
    return " ".join(findings(Results.read(made(folder, gains))))


def test_a_gain_is_claimed_where_the_seeds_show_it(tmp_path):
    text = said(tmp_path, frechet=0.8)
    assert "Samples surely better than DSM's: STF, n = 64." in text
    assert re.search(r"samples to the data: lower, -(19|20|21)\.\d %", text)
    assert "A step took 5 % more time." in text
    assert "memorisation" not in text


def test_no_gain_is_said_plainly(tmp_path):
    text = said(tmp_path, frechet=1.0, held_out_loss=1.0)
    assert "No difference in samples that can be told from chance: STF, n = 64." in text


def test_a_loss_is_said_too(tmp_path):
    assert "Samples surely worse than DSM's: STF, n = 64." in said(tmp_path, frechet=1.3)


def test_a_gain_in_the_exact_error_alone_is_called_memorisation(tmp_path):
    assert "alone, that is memorisation, not quality" in said(tmp_path / "alone", exact_error=0.7)
    assert "memorisation" not in said(tmp_path / "both", exact_error=0.7, held_out_loss=0.8)
    assert "mind memorisation" in said(tmp_path / "worse", exact_error=0.7, frechet=0.7, held_out_loss=1.2)


def test_one_seed_claims_nothing(tmp_path):
    text = " ".join(findings(Results.read(made(tmp_path, {"frechet": 0.5}, seeds=1))))
    assert "One seed cannot tell a difference from chance" in text
    assert "surely" not in text


def test_half_an_experiment_is_compared_at_equal_images_over_common_seeds(tmp_path):
    out = made(tmp_path, {"frechet": 0.8})
    experiment = Experiment.read(out)
    for seed, kept in ((0, 5), (1, 4), (2, 4), (3, 0)):
        place = experiment.folder(out, experiment.arms[1], seed).path / "looks.jsonl"
        lines = place.read_text().splitlines(keepends=True)
        with replacing(place) as beside:
            beside.write_text("".join(lines[:kept]))
    results = Results.read(out)
    assert results.last == experiment.marks[3]
    assert results.common(results.last) == {0, 1, 2}
    write_report(out)
    text = (out / "report.html").read_text()
    assert f"After {experiment.marks[3]:,} images" in text
    assert "The experiment is not finished" in text


def test_an_experiment_without_any_score_has_a_report_that_says_so(tmp_path):
    out = made(tmp_path, {})
    for place in out.rglob("looks.jsonl"):
        place.unlink()
    write_report(out)
    assert "Nothing has been scored yet" in (out / "report.html").read_text()


def chromium(*arguments: object) -> str:
    assert CHROMIUM is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    found = subprocess.run([CHROMIUM, *flags, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_on_a_screen_and_on_a_phone(report, tmp_path, width):
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
    found = dict(re.findall(r'data-(width|shown)="(\d+)"', page))
    assert int(found["width"]) <= width  # nothing sticks out
    assert int(found["shown"]) == 14


def test_every_target_that_can_be_compared_is_told_of_in_words(tmp_path):
    arms = tuple(Arm(kind, 64 if key else None) for kind, key in NUMBER.items())
    out = made(tmp_path, {"frechet": 0.8}, seeds=1, arms=arms)
    experiment = Experiment.read(out)
    bands = [[2.5, "single"], [inf, "reference:64"]]
    config = resolve(overlay(experiment.config.sections, {"target": {"kind": "auto", "bands": bands}}))
    replace(experiment, config=config).write(out)
    write_report(out, tmp_path / "summary.md")
    said = (tmp_path / "summary.md").read_text()
    assert all(f"{arm.title}: " in said for arm in arms)
    assert "single up to 2.5, reference:64 beyond" in said
