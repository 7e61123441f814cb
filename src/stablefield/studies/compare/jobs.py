"""Execution of a comparison: its seeds one after the other, or several at once in processes that share the cores."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from stablefield.build import build
from stablefield.config import Allowed
from stablefield.data import Progress, StageProgress, silent_stage
from stablefield.engine.fit import deterministic_algorithms
from stablefield.run import fingerprint
from stablefield.studies.compare.evaluator import Evaluator, make_evaluator
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.runs import ReportImages, ShouldStop, run_seed

__all__ = ["ReportStage", "cached_evaluator", "run_all"]

ReportStage = Callable[[int, str], None]  # called with (seed, what its process is preparing)

_channel: list[Any] = []  # in a worker process: the queue of its messages and the event that stops it
_evaluators: dict[Path, Evaluator] = {}  # the one made last


def run_all(
    experiment: Experiment,
    out: Path,
    jobs: int,
    report: ReportImages,
    should_stop: ShouldStop,
    report_stage: ReportStage = lambda seed, stage: None,
) -> bool:
    """Train and evaluate all runs of an experiment that are not finished.

    Args:
        experiment: the experiment, already written to its folder.
        out: folder of the experiment.
        jobs: number of seeds that are processed at once; with more than one, each in a process of its own.
        report: called with (seed, arm, images seen) as runs proceed.
        should_stop: called after every step; once it returns True, everything is saved and no more is trained.
        report_stage: called with (seed, text) while a process prepares its own evaluator (only with several jobs).

    Returns:
        True if the experiment is complete, False if it was stopped.
    """
    if jobs == 1:
        return all(_run_seed(experiment, out, seed, report, should_stop) for seed in experiment.seeds)
    context = multiprocessing.get_context("spawn")
    messages, stopping = context.Queue(), context.Event()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (messages, stopping, threads))
    with pool:
        futures = [pool.submit(_work, out, seed, experiment.config.allowed) for seed in experiment.seeds]
        while wait(futures, 0.2).not_done:
            _forward(messages, report, report_stage)
            if should_stop() or any(_failed(future) for future in futures):
                stopping.set()
        _forward(messages, report, report_stage)
    return all([future.result() for future in futures])


def cached_evaluator(
    out: Path, stage_progress: StageProgress = silent_stage, allow: Iterable[Allowed] = ()
) -> Evaluator:
    """The evaluator of an experiment, made once per process.

    Args:
        out: folder of the experiment.
        stage_progress: opens a progress callback for each stage of the preparation.
        allow: classes outside this package that the configuration may name, as for `resolve`.

    Raises:
        ConfigError: there is no experiment, or its data have changed.
    """
    if out not in _evaluators:
        experiment = Experiment.read(out, allow=allow)
        config = experiment.arms[0].configure(experiment.config, experiment.seeds[0])
        parts = build(config)
        experiment.refuse_other_data(parts.data, fingerprint(parts.data))
        _evaluators.clear()
        _evaluators[out] = make_evaluator(
            config, parts, samples=experiment.samples, examples=experiment.examples, stage_progress=stage_progress
        )
    return _evaluators[out]


def _start_worker(messages: Any, stopping: Event, threads: int) -> None:
    """Initialize a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides when to stop
    torch.set_num_threads(threads)
    _channel[:] = messages, stopping


def _work(out: Path, seed: int, allow: tuple[Allowed, ...]) -> bool:
    """Process one seed in a worker process, and send its progress to the parent."""
    messages, stopping = _channel

    def report(seed: int, arm: Arm, images: int) -> None:
        messages.put((seed, arm, images))

    @contextmanager
    def stage_progress(title: str) -> Iterator[Progress]:
        yield lambda done, total: messages.put((seed, f"{title}, {done:,} of {total:,}"))

    if stopping.is_set():
        return False
    return _run_seed(Experiment.read(out, allow=allow), out, seed, report, stopping.is_set, stage_progress)


def _run_seed(
    experiment: Experiment,
    out: Path,
    seed: int,
    report: ReportImages,
    should_stop: ShouldStop,
    stage_progress: StageProgress = silent_stage,
) -> bool:
    """Train and evaluate all arms with one seed; True if they are finished."""
    allow = experiment.config.allowed
    with deterministic_algorithms(experiment.config.training.deterministic):
        return run_seed(
            experiment, out, seed, lambda: cached_evaluator(out, stage_progress, allow), report, should_stop
        )


def _forward(messages: Any, report: Callable[..., None], report_stage: Callable[..., None]) -> None:
    """Pass the messages of worker processes on to the callbacks."""
    while True:
        try:
            message = messages.get_nowait()
        except Empty:
            return
        (report_stage if len(message) == 2 else report)(*message)


def _failed(future: Future[bool]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None
