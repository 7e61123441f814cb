"""Plots for looking: labelled axes with units, readable in grey, nothing that is not data."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_loss(path: Path, images: Sequence[float], loss: Sequence[float], title: str) -> None:
    """Training loss against images seen, raw and smoothed."""
    figure, axes = new_plot(title, "images seen", "loss (weighted squared error per dimension)")
    axes.plot(images, loss, color="0.75", linewidth=0.8, label="each kimg")
    axes.plot(images, _smooth(loss), color="black", linewidth=1.6, label="running mean")
    axes.set_ylim(0, 1.05 * sorted(loss)[int(0.98 * (len(loss) - 1))])
    axes.legend(frameon=False)
    figure.savefig(path)


def new_plot(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """One plot, without clutter."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, x, y)
    return figure, axes


def label(axes: Axes, x: str, y: str) -> None:
    """Names of the axes, and no frame around what they span."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    # a centred mean over what there is, shorter at the ends
    numbers = torch.tensor(values, dtype=torch.float64)
    half = window // 2
    return [float(numbers[max(0, i - half) : i + half + 1].mean()) for i in range(len(numbers))]
