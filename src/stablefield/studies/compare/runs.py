"""Training of all arms of one seed in alternation, and their evaluation at every evaluation point.

Each arm trains for a while, then the next one. So an experiment that is stopped early can be compared at equal numbers
of images, and a busy machine slows all arms down alike. A run is saved before it is evaluated, so that every score
belongs to saved weights and no evaluation is repeated.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from stablefield.build import build
from stablefield.distributed import Ranks
from stablefield.engine import StepReport, train
from stablefield.engine.checkpoints import CheckpointManager
from stablefield.engine.fit import compile_network, initial_state, make_optimization
from stablefield.files import write_text
from stablefield.generate.images import save_sheet
from stablefield.run import RunFolder
from stablefield.studies.compare.evaluator import Evaluator
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.gradients import gradient_variance

__all__ = [
    "ReportImages",
    "Run",
    "ShouldStop",
    "StopRequestedError",
    "evaluations_file",
    "is_finished",
    "read_evaluations",
    "run_seed",
    "sheet_file",
    "step_metrics",
]

SAVE_INTERVAL = 60.0  # seconds of work that may be lost
SHEET_SAMPLES = 64

ReportImages = Callable[[int, Arm, int], None]  # called with (seed, arm, images seen)
ShouldStop = Callable[[], bool]


class StopRequestedError(Exception):
    """Raised when training was asked to stop; everything is saved."""


class Run:
    """Run of one arm with one seed, resumed from its newest checkpoint if there is one.

    Args:
        experiment: the experiment that the run belongs to.
        out: folder of the experiment.
        arm: the arm.
        seed: training seed.

    Attributes:
        arm: the arm.
        seed: training seed.
        folder: files of the run.
        config: configuration of the run.
        parts: data, denoiser, objective and batches.
        state: state of the training.
        checkpoints: writer of the checkpoints.
        steps: iterator over the remaining training steps.
        saved_at: when the run was saved last, on the clock of `perf_counter`.

    Raises:
        ConfigError: the data or the configuration have changed.
    """

    def __init__(self, experiment: Experiment, out: Path, arm: Arm, seed: int) -> None:
        self.arm, self.seed, self.folder = arm, seed, experiment.run_folder(out, arm, seed)
        self.config = arm.configure(experiment.config, seed)
        self.parts = build(self.config)
        self.state = initial_state(self.config, self.parts)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.sweep()
        self.checkpoints = CheckpointManager(self.folder, self.config, self.parts)
        experiment.refuse_other_data(self.parts.data, self.checkpoints.data_hash)
        self.checkpoints.restore(self.state, Ranks(self.state.device))
        self.folder.rewind(self.images)
        compile_network(self.config, self.parts)
        write_text(self.folder.config, self.config.toml())
        # one iterator for the whole training, because prefetched targets may reach beyond the next switch point
        self.steps = train(
            self.state,
            self.parts.objective,
            self.parts.batches,
            images=experiment.switch_points[-1],
            seed=self.config.training.seed,
            optimization=make_optimization(self.config.training),
        )
        self.saved_at = perf_counter()

    @property
    def images(self) -> int:
        """Number of images seen so far."""
        return self.state.images

    def train_until(self, images: int, should_stop: ShouldStop) -> None:
        """Train until a number of images is seen, and write a line of metrics.

        Args:
            images: total number of images to reach; nothing is done if it is reached already.
            should_stop: called after every step; training stops once it returns True.

        Raises:
            StopRequestedError: training was stopped early; the metrics of its steps are written.
        """
        if self.images >= images:
            return
        start, first, steps = perf_counter(), self.images, list[StepReport]()
        while self.images < images:
            steps.append(next(self.steps))
            if should_stop():
                break
        line = step_metrics(steps)  # waits for the device, so that the time below includes its work
        line["timing/sec_per_kimg"] = (perf_counter() - start) / (self.images - first) * 1000
        self.folder.log(line)
        if self.images < images:
            raise StopRequestedError
        if perf_counter() - self.saved_at > SAVE_INTERVAL:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless the newest one is up to date."""
        if self.checkpoints.newest_images < self.images and self.state.complete:
            self.checkpoints.save(self.state)
        self.saved_at = perf_counter()

    def evaluate(self, evaluator: Evaluator) -> None:
        """Evaluate the averaged weights and the gradient, unless that was done at this number of images.

        Args:
            evaluator: what all arms are evaluated with.
        """
        if self.images in {line["images"] for line in read_evaluations(self.folder)}:
            return
        self.save()
        x, network_evaluations = evaluator.sample(self.state.average)
        if evaluator.pool.images:
            file = sheet_file(self.folder, self.images)
            save_sheet(file, x[:SHEET_SAMPLES])
        gradient = gradient_variance(self.parts.denoiser, self.parts.objective, evaluator.gradient_batches)
        line = {
            "images": self.images,
            **evaluator.score_samples(x),
            **evaluator.score_denoiser(self.state.average),
            "gradient_variance": gradient.total,
            "gradient_variance_of_target": gradient.target,
            "gradient_squared_mean": gradient.squared_mean,
            "network_evaluations": network_evaluations,
        }
        _append(self.folder, line)


def run_seed(
    experiment: Experiment,
    out: Path,
    seed: int,
    evaluator: Callable[[], Evaluator],
    report: ReportImages,
    should_stop: ShouldStop,
) -> bool:
    """Train and evaluate all arms with one seed; whatever ends it, the training so far is saved.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        seed: training seed.
        evaluator: returns the evaluator; called only when there is something to evaluate.
        report: called with (seed, arm, images seen) after each part of the training.
        should_stop: called after every step; training stops once it returns True.

    Returns:
        True if all arms are finished, False if training was stopped.
    """
    arms = [arm for arm in experiment.arms if not is_finished(experiment, out, arm, seed)]
    runs: list[Run] = []
    try:
        for arm in arms:
            runs.append(Run(experiment, out, arm, seed))
            report(seed, arm, runs[-1].images)
        for number, images in enumerate(experiment.switch_points if runs else ()):
            for run in _rotated(runs, number):
                if run.images > images:
                    continue  # resumed beyond this point
                run.train_until(images, should_stop)
                if images in experiment.evaluation_points:
                    run.evaluate(evaluator())
                report(seed, run.arm, run.images)
                if should_stop():
                    raise StopRequestedError
    except StopRequestedError:
        return False
    finally:
        for run in runs:
            run.save()
    return True


def is_finished(experiment: Experiment, out: Path, arm: Arm, seed: int) -> bool:
    """True if a run has been evaluated at every evaluation point.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        arm: arm of the run.
        seed: training seed of the run.
    """
    done = {line["images"] for line in read_evaluations(experiment.run_folder(out, arm, seed))}
    return done >= set(experiment.evaluation_points)


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """Scores of a run, one dictionary per evaluation; empty before the first.

    Args:
        folder: files of the run.
    """
    file = evaluations_file(folder)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def evaluations_file(folder: RunFolder) -> Path:
    """Path of a run's scores (`stablefield evaluate` writes its own to scores.jsonl).

    Args:
        folder: files of the run.
    """
    return folder.path / "evaluations.jsonl"


def sheet_file(folder: RunFolder, images: int) -> Path:
    """Path of the sheet of samples that a run made at an evaluation.

    Args:
        folder: files of the run.
        images: number of images seen at the evaluation.
    """
    return folder.path / "samples" / f"{images:09d}.png"


def step_metrics(steps: Sequence[StepReport]) -> dict[str, float]:
    """Metrics of consecutive training steps, averaged.

    Args:
        steps: reports of the steps; those that the optimizer skipped do not count.
    """
    line = {"progress/kimg": steps[-1].images / 1000, "loss/learning_rate": steps[-1].learning_rate}
    if not (taken := [step for step in steps if step.step_taken]):
        return line  # a skipped step has a loss that is not finite
    loss = torch.stack([step.report.loss.detach() for step in taken]).double()
    norm = torch.stack([step.gradient_norm.detach() for step in taken]).double()
    return line | {
        "loss/loss": float(loss.mean()),
        "loss/gradient_norm": float(norm.mean()),
        "loss/gradient_norm_deviation": float(norm.std(correction=0)),
        "target/ess": float(torch.stack([step.report.ess.mean() for step in taken]).mean()),
    }


def _append(folder: RunFolder, line: dict[str, Any]) -> None:
    """Add the scores of an evaluation to the file of a run."""
    file = evaluations_file(folder)
    before = file.read_text() if file.exists() else ""
    write_text(file, before + json.dumps(line) + "\n")


def _rotated(runs: Sequence[Run], shift: int) -> Iterator[Run]:
    """The runs from another one on, so that none is always first."""
    return (runs[(shift + place) % len(runs)] for place in range(len(runs)))
