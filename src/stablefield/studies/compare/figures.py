"""Plots of a comparison, in which arms differ by line style and marker as well as by colour."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stablefield.studies.compare.experiment import Arm
from stablefield.studies.compare.results import Results, percent
from stablefield.studies.compare.statistics import Estimate, paired_log_ratio

__all__ = ["Plot", "plots"]

Interval = tuple[float, float, float]  # mean, lower end, upper end

# darkest first, so that they differ in grey too
STYLES = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0b5394", "linestyle": "--", "marker": "s"},
    {"color": "#c0504d", "linestyle": "-.", "marker": "^"},
    {"color": "#7a9a3a", "linestyle": ":", "marker": "D"},
    {"color": "#8064a2", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#999999", "linestyle": (0, (8, 2)), "marker": "x"},
)


@dataclass(frozen=True)
class Plot:
    """A plot with its texts.

    Attributes:
        name: short identifier.
        title: title, shown above the plot.
        caption: explanation, shown below it.
        svg: the plot as an SVG document.
    """

    name: str
    title: str
    caption: str
    svg: bytes


def plots(results: Results) -> list[Plot]:
    """Plots of the report; none before the first evaluation that all arms have in common.

    Args:
        results: results of the experiment.
    """
    if results.compared_at is None:
        return []
    bands = "Bands: 95 % intervals over seeds." if len(results.experiment.seeds) > 1 else "One seed."
    return [
        _against_images(
            results,
            "quality",
            "Quality of samples",
            "Frechet distance (feature units²)",
            lambda arm, images: _interval(results.mean(arm, images, "frechet")),
            f"Frechet distance between {results.experiment.samples:,} samples of the averaged weights and the training "
            f"data, in features of {results.evaluator['features']}; lower is better. {bands} Thin grey line: "
            f"{results.evaluator['held_out_size']:,} held-out images.",
            log=True,
            line=results.evaluator["frechet_of_held_out"],
        ),
        _against_images(
            results,
            "gain",
            "Change of quality, paired by seed",
            f"Frechet distance relative to {results.baseline.title} (%)",
            lambda arm, images: _percent_interval(results.log_ratio(arm, images, "frechet")),
            f"The same, each run divided by the run of {results.baseline.title} with the same seed. Negative is "
            f"better. {bands} The change is significant where the band excludes zero.",
            line=0.0,
            baseline=False,
        ),
        _against_images(
            results,
            "held-out",
            "Denoising of held-out data",
            "held-out loss (weighted, per dimension)",
            lambda arm, images: _interval(results.mean(arm, images, "held_out_loss")),
            "Loss against the clean image on held-out data, with noise levels weighted as in training. It has a lower "
            f"bound above zero that no denoiser can reach; lower is better. {bands}",
            log=True,
        ),
        _against_images(
            results,
            "exact",
            "Error to the exact posterior mean over the training set",
            "error (weighted, per dimension)",
            lambda arm, images: _interval(results.mean(arm, images, "exact_error")),
            "Squared error to E[x | x_t] over the training data, with noise levels weighted as in training. A denoiser "
            f"with zero error only reproduces training data: a gain here alone is memorisation. {bands}",
            log=True,
        ),
        *([_against_time(results, bands)] if isfinite(results.equal_time) else []),
        _against_levels(
            results,
            "exact-levels",
            "Exact error against the noise level",
            "error per dimension (data units²)",
            lambda arm, level: _at_level(results, arm, "exact_error_by_level", level),
            f"After {results.compared_at:,} images, on training data. {bands}",
            log=True,
        ),
        _against_levels(
            results,
            "held-out-levels",
            "Change of the held-out loss against the noise level, paired by seed",
            f"held-out loss relative to {results.baseline.title} (%)",
            lambda arm, level: _level_ratio(results, arm, "held_out_loss_by_level", level),
            f"After {results.compared_at:,} images; negative is better. {bands} Grey steps: distribution of the "
            "training noise.",
            baseline=False,
        ),
        _gradients(results, bands),
        _training(results, "loss/loss", "loss", "Training loss", "loss (weighted, per dimension)", _LOSS_CAPTION),
        _training(
            results, "target/ess", "ess", "Effective sample size of the targets", "effective sample size", _ESS_CAPTION
        ),
    ]


_LOSS_CAPTION = (
    "Running mean over a tenth of the run and over seeds. The values of different targets are not comparable, because "
    "the variance of a target is part of its loss; their scatter is."
)
_ESS_CAPTION = "Mean of 1 / sum of squared weights over the examples of a batch: 1 where one data point has all weight."


def _against_images(
    results: Results,
    name: str,
    title: str,
    y: str,
    value: Callable[[Arm, int], Interval],
    caption: str,
    *,
    log: bool = False,
    line: float | None = None,
    baseline: bool = True,
) -> Plot:
    """Plot a score of each arm against the number of images."""
    figure, axes = _axes("images seen", y)
    if line is not None:
        axes.axhline(line, color="0.6", linewidth=0.8)
    points = results.common_points
    for arm, style in _arm_styles(results, baseline):
        _draw(axes, points, [value(arm, images) for images in points], arm.title, style)
    _set_scale(axes, log)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    return _finish(figure, axes, name, title, caption)


def _against_time(results: Results, bands: str) -> Plot:
    """Plot the Frechet distance against training time."""
    figure, axes = _axes("training time (s)", "Frechet distance (feature units²)")
    axes.axhline(results.evaluator["frechet_of_held_out"], color="0.6", linewidth=0.8)
    axes.axvline(results.equal_time, color="0.85", linewidth=0.8)
    points = results.common_points
    for arm, style in _arm_styles(results):
        seconds = [images / 1000 * results.paired_seconds_per_kimg(arm) for images in points]
        _draw(axes, seconds, [_interval(results.mean(arm, images, "frechet")) for images in points], arm.title, style)
    _set_scale(axes, True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    caption = (
        "The first plot against the training time, which is measured relative to the baseline and excludes preparation "
        f"and evaluation. Thin vertical line: when the fastest target has finished. {bands}"
    )
    return _finish(figure, axes, "time", "Quality against training time", caption)


def _against_levels(
    results: Results,
    name: str,
    title: str,
    y: str,
    value: Callable[[Arm, int], Interval],
    caption: str,
    *,
    log: bool = False,
    baseline: bool = True,
) -> Plot:
    """Plot a score of each arm against the noise level."""
    figure, axes = _axes("noise level sigma / alpha (data units)", y)
    levels = results.evaluator["levels"]
    if not log:
        axes.axhline(0, color="0.6", linewidth=0.8)
        shares = axes.twinx()
        shares.step(levels, results.evaluator["shares"], where="mid", color="0.82", linewidth=1.2)
        shares.set_ylim(0, 3 * max(results.evaluator["shares"]))
        shares.set_axis_off()
        axes.set_zorder(1)
        axes.patch.set_visible(False)
    for arm, style in _arm_styles(results, baseline):
        _draw(axes, levels, [value(arm, level) for level in range(len(levels))], arm.title, style)
    _set_scale(axes, log)
    return _finish(figure, axes, name, title, caption)


def _gradients(results: Results, bands: str) -> Plot:
    """Plot the variance of the gradient and the part that is due to the target."""
    figure, axes = _axes("images seen", "Tr Cov of the gradient (loss units²)")
    points = results.common_points
    for arm, style in _arm_styles(results):
        total = [_interval(results.mean(arm, images, "gradient_variance")) for images in points]
        _draw(axes, points, total, arm.title, style)
        part = [results.mean(arm, images, "gradient_variance_of_target").mean for images in points]
        if any(value > 0 for value in part):
            axes.plot(points, part, **{**style, "linewidth": 0.9, "markersize": 3, "markerfacecolor": "white"})
    _set_scale(axes, True)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    caption = (
        "Variance of the gradient over batches (of 32 examples) at the weights of each run. Thin lines with open "
        "markers: the part due to the target, E ||g(target) - g(exact)||², which stable targets can lower; the rest "
        f"comes from the choice of x_t in a batch, and no target can lower it. {bands}"
    )
    return _finish(figure, axes, "gradients", "Variance of the gradient", caption)


def _training(results: Results, key: str, name: str, title: str, y: str, caption: str) -> Plot:
    """Plot a training metric against the number of images."""
    figure, axes = _axes("images seen", y)
    for arm, style in _arm_styles(results):
        images, values = _mean_curve(results, arm, key)
        axes.plot(images, values, **{**style, "marker": "", "linewidth": 1.4, "label": arm.title})
    _set_scale(axes, True, log_x=False)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    return _finish(figure, axes, name, title, caption)


def _mean_curve(results: Results, arm: Arm, key: str) -> tuple[list[int], list[float]]:
    """Running mean of a training metric over a tenth of the run and over seeds."""
    by_images: dict[int, list[float]] = {}
    for seed in results.experiment.seeds:
        for line in (line for line in results.training[arm, seed] if key in line):
            by_images.setdefault(round(1000 * line["progress/kimg"]), []).append(line[key])
    images = sorted(by_images)
    means = [fmean(by_images[count]) for count in images]
    width = max(1, len(images) // 10)
    return images, [fmean(means[max(0, at - width + 1) : at + 1]) for at in range(len(images))]


def _at_level(results: Results, arm: Arm, name: str, level: int) -> Interval:
    """Mean of a score over seeds at one noise level."""
    assert results.compared_at is not None
    by_seed = results.by_seed(arm, results.compared_at, name)
    return _interval(Estimate.from_values([values[level] for values in by_seed.values()]))


def _level_ratio(results: Results, arm: Arm, name: str, level: int) -> Interval:
    """Paired change of a score at one noise level, in per cent."""
    assert results.compared_at is not None
    ours, theirs = (
        {seed: values[level] for seed, values in results.by_seed(each, results.compared_at, name).items()}
        for each in (arm, results.baseline)
    )
    return _percent_interval(paired_log_ratio(ours, theirs))


def _interval(estimate: Estimate) -> Interval:
    return estimate.mean, estimate.low, estimate.high


def _percent_interval(log_ratio: Estimate) -> Interval:
    return percent(log_ratio.mean), percent(log_ratio.low), percent(log_ratio.high)


def _arm_styles(results: Results, baseline: bool = True) -> list[tuple[Arm, dict[str, Any]]]:
    """The arms, with or without the baseline, and the style of each, which is the same in all plots."""
    styles = [(arm, STYLES[number % len(STYLES)]) for number, arm in enumerate(results.experiment.arms)]
    return styles if baseline else styles[1:]


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    """A new figure with labelled axes."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(axes: Axes, x: Sequence[float], intervals: list[Interval], label: str, style: dict[str, Any]) -> None:
    """Draw means as a line and intervals as a band."""
    mean, low, high = (list(part) for part in zip(*intervals, strict=True))
    axes.plot(x, mean, **style, linewidth=1.5, markersize=4, label=label)
    if all(map(isfinite, low + high)):
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _set_scale(axes: Axes, log: bool, *, log_x: bool = True) -> None:
    """Use logarithmic scales; a y axis whose values differ by less than a factor of four stays linear."""
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    positive = drawn[drawn > 0]
    if log and len(positive) and positive.max() > 4 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(positive.min() / 1.3, positive.max() * 1.3)  # an interval may reach below zero


def _thousands(value: float, _: Any) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _finish(figure: Figure, axes: Axes, name: str, title: str, caption: str) -> Plot:
    """Add the legend, and render the figure."""
    axes.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, caption, file.getvalue())
