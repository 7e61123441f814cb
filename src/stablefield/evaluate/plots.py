"""Plots with labelled axes and units that remain readable in grey."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stablefield.files import atomic_path

__all__ = ["label", "plot_loss", "save_figure"]


def plot_loss(path: Path, images: Sequence[float], loss: Sequence[float], title: str) -> None:
    """Plot the training loss against the number of images seen, raw and smoothed.

    Args:
        path: the file; its suffix decides the format.
        images: number of images seen at each point.
        loss: loss at each point.
        title: title of the plot.
    """
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, "images seen", "loss (weighted squared error per dimension)")
    axes.plot(images, loss, color="0.75", linewidth=0.8, label="each kimg")
    axes.plot(images, _smooth(loss), color="black", linewidth=1.6, label="running mean")
    axes.set_ylim(0, 1.05 * sorted(loss)[int(0.98 * (len(loss) - 1))])
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure.

    Args:
        figure: the figure.
        path: the file; its suffix decides the format.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def label(axes: Axes, x: str, y: str) -> None:
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
