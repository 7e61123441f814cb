"""The driver of a run: trains in the run's folder until all images have been seen or a signal arrives.

Whatever ends a run (a signal, an error, a rank that dies), its newest checkpoint is whole, and the run resumes from it
as if it had never stopped. Metrics, samples and checkpoints are due at numbers of images seen, so a run that was
stopped writes them at the same steps.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any

from stablefield.build import Components, build_sampler
from stablefield.config import Config
from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.engine.checkpoints import locked
from stablefield.engine.loop import StepReport
from stablefield.engine.metrics import HeldOutLoss, MetricsLogger, NoiseBins
from stablefield.engine.probing import LossFigure, RunProbes
from stablefield.engine.session import Session, deterministic_algorithms
from stablefield.engine.tensorboard import TensorBoardWriter, samples
from stablefield.files import write_text
from stablefield.run import RunFolder

__all__ = [
    "CheckpointScore",
    "OnStep",
    "StopRequest",
    "fit",
    "stop_signals",
]

OnStep = Callable[[int, Mapping[str, Any]], object]
"""Called after every step, on every rank, with the images seen and the latest metrics."""

CheckpointScore = Callable[[Denoiser], float]
"""Rates a model; lower is better."""


def fit(
    config: Config,
    components: Components,
    folder: RunFolder,
    *,
    ranks: Ranks | None = None,
    on_step: OnStep | None = None,
    score: CheckpointScore | None = None,
) -> int:
    """Train or resume a run until all images have been seen or a signal arrives.

    Args:
        config: the configuration that `components` were built from.
        components: the parts of the run; the denoiser is trained in place.
        folder: folder of the run, which resumes from its newest checkpoint if there is one.
        ranks: this process and those it trains with, all of which call this; a single process by default.
        on_step: called after every step, on every rank, with the images seen and the latest metrics.
        score: rates the first average at every checkpoint; the checkpoint with the lowest score is kept as the best. It
            is called on every rank, and the result of the main rank counts. By default the loss on the held-out images,
            if there are any.

    Returns:
        The number of the signal that stopped the run (2 for Ctrl-C), or 0 if it is complete.

    Raises:
        ConfigError: the folder holds another run, or one that has seen more images than are to be seen, or another
            process is training in it.
        CheckpointError: the newest checkpoint is damaged.
        FloatingPointError: the gradient was not finite in too many consecutive steps.
        ConnectionError: another rank has died.
        OSError: the folder cannot be written.
    """
    ranks = ranks or Ranks(next(components.denoiser.parameters()).device)
    with ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(locked(folder)))
        stack.enter_context(deterministic_algorithms(config.training.deterministic))
        stop = stack.enter_context(stop_signals())
        return _Fit(config, components, folder, ranks, score).run(on_step, stop)


class _Fit:
    """A run in progress, with its checkpoints, metrics and samples."""

    def __init__(
        self,
        config: Config,
        components: Components,
        folder: RunFolder,
        ranks: Ranks,
        score: CheckpointScore | None,
    ) -> None:
        self.config, self.components, self.folder, self.ranks, self.score = config, components, folder, ranks, score
        training, objective = config.training, components.objective
        self.session = Session(config, components, folder, ranks)
        self.state, self.checkpoints = self.session.state, self.session.checkpoints
        ranks.on_main(self._start)
        history = folder.history()
        bins = NoiseBins.equally_likely(objective.times, components.denoiser.process)
        elapsed = history[-1].get("timing/total_sec", 0.0) if history else 0.0
        self.logger = MetricsLogger(bins, ranks, elapsed)
        batch_size = training.micro_batch_size or training.batch_size // ranks.world_size
        held_out = components.held_out
        self.held_out = None if held_out is None else HeldOutLoss(held_out, objective, bins, ranks, batch_size)
        self.probes = RunProbes(config, components, ranks)
        self.figure = LossFigure(folder, history)
        self.tensorboard = TensorBoardWriter(folder, self.state.images) if ranks.is_main else None
        self.metrics: dict[str, Any] = {}

    def _start(self) -> None:
        """Write the configuration and a first checkpoint, so that the run can be resumed from its first step on.

        config.toml comes first: a run that is stopped before its checkpoint resumes with it (see `latest_config`).
        """
        write_text(self.folder.config, self.config.toml())
        self.folder.rewind(self.state.images)
        self.checkpoints.save(self.state)

    def run(self, on_step: OnStep | None, stop: "StopRequest") -> int:
        """Train to the end or to a signal; if an error is raised on the way, save first."""
        try:
            with self.ranks.reraise_lost_rank():
                return self._train(on_step, stop)
        except Exception:
            with suppress(Exception):  # the first of two errors is the one to report
                self.checkpoints.wait()
            if self.ranks.is_main and self.state.complete:
                with suppress(OSError):
                    self.checkpoints.save(self.state)
            raise
        finally:
            self.checkpoints.wait()

    def _train(self, on_step: OnStep | None, stop: "StopRequest") -> int:
        for step in self.session.steps():
            number = int(self.ranks.all_gather_int(stop.number).max())  # a signal to one rank stops all
            self._record(step, stopping=number > 0)
            if on_step is not None:
                on_step(step.images, self.metrics | self.probes.latest)
            self.checkpoints.raise_failure()
            if number:
                return number
        return 0

    def _record(self, step: StepReport, stopping: bool) -> None:
        """Write the metrics, checkpoint and samples that are due after a step; only a checkpoint when stopping."""
        training, batch_size = self.config.training, self.components.batches.size

        def due(every: int) -> bool:
            return step.images // every > (step.images - batch_size) // every

        self.logger.add(step, batch_size)
        last = stopping or step.images >= training.images
        save = last or due(training.save_every)
        probe = self.probes.due(step.images, batch_size)
        if save:
            self.ranks.on_main(self.checkpoints.wait)  # the metrics on the disk are of one interval at most
        if save or probe or due(training.log_every):
            self.metrics = self.logger.flush(self.state)
            if probe:
                self.metrics |= self.probes(self.state)
                if self.state.adaptation:
                    self.state.adaptation.follow(self.probes.excess_by_bin)
            score = self._rate_average() if save and not stopping else None
            self.ranks.on_main(lambda: self._write_metrics(draw=save))
            if save:
                self.ranks.on_main(lambda: self.checkpoints.save(self.state, score, background=not last))
        if training.sample_every and due(training.sample_every) and not stopping:
            x = samples(self.state.average, build_sampler(self.config), self.components.pool.shape, self.ranks)
            self.ranks.on_main(lambda: self.tensorboard.add_sheet(x, step.images) if self.tensorboard else None)
        self.logger.restart_clock()

    def _rate_average(self) -> float | None:
        """The score that decides which checkpoint is the best; added to the metrics."""
        score = None
        if self.held_out is not None:
            self.metrics |= self.held_out(self.state.average)
            score = self.metrics["held_out/loss"]
        if self.score is not None:
            score = self.metrics["score/score"] = float(self.score(self.state.average))
        return score

    def _write_metrics(self, draw: bool) -> None:
        self.folder.log(self.metrics)
        self.figure.add(self.metrics)
        if draw:
            self.figure.draw()
        if self.tensorboard:
            self.tensorboard.add_metrics(self.metrics, self.state.images)


class StopRequest:
    """Signal handler that records the first signal, so that the current step can end.

    Attributes:
        number: number of the first signal; 0 until one arrives.
        time: time at which it arrived, in seconds of the monotonic clock.
    """

    number = 0
    time = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Args:
            number: number of the signal.
            frame: the interrupted frame, which is not used.

        Raises:
            KeyboardInterrupt: this is a second signal, more than a second after the first.
        """
        # launchers that forward Ctrl-C deliver it to a process twice at once, which must not count as the second signal
        if self.number and monotonic() - self.time > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.time = number, monotonic()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Context in which Ctrl-C and SIGTERM are recorded, so that a step can end and be saved; a second one interrupts.

    Outside the main thread, which alone receives signals, nothing is recorded.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
