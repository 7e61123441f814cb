"""Tables of the report as rows of text, the same for HTML and Markdown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from stablefield.studies.compare.experiment import Arm
from stablefield.studies.compare.results import QUALITY_FACTORS, Results
from stablefield.studies.compare.statistics import Estimate
from stablefield.studies.compare.summary import format_change, format_overhead

__all__ = ["Table", "format_interval", "methods", "tables"]

EQUAL_TIME_SCORES = ("frechet", "held_out_loss")


@dataclass(frozen=True)
class Table:
    """A table with its explanation.

    Attributes:
        title: heading of the table.
        note: explanation of its columns, shown below it.
        head: titles of the columns.
        rows: cells of each row.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(results: Results) -> list[Table]:
    """Tables of the report; none before the first evaluation that all arms have in common.

    Args:
        results: results of the experiment.
    """
    if results.compared_at is None:
        return []
    found = [_scores(results), _changes(results), _images_to_reach(results)]
    if isfinite(results.equal_time):  # without training metrics the time is unknown
        found += [_equal_time(results), _seconds_to_reach(results)]
    return [*found, _costs(results)]


def methods(results: Results) -> list[tuple[str, str]]:
    """The methods, as pairs of a topic and its description.

    Args:
        results: results of the experiment.
    """
    experiment, evaluator, machine = results.experiment, results.evaluator, results.machine
    config, training = experiment.config, experiment.config["training"]
    half_life = experiment.config.training.half_lives[0]
    accuracy = "" if evaluator["accuracy"] is None else f" (accuracy {evaluator['accuracy']:.1%} on other images)"
    levels = f"{evaluator['levels'][0]:.3g} to {evaluator['levels'][-1]:.3g}"
    return [
        (
            "data",
            f"{_section(config, 'data')}; {evaluator['train_size']:,} for training, "
            f"{evaluator['held_out_size']:,} held out",
        ),
        (
            "process",
            f"{_section(config, 'process')}; times {_section(config, 'times')}; weight {_section(config, 'weight')}",
        ),
        ("network", f"{_section(config, 'network')}; preconditioning {_section(config, 'preconditioning')}"),
        (
            "training",
            f"{experiment.images:,} images per run, batch size {training['batch_size']}, learning rate "
            f"{training['learning_rate']:g} after a warmup of {training['learning_rate_warmup']:,} images; the average "
            f"of the weights is evaluated, with a half-life of {half_life:,.0f} images or "
            f"{training['ema_rampup_ratio']:g} of those seen",
        ),
        ("targets", "; ".join(_description(arm, evaluator["train_size"]) for arm in experiment.arms)),
        (
            "pairing",
            "runs with the same seed share initial weights, order of images, times and noise, and differ only in the "
            "target",
        ),
        (
            "samples",
            f"{experiment.samples:,} per evaluation, from the same seeds for all runs; {_section(config, 'sampler')}, "
            f"{_network_evaluations(results)} network evaluations each",
        ),
        (
            "quality",
            f"Frechet distance to the training data in features of {evaluator['features']}{accuracy}; this is not FID. "
            f"The held-out images themselves have a distance of {evaluator['frechet_of_held_out']:.3g}",
        ),
        (
            "denoising",
            f"{experiment.examples} examples x_t at each of {len(evaluator['levels'])} noise levels from {levels}, the "
            "same for all runs; sums over noise levels are weighted as in training",
        ),
        (
            "intervals",
            "95 %, Student's t over seeds; differences are taken seed by seed, changes in per cent from logarithms of "
            "ratios. They are not corrected for multiple comparisons: one in twenty excludes zero by chance",
        ),
        (
            "machine",
            f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads per job, {machine['jobs']} "
            f"jobs; PyTorch {machine['torch']}, Python {machine['python']}; started {experiment.started}",
        ),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("command", experiment.command),
    ]


def format_interval(estimate: Estimate) -> str:
    """A mean with half the width of its interval.

    Args:
        estimate: the estimate.

    >>> format_interval(Estimate(12.345, 0.678, 0.5, 3))
    '12.3 ± 0.68'
    """
    half = f"{estimate.half_width:.2g}" if estimate.half_width < 100 else _number(estimate.half_width)
    return _number(estimate.mean) + (f" ± {half}" if isfinite(estimate.half_width) else "")


def _description(arm: Arm, data_points: int) -> str:
    """The target of an arm in words."""
    number = arm.number or 0
    words = {
        "dsm": "the source x of x_t",
        "stf": f"the weighted mean of the source and {number - 1:,} references, drawn anew at each step",
        "knn": f"the weighted mean of the {number:,} data points nearest to x_t if the source is among them, else the "
        "source",
        "exact": f"E[x | x_t] over all {data_points:,} data points",
    }
    return f"{arm.title}: {words[arm.kind]}"


def _scores(results: Results) -> Table:
    """Means over seeds at the point of comparison."""

    def row(arm: Arm) -> list[str]:
        names = ("frechet", "frechet_held_out", "held_out_loss", "exact_error", "nearest_ratio", "copies")
        return [arm.title, *(format_interval(_final(results, arm, name)) for name in names)]

    return Table(
        f"After {results.compared_at:,} images",
        "Mean over seeds ± half the width of the 95 % interval. Lower is better for the first three. Nearest: median "
        "distance of samples to their nearest training image, divided by that of held-out images; copies: fraction of "
        "samples that are less than a third as far from their nearest training image as from the second nearest "
        f"({results.evaluator['copies_of_held_out']:.3g} of the held-out images).",
        ["target", "Frechet", "Frechet to held-out data", "held-out loss", "exact error", "nearest", "copies"],
        [row(arm) for arm in results.experiment.arms],
    )


def _changes(results: Results) -> Table:
    """Paired changes relative to the baseline."""
    names = ("frechet", "frechet_held_out", "held_out_loss", "exact_error", "gradient_variance")

    def row(arm: Arm) -> list[str]:
        assert results.compared_at is not None
        return [arm.title, *(format_change(results.log_ratio(arm, results.compared_at, name)) for name in names)]

    return Table(
        f"Change relative to {results.baseline.title}, paired by seed",
        "Change with its 95 % interval; a change is significant if its interval excludes zero.",
        ["target", "Frechet", "Frechet to held-out data", "held-out loss", "exact error", "gradient variance"],
        [row(arm) for arm in results.others],
    )


def _images_to_reach(results: Results) -> Table:
    """Images needed to reach several qualities."""
    return _needed_table(
        results,
        "Images needed to reach a quality",
        "Number of images until the Frechet distance falls to the final mean of "
        f"{results.baseline.title} times a factor: minimum and maximum over seeds, interpolated linearly in "
        "log(images) between two evaluations. Changes are paired by seed, over the seeds where both reach the quality.",
        dict.fromkeys(results.experiment.arms, 1.0),
        results.log_ratio_of_images,
    )


def _seconds_to_reach(results: Results) -> Table:
    """Training time needed to reach several qualities."""
    return _needed_table(
        results,
        "Seconds needed to reach a quality",
        "The same in seconds of training. The time per image is one number for each target, as in the table above, so "
        "the intervals are those of the images.",
        {arm: results.paired_seconds_per_kimg(arm) / 1000 for arm in results.experiment.arms},
        results.log_ratio_of_seconds,
    )


def _needed_table(
    results: Results, title: str, note: str, units: Mapping[Arm, float], log_ratio: Callable[[Arm, float], Estimate]
) -> Table:
    """Cost of reaching several qualities, in images or in another unit per image."""
    final = _final(results, results.baseline, "frechet").mean
    first = results.common_points[0]

    def cell(arm: Arm, quality: float) -> str:
        needed = results.images_to_reach(arm, quality)
        reached = sorted(images for images in needed.values() if isfinite(images))
        if not reached:
            return "not reached"
        ends = [_number(units[arm] * images) for images in dict.fromkeys((reached[0], reached[-1]))]
        text = f"{'at most ' if reached[-1] <= first else ''}{' to '.join(ends)}"
        if len(reached) < len(needed):
            text += f"; not reached by {len(needed) - len(reached)} of {len(needed)}"
        ratio = log_ratio(arm, quality)
        return text if arm == results.baseline or ratio.n < 2 else f"{text}; {format_change(ratio)}"

    return Table(
        title,
        note,
        ["target", *(f"{_number(factor * final)} ({factor:g} ×)" for factor in QUALITY_FACTORS)],
        [[arm.title, *(cell(arm, factor * final) for factor in QUALITY_FACTORS)] for arm in results.experiment.arms],
    )


def _equal_time(results: Results) -> Table:
    """Scores after equal training time."""

    def row(arm: Arm) -> list[str]:
        scores = (list(results.by_seed_at_equal_time(arm, name).values()) for name in EQUAL_TIME_SCORES)
        means = [format_interval(Estimate.from_values(values)) for values in scores]
        changes = [format_change(results.log_ratio_at_equal_time(arm, name)) for name in EQUAL_TIME_SCORES]
        images = f"{results.images_at_equal_time(arm):,.0f}"
        return [arm.title, images, *means, *(changes if arm != results.baseline else [""] * len(changes))]

    baseline = results.baseline.title
    return Table(
        f"After equal time, {_number(results.equal_time)} s of training",
        "When the fastest target has finished, interpolated linearly in log(images) between two evaluations; changes "
        f"relative to {baseline} are paired by seed. The time is that of training alone, without preparation and "
        f"evaluation: the median of {baseline}, times the relative time of the others, measured segment by segment.",
        ["target", "images", "Frechet", "held-out loss", "Frechet, change", "held-out loss, change"],
        [row(arm) for arm in results.experiment.arms],
    )


def _costs(results: Results) -> Table:
    """Scatter over seeds and evaluations, variance of the gradient, and time."""

    def row(arm: Arm) -> list[str]:
        total, part = (_final(results, arm, name).mean for name in ("gradient_variance", "gradient_variance_of_target"))
        return [
            arm.title,
            _number(_final(results, arm, "frechet").std),
            _number(100 * results.roughness(arm).mean) + " %",
            _number(total),
            f"{part / total:.1%}" if total > 0 else "",
            f"{results.seconds_per_kimg(arm):.3g}",
            "" if arm == results.baseline else format_overhead(results.overhead(arm)),
        ]

    return Table(
        "Stability and cost",
        "Standard deviation of the final Frechet distance over seeds, and its relative scatter between evaluations "
        "(from second differences over the last half of the run, to which curvature contributes too); Tr Cov of the "
        "gradient, and the part of it that is due to the target; seconds per thousand images (median over segments of "
        "the runs), and the time of a step relative to the baseline, paired by seed and segment.",
        [
            "target",
            "over seeds",
            "between evaluations",
            "gradient variance",
            "due to the target",
            "s per 1,000 images",
            "overhead",
        ],
        [row(arm) for arm in results.experiment.arms],
    )


def _number(value: float) -> str:
    if not isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _final(results: Results, arm: Arm, name: str) -> Estimate:
    """Mean of a score at the point of comparison."""
    assert results.compared_at is not None
    return results.mean(arm, results.compared_at, name)


def _network_evaluations(results: Results) -> int:
    """Network evaluations per sample."""
    return next(line["network_evaluations"] for lines in results.scores.values() for line in lines)


def _section(config: Any, name: str) -> str:
    """A section of the configuration in short: its kind and its other keys."""
    keys = {k: v for k, v in config[name].items() if k not in ("kind", "holdout") and v is not None}
    text = ", ".join(f"{key} {value}" for key, value in keys.items())
    return f"{config[name]['kind']}" + (f" ({text})" if text else "")
