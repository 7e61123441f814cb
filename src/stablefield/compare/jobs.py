"""Seeds at work: one after the other, or several at once in processes of their own that share the cores."""

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

from stablefield.compare.experiment import Arm, Experiment
from stablefield.compare.runs import Stop, Tell, work
from stablefield.compare.yardstick import Stages, Yardstick, make_yardstick, quietly
from stablefield.config import Allowed
from stablefield.data import Progress
from stablefield.engine.begin import exactly
from stablefield.run import assemble, fingerprint

Prepare = Callable[[int, str], None]  # seed, what its process does before it can be scored

_shared: list[Any] = []  # of a worker process: what it tells into, and what it is stopped by
_made: dict[Path, Yardstick] = {}  # the one made last


def run_all(
    experiment: Experiment, out: Path, jobs: int, tell: Tell, stop: Stop, prepare: Prepare = lambda seed, what: None
) -> bool:
    """Bring an experiment to its end; whether that was reached, or `stop` said to stop.

    Args:
        tell: how far a run is.
        prepare: with several jobs, each makes its own yardstick; what it is doing for that.
    """
    if jobs == 1:
        return all(_seed(experiment, out, seed, tell, stop) for seed in experiment.seeds)
    context = multiprocessing.get_context("spawn")
    told, stopping = context.Queue(), context.Event()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, _begin, (told, stopping, threads))
    with pool:
        futures = [pool.submit(_work, out, seed, experiment.config.allowed) for seed in experiment.seeds]
        while wait(futures, 0.2).not_done:
            _drain(told, tell, prepare)
            if stop() or any(_failed(future) for future in futures):
                stopping.set()
        _drain(told, tell, prepare)
    return all([future.result() for future in futures])


def yardstick_of(out: Path, stages: Stages = quietly, allow: Iterable[Allowed] = ()) -> Yardstick:
    """Of the experiment in a folder; made once a process, which `stages` is told of.

    Args:
        allow: classes outside this package that its network may be, as of `resolve`.
    """
    if out not in _made:
        experiment = Experiment.read(out, allow=allow)
        config = experiment.arms[0].configured(experiment.config, experiment.seeds[0])
        parts = assemble(config)
        experiment.refuse_other_data(parts.data, fingerprint(parts.data))
        _made.clear()
        _made[out] = make_yardstick(config, parts, samples=experiment.samples, rows=experiment.rows, stages=stages)
    return _made[out]


def _begin(told: Any, stopping: Event, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent says when to stop
    torch.set_num_threads(threads)
    _shared[:] = told, stopping


def _work(out: Path, seed: int, allow: tuple[Allowed, ...]) -> bool:
    told, stopping = _shared

    def tell(seed: int, arm: Arm, images: int) -> None:
        told.put((seed, arm, images))

    @contextmanager
    def stages(title: str) -> Iterator[Progress]:
        yield lambda done, total: told.put((seed, f"{title}, {done:,} of {total:,}"))

    if stopping.is_set():
        return False
    return _seed(Experiment.read(out, allow=allow), out, seed, tell, stopping.is_set, stages)


def _seed(experiment: Experiment, out: Path, seed: int, tell: Tell, stop: Stop, stages: Stages = quietly) -> bool:
    allow = experiment.config.allowed
    with exactly(experiment.config.training.deterministic):
        return work(experiment, out, seed, lambda: yardstick_of(out, stages, allow), tell, stop)


def _drain(told: Any, tell: Callable[..., None], prepare: Callable[..., None]) -> None:
    while True:
        try:
            news = told.get_nowait()
        except Empty:
            return
        (prepare if len(news) == 2 else tell)(*news)


def _failed(future: Future[bool]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None
