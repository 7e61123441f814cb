"""The runs of one seed, all arms in turn: each trains a little, then the next, and at every mark all are scored.

So an experiment that is stopped can be compared at equal images, and what slows the machine down slows all arms down.
A run is saved before it is scored, so that no score is ever without its weights, and none is made twice.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from stablefield.checkpoint import write_text
from stablefield.compare.experiment import Arm, Experiment
from stablefield.compare.gradients import gradient_variance
from stablefield.compare.yardstick import Yardstick
from stablefield.engine import StepReport, train
from stablefield.engine.begin import begun, compile_network, descent_of
from stablefield.engine.saving import Saver
from stablefield.evaluate.pictures import save_grid
from stablefield.ranks import Ranks
from stablefield.run import Folder, assemble

SAVE_AFTER = 60.0  # seconds of work that may be lost
SHOWN = 64

Tell = Callable[[int, Arm, int], None]  # seed, arm, images seen
Stop = Callable[[], bool]


class Stopped(Exception):
    """Somebody asked to stop; all is saved."""


class Run:
    """One arm with one seed, where it stands.

    Attributes:
        folder: its files.
        images: seen so far.
    """

    def __init__(self, experiment: Experiment, out: Path, arm: Arm, seed: int) -> None:
        self.arm, self.seed, self.folder = arm, seed, experiment.folder(out, arm, seed)
        self.config = arm.configured(experiment.config, seed)
        self.parts = assemble(self.config)
        self.state = begun(self.config, self.parts)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.sweep()
        self.saver = Saver(self.folder, self.config, self.parts)
        experiment.refuse_other_data(self.parts.data, self.saver.data)
        self.saver.restore(self.state, Ranks(self.state.device))
        self.folder.rewind(self.images)
        compile_network(self.config, self.parts)
        write_text(self.folder.config, self.config.toml())
        # one for all turns: what is taught in steps of the next turn may be known already
        self.steps = train(
            self.state,
            self.parts.objective,
            self.parts.batches,
            images=experiment.goals[-1],
            seed=self.config.training.seed,
            descent=descent_of(self.config.training),
        )
        self.when = perf_counter()

    @property
    def images(self) -> int:
        return self.state.images

    def advance(self, goal: int, stop: Stop) -> None:
        """Train until so many images are seen, and note how it went.

        Raises:
            Stopped: asked to; what was trained is noted.
        """
        if self.images >= goal:
            return
        began, before, steps = perf_counter(), self.images, list[StepReport]()
        while self.images < goal:
            steps.append(next(self.steps))
            if stop():
                break
        line = noted(steps)  # waits for the device
        line["Timing/sec_per_kimg"] = (perf_counter() - began) / (self.images - before) * 1000
        self.folder.log(line)
        if self.images < goal:
            raise Stopped
        if perf_counter() - self.when > SAVE_AFTER:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, unless it is there."""
        if self.saver.newest < self.images and self.state.whole:
            self.saver.save(self.state)
        self.when = perf_counter()

    def look(self, yardstick: Yardstick) -> None:
        """Score the average as it is now, unless that was done."""
        if self.images in {line["images"] for line in scores(self.folder)}:
            return
        self.save()
        x, evaluations = yardstick.sample(self.state.average)
        if yardstick.pool.images:
            place = picture(self.folder, self.images)
            place.parent.mkdir(exist_ok=True)
            save_grid(place, x[:SHOWN])
        found = gradient_variance(self.parts.denoiser, self.parts.objective, yardstick.batches)
        line = {
            "images": self.images,
            **yardstick.judge(x),
            **yardstick.question(self.state.average),
            "gradient_variance": found.total,
            "gradient_variance_of_target": found.target,
            "gradient_squared_mean": found.squared_mean,
            "evaluations": evaluations,
        }
        _append(self.folder, line)


def work(
    experiment: Experiment, out: Path, seed: int, yardstick: Callable[[], Yardstick], tell: Tell, stop: Stop
) -> bool:
    """Bring all arms of a seed to the end; whether that was reached, or somebody asked to stop.

    Whatever ends it, what was trained is saved.
    """
    arms = [arm for arm in experiment.arms if not finished(experiment, out, arm, seed)]
    runs: list[Run] = []
    try:
        for arm in arms:
            runs.append(Run(experiment, out, arm, seed))
            tell(seed, arm, runs[-1].images)
        for turn, goal in enumerate(experiment.goals if runs else ()):
            for run in _rotated(runs, turn):
                if run.images > goal:
                    continue  # it has been here before
                run.advance(goal, stop)
                if goal in experiment.marks:
                    run.look(yardstick())
                tell(seed, run.arm, run.images)
                if stop():
                    raise Stopped
    except Stopped:
        return False
    finally:
        for run in runs:
            run.save()
    return True


def finished(experiment: Experiment, out: Path, arm: Arm, seed: int) -> bool:
    """Whether nothing is left to do."""
    done = {line["images"] for line in scores(experiment.folder(out, arm, seed))}
    return done >= set(experiment.marks)


def scores(folder: Folder) -> list[dict[str, Any]]:
    """What was measured of a run, a line a look."""
    place = looks(folder)
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def looks(folder: Folder) -> Path:
    """Where they stand (`stablefield evaluate` writes its scores of a run to scores.jsonl)."""
    return folder.path / "looks.jsonl"


def picture(folder: Folder, images: int) -> Path:
    """The grid of samples made after so many images."""
    return folder.path / "samples" / f"{images:09d}.png"


def noted(steps: Sequence[StepReport]) -> dict[str, float]:
    """A line of metrics for some steps."""
    line = {"Progress/kimg": steps[-1].images / 1000, "Loss/learning_rate": steps[-1].rate}
    if not (taken := [step for step in steps if step.taken]):
        return line  # a step that was not taken has no loss to speak of
    loss = torch.stack([step.report.loss.detach() for step in taken]).double()
    norm = torch.stack([step.gradient_norm.detach() for step in taken]).double()
    return line | {
        "Loss/loss": float(loss.mean()),
        "Loss/gradient_norm": float(norm.mean()),
        "Loss/gradient_norm_deviation": float(norm.std(correction=0)),
        "Target/ess": float(torch.stack([step.report.ess.mean() for step in taken]).mean()),
    }


def _append(folder: Folder, line: dict[str, Any]) -> None:
    place = looks(folder)
    before = place.read_text() if place.exists() else ""
    write_text(place, before + json.dumps(line) + "\n")


def _rotated(runs: Sequence[Run], turn: int) -> Iterator[Run]:
    # nobody is always first
    return (runs[(turn + place) % len(runs)] for place in range(len(runs)))
