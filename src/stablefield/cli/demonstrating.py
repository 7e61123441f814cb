"""The work of `stablefield demo`: samples, scores and plots."""

import json
from pathlib import Path

import torch

from stablefield.build import Components, build
from stablefield.cli.progress import progress_bar
from stablefield.cli.training import run, summary
from stablefield.config import override, resolve
from stablefield.evaluate import cached_classifier, evaluate
from stablefield.files import write_text
from stablefield.generate import SamplingPlan, generate_samples
from stablefield.generate.images import save_sheet
from stablefield.pool import Pool
from stablefield.run import RunFolder
from stablefield.seeding import generator
from stablefield.studies.field import measure
from stablefield.studies.field.plots import plot_field
from stablefield.targets import STFTarget


def demonstrate(out: Path, images: int | None, samples: int) -> int:
    """Train on digits, sample, score and plot, and print where the results are.

    Args:
        out: folder of the run; an existing run is resumed.
        images: number of training images; None for the default.
        samples: number of samples to score.

    Returns:
        The number of the signal that stopped training, or 0.
    """
    settings = [] if images is None else [f"training.images={images}"]
    config, folder = resolve(override({}, settings)), RunFolder(out)
    components = build(config)
    if not folder.occupied():
        folder.claim(config)
    print(summary(config, components, folder))
    if stopped := run(config, components, folder):
        return stopped
    sheet, variance = out / "samples.png", out / "variance.png"
    x = _draw_samples(folder, samples)
    save_sheet(sheet, x[:100])
    scores = _score_samples(components.data, x.float())
    write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    _plot_variance(variance, components)
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
    return 0


def _draw_samples(folder: RunFolder, samples: int) -> torch.Tensor:
    """Samples of seeds 0, 1, ... from the trained run."""
    plan = SamplingPlan.for_run(folder.path)
    parts = []
    with progress_bar("sampling") as progress:
        batches = generate_samples(plan.denoiser, plan.trained.shape, plan.sampler, range(samples), batch_size=250)
        for seeds, batch in batches:
            parts.append(batch.x.cpu())
            progress(max(seeds) + 1, samples)
    return torch.cat(parts)


def _score_samples(data: Pool, x: torch.Tensor) -> dict[str, float]:
    """Frechet distances to all data: of samples, and of as many images drawn from the data, over 8 draws.

    A model that had learned the data exactly would draw from them with replacement. Disjoint parts of the data are
    further apart, because the sampling error of both counts: 1 / n + 1 / m compared with 1 / n.
    """
    classifier = cached_classifier(data)

    def frechet(samples: Pool | torch.Tensor, reference: Pool) -> float:
        return evaluate(samples, reference, features=classifier, metrics=["frechet"], batch_size=512)["frechet"].mean

    n, real, disjoint = len(x), [], []
    for seed in range(8):
        drawn = torch.randint(len(data), (n,), generator=generator(seed, "real with replacement"))
        real.append(frechet(data.take(drawn), data))
        order = torch.randperm(len(data), generator=generator(seed, "real"))
        disjoint.append(frechet(data.subset(order[:n]), data.subset(order[n:])))
    return {
        "samples": frechet(x, data),
        "real": sum(real) / len(real),
        "real_least": min(real),
        "real_most": max(real),
        "disjoint": sum(disjoint) / len(disjoint),
        "n": n,
        "reference": len(data),
        "features": classifier.network.head.in_features,
        "accuracy": classifier.accuracy,
    }


def _plot_variance(path: Path, components: Components) -> None:
    """Plot the variance of the targets against the noise level."""
    target, levels = components.objective.target, torch.logspace(-1.3, 1.5, 15, dtype=torch.float64)
    assert isinstance(target, STFTarget)
    process, sizes = components.denoiser.process, (64, target.size)
    study = measure(components.data, process, noise_levels=levels, sizes=sizes, examples=128)
    plot_field(path, study, "Variance of training targets: digits")
