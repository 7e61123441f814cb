"""Training times of all arms, measured alternately on an idle machine, for comparisons at equal time.

The runs of a comparison share their machine with each other and with other work, so their wall clock says little.
Here, arms of one objective train in turns, a segment each, and a turn compares each arm with the baseline. A segment
holds all the steps whose exact targets are computed in one call.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from stablefield.build import build
from stablefield.engine import StepReport
from stablefield.engine.session import initial_state, training_steps
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.runs import append_line


def measure_steps(
    experiment: Experiment,
    out: Path,
    machine: Mapping[str, Any],
    rounds: int = 7,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure training times of all arms, and add them to `records/steps.jsonl`.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        machine: description of the machine.
        rounds: number of turns; one more comes first and is not counted.
        report: called with (done, total) segments.

    Returns:
        The new line: date, machine, load average before the start, and seconds per 1,000 images by arm, one per turn.
    """
    load = os.getloadavg()[0]
    times: dict[str, list[float]] = {str(arm): [] for arm in experiment.arms}
    done, total = 0, len(experiment.arms) * (rounds + 1)
    for objective in experiment.objectives:
        arms = [arm for arm in experiment.arms if arm.objective == objective]
        runs = [_endless_steps(experiment, arm) for arm in arms]
        for turn in range(rounds + 1):
            for place in range(len(arms)):
                at = (turn + place) % len(arms)  # none is always first
                seconds = _time_segment(experiment, runs[at])
                done += 1
                report(done, total)
                if turn:
                    times[str(arms[at])].append(seconds)
    line = {"date": date.today().isoformat(), "machine": dict(machine), "load": load, "sec_per_kimg": times}
    append_line(out / "records" / "steps.jsonl", line)
    return line


def step_ratio(line: Mapping[str, Any], arm: Arm, baseline: Arm) -> float:
    """Training time of an arm relative to the baseline: the median over turns; nan if they were not measured.

    Args:
        line: a line of `records/steps.jsonl`.
        arm: the arm.
        baseline: the baseline of its objective.
    """
    times = line.get("sec_per_kimg", {})
    ours, theirs = times.get(str(arm), []), times.get(str(baseline), [])
    return median(a / b for a, b in zip(ours, theirs, strict=True)) if ours and theirs else float("nan")


def _endless_steps(experiment: Experiment, arm: Arm) -> Iterator[StepReport]:
    """Training steps of a fresh run of an arm."""
    config = experiment.configure(arm, experiment.seeds[0])
    parts = build(config)
    return training_steps(config, parts, initial_state(config, parts), images=2**62)


def _time_segment(experiment: Experiment, steps: Iterator[StepReport]) -> float:
    """Seconds per 1,000 images over one segment."""
    training = experiment.config.training
    count = max(1, training.target_prefetch // training.batch_size)
    start = perf_counter()
    for _ in range(count):
        step = next(steps)
    step.report.loss.item()  # waits for the device
    return (perf_counter() - start) / (count * training.batch_size) * 1000
