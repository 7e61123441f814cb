"""The driver of a run, for `fit` and for a comparison: it trains, saves and resumes, and they record what they need.

Whatever ends a run (a request to stop, an error, a rank that dies), its newest checkpoint is whole, and the run resumes
from it as if it had never stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import torch

from stablefield.build import Components
from stablefield.config import Config, ConfigError
from stablefield.distributed import Ranks
from stablefield.engine.adaptation import Adaptation
from stablefield.engine.checkpoints import CheckpointManager, locked
from stablefield.engine.compilation import decide_compile
from stablefield.engine.loop import Optimization, Prepare, StepReport, train
from stablefield.engine.state import TrainState
from stablefield.files import write_text
from stablefield.precision import arithmetic, dtype_of
from stablefield.run import RunFolder

Record = Callable[[StepReport | None], bool]
"""Records a step of a run, or what is due before the next one (None); True ends training."""


class Session:
    """A run that continues from its newest checkpoint, or from the beginning if there is none.

    Args:
        config: the configuration that `components` were built from.
        components: the parts of the run; the denoiser is trained in place.
        folder: folder of the run.
        ranks: this process and those it trains with.

    Attributes:
        config: the configuration, in which "auto" for `training.compile` has been decided.
        state: the state of training.
        checkpoints: the checkpoints in the folder.

    Raises:
        ConfigError: the folder holds another run, or one that has seen more images than are to be seen.
        CheckpointError: the newest checkpoint is damaged.
    """

    def __init__(self, config: Config, components: Components, folder: RunFolder, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.config = config = decide_compile(config, components, folder, ranks)
        self.components, self.state = components, initial_state(config, components)
        self.checkpoints = CheckpointManager(folder, config, components)
        self.checkpoints.restore(self.state, self.ranks)

    def run(
        self,
        record: Record,
        *,
        prepare: Prepare | None = None,
        before_rescue: Callable[[], object] = lambda: None,
    ) -> bool:
        """Train until all images have been seen, or until `record` or `prepare` ends it; an error saves the run, too.

        Args:
            record: called on every rank before the first step, with None, and after every step.
            prepare: calls the function that makes the batch of a step, as for `train`.
            before_rescue: called on the main rank before the run is saved because of an error.

        Returns:
            True if all images have been seen, and `record` has not ended training.
        """
        self.ranks.on_main(self._start)
        try:
            with self.ranks.reraise_lost_rank():
                steps = training_steps(self.config, self.components, self.state, ranks=self.ranks, prepare=prepare)
                for step in chain([None], steps):
                    ends = record(step)
                    self.checkpoints.raise_failure()
                    if ends:
                        self.ranks.on_main(self.save)
                        return False
            return self.state.images >= self.config.training.images
        except Exception:
            with suppress(Exception):  # the first of two errors is the one to report
                self.checkpoints.wait()
            if self.ranks.is_main and self.state.complete:
                with suppress(Exception):
                    before_rescue()
                with suppress(Exception):
                    self.checkpoints.save(self.state)
            raise
        finally:
            self.checkpoints.wait()

    def save(self) -> None:
        """Save the state, unless the newest checkpoint has it."""
        self.checkpoints.wait()
        if self.checkpoints.newest_images < self.state.images:
            self.checkpoints.save(self.state)

    def _start(self) -> None:
        """Write the configuration and a first checkpoint, so that the run can be resumed from its first step on.

        config.toml comes first: a run that is stopped before its checkpoint resumes with it (see `latest_config`).
        """
        write_text(self.folder.config, self.config.toml())
        self.checkpoints.save(self.state)


@contextmanager
def open_session(
    config: Config, components: Components, folder: RunFolder, ranks: Ranks | None = None
) -> Iterator[Session]:
    """Context of a session in which no other process can train in the folder, with the arithmetic of the run.

    Args:
        config: the configuration that `components` were built from.
        components: the parts of the run; the denoiser is trained in place.
        folder: folder of the run.
        ranks: this process and those it trains with; by default a single process.

    Raises:
        ConfigError: another process is training in the folder, or as for `Session`.
    """
    ranks, training = ranks or Ranks(components.denoiser.device), config.training
    with ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(locked(folder)))
        stack.enter_context(arithmetic(training.precision, deterministic=training.deterministic))
        yield Session(config, components, folder, ranks)


def training_steps(
    config: Config,
    components: Components,
    state: TrainState,
    *,
    images: int | None = None,
    ranks: Ranks | None = None,
    prepare: Prepare | None = None,
) -> Iterator[StepReport]:
    """The steps of `train` with the components and hyperparameters of a configuration.

    Args:
        config: configuration of the run.
        components: the parts of the run; the network is compiled in place if `training.compile` is true.
        state: the state, trained in place.
        images: images to see in the whole run; those of the configuration by default.
        ranks: as for `train`.
        prepare: as for `train`.
    """
    training = config.training
    if training.compile is True:
        for network in components.denoiser.children():
            network.compile()
    return train(
        state,
        components.objective,
        components.batches,
        images=training.images if images is None else images,
        seed=training.seed,
        optimization=Optimization(training.rate, training.gradient_clip, training.micro_batch_size),
        ranks=ranks,
        prepare=prepare,
    )


def initial_state(config: Config, components: Components) -> TrainState:
    """The state of a run that has not seen any image.

    Args:
        config: configuration of the run, for averages and precision.
        components: the parts of the run, for the denoiser.
    """
    training = config.training
    return TrainState(
        components.denoiser,
        torch.optim.Adam(components.denoiser.parameters(), eps=training.adam_eps, fused=True),
        emas=training.emas,
        precision=dtype_of(training.precision),
        adaptation=_adaptation(config, components),
    )


def _adaptation(config: Config, components: Components) -> Adaptation | None:
    """The noise distribution of a run, if it adapts."""
    adaptation = Adaptation.of(components.objective.times)
    if adaptation and not adaptation.adaptive.reweight and not config.training.probe_every:
        raise ConfigError("times.reweight=false follows the excess, which is not measured: set training.probe_every")
    return adaptation
