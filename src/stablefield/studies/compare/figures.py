"""The three figures of a comparison; arms differ by line style, marker and brightness, for prints in grey."""

from collections.abc import Callable
from math import exp, isfinite, isnan, log
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from stablefield.config import describe_target
from stablefield.evaluate.plots import save_figure
from stablefield.studies.compare.comparison import Comparison
from stablefield.studies.compare.endpoints import WEIGHTS, Finding
from stablefield.studies.compare.experiment import Arm
from stablefield.studies.compare.statistics import Curve, Estimate

# darkest first, so that they differ in grey too
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0b5394", "linestyle": "--", "marker": "s"},
    {"color": "#c0504d", "linestyle": "-.", "marker": "^"},
    {"color": "#7a9a3a", "linestyle": ":", "marker": "D"},
    {"color": "#8064a2", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#999999", "linestyle": (0, (8, 2)), "marker": "x"},
)
TICKS = (-90, -50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100, 400)
WIDEST = log(6.0)  # intervals are drawn up to this log ratio
WORDS = {"average": "averaged weights", "raw": "raw weights"}


def save_figures(comparison: Comparison, prefix: Path) -> dict[str, Path]:
    """Draw the figures of a comparison in which at least one pair of runs is finished.

    Args:
        comparison: the comparison.
        prefix: path of the figures without the end of their names, "-NAME.png".

    Returns:
        Paths by name: "distance", "endpoints" and "loss".
    """
    drawn = {"distance": _distances(comparison), "endpoints": _forest(comparison), "loss": _losses(comparison)}
    files = {name: prefix.with_name(f"{prefix.name}-{name}.png") for name in drawn}
    for name, figure in drawn.items():
        save_figure(figure, files[name])
    return files


def _distances(comparison: Comparison) -> Figure:
    """Distance in the first feature space against images: a row per objective, a column per set of weights."""
    figure, panels = _grid(comparison, 2)
    for objective, row in zip(comparison.experiment.objectives, panels, strict=True):
        for weights, axes in zip(WEIGHTS, row, strict=True):
            draw_distance(comparison, axes, objective, weights)
    panels[0][0].legend(frameon=False)
    return figure


def draw_distance(comparison: Comparison, axes: Axes, objective: str, weights: str) -> None:
    """Draw the distance of samples to the training data in the first feature space against images seen.

    Args:
        comparison: the comparison.
        axes: the axes to draw on.
        objective: name of the objective.
        weights: "average" or "raw".
    """
    space = comparison.experiment.spaces[0]
    axes.axhline(comparison.machine["reference"]["held_out_distance"][space], color="0.7", linewidth=1)
    _draw_arms(comparison, axes, objective, lambda line: line[weights][space])
    _label(axes, f"{objective} {WORDS[weights]}".strip(), f"Frechet distance\n({space}, squared units)")


def _losses(comparison: Comparison) -> Figure:
    """Held-out loss and the variance of the gradient against images; thin lines are the part due to the target."""
    figure, panels = _grid(comparison, 2)
    for objective, (loss, variance) in zip(comparison.experiment.objectives, panels, strict=True):
        _draw_arms(comparison, loss, objective, lambda line: line["average"]["held-out loss"])
        _label(loss, f"{objective} averaged weights".strip(), "held-out loss\n(weighted, per dimension)")
        _draw_arms(comparison, variance, objective, lambda line: line["gradient_variance"])
        _draw_arms(comparison, variance, objective, _variance_of_target, thin=True)
        _label(variance, f"{objective} raw weights".strip(), "variance of the gradient\n(loss units squared)")
    panels[0][0].legend(frameon=False)
    return figure


def _forest(comparison: Comparison) -> Figure:
    """Endpoints of all contrasts with their intervals."""
    contrasts = comparison.experiment.contrasts
    endpoints = comparison.experiment.endpoints
    columns = 2 if len(contrasts) == 4 else min(3, len(contrasts))
    rows = -(-len(contrasts) // columns)
    figure = Figure(figsize=(4 + 3.6 * columns, rows * (1.2 + 0.27 * len(endpoints))), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(contrasts):  # the last row of panels is not full
            axes.set_axis_off()
            continue
        found = comparison.findings_by_contrast[number]
        axes.axvline(0, color="0.6", linewidth=1)
        for place, finding in enumerate(found):
            _draw_interval(axes, -place, finding)
        names = [f"{finding.endpoint.title} [{finding.endpoint.weights}]" for finding in found]
        axes.set_yticks([-place for place in range(len(found))], names, fontsize=9.5)
        axes.set_title(fill(found[0].contrast, 42), fontsize=11)
        axes.set_xscale("symlog", linthresh=5, linscale=0.8)
        spread = [abs(end) for f in found for end in (f.estimate.low, f.estimate.high) if isfinite(end)]
        widest = min(WIDEST, 1.1 * max([0.02, *spread]))
        axes.set_xlim(_percent(-widest), _percent(widest))
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if abs(log(1 + tick / 100)) <= widest]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        axes.tick_params("x", labelsize=8.5, labelrotation=60)
        axes.set_xlabel("change (%)")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_interval(axes: Axes, y: float, finding: Finding) -> None:
    """One row of the forest plot: filled if the change is significant after Holm's correction."""
    estimate = finding.estimate
    if isnan(estimate.mean):
        return
    low, mean, high = (_percent(_within(x)) for x in (estimate.low, estimate.mean, estimate.high))
    found = finding.direction in ("increases", "decreases")
    if isfinite(estimate.low):
        axes.plot([low, high], [y, y], color="black" if found else "0.55", linewidth=2 if found else 1.2)
    fill = "black" if found else "white"
    axes.plot([mean], [y], marker="o", markersize=6, color="black" if found else "0.45", markerfacecolor=fill)


def _draw_arms(
    comparison: Comparison,
    axes: Axes,
    objective: str,
    value: Callable[[dict[str, Any]], float],
    *,
    thin: bool = False,
) -> None:
    """Geometric means of all arms over seeds, with the interval of the paired ratio to the baseline around them."""
    experiment = comparison.experiment
    for target, style in zip(experiment.targets, STYLES * len(experiment.targets), strict=False):
        arm = Arm(objective, target)
        baseline = experiment.baseline(arm)
        points, seeds = experiment.evaluation_points, comparison.paired_seeds(arm, baseline)
        ours, theirs = (
            [Curve(points, [value(line) for line in comparison.lines[each, seed]]).logs for seed in seeds]
            for each in (arm, baseline)
        )
        if not ours:
            continue
        means = [fmean(at) if all(map(isfinite, at)) else float("nan") for at in zip(*ours, strict=True)]
        width = {"linewidth": 0.9, "markersize": 3, "markerfacecolor": "white"} if thin else {"linewidth": 1.8}
        look = {"markersize": 5, **style, **width, "label": "" if thin else fill(describe_target(target), 26)}
        axes.plot(points, [exp(m) for m in means], **look)
        if arm == baseline or thin or len(seeds) < 2:
            continue
        bands = [
            Estimate.from_values([a - b for a, b in zip(ours_at, theirs_at, strict=True)])
            for ours_at, theirs_at in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
        ]
        low = [exp(mean + _within(band.low - band.mean)) for mean, band in zip(means, bands, strict=True)]
        high = [exp(mean + _within(band.high - band.mean)) for mean, band in zip(means, bands, strict=True)]
        axes.fill_between(points, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _variance_of_target(line: Any) -> float:
    """Part of the target in the variance of the gradient; 0 where it is rounding error, as with exact targets."""
    part, whole = float(line["gradient_variance_of_target"]), float(line["gradient_variance"])
    return part if part > 1e-6 * whole else 0.0


def _within(log_ratio: float) -> float:
    """A log ratio within what is drawn."""
    return min(max(log_ratio, -WIDEST), WIDEST)


def _grid(comparison: Comparison, columns: int) -> tuple[Figure, Any]:
    """A figure with a row of panels per objective."""
    rows = len(comparison.experiment.objectives)
    figure = Figure(figsize=(4.4 * columns, 3.3 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _label(axes: Axes, title: str, y: str) -> None:
    """Logarithmic axes with names, units and readable ticks."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("images seen")
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e3:g}k" if v >= 1e3 else f"{v:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high / low > 20:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))


def _percent(log_ratio: float) -> float:
    return 100 * (exp(log_ratio) - 1)
