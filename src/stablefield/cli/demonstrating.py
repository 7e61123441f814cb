"""The work of `stablefield demo`: samples, scores and plots."""

from pathlib import Path

import torch

from stablefield.build import Components
from stablefield.cli.progress import progress_bar
from stablefield.evaluate import cached_classifier, evaluate
from stablefield.generate import SamplingPlan, generate_samples
from stablefield.pool import Pool
from stablefield.run import RunFolder
from stablefield.seeding import generator
from stablefield.studies.field import measure
from stablefield.studies.field.plots import plot_field
from stablefield.targets import STFTarget


def draw_samples(folder: RunFolder, samples: int) -> torch.Tensor:
    """Samples of seeds 0, 1, ... from the trained run.

    Args:
        folder: folder of the run.
        samples: number of samples.
    """
    plan = SamplingPlan.for_run(folder.path)
    parts = []
    with progress_bar("sampling") as progress:
        batches = generate_samples(plan.denoiser, plan.trained.shape, plan.sampler, range(samples), batch_size=250)
        for seeds, batch in batches:
            parts.append(batch.x.cpu())
            progress(max(seeds) + 1, samples)
    return torch.cat(parts)


def score_samples(data: Pool, x: torch.Tensor) -> dict[str, float]:
    """Frechet distances to all data: of samples, and of as many images drawn from the data, over 8 draws.

    A model that had learned the data exactly would draw from them with replacement. Disjoint parts of the data are
    further apart, because the sampling error of both counts: 1 / n + 1 / m compared with 1 / n.

    Args:
        data: the data of the run.
        x: the samples.
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


def plot_variance(path: Path, components: Components) -> None:
    """Plot the variance of the targets against the noise level.

    Args:
        path: image file to write.
        components: components of the run; its target is an STF target.
    """
    target, levels = components.objective.target, torch.logspace(-1.3, 1.5, 15, dtype=torch.float64)
    assert isinstance(target, STFTarget)
    process, sizes = components.denoiser.process, (64, target.size)
    study = measure(components.data, process, noise_levels=levels, sizes=sizes, examples=128)
    plot_field(path, study, "Variance of training targets: digits")
