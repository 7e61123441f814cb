"""Training of one run and its evaluation at every evaluation point; whatever stops it, it resumes from its checkpoint.

A run is saved before it is evaluated, so that every score belongs to saved weights and no evaluation is repeated.
"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from stablefield.build import Components, build
from stablefield.engine.session import Session, deterministic_algorithms
from stablefield.files import write_text
from stablefield.generate.images import save_sheet
from stablefield.precision import arithmetic
from stablefield.studies.compare.endpoints import endpoints_hash
from stablefield.studies.compare.evaluator import Evaluator
from stablefield.studies.compare.experiment import Arm, Experiment

SAVE_INTERVAL = 60.0  # seconds of work that may be lost
SHEET_SAMPLES = 64

ReportImages = Callable[[int], None]
ShouldStop = Callable[[], bool]


def run_arm(
    experiment: Experiment,
    out: Path,
    arm: Arm,
    seed: int,
    evaluator: Callable[[Components], Evaluator],
    report: ReportImages,
    should_stop: ShouldStop,
) -> bool:
    """Train and evaluate one run.

    Args:
        experiment: the experiment that the run belongs to.
        out: folder of the experiment.
        arm: the arm.
        seed: training seed.
        evaluator: returns the evaluator of the arm's objective, given components of a run.
        report: called with the images seen, about once a second.
        should_stop: called after every step; once it returns True, the run is saved and left.

    Returns:
        True if the run is finished.

    Raises:
        ConfigError: the data or the configuration have changed.
    """
    if is_finished(experiment, out, arm, seed):
        return True
    config, folder = experiment.configure(arm, seed), experiment.run_folder(out, arm, seed)
    training = config.training
    with (
        deterministic_algorithms(training.deterministic),
        arithmetic(training.precision, deterministic=training.deterministic),
    ):
        parts = build(config)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.sweep()
        session = Session(config, parts, folder)
        state, checkpoints = session.state, session.checkpoints
        experiment.refuse_other_data(parts.data, checkpoints.identity.found)
        write_text(folder.config, session.config.toml())
        record = experiment.record_file(out, arm, seed)
        saved_at = reported_at = perf_counter()
        for images in chain([state.images], (step.images for step in session.steps())):
            now, stop = perf_counter(), should_stop()
            if stop or now - saved_at > SAVE_INTERVAL:
                checkpoints.save(state)
                saved_at = now
            if stop:
                return False
            if images in experiment.evaluation_points and images not in {line["images"] for line in read_lines(record)}:
                if checkpoints.newest_images < images:
                    checkpoints.save(state)
                line, samples = evaluator(parts)(state, parts, last=images == experiment.images)
                if parts.pool.images and images == experiment.images:
                    save_sheet(folder.path / "samples.png", samples[:SHEET_SAMPLES])
                append_line(record, line | {"endpoints": endpoints_hash(experiment.endpoints)})  # the run is finished
                saved_at = perf_counter()
            if now - reported_at > 1 or images in experiment.evaluation_points:
                report(images)
                reported_at = now
    return True


def is_finished(experiment: Experiment, out: Path, arm: Arm, seed: int) -> bool:
    """True if a run has been evaluated at every evaluation point.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        arm: arm of the run.
        seed: training seed of the run.
    """
    done = {line["images"] for line in read_lines(experiment.record_file(out, arm, seed))}
    return done >= set(experiment.evaluation_points)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Content of a file of JSON lines; empty if there is no file.

    Args:
        file: the file.
    """
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines, by one whole write.

    Args:
        file: the file.
        line: what to add.
    """
    before = file.read_text() if file.exists() else ""
    write_text(file, before + json.dumps(line) + "\n")
