"""Rank correlation of losses with the Frechet distance of samples, over the records of comparisons.

    python examples/loss_correlation.py DIR [DIR ...] --out loss-correlation.md

DIR is the folder of a comparison (`stablefield compare --out DIR`). Three questions, each within one objective, for raw
and averaged weights:

    all runs            final values of all runs, whatever their targets
    one target          final values of the runs of one target, which differ in their seed; mean over the targets
    along training      all evaluation points of one run; mean over the runs

Each is answered by Spearman's rank correlation with the distance, for the excess, for the held-out loss, and for the
training loss that is to be expected, excess + floor of the run's targets: records have no training loss as it was
printed, whose noise and older weights are in neither. The interval is that of a bootstrap over seeds, with all runs of
a seed together; it is left out for fewer than 5 seeds.
"""

import argparse
import datetime
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from stablefield.build import build
from stablefield.engine.probing import target_name
from stablefield.files import write_text
from stablefield.floor import SquaredError
from stablefield.seeding import format_seeds
from stablefield.studies.compare import Arm, Comparison
from stablefield.studies.floor import cached_floor

LOSSES = ("excess", "held-out loss", "excess + floor")
MIN_SEEDS = 5
QUESTIONS = ("all runs", "one target", "along training")

Runs = Sequence[tuple[Arm, Mapping[str, np.ndarray]]]  # the curves of each run by the name of the quantity


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; nan if there are fewer than 3 values or one of the two is constant."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def correlation(runs: Runs, question: str, loss: str) -> float:
    """Rank correlation of a loss with the distance over runs of one objective.

    Args:
        runs: the runs; one may occur several times.
        question: one of `QUESTIONS`.
        loss: one of `LOSSES`.
    """
    if question == "along training":
        return float(np.mean([curves[f"{loss}, along training"] for _, curves in runs]))
    groups = [runs] if question == "all runs" else [[r for r in runs if r[0] == arm] for arm in {a for a, _ in runs}]
    final = [[np.array([curves[name][-1] for _, curves in group]) for name in (loss, "distance")] for group in groups]
    return float(np.mean([spearman(*each) for each in final]))


def interval(
    by_seed: Sequence[Runs], statistic: Callable[[Runs], float], resamples: int, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic: percentiles over bootstrap samples of the seeds.

    Args:
        by_seed: runs of each seed.
        statistic: the statistic of runs; samples in which it is nan are left out.
        resamples: number of bootstrap samples.
        seed: seed of their draws.
    """
    draws = np.random.default_rng(seed).integers(len(by_seed), size=(resamples, len(by_seed)))
    enough = len(by_seed) >= MIN_SEEDS
    values = [statistic([run for at in draw for run in by_seed[at]]) for draw in draws] if enough else []
    values = [value for value in values if np.isfinite(value)]
    return tuple(np.percentile(values, [2.5, 97.5])) if values else (float("nan"), float("nan"))


def runs_by_seed(
    comparison: Comparison, objective: str, weights: str, space: str, floors: Mapping[Arm, float]
) -> list[Runs]:
    """Curves of the finished runs of an objective, a list per seed.

    Args:
        comparison: the comparison.
        objective: name of the objective.
        weights: "average" or "raw".
        space: feature space of the distance.
        floors: floor of the loss with each arm's targets.
    """

    def curves(arm: Arm, seed: int) -> dict[str, np.ndarray]:
        lines = [line[weights] for line in comparison.lines[arm, seed]]
        found = {name: np.array([line[key] for line in lines]) for name, key in names.items()}
        found["excess + floor"] = found["excess"] + floors.get(arm, float("nan"))
        along = {f"{loss}, along training": np.array(spearman(found[loss], found["distance"])) for loss in LOSSES}
        return found | along

    names = {"distance": space, "excess": "excess", "held-out loss": "held-out loss"}
    arms = [arm for arm in comparison.experiment.arms if arm.objective == objective]
    found = [
        [(arm, curves(arm, seed)) for arm in arms if (arm, seed) in comparison.lines]
        for seed in comparison.experiment.seeds
    ]
    return [runs for runs in found if runs]


def floors_of_arms(comparison: Comparison) -> dict[Arm, float]:
    """Floor of the loss of each arm whose targets have a known one; the data are loaded for it."""
    experiment, found = comparison.experiment, {}
    for arm in experiment.arms:
        parts = build(experiment.configure(arm, experiment.seeds[0]))
        if (name := target_name(parts.objective.target)) is None:
            continue
        loss = SquaredError.of_objective(parts.objective, parts.denoiser.process)
        found[arm] = cached_floor(parts.pool, loss, targets=[name], bins=32, per_bin=64).floors[name].value
    return found


def table(comparison: Comparison, floors: Mapping[Arm, float], resamples: int) -> Iterator[str]:
    """Rows of the table of a comparison, in Markdown."""
    yield "| objective | weights | distance | over | runs | " + " | ".join(LOSSES) + " | excess less held-out loss |"
    yield "| --- | --- | --- | --- | --- |" + " --- |" * (len(LOSSES) + 1)

    def cell(by_seed: list[Runs], statistic: Callable[[Runs], float]) -> str:
        value = statistic([run for runs in by_seed for run in runs])
        low, high = interval(by_seed, statistic, resamples)
        ends = f" ({low:+.2f} to {high:+.2f})" if np.isfinite(low) else ""
        return f"{value:+.2f}{ends}" if np.isfinite(value) else "not measured"

    for objective in comparison.experiment.objectives:
        for weights in ("average", "raw"):
            for space in comparison.experiment.spaces:
                by_seed = runs_by_seed(comparison, objective, weights, space, floors)
                for question in QUESTIONS:
                    cells = [cell(by_seed, lambda runs, q=question, n=n: correlation(runs, q, n)) for n in LOSSES]
                    cells.append(cell(by_seed, lambda runs, q=question: _difference(runs, q)))
                    head = [objective or "configured", weights, space, question, str(sum(map(len, by_seed)))]
                    yield f"| {' | '.join([*head, *cells])} |"


def _difference(runs: Runs, question: str) -> float:
    return correlation(runs, question, "excess") - correlation(runs, question, "held-out loss")


def section(folder: Path, resamples: int, floors: Mapping[Arm, float] | None = None) -> Iterator[str]:
    """Section of the page about a comparison.

    Args:
        folder: folder of the comparison.
        resamples: number of bootstrap samples.
        floors: floor of the loss with each arm's targets; measured by default.
    """
    comparison = Comparison.read(folder)
    experiment = comparison.experiment
    total = len(experiment.arms) * len(experiment.seeds)
    machine = ", ".join(f"{key} {value}" for key, value in comparison.machine.items() if key != "reference")
    yield f"### {folder.name}"
    yield (
        f"{len(comparison.lines)} of {total} runs are finished: {'; '.join(map(str, experiment.arms))}. Seeds "
        f"{format_seeds(experiment.seeds)}; {experiment.images:,} images per run; machine: {machine}."
    )
    yield "\n".join(f"* {day}: `{command}`" for day, command in experiment.commands)
    yield "\n".join(table(comparison, floors_of_arms(comparison) if floors is None else floors, resamples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank correlation of losses with the Frechet distance.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of comparisons")
    parser.add_argument("--out", type=Path, default=Path("loss-correlation.md"), help="file of the page")
    parser.add_argument("--resamples", type=int, default=1000, help="number of bootstrap samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    head = (
        "Spearman's rank correlation with the Frechet distance of samples to the training data (95 % interval: "
        "bootstrap over seeds, from 5 seeds on). The records have no training loss as it was printed; excess + floor "
        f"is its average, without dropout. {datetime.date.today()}, `{command}`."
    )
    blocks = [head, *(block for folder in options.folders for block in section(folder, options.resamples))]
    write_text(options.out, "\n\n".join(blocks) + "\n")
    print(f"written {options.out}")


if __name__ == "__main__":
    main()
