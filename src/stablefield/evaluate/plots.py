"""Plots with labelled axes and units that remain readable in grey."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablefield.files import atomic_path
from stablefield.floor import ByNoise

# curves of a loss; they differ in brightness, line style and marker, for prints in grey
_TRAINING = {"color": "0.75", "linestyle": "-", "label": "training loss"}
_PARTS: dict[str, dict[str, Any]] = {
    "floor_dsm": {"color": "black", "linestyle": ":", "label": "floor with DSM targets"},
    "floor_target": {"color": "black", "linestyle": "--", "label": "floor with the targets of this run"},
    "excess": {"color": "tab:red", "linestyle": "-", "marker": "o", "ms": 4, "label": "excess over the floor"},
    "excess_average": {
        "color": "#0b3a66",
        "linestyle": "-.",
        "marker": "s",
        "ms": 4,
        "markerfacecolor": "white",
        "label": "excess of the averaged weights",
    },
}


def _new_figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # not at the top: training imports this module, and rarely plots

    return Figure(figsize=size, dpi=120, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure.

    Args:
        figure: the figure.
        path: the file; its suffix decides the format.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def plot_excess(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Plot the loss, its floor and the excess during training, and floor and excess by noise level at the end.

    Args:
        path: the file; its suffix decides the format.
        lines: metrics of the run; at least one has the excess.
        title: title of the plot.
    """
    figure = _new_figure((7, 7.2))
    above, below = figure.subplots(2, 1)
    above.set_title(title, loc="left", fontsize=11)
    label(above, "images seen", "loss (weighted squared error)")
    if all(line.get("loss/floor_target") == line.get("loss/floor_dsm") for line in lines):  # a run with DSM targets
        lines = [{key: value for key, value in line.items() if "floor_target" not in key} for line in lines]
    for key, style in {"loss": _TRAINING, **_PARTS}.items():
        known = [(line["progress/kimg"] * 1000, line.get(f"loss/{key}")) for line in lines]
        points = [(at, x) for at, x in known if isinstance(x, int | float) and 0 < x < float("inf")]
        if points:
            marked = style if len(points) < 30 else {**style, "marker": ""}
            above.plot(*zip(*points, strict=True), **marked)
    above.set_yscale("log")
    last = next(line for line in reversed(lines) if "loss/excess" in line)
    label(
        below, "noise level sigma / alpha: ranges that training visits equally often", "part of the loss (same units)"
    )
    for key, style in _PARTS.items():
        ranges = {k.partition("/")[2]: v for k, v in last.items() if k.startswith(f"{key}_by_noise/")}
        if ranges:
            below.plot(list(ranges), list(ranges.values()), **style)
    below.tick_params(axis="x", labelrotation=30, labelsize=8)
    below.set_ylim(bottom=0)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_floor(path: Path, floors: Mapping[str, ByNoise], title: str, excess: ByNoise | None = None) -> None:
    """Plot the floor of a loss by noise level for several targets, with bands of two standard errors.

    Args:
        path: the file; its suffix decides the format.
        floors: the floor by the name of the target.
        title: title of the plot.
        excess: excess of a network over the floor, by noise level.
    """
    figure = _new_figure((7, 4.6))
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, "noise level sigma / alpha (units of the data)", "part of the loss")
    named = {f"floor with {name.upper()} targets": floor for name, floor in floors.items()}
    curves = named if excess is None else {**named, "excess of the network": excess}
    styles = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
    for (name, values), style in zip(curves.items(), cycle(styles), strict=False):
        color = "tab:red" if values is excess else "black"
        place = _middles(values.noise_levels)
        axes.plot(place, values.by_bin, color=color, linestyle=style, marker="o", ms=3, label=name)
        low, high = (values.by_bin + sign * 2 * values.errors_by_bin for sign in (-1, 1))
        axes.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)


def _middles(ends: Tensor) -> Tensor:
    """Geometric middles of ranges of the noise level; of a range without an end, its finite end; 1 if it has none."""
    low, high = ends[:-1].clone(), ends[1:].clone()
    low = torch.where(low > 0, low, torch.where(torch.isfinite(high), high / 2, 0.5**0.5))
    high = torch.where(torch.isfinite(high), high, low * 2)
    return (low * high).sqrt()


def label(axes: Any, x: str, y: str) -> None:
    """Label the axes, and remove the lines at the top and on the right.

    Args:
        axes: axes of a plot.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
