"""`stablefield demo`: a complete example on handwritten digits, in about two minutes on two cores.

It trains with stable targets, samples, scores the samples by their distance to the data, and plots the variance of the
targets.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from stablefield.build import build
from stablefield.cli.data_command import progress_bar
from stablefield.cli.train_command import run, summary
from stablefield.config import Config, override, resolve
from stablefield.data import Progress
from stablefield.evaluate import cached_classifier, evaluate
from stablefield.evaluate.plots import plot_loss
from stablefield.files import write_text
from stablefield.generate import SamplingPlan, generate_samples
from stablefield.generate.images import save_sheet
from stablefield.pool import Pool
from stablefield.run import RunFolder
from stablefield.seeding import generator
from stablefield.studies.field import measure_field
from stablefield.studies.field.plots import plot_field

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; an existing run is resumed.")] = Path("runs/demo"),
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of training images.", show_default="training.images")
    ] = None,
    samples: Annotated[int, typer.Option(min=64, help="Number of samples to score.")] = 500,
) -> None:
    """Train on scikit-learn's digits, sample, score, and plot the variance of targets: two minutes on two cores."""
    settings = [] if images is None else [f"training.images={images}"]
    config, folder = resolve(override({}, settings)), RunFolder(out)
    components = build(config)
    if not folder.occupied():
        folder.claim(config)
    print(summary(config, components, folder))
    if stopped := run(config, components, folder):
        raise typer.Exit(128 + stopped)
    sheet, loss, variance = (out / name for name in ("samples.png", "loss.png", "variance.png"))
    history = folder.history()
    images_seen = [1000 * record["progress/kimg"] for record in history]
    losses = [record["loss/loss"] for record in history]
    plot_loss(loss, images_seen, losses, "Training on the digits with stable targets")
    x = _sample(folder, samples)
    save_sheet(sheet, x[:100])
    scores = _score(components.data, x.float())
    write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    _plot_variance(variance, components.data, config)
    print(
        f"Frechet distance of {samples} samples to the digits: {scores['samples']:.2f} "
        f"(of {samples} real digits to the others: {scores['real']:.2f},\n"
        f"  {scores['real_least']:.2f} to {scores['real_most']:.2f} in 8 splits), "
        f"in {scores['features']} features of a classifier ({scores['accuracy']:.1%} accuracy on held-out digits)\n"
        f"samples            {sheet}\nloss curve         {loss}\n"
        f"target variance    {variance}\nrun                {out}\n"
        f"The same without stable targets: stablefield train --set target.kind=dsm"
    )


def _sample(folder: RunFolder, samples: int) -> torch.Tensor:
    """Samples of seeds 0, 1, ... from the trained run."""
    plan = SamplingPlan.for_run(folder.path)
    parts = generate_samples(plan.denoiser, plan.trained.shape, plan.sampler, range(samples), batch_size=250)
    with progress_bar("sampling") as progress:
        return torch.cat([_report(part.x.cpu(), max(seeds) + 1, samples, progress) for seeds, part in parts])


def _report(x: torch.Tensor, done: int, total: int, progress: Progress) -> torch.Tensor:
    progress(done, total)
    return x


def _score(data: Pool, x: torch.Tensor) -> dict[str, float]:
    """Frechet distance of samples to the data, and of as many real images to the other ones, over 8 splits."""
    classifier = cached_classifier(data)

    def frechet(samples: Pool | torch.Tensor, reference: Pool) -> float:
        return evaluate(samples, reference, features=classifier, metrics=["frechet"], batch_size=512)["frechet"].mean

    splits = [torch.randperm(len(data), generator=generator(seed, "real")) for seed in range(8)]
    real = [frechet(data.subset(order[: len(x)]), data.subset(order[len(x) :])) for order in splits]
    return {
        "samples": frechet(x, data),
        "real": sum(real) / len(real),
        "real_least": min(real),
        "real_most": max(real),
        "n": len(x),
        "reference": len(data),
        "features": classifier.network.head.in_features,
        "accuracy": classifier.accuracy,
    }


def _plot_variance(path: Path, data: Pool, config: Config) -> None:
    t = torch.logspace(-1.3, 1.5, 15, dtype=torch.float64)
    field = measure_field(data, config.make("process"), t, sizes=(64, config["target"]["size"]), examples=128)
    plot_field(path, field, "Variance of training targets: digits")
