"""Plots of an experiment: arms told apart by line and marker as well as by colour, bands over seeds, labelled axes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stablefield.compare.experiment import Arm
from stablefield.compare.results import Results, percent
from stablefield.compare.statistics import Estimate, paired_ratio

Band = tuple[float, float, float]  # a mean, and the ends of its interval

# darkest first, so that they differ in grey too
LOOKS = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0b5394", "linestyle": "--", "marker": "s"},
    {"color": "#c0504d", "linestyle": "-.", "marker": "^"},
    {"color": "#7a9a3a", "linestyle": ":", "marker": "D"},
    {"color": "#8064a2", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#999999", "linestyle": (0, (8, 2)), "marker": "x"},
)


@dataclass(frozen=True)
class Plot:
    """A picture with what it shows.

    Attributes:
        name: for files.
        title: what it shows.
        caption: how to read it.
        svg: the picture.
    """

    name: str
    title: str
    caption: str
    svg: bytes


def plots(results: Results) -> list[Plot]:
    """All that can be drawn of what is there."""
    if results.last is None:
        return []
    band = "Bands: 95 % intervals over seeds." if len(results.experiment.seeds) > 1 else "One seed."
    exact = "error per dimension (data units²)"
    return [
        _against_images(
            results,
            "quality",
            "Quality of samples",
            "Frechet distance (feature units²)",
            lambda arm, mark: _bounds(results.over_seeds(arm, mark, "frechet")),
            f"Frechet distance between {results.experiment.samples:,} samples of the average and the training data, in "
            f"features of {results.about['features']}; lower is better. {band} Thin grey line: "
            f"{results.about['held_out']:,} real images that were held out.",
            log=True,
            line=results.about["real"],
        ),
        _against_images(
            results,
            "gain",
            "Change of quality, pair by pair",
            f"Frechet distance against {results.baseline.title} (%)",
            lambda arm, mark: _percents(results.ratio(arm, mark, "frechet")),
            f"The same, each run divided by the run of {results.baseline.title} with its seed. Below zero is better. "
            f"{band} Where a band holds zero, the seeds cannot tell the difference from chance.",
            line=0.0,
            others=True,
        ),
        _against_images(
            results,
            "held-out",
            "Denoising data never trained on",
            "held-out loss (weighted, per dimension)",
            lambda arm, mark: _bounds(results.over_seeds(arm, mark, "held_out_loss")),
            "The loss against the clean image, on held-out data, as training weighs the noise levels. It has a floor "
            f"that no denoiser can pass; lower is better. {band}",
            log=True,
        ),
        _against_images(
            results,
            "exact",
            "Distance to the training set's exact answer",
            "error (weighted, per dimension)",
            lambda arm, mark: _bounds(results.over_seeds(arm, mark, "exact_error")),
            "The squared error against E[x | x_t] over the training data, as training weighs the noise levels. Zero "
            f"would be a machine that returns training data: a gain here alone is memorisation. {band}",
            log=True,
        ),
        *([_against_time(results, band)] if isfinite(results.deadline) else []),
        _against_levels(
            results,
            "exact-levels",
            "The same against the noise",
            exact,
            lambda arm, level: _at_level(results, arm, "exact_error_by_level", level),
            f"After {results.last:,} images, on rows of the training data. {band}",
            log=True,
        ),
        _against_levels(
            results,
            "held-out-levels",
            "Held-out loss against the noise, pair by pair",
            f"held-out loss against {results.baseline.title} (%)",
            lambda arm, level: _level_ratio(results, arm, "held_out_loss_by_level", level),
            f"After {results.last:,} images; below zero is better. {band} Grey steps: where the training noise lies.",
            others=True,
        ),
        _gradients(results, band),
        _training(results, "Loss/loss", "loss", "Training loss", "loss (weighted, per dimension)", _LOSS, log=True),
        _training(results, "Target/ess", "ess", "Members that share in a target", "effective number", _ESS, log=True),
    ]


_LOSS = (
    "Running means over a tenth of the run and over seeds. The levels cannot be compared between targets, since the "
    "variance of a target is a part of its loss; the steadiness can."
)
_ESS = "Mean of 1 / sum of squared weights over the rows of a batch: 1 where one image explains all."


def _against_images(
    results: Results,
    name: str,
    title: str,
    y: str,
    value: Callable[[Arm, int], Band],
    caption: str,
    *,
    log: bool = False,
    line: float | None = None,
    others: bool = False,
) -> Plot:
    figure, axes = _axes("images seen", y)
    if line is not None:
        axes.axhline(line, color="0.6", linewidth=0.8)
    marks = results.marks
    for arm, look in _arms(results, others):
        _band(axes, marks, [value(arm, mark) for mark in marks], arm.title, look)
    _scaled(axes, log)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    return _finished(figure, axes, name, title, caption)


def _against_time(results: Results, band: str) -> Plot:
    figure, axes = _axes("training time (s)", "Frechet distance (feature units²)")
    axes.axhline(results.about["real"], color="0.6", linewidth=0.8)
    axes.axvline(results.deadline, color="0.85", linewidth=0.8)
    marks = results.marks
    for arm, look in _arms(results, False):
        seconds = [mark / 1000 * results.pace(arm) for mark in marks]
        _band(axes, seconds, [_bounds(results.over_seeds(arm, mark, "frechet")) for mark in marks], arm.title, look)
    _scaled(axes, True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    caption = (
        "The first plot against seconds of training, by one clock for all targets; preparing and scoring are left out. "
        f"Thin upright line: when the fastest has seen its last image. {band}"
    )
    return _finished(figure, axes, "time", "Quality against training time", caption)


def _against_levels(
    results: Results,
    name: str,
    title: str,
    y: str,
    value: Callable[[Arm, int], Band],
    caption: str,
    *,
    log: bool = False,
    others: bool = False,
) -> Plot:
    figure, axes = _axes("noise level sigma / alpha (data units)", y)
    levels = results.about["levels"]
    if not log:
        axes.axhline(0, color="0.6", linewidth=0.8)
        shares = axes.twinx()
        shares.step(levels, results.about["shares"], where="mid", color="0.82", linewidth=1.2)
        shares.set_ylim(0, 3 * max(results.about["shares"]))
        shares.set_axis_off()
        axes.set_zorder(1)
        axes.patch.set_visible(False)
    for arm, look in _arms(results, others):
        _band(axes, levels, [value(arm, level) for level in range(len(levels))], arm.title, look)
    _scaled(axes, log)
    return _finished(figure, axes, name, title, caption)


def _gradients(results: Results, band: str) -> Plot:
    figure, axes = _axes("images seen", "Tr Cov of a gradient (loss units²)")
    for arm, look in _arms(results, False):
        total = [_bounds(results.over_seeds(arm, mark, "gradient_variance")) for mark in results.marks]
        _band(axes, results.marks, total, arm.title, look)
        part = [results.over_seeds(arm, mark, "gradient_variance_of_target").mean for mark in results.marks]
        if any(value > 0 for value in part):
            axes.plot(results.marks, part, **{**look, "linewidth": 0.9, "markersize": 3, "markerfacecolor": "white"})
    _scaled(axes, True)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    caption = (
        "How much the gradient varies from batch to batch (32 rows) at each run's own weights. Thin, with open "
        "markers: the target's part of it, E ||g(target) - g(exact)||², which stable targets can lower; the rest comes "
        f"from which x_t a batch holds, and no target can. {band}"
    )
    return _finished(figure, axes, "gradients", "Variance of the gradient", caption)


def _training(results: Results, key: str, name: str, title: str, y: str, caption: str, *, log: bool) -> Plot:
    figure, axes = _axes("images seen", y)
    for arm, look in _arms(results, False):
        images, values = _mean_curve(results, arm, key)
        axes.plot(images, values, **{**look, "marker": "", "linewidth": 1.4, "label": arm.title})
    _scaled(axes, log, across=False)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    return _finished(figure, axes, name, title, caption)


def _mean_curve(results: Results, arm: Arm, key: str) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = {}
    for seed in results.experiment.seeds:
        for line in (line for line in results.training[arm, seed] if key in line):
            found.setdefault(round(1000 * line["Progress/kimg"]), []).append(line[key])
    images = sorted(found)
    means = [fmean(found[seen]) for seen in images]
    width = max(1, len(images) // 10)
    return images, [fmean(means[max(0, at - width + 1) : at + 1]) for at in range(len(images))]


def _at_level(results: Results, arm: Arm, name: str, level: int) -> Band:
    assert results.last is not None
    return _bounds(Estimate.of([values[level] for values in results.at(arm, results.last, name).values()]))


def _level_ratio(results: Results, arm: Arm, name: str, level: int) -> Band:
    assert results.last is not None
    mine, theirs = (
        {seed: values[level] for seed, values in results.at(each, results.last, name).items()}
        for each in (arm, results.baseline)
    )
    return _percents(paired_ratio(mine, theirs))


def _bounds(estimate: Estimate) -> Band:
    return estimate.mean, estimate.low, estimate.high


def _percents(ratio: Estimate) -> Band:
    return percent(ratio.mean), percent(ratio.low), percent(ratio.high)


def _arms(results: Results, others: bool) -> list[tuple[Arm, dict[str, Any]]]:
    looked = [(arm, LOOKS[number % len(LOOKS)]) for number, arm in enumerate(results.experiment.arms)]
    return looked[1:] if others else looked


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _band(axes: Axes, x: list[Any], bands: list[Band], label: str, look: dict[str, Any]) -> None:
    mean, low, high = (list(part) for part in zip(*bands, strict=True))
    axes.plot(x, mean, **look, linewidth=1.5, markersize=4, label=label)
    if all(map(isfinite, low + high)):
        axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)


def _scaled(axes: Axes, log: bool, *, across: bool = True) -> None:
    if across:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    shown = drawn[drawn > 0]
    if log and len(shown) and shown.max() > 4 * shown.min():  # less is told better by even ticks
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(shown.min() / 1.3, shown.max() * 1.3)  # an interval may reach below zero


def _thousands(value: float, _: Any) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _finished(figure: Figure, axes: Axes, name: str, title: str, caption: str) -> Plot:
    axes.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, caption, file.getvalue())
