"""The driver of a run: trains in its folder until all is seen or somebody asks to stop, and loses nothing.

Whatever ends it (a signal, an error, a rank that dies), the newest checkpoint is whole, and the run goes on from it
as if it had never stopped. Every so many images it notes numbers, samples, and saves: what is due follows from the
images seen, so a run that was stopped does all of it at the same places.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any

from stablefield.checkpoint import write_text
from stablefield.config import Config
from stablefield.denoise import Denoiser
from stablefield.engine.begin import begun, compile_network, descent_of, exactly
from stablefield.engine.choice import decided
from stablefield.engine.metrics import Bins, HeldOut, Meter
from stablefield.engine.pictures import Board, samples
from stablefield.engine.saving import Saver, alone
from stablefield.engine.train import StepReport, train
from stablefield.ranks import Ranks
from stablefield.run import Folder, Parts, make_sampler

Watch = Callable[[int, Mapping[str, Any]], None]  # after each step: images seen, the latest line of the metrics
Score = Callable[[Denoiser], float]


def unwatched(images: int, line: Mapping[str, Any]) -> None:
    """Progress that nobody looks at."""


def fit(
    config: Config,
    parts: Parts,
    folder: Folder,
    *,
    ranks: Ranks | None = None,
    watch: Watch = unwatched,
    score: Score | None = None,
) -> int:
    """Train, or go on training, until all images are seen or a signal asks to stop.

    Args:
        config: what `parts` were assembled from. Bands of an `auto` target that it does not say are decided, or are
            those that the run has.
        parts: trained in place.
        folder: of the run; its newest checkpoint is gone on from, if there is one.
        ranks: this process among those that train together, all of which call this.
        watch: told after each step; on every rank.
        score: what makes a checkpoint the best, of its (first) average; lower is better. It is asked on every rank, and
            the first one's answer counts. By default the loss on the images held out, if there are any.

    Returns:
        The number of the signal that stopped it (130 - 128 for Ctrl-C), or 0 if all is done.

    Raises:
        ConfigError: the folder holds another run, or one that has seen more images than are asked for, or one that
            another process is training; or there is nothing to make pictures of.
        CheckpointError: the newest checkpoint is damaged.
        FloatingPointError: the gradient was not finite too many steps in a row.
        ConnectionError: another rank has died.
        OSError: the folder cannot be written.
    """
    ranks = ranks or Ranks(next(parts.denoiser.parameters()).device)
    with ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(alone(folder)))
        stack.enter_context(exactly(config.training.deterministic))
        asked = stack.enter_context(stop_signals())
        config, parts, _ = decided(config, parts, ranks, folder=folder)
        return _Run(config, parts, folder, ranks, score)(watch, asked)


class _Run:
    """A run on its way, with all that writes down what happens."""

    def __init__(self, config: Config, parts: Parts, folder: Folder, ranks: Ranks, score: Score | None) -> None:
        self.config, self.parts, self.folder, self.ranks, self.score = config, parts, folder, ranks, score
        training, objective = config.training, parts.objective
        self.state = begun(config, parts)
        self.saver = Saver(folder, config, parts)
        self.saver.restore(self.state, ranks)
        ranks.lead(self._begin)
        history = folder.history()
        bins = Bins.of(objective.times, parts.denoiser.process)
        self.meter = Meter(bins, ranks, history[-1].get("Timing/total_sec", 0.0) if history else 0.0)
        batch = training.micro_batch or training.batch_size // ranks.total
        held_out = parts.held_out
        self.held_out = None if held_out is None else HeldOut(held_out, objective, bins, ranks, batch)
        self.board = Board(folder, self.state.images) if ranks.first else None
        self.line: dict[str, Any] = {}

    def _begin(self) -> None:
        """From here on the run is this one; and there is something to go on with from the first moment.

        config.toml comes first: a run that is stopped before its checkpoint says the same goes on by it (`last_told`).
        """
        write_text(self.folder.config, self.config.toml())
        self.folder.rewind(self.state.images)
        self.saver.save(self.state)

    def __call__(self, watch: Watch, asked: "Asked") -> int:
        """Train to the end, or until asked to stop."""
        try:
            with self.ranks.company():
                return self._train(watch, asked)
        except Exception:
            if self.ranks.first and self.state.whole:
                with suppress(OSError):  # of two errors the first is to be told
                    self.saver.save(self.state)
            raise

    def _train(self, watch: Watch, asked: "Asked") -> int:
        for step in self._steps():
            number = int(self.ranks.each(asked.number).max())  # what one rank is asked, all are
            self._note(step, stopping=number > 0)
            watch(step.images, self.line)
            if number:
                return number
        return 0

    def _steps(self) -> Iterator[StepReport]:
        training, parts = self.config.training, self.parts
        compile_network(self.config, parts)
        return train(
            self.state,
            parts.objective,
            parts.batches,
            images=training.images,
            seed=training.seed,
            descent=descent_of(training),
            ranks=self.ranks,
        )

    def _note(self, step: StepReport, stopping: bool) -> None:
        """All that is due after a step; a run that is asked to stop only saves."""
        training, size = self.config.training, self.parts.batches.size

        def due(every: int) -> bool:
            return step.images // every > (step.images - size) // every

        self.meter.add(step, size)
        save = stopping or step.images >= training.images or due(training.save_every)
        if save or due(training.log_every):
            self.line = self.meter.line(self.state)
            score = self._measure() if save and not stopping else None
            self.ranks.lead(self._write_line)
            if save:
                self.ranks.lead(lambda: self.saver.save(self.state, score))
        if training.sample_every and due(training.sample_every) and not stopping:
            x = samples(self.state.average, make_sampler(self.config), self.parts.pool.shape, self.ranks)
            self.ranks.lead(lambda: self.board.grid(x, step.images) if self.board else None)
        self.meter.rest()

    def _measure(self) -> float | None:
        """Add to the line how good the average is; what decides which is the best."""
        found = None
        if self.held_out is not None:
            self.line |= self.held_out(self.state.average)
            found = self.line["Held_out/loss"]
        if self.score is not None:
            found = self.line["Score/score"] = float(self.score(self.state.average))
        return found

    def _write_line(self) -> None:
        self.folder.log(self.line)
        if self.board:
            self.board.numbers(self.line, self.state.images)


class Asked:
    """Whether somebody asked to stop: the number of the signal, or 0."""

    number = 0
    when = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # one key reaches a process twice where a launcher hands it on; a person who means it again takes a second
        if self.number and monotonic() - self.when > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.when = number, monotonic()


@contextmanager
def stop_signals() -> Iterator[Asked]:
    """Ctrl-C and SIGTERM, noted instead of obeyed, so that a step is finished and saved; a second one is obeyed."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():  # no others hear signals
        yield asked
        return
    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
