"""`stablefield demo`: the whole of it on handwritten digits, in about two minutes on two cores.

Trains with stable targets, samples, measures the distance between samples and data, and how much the targets vary.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from stablefield.cli.sample import batches
from stablefield.cli.train import run, summary
from stablefield.config import Config, override, resolve
from stablefield.evaluate import Statistics, cached_classifier, frechet_distance, measure_field
from stablefield.evaluate.field.plots import plot_field
from stablefield.evaluate.pictures import save_grid
from stablefield.evaluate.plots import plot_loss
from stablefield.reference import Pool
from stablefield.run import Folder, assemble, make_sampler, open_run
from stablefield.seeding import generator


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that is there is taken up again.")] = Path(
        "runs/demo"
    ),
    images: Annotated[int | None, typer.Option(min=1, help="Images to train on, instead of the default.")] = None,
    samples: Annotated[int, typer.Option(min=64, help="Samples to score.")] = 500,
) -> None:
    """Train on scikit-learn's digits, sample, score, and plot the variance of the targets: two minutes on two cores."""
    settings = [] if images is None else [f"training.images={images}"]
    config, folder = resolve(override({}, settings)), Folder(out)
    parts = assemble(config)
    if not folder.occupied():
        folder.claim(config)
    print(summary(config, parts, folder))
    if stopped := run(config, parts, folder):
        raise typer.Exit(128 + stopped)
    grid, loss, variance = (out / name for name in ("samples.png", "loss.png", "variance.png"))
    history = folder.history()
    seen = [1000 * line["Progress/kimg"] for line in history]
    plot_loss(loss, seen, [line["Loss/loss"] for line in history], "Training on the digits with stable targets")
    x = _sample(folder, config, samples)
    save_grid(grid, x[:100])
    scores = _score(parts.data, x.float())
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    _plot_variance(variance, parts.data, config)
    print(
        f"Frechet distance to the digits, {samples} samples: {scores['samples']:.2f} "
        f"(as many real ones to the rest: {scores['real']:.2f}, in 8 splits {scores['real_least']:.2f} to "
        f"{scores['real_most']:.2f}),\n"
        f"  in {scores['features']} features of a classifier ({scores['accuracy']:.1%} of unseen digits right)\n"
        f"samples            {grid}\nloss curve         {loss}\n"
        f"target variance    {variance}\nthe run            {out}\n"
        f"Its twin without stable targets: stablefield train --set target.kind=single"
    )


def _sample(folder: Folder, config: Config, samples: int) -> torch.Tensor:
    trained = open_run(folder.path)
    made = batches(trained.denoiser, trained.shape, make_sampler(config), range(samples), batch=250)
    return torch.cat([part.x.cpu() for _, part in made])


def _score(data: Pool, x: torch.Tensor) -> dict[str, float]:
    """Distance of samples to the data; beside it, that of as many real images to the rest, over several splits."""
    classifier = cached_classifier(data)
    features = classifier(data.take(torch.arange(len(data))))
    splits = [torch.randperm(len(data), generator=generator(seed, "real")) for seed in range(8)]
    real = [
        frechet_distance(*(Statistics.of(features[part]) for part in (order[: len(x)], order[len(x) :])))
        for order in splits
    ]
    return {
        "samples": frechet_distance(Statistics.of(classifier(x)), Statistics.of(features)),
        "real": sum(real) / len(real),
        "real_least": min(real),
        "real_most": max(real),
        "n": len(x),
        "reference": len(data),
        "features": features.shape[1],
        "accuracy": classifier.accuracy,
    }


def _plot_variance(path: Path, data: Pool, config: Config) -> None:
    t = torch.logspace(-1.3, 1.5, 15, dtype=torch.float64)
    found = measure_field(data, config.make("process"), t, sizes=(64, config["target"]["size"]), rows=128)
    plot_field(path, found, "Variance of the training target, digits")
