"""Execution of a comparison: its runs one after the other, or several at once in processes of one thread each."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from stablefield.build import Components, build
from stablefield.config import Allowed
from stablefield.data import Progress, StageProgress, silent_stage
from stablefield.studies.compare.evaluator import Evaluator, Reference
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.runs import ReportImages, ShouldStop, is_finished, run_arm

ReportRun = Callable[[Arm, int, int | str], None]  # called with (arm, seed, images seen or what is prepared)

_worker: list[Any] = []  # in a worker process: the worker, the queue of its messages and the event that stops it


class Worker:
    """Trains runs in one process, which share the features of the data and the evaluator of each objective.

    Args:
        out: folder of the experiment.
        allow: classes outside this package that the configuration may name, as for `resolve`.
        stage_progress: opens a progress callback for each stage of the preparation, given its title.

    Attributes:
        out: folder of the experiment.
        experiment: the experiment.
        stage_progress: opens a progress callback for each stage of the preparation.
    """

    def __init__(self, out: Path, allow: Iterable[Allowed] = (), stage_progress: StageProgress = silent_stage) -> None:
        self.out, self.experiment, self.stage_progress = out, Experiment.read(out, allow=allow), stage_progress
        self._reference: Reference | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def reference(self, parts: Components | None = None) -> Reference:
        """Data that samples are compared with, prepared at the first call.

        Args:
            parts: components of any run; built if there are none.
        """
        if self._reference is None:
            experiment = self.experiment
            parts = parts or build(experiment.configure(experiment.arms[0], experiment.seeds[0]))
            self._reference = Reference.make(
                parts, experiment.spaces, experiment.samples, self.out / "checkpoints", self.stage_progress
            )
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

    def __call__(self, arm: Arm, seed: int, report: ReportImages, should_stop: ShouldStop) -> bool:
        """Train one run; True if it is finished.

        Args:
            arm: the arm.
            seed: training seed.
            report: called with the images seen.
            should_stop: called after every step.
        """
        return run_arm(
            self.experiment, self.out, arm, seed, lambda parts: self.evaluator(arm, parts), report, should_stop
        )


def run_all(worker: Worker, jobs: int, report: ReportRun, should_stop: ShouldStop) -> bool:
    """Train and evaluate all runs that are not finished, seed by seed, so that pairs are completed early.

    Args:
        worker: the worker of this process.
        jobs: number of runs that are trained at once; with more than one, each in a process of its own.
        report: called as runs proceed.
        should_stop: called after every step; once it returns True, everything is saved and no more is trained.

    Returns:
        True if all runs are finished.
    """
    experiment, out = worker.experiment, worker.out
    runs = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    for run in runs:
        if is_finished(experiment, out, *run):
            report(*run, experiment.images)
    left = [run for run in runs if not is_finished(experiment, out, *run)]
    if jobs == 1 or len(left) < 2:
        return all(worker(arm, seed, partial(report, arm, seed), should_stop) for arm, seed in left)
    worker.reference()  # its statistics are cached for all processes
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    arguments = (out, experiment.config.allowed, messages, stopping)
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
