"""`stablefield demo`: a complete example on handwritten digits, in about two minutes on two cores.

It trains with stable targets, samples, scores the samples by their distance to the data, and plots the variance of the
targets.
"""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; an existing run is resumed.")] = Path("runs/demo"),
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of training images.", show_default="training.images")
    ] = None,
    samples: Annotated[int, typer.Option(min=64, help="Number of samples to score.")] = 500,
) -> None:
    """Train on scikit-learn's digits, sample, score, and plot the variance of targets: two minutes on two cores."""
    from stablefield.cli.demonstrating import demonstrate

    if stopped := demonstrate(out, images, samples):
        raise typer.Exit(128 + stopped)
