"""Execution of a comparison: its runs one after the other, or several at once in processes of one thread each.

A run is saved before it is evaluated, so that every score belongs to saved weights and no evaluation is repeated.
Whatever stops a run, it resumes from its checkpoint.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import date
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from statistics import median
from time import perf_counter
from typing import Any

import torch

from stablefield.build import Components, build
from stablefield.config import Allowed
from stablefield.data import Progress, StageProgress, silent_stage
from stablefield.engine import StepReport
from stablefield.engine.session import initial_state, open_session, training_steps
from stablefield.files import write_text
from stablefield.generate.images import save_sheet
from stablefield.studies.compare.endpoints import endpoints_hash
from stablefield.studies.compare.evaluator import Evaluator, Reference
from stablefield.studies.compare.experiment import Arm, Experiment

SAVE_INTERVAL = 60.0  # seconds of work that may be lost
SHEET_SAMPLES = 64

ReportRun = Callable[[Arm, int, int | str], None]  # called with (arm, seed, images seen or what is prepared)

_worker: list[Any] = []  # in a worker process: the worker, the queue of its messages and the event that stops it


class Worker:
    """Trains and evaluates runs in one process, which share the features of the data and the evaluators.

    Args:
        out: folder of the experiment.
        allow: classes outside this package that the configuration may name, as for `resolve`.
        stage_progress: opens a progress callback for each stage of the preparation, given its title.

    Attributes:
        experiment: the experiment.
    """

    def __init__(self, out: Path, allow: Iterable[Allowed] = (), stage_progress: StageProgress = silent_stage) -> None:
        self.out, self.experiment, self.stage_progress = out, Experiment.read(out, allow=allow), stage_progress
        self._reference: Reference | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def reference(self, parts: Components) -> Reference:
        """Data that samples are compared with, prepared at the first call.

        Args:
            parts: components of any run.
        """
        if self._reference is None:
            names, samples, cache = self.experiment.spaces, self.experiment.samples, self.out / "checkpoints"
            self._reference = Reference.make(parts, names, samples, cache, self.stage_progress)
        return self._reference

    def evaluator(self, arm: Arm, parts: Components) -> Evaluator:
        """Evaluator of an objective, made at the first call.

        Args:
            arm: an arm of the objective.
            parts: components of a run of it.
        """
        if arm.objective not in self._evaluators:
            experiment, reference = self.experiment, self.reference(parts)
            config = experiment.configure(arm.plain, 0)
            parts = parts if arm.plain == arm else build(config)
            with self.stage_progress(f"exact targets: {arm.objective or 'objective'}"):
                made = Evaluator.make(config, parts, reference, experiment.samples, experiment.examples)
            self._evaluators[arm.objective] = made
        return self._evaluators[arm.objective]

    def __call__(self, arm: Arm, seed: int, report: Callable[[int], object], should_stop: Callable[[], bool]) -> bool:
        """Train and evaluate one run.

        Args:
            arm: the arm.
            seed: training seed.
            report: called with the images seen, about once a second.
            should_stop: called after every step; once it returns True, the run is saved and left.

        Returns:
            True if the run is finished.

        Raises:
            ConfigError: the data or the configuration have changed.
        """
        experiment, file = self.experiment, self.experiment.record_file(self.out, arm, seed)
        config, missing = experiment.configure(arm, seed), _missing(experiment, file)
        parts = build(config)
        with open_session(config, parts, experiment.run_folder(self.out, arm, seed)) as session:
            experiment.refuse_other_data(parts.data, session.checkpoints.identity.found)
            saved_at = reported_at = perf_counter()

            def record(step: StepReport | None) -> bool:
                nonlocal saved_at, reported_at
                if should_stop():
                    return True
                images, now = session.state.images, perf_counter()
                if images in missing or now - saved_at > SAVE_INTERVAL:
                    session.save()
                    saved_at = now
                if images in missing:
                    last = images == experiment.images
                    line, samples = self.evaluator(arm, parts)(session.state, parts, last=last)
                    if parts.pool.images and last:
                        save_sheet(session.folder.path / "samples.png", samples[:SHEET_SAMPLES])
                    _append(file, line | {"endpoints": endpoints_hash(experiment.endpoints)})  # the run is finished
                    saved_at = perf_counter()
                if images in missing or now - reported_at > 1:
                    report(images)
                    reported_at = now
                return False

            return session.run(record)


def run_all(worker: Worker, jobs: int, report: ReportRun, should_stop: Callable[[], bool]) -> bool:
    """Train and evaluate all runs that are not finished, seed by seed, so that pairs are completed early.

    Args:
        worker: the worker of this process, whose reference is made: its statistics are cached for all processes.
        jobs: number of runs that are trained at once; with more than one, each in a process of its own.
        report: called as runs proceed.
        should_stop: called after every step; once it returns True, everything is saved and no more is trained.

    Returns:
        True if all runs are finished.
    """
    experiment, left = worker.experiment, []
    for run in ((arm, seed) for seed in experiment.seeds for arm in experiment.arms):
        if is_finished(experiment, worker.out, *run):
            report(*run, experiment.images)
        else:
            left.append(run)
    if jobs == 1 or len(left) < 2:
        return all(worker(arm, seed, partial(report, arm, seed), should_stop) for arm, seed in left)
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    arguments = (worker.out, experiment.config.allowed, messages, stopping)
    with ProcessPoolExecutor(jobs, context, _start_process, arguments) as pool:
        futures = [pool.submit(_work, *run) for run in left]
        while wait(futures, 0.2).not_done:
            _forward(messages, report)
            failed = any(f.done() and not f.cancelled() and f.exception() for f in futures)
            if should_stop() or failed:
                stopping.set()
        _forward(messages, report)
        return all([future.result() for future in futures])


def _start_process(out: Path, allow: tuple[Allowed, ...], messages: Any, stopping: Event) -> None:
    """Initialize a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker[:] = [Worker(out, allow), messages, stopping]


def _work(arm: Arm, seed: int) -> bool:
    """Train one run in a worker process, and send its progress to the parent."""
    worker, messages, stopping = _worker

    @contextmanager
    def stage_progress(title: str) -> Iterator[Progress]:
        yield lambda done, total: messages.put((arm, seed, f"{title}, {done:,} of {total:,}"))

    worker.stage_progress = stage_progress
    return not stopping.is_set() and worker(arm, seed, lambda n: messages.put((arm, seed, n)), stopping.is_set)


def _forward(messages: Any, report: ReportRun) -> None:
    """Pass the messages of worker processes on to the callback."""
    while True:
        try:
            report(*messages.get_nowait())
        except Empty:
            return


def measure_steps(
    experiment: Experiment,
    out: Path,
    machine: Mapping[str, Any],
    rounds: int = 7,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure training times of all arms on an idle machine, and add them to `records/steps.jsonl`.

    The runs of a comparison share their machine with each other and with other work, so their wall clock says little.
    Here, arms of one objective train in turns, a segment each, and a turn compares each arm with the baseline. A
    segment holds all the steps whose exact targets are computed in one call.

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
    _append(out / "records" / "steps.jsonl", line)
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


def is_finished(experiment: Experiment, out: Path, arm: Arm, seed: int) -> bool:
    """True if a run has been evaluated at every evaluation point.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        arm: arm of the run.
        seed: training seed of the run.
    """
    return not _missing(experiment, experiment.record_file(out, arm, seed))


def _missing(experiment: Experiment, file: Path) -> set[int]:
    """Evaluation points that the records of a run lack."""
    return set(experiment.evaluation_points) - {line["images"] for line in read_lines(file)}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Content of a file of JSON lines; empty if there is no file.

    Args:
        file: the file.
    """
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines, by one whole write."""
    before = file.read_text() if file.exists() else ""
    write_text(file, before + json.dumps(line) + "\n")
