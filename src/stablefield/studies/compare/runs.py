"""Training of one run and its evaluation at every evaluation point; whatever stops it, it resumes from its checkpoint.

A run is saved before it is evaluated, so that every score belongs to saved weights and no evaluation is repeated.
"""

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from stablefield.build import Components, build
from stablefield.engine import StepReport
from stablefield.engine.session import open_session
from stablefield.files import write_text
from stablefield.generate.images import save_sheet
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
    config, file = experiment.configure(arm, seed), experiment.record_file(out, arm, seed)
    parts, done = build(config), {line["images"] for line in read_lines(file)}
    with open_session(config, parts, experiment.run_folder(out, arm, seed)) as session:
        experiment.refuse_other_data(parts.data, session.checkpoints.identity.found)
        saved_at = reported_at = perf_counter()

        def record(step: StepReport | None) -> bool:
            nonlocal saved_at, reported_at
            if should_stop():
                return True
            images, now = session.state.images, perf_counter()
            due = images in experiment.evaluation_points and images not in done
            if due or now - saved_at > SAVE_INTERVAL:
                session.save()
                saved_at = now
            if due:
                line, samples = evaluator(parts)(session.state, parts, last=images == experiment.images)
                if parts.pool.images and images == experiment.images:
                    save_sheet(session.folder.path / "samples.png", samples[:SHEET_SAMPLES])
                append_line(file, line | {"endpoints": endpoints_hash(experiment.endpoints)})  # the run is finished
                saved_at = perf_counter()
            if due or now - reported_at > 1:
                report(images)
                reported_at = now
            return False

        return session.run(record)


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
