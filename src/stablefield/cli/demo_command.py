"""`stablefield demo`: a complete example on handwritten digits, in about two minutes on two cores.

It trains with stable targets, samples, scores the samples by their distance to the data, and plots the variance of the
targets.
"""

import json
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
    from stablefield.build import build
    from stablefield.cli.demonstrating import draw_samples, plot_variance, score_samples
    from stablefield.cli.training import run, summary
    from stablefield.config import override, resolve
    from stablefield.files import write_text
    from stablefield.generate.images import save_sheet
    from stablefield.run import RunFolder

    settings = [] if images is None else [f"training.images={images}"]
    config, folder = resolve(override({}, settings)), RunFolder(out)
    components = build(config)
    if not folder.occupied():
        folder.claim(config)
    print(summary(config, components, folder))
    if stopped := run(config, components, folder):
        raise typer.Exit(128 + stopped)
    sheet, variance = out / "samples.png", out / "variance.png"
    x = draw_samples(folder, samples)
    save_sheet(sheet, x[:100])
    scores = score_samples(components.data, x.float())
    write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    plot_variance(variance, components)
    curve = f"loss and excess    {folder.loss_figure}\n" if folder.loss_figure.exists() else ""
    print(
        f"Frechet distance of {samples} samples to all digits: {scores['samples']:.2f}, "
        f"in {scores['features']} features of a classifier ({scores['accuracy']:.1%} accuracy on held-out digits)\n"
        f"  of {samples} digits drawn from them with replacement: {scores['real']:.2f} ({scores['real_least']:.2f} to "
        f"{scores['real_most']:.2f} in 8 draws)\n"
        f"  of {samples} digits to the others: {scores['disjoint']:.2f}, because both sets have sampling error\n"
        "  Samples can be nearer than digits are: with fewer unusual digits among them, sampling error is less.\n"
        f"samples            {sheet}\n{curve}"
        f"target variance    {variance}\nrun                {out}\n"
        f"The same without stable targets: stablefield train --set target.kind=dsm"
    )
