"""Training of a run with its metrics and samples, until all images have been seen or a signal arrives.

Metrics, samples and checkpoints are due at numbers of images seen, so a run that was stopped writes them at the same
steps. A signal ends measurements and sheets of samples at once (`engine.stopping`), and the checkpoint is saved without
them; what was due at a checkpoint and is missing is made up for when the run resumes.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from stablefield.build import Components, build_sampler
from stablefield.checkpoint import finite
from stablefield.config import Config
from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.engine.loop import StepReport
from stablefield.engine.metrics import HeldOutLoss, MetricsLogger, NoiseBins
from stablefield.engine.probing import RunProbes
from stablefield.engine.session import Session, open_session
from stablefield.engine.stopping import Interruptible, StopRequest, stop_signals
from stablefield.engine.tensorboard import TensorBoardWriter, samples
from stablefield.evaluate.plots import plot_excess
from stablefield.files import write_text
from stablefield.run import RunFolder

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
    with stop_signals() as stop, open_session(config, components, folder, ranks) as session:
        return _Fit(session, score, stop, on_step).run()


class _Fit:
    """A run in progress, with its metrics, scores and samples."""

    def __init__(
        self, session: Session, score: CheckpointScore | None, stop: StopRequest, on_step: OnStep | None
    ) -> None:
        self.session, self.score, self.stop, self.on_step = session, score, stop, on_step
        self.config, self.components, self.state = session.config, session.components, session.state
        self.folder, self.ranks, self.checkpoints = session.folder, session.ranks, session.checkpoints
        ranks, training, objective = self.ranks, self.config.training, self.components.objective
        self.interruptible = Interruptible(stop, ranks)
        ranks.on_main(lambda: self.folder.rewind(self.state.images))
        self.history = self.folder.history()
        bins = NoiseBins.equally_likely(objective.times, self.components.denoiser.process)
        last = {key: line[key] for line in self.history for key in line}
        self.logger = MetricsLogger(bins, ranks, last.get("timing/total_sec", 0.0))
        batch_size = training.micro_batch_size or training.batch_size // ranks.world_size
        held_out = self.components.held_out
        self.held_out = None if held_out is None else HeldOutLoss(held_out, objective, bins, ranks, batch_size)
        self.probes = RunProbes(self.config, self.components, ranks)
        if "loss/excess" in last:
            self.probes.recall(last)
        self.tensorboard = TensorBoardWriter(self.folder, self.state.images) if ranks.is_main else None
        self.metrics: dict[str, Any] = {}

    def run(self) -> int:
        """Train to the end or to a signal, whose number is returned."""
        if not self.session.run(self._record, prepare=self.interruptible, before_rescue=self._log_alone):
            return self.interruptible.number()
        self._refuse_untrained()
        return 0

    def _log_alone(self) -> None:
        """Write the metrics since the last line, of this rank's examples alone: other ranks may have died.

        What else is due at this step is made up for when the run resumes.
        """
        if self.logger.steps:
            self.metrics = self.logger.flush(self.state, Ranks(self.ranks.device))
        written = {line["progress/kimg"] for line in self.folder.history()}
        if self.metrics and self.metrics["progress/kimg"] not in written:
            self._write_metrics(draw=True)

    def _refuse_untrained(self) -> None:
        """Refuse to call a run complete in which no step has changed the weights."""
        if 0 < self.state.images <= self.state.skipped * self.components.batches.size:
            raise FloatingPointError(
                f"the gradient was not finite in any of the {self.state.skipped} steps, so nothing was trained: lower "
                "the learning rate, raise the precision, or look for outliers in the data"
            )

    def _due(self, every: int) -> bool:
        """True if something that happens once in a number of images is due at the current step."""
        images, before = self.state.images, self.state.images - self.components.batches.size
        return every > 0 and images // every > before // every

    def _due_now(self) -> tuple[bool, bool, bool]:
        """True for each of a checkpoint, a measurement of the excess and a sheet of samples that is due now."""
        training, images = self.config.training, self.state.images
        save = images >= training.images or self._due(training.save_every)
        return save, self.probes.due(images, self.components.batches.size), self._due(training.sample_every)

    def _record(self, step: StepReport | None) -> bool:
        """Write what is due after a step, without measurements when stopping; True ends training."""
        if step is None:
            self._make_up()
            return self.interruptible.stopped
        (save, probe, sheet), stopped = self._due_now(), lambda: self.interruptible.stopped
        line = save or probe or self._due(self.config.training.log_every)
        self.logger.add(step, self.components.batches.size)
        if save:
            self.ranks.on_main(self.checkpoints.wait)  # the metrics on the disk are of one interval at most
        if line:
            self.metrics = self.logger.flush(self.state)
            if not stopped():
                self.interruptible(lambda: self._measure(self.metrics, probe=probe, rate=save))
            self.ranks.on_main(lambda: self._write_metrics(draw=save))
        if save:
            background = step.images < self.config.training.images and not stopped()
            score = self._score_in(self.metrics)
            self.ranks.on_main(lambda: self.checkpoints.save(self.state, score, background=background))
        if sheet and not stopped():
            self._draw_sheet()
        if stopped() and not line:
            self.metrics = self.logger.flush(self.state)
            self.ranks.on_main(lambda: self._write_metrics(draw=True))
        self.logger.restart_clock()
        if self.on_step is not None:
            self.on_step(step.images, self.metrics | self.probes.latest)
        return self.interruptible.stopped

    def _make_up(self) -> None:
        """Measure and draw what was due at the checkpoint that the run resumes from, and was stopped or killed."""
        images = self.state.images
        line = {"progress/kimg": images / 1000} | self._line_of_checkpoint()
        save, probe, sheet = self._due_now()
        probe = probe and "loss/excess" not in line
        rate = save and (
            (self.held_out is not None and "held_out/loss" not in line)
            or (self.score is not None and "score/score" not in line)
        )
        sheet = sheet and not (self.folder.sheets / f"{images:09d}.png").exists()
        # the main rank decides: others may see older files
        probe, rate, sheet = (images > 0 and bool(self.ranks.all_gather_int(owed)[0]) for owed in (probe, rate, sheet))
        if probe or rate:
            self.interruptible(lambda: self._measure(line, probe=probe, rate=rate))
            self.ranks.on_main(lambda: self._amend(line))
        if sheet and not self.interruptible.stopped:
            self._draw_sheet()

    def _amend(self, line: dict[str, Any]) -> None:
        """Complete the checkpoint, and then the last line of the metrics, so that a kill between them loses nothing."""
        last = self._line_of_checkpoint()
        if len(line) == len(last):
            return
        lines = [*(self.history[:-1] if last else self.history), line]
        self.checkpoints.save(self.state, self._score_in(line))
        write_text(self.folder.metrics, "".join(json.dumps(finite(each)) + "\n" for each in lines))
        if self.tensorboard:
            self.tensorboard.add_metrics({key: line[key] for key in line.keys() - last.keys()}, self.state.images)

    def _line_of_checkpoint(self) -> dict[str, Any]:
        """The line of the metrics at the checkpoint that the run resumes from; empty if there is none."""
        last = self.history[-1] if self.history else {}
        return last if last.get("progress/kimg") == self.state.images / 1000 else {}

    def _measure(self, line: dict[str, Any], *, probe: bool, rate: bool) -> None:
        """Add to a line of the metrics what is due; what is complete when a signal arrives stays in it."""
        if probe:
            found = self.probes(self.state)
            if self.state.adaptation:
                self.state.adaptation.follow(self.probes.excess_by_bin)
            line |= found
        if rate and self.held_out is not None:
            line |= self.held_out(self.state.average)
        if rate and self.score is not None:
            # on several ranks a signal waits for the score, which may exchange what it likes
            with self.stop.raising(self.ranks.world_size == 1):
                line["score/score"] = float(self.score(self.state.average))

    def _score_in(self, line: Mapping[str, Any]) -> float | None:
        """The score that decides which checkpoint is the best, if it was measured."""
        return line.get("score/score" if self.score is not None else "held_out/loss")

    def _draw_sheet(self) -> None:
        sampler, shape = build_sampler(self.config), self.components.pool.shape
        x = self.interruptible(lambda: samples(self.state.average, sampler, shape, self.ranks))
        if x is not None:
            self.ranks.on_main(lambda: self.tensorboard.add_sheet(x, self.state.images) if self.tensorboard else None)

    def _write_metrics(self, draw: bool) -> None:
        self.folder.log(self.metrics)
        if draw and self.probes.latest:
            plot_excess(self.folder.loss_figure, self.folder.history(), f"Loss and excess of {self.folder.path.name}")
        if self.tensorboard:
            self.tensorboard.add_metrics(self.metrics, self.state.images)
