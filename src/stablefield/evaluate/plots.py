"""Plots with labelled axes and units that remain readable in grey."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablefield.files import atomic_path
from stablefield.floor import ByNoise


def plot_loss(path: Path, images: Sequence[float], loss: Sequence[float], title: str) -> None:
    """Plot the training loss against the number of images seen, raw and smoothed.

    Args:
        path: the file; its suffix decides the format.
        images: number of images seen at each point.
        loss: loss at each point.
        title: title of the plot.
    """
    figure = _new_figure((7, 4.2))
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, "images seen", "loss (weighted squared error per dimension)")
    axes.plot(images, loss, color="0.75", linewidth=0.8, label="each kimg")
    axes.plot(images, _smooth(loss), color="black", linewidth=1.6, label="running mean")
    axes.set_ylim(0, 1.05 * sorted(loss)[int(0.98 * (len(loss) - 1))])
    axes.legend(frameon=False)
    save_figure(figure, path)


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
    curves = (
        ("loss/loss", "0.75", "-", "training loss"),
        ("loss/floor_dsm", "black", ":", "floor with DSM targets"),
        ("loss/floor_target", "black", "--", "floor with the targets of this run"),
        ("loss/excess", "tab:red", "-", "excess: distance from the best prediction"),
        ("loss/excess_average", "tab:blue", "-", "excess of the averaged weights"),
    )
    for key, color, style, name in curves:
        points = [(line["progress/kimg"] * 1000, line[key]) for line in lines if _is_positive(line.get(key))]
        if points:
            marker = "o" if len(points) < 30 and "excess" in key else ""
            above.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=marker, ms=3, label=name)
    above.set_yscale("log")
    above.legend(loc="best", framealpha=0.8, edgecolor="none", fontsize=8)
    last = next(line for line in reversed(lines) if "loss/excess" in line)
    label(below, "noise level sigma / alpha: ranges that training visits equally often", "part of the loss")
    for key, color, style, name in (
        ("floor_dsm", "black", ":", "floor with DSM targets"),
        ("floor_target", "black", "--", "floor with the targets of this run"),
        ("excess", "tab:red", "-", "excess"),
        ("excess_average", "tab:blue", "-", "excess of the averaged weights"),
    ):
        ranges = {k.partition("/")[2]: v for k, v in last.items() if k.startswith(f"{key}_by_noise/")}
        if ranges:
            below.plot(list(ranges), list(ranges.values()), color=color, linestyle=style, marker="o", ms=3, label=name)
    below.tick_params(axis="x", labelrotation=30, labelsize=8)
    below.set_ylim(bottom=0)
    below.legend(frameon=False, fontsize=8)
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
    """Geometric middles of ranges of the noise level; of a range without an end, its finite end."""
    low, high = ends[:-1].clone(), ends[1:].clone()
    low = torch.where(low > 0, low, high / 2)
    high = torch.where(torch.isfinite(high), high, low * 2)
    return (low * high).sqrt()


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


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


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred running mean, over a shorter window at both ends."""
    numbers = torch.tensor(values, dtype=torch.float64)
    half = window // 2
    return [float(numbers[max(0, i - half) : i + half + 1].mean()) for i in range(len(numbers))]
