"""The tables of a report, as rows of text: the same for HTML and Markdown."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from stablefield.banded import in_words
from stablefield.compare.experiment import Arm
from stablefield.compare.findings import change, percent_of
from stablefield.compare.results import GOALS, Results
from stablefield.compare.statistics import Estimate
from stablefield.config import Config

AT_EQUAL_TIME = ("frechet", "held_out_loss")


@dataclass(frozen=True)
class Table:
    """Rows under a heading, and what they mean."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(results: Results) -> list[Table]:
    """All that can be said of what is there."""
    if results.last is None:
        return []
    found = [_scores(results), _changes(results), _needed(results)]
    if isfinite(results.deadline):  # no turn, no time
        found += [_equal_time(results), _needed(results, seconds=True)]
    return [*found, _costs(results)]


def methods(results: Results) -> list[tuple[str, str]]:
    """How the numbers came about, point by point."""
    experiment, about, machine = results.experiment, results.about, results.machine
    config, training = experiment.config, experiment.config["training"]
    half_life = experiment.config.training.half_lives[0]
    accuracy = "" if about["accuracy"] is None else f" ({about['accuracy']:.1%} right on images it has not seen)"
    levels = f"{about['levels'][0]:.3g} to {about['levels'][-1]:.3g}"
    return [
        ("data", f"{_part(config, 'data')}; {about['trained']:,} trained on, {about['held_out']:,} held out"),
        ("process", f"{_part(config, 'process')}; times {_part(config, 'times')}; weight {_part(config, 'weight')}"),
        ("network", f"{_part(config, 'network')}; scaling {_part(config, 'scaling')}"),
        (
            "training",
            f"{experiment.images:,} images a run, {training['batch_size']} a step, learning rate "
            f"{training['learning_rate']:g} after {training['ramp']:,} images; scored is the average of the weights, "
            f"half-life {half_life:,.0f} images or {training['ema_ramp_up']:g} of those seen",
        ),
        ("targets", "; ".join(_told(arm, about["trained"], config) for arm in experiment.arms)),
        (
            "pairing",
            "runs with one seed share initial weights, order of images, times and noise, and differ in the target",
        ),
        (
            "samples",
            f"{experiment.samples:,} a look, from the same seeds for all runs; {_part(config, 'sampler')}, "
            f"{_evaluations(results)} network evaluations each",
        ),
        (
            "quality",
            f"Frechet distance to the training data in features of {about['features']}{accuracy}; it is not FID. "
            f"The held-out images themselves score {about['real']:.3g}",
        ),
        (
            "denoising",
            f"{experiment.rows} x_t at each of {len(about['levels'])} noise levels from {levels}, the same for all "
            "runs; sums over levels are weighted as training weighs them",
        ),
        (
            "intervals",
            "95 %, Student's t over seeds; differences are taken seed by seed, changes in per cent from logarithms of "
            "ratios. Many are looked at: one in twenty leaves out zero by chance",
        ),
        (
            "machine",
            f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads a job, {machine['jobs']} at "
            f"once; PyTorch {machine['torch']}, Python {machine['python']}; begun {experiment.begun}",
        ),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("command", experiment.command),
    ]


def _told(arm: Arm, members: int, config: Config) -> str:
    """What an arm teaches, in words."""
    number, bands = arm.number or 0, config["target"].get("bands", ())
    told = {
        "single": "the x that x_t was made from",
        "reference": f"the weighted mean over that x and {number - 1:,} others, drawn anew at each step",
        "neighbours": f"the weighted mean over the {number:,} nearest to x_t if that x is among them, else that x",
        "full": f"E[x | x_t] over all {members:,} members of the data",
        "pruned": f"E[x | x_t] over all {members:,} members of the data, but for those whose share could not be seen",
        "auto": f"another of these at each sigma / alpha: {in_words(bands)}",
    }
    return f"{arm.title}: {told[arm.kind]}"


def _scores(results: Results) -> Table:
    def row(arm: Arm) -> list[str]:
        names = ("frechet", "frechet_held_out", "held_out_loss", "exact_error", "nearest_ratio", "copies")
        return [arm.title, *(interval(_last(results, arm, name)) for name in names)]

    return Table(
        f"After {results.last:,} images",
        "Mean over seeds ± half of the 95 % interval. Lower is better for the first three. Nearest: median distance "
        "from samples to their nearest training image, over that of held-out images; copies: share of samples whose "
        "nearest training image is less than a third as far as the second "
        f"({results.about['copies_held_out']:.3g} of the held-out images).",
        ["target", "Frechet", "Frechet to held-out data", "held-out loss", "error to exact", "nearest", "copies"],
        [row(arm) for arm in results.experiment.arms],
    )


def _changes(results: Results) -> Table:
    names = ("frechet", "frechet_held_out", "held_out_loss", "exact_error", "gradient_variance")

    def row(arm: Arm) -> list[str]:
        assert results.last is not None
        return [arm.title, *(change(results.ratio(arm, results.last, name)) for name in names)]

    return Table(
        f"Against {results.baseline.title}, pair by pair",
        "Change with its 95 % interval; one that holds zero is no finding.",
        ["target", "Frechet", "Frechet to held-out data", "held-out loss", "error to exact", "gradient variance"],
        [row(arm) for arm in results.others],
    )


def _needed(results: Results, *, seconds: bool = False) -> Table:
    assert results.last is not None
    quality = _last(results, results.baseline, "frechet").mean
    first = results.marks[0]

    def cell(arm: Arm, goal: float) -> str:
        needed = results.needed(arm, goal * quality)
        reached = sorted(images for images in needed.values() if isfinite(images))
        if not reached:
            return "not reached"
        unit = results.pace(arm) / 1000 if seconds else 1.0
        ends = [_number(unit * images) for images in dict.fromkeys((reached[0], reached[-1]))]
        spread = f"{'at most ' if reached[-1] <= first else ''}{' to '.join(ends)}"
        if len(reached) < len(needed):
            spread += f"; {len(needed) - len(reached)} of {len(needed)} not"
        speed = (results.faster if seconds else results.speed)(arm, goal * quality)
        return spread if arm == results.baseline or speed.n < 2 else f"{spread}; {change(speed)}"

    title, note = NEEDED[seconds]
    return Table(
        title,
        note.format(results.baseline.title),
        ["target", *(f"{_number(goal * quality)} ({goal:g} ×)" for goal in GOALS)],
        [[arm.title, *(cell(arm, goal) for goal in GOALS)] for arm in results.experiment.arms],
    )


NEEDED = {
    False: (
        "Images needed to reach a quality",
        "First time that the Frechet distance is as low as {}'s last mean, times a factor; least and most over seeds, "
        "on a line in log images between two looks. Changes are pair by pair, over the seeds where both got there.",
    ),
    True: (
        "Seconds needed to reach a quality",
        "The same in seconds of training. The time of a step is one number for each target, as above, "
        "so the intervals are those of images.",
    ),
}


def _equal_time(results: Results) -> Table:
    def row(arm: Arm) -> list[str]:
        means = [interval(Estimate.of(list(results.at_equal_time(arm, name).values()))) for name in AT_EQUAL_TIME]
        changes = [change(results.ratio_at_equal_time(arm, name)) for name in AT_EQUAL_TIME]
        images = f"{results.by_then(arm):,.0f}"
        return [arm.title, images, *means, *(changes if arm != results.baseline else [""] * len(changes))]

    return Table(
        f"After equal time, {_number(results.deadline)} s of training",
        "When the fastest target has seen its last image, on a line in log images between two looks; changes against "
        f"{results.baseline.title} are pair by pair. Time is that of training alone, without preparing and scoring, by "
        f"one clock: {results.baseline.title}'s median, and what the others take beside it, stretch by stretch.",
        ["target", "images", "Frechet", "held-out loss", "Frechet, change", "held-out loss, change"],
        [row(arm) for arm in results.experiment.arms],
    )


def _costs(results: Results) -> Table:
    def row(arm: Arm) -> list[str]:
        total, part = (_last(results, arm, name).mean for name in ("gradient_variance", "gradient_variance_of_target"))
        return [
            arm.title,
            _number(_last(results, arm, "frechet").deviation),
            _number(100 * results.roughness(arm).mean) + " %",
            _number(total),
            f"{part / total:.1%}" if total > 0 else "",
            f"{results.seconds(arm):.3g}",
            "" if arm == results.baseline else percent_of(results.overhead(arm)),
        ]

    return Table(
        "Steadiness and cost",
        "Deviation of the Frechet distance over seeds at the end, and from look to look (relative, from second "
        "differences over the last half of the run, so that a bend counts too); Tr Cov of a gradient, "
        "and the target's share of it; seconds per thousand "
        "images, the median over stretches of the runs, and against the baseline, pair by pair.",
        [
            "target",
            "over seeds",
            "over looks",
            "gradient variance",
            "the target's share",
            "s per 1,000 images",
            "overhead",
        ],
        [row(arm) for arm in results.experiment.arms],
    )


def interval(estimate: Estimate) -> str:
    """A mean with half its interval.

    >>> interval(Estimate(12.345, 0.678, 0.5, 3))
    '12.3 ± 0.68'
    """
    half = f"{estimate.half:.2g}" if estimate.half < 100 else _number(estimate.half)
    return _number(estimate.mean) + (f" ± {half}" if isfinite(estimate.half) else "")


def _number(value: float) -> str:
    if not isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _last(results: Results, arm: Arm, name: str) -> Estimate:
    assert results.last is not None
    return results.over_seeds(arm, results.last, name)


def _evaluations(results: Results) -> int:
    return next(line["evaluations"] for lines in results.scores.values() for line in lines)


def _part(config: Any, section: str) -> str:
    """A section in short: its kind, and what else is said."""
    said = {k: v for k, v in config[section].items() if k not in ("kind", "holdout") and v is not None}
    inner = ", ".join(f"{key} {value}" for key, value in said.items())
    return f"{config[section]['kind']}" + (f" ({inner})" if inner else "")
