"""A run in training: what `fit` and a comparison do alike, whatever they record on the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stablefield.build import Components
from stablefield.config import Config, ConfigError, Training
from stablefield.distributed import Ranks
from stablefield.engine.adaptation import Adaptation
from stablefield.engine.checkpoints import CheckpointManager
from stablefield.engine.compilation import decide_compile
from stablefield.engine.loop import Optimization, Prepare, StepReport, train
from stablefield.engine.state import TrainState
from stablefield.precision import dtype_of
from stablefield.run import RunFolder


class Session:
    """A run that continues from its newest checkpoint, or from the beginning if there is none.

    Args:
        config: the configuration that `components` were built from.
        components: the parts of the run; the denoiser is trained in place.
        folder: folder of the run.
        ranks: this process and those it trains with; by default a single process.

    Attributes:
        config: the configuration, in which "auto" for `training.compile` has been decided.
        components: the parts of the run.
        ranks: this process and those it trains with.
        state: the state of training.
        checkpoints: the checkpoints in the folder.

    Raises:
        ConfigError: the folder holds another run, or one that has seen more images than are to be seen.
        CheckpointError: the newest checkpoint is damaged.
    """

    def __init__(self, config: Config, components: Components, folder: RunFolder, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks(components.denoiser.device)
        self.config = config = decide_compile(config, components, folder, self.ranks)
        self.components, self.state = components, initial_state(config, components)
        self.checkpoints = CheckpointManager(folder, config, components)
        self.checkpoints.restore(self.state, self.ranks)

    def steps(self, prepare: Prepare | None = None) -> Iterator[StepReport]:
        """The steps that are left; each one is taken when it is asked for.

        Args:
            prepare: calls the function that makes the batch of a step, as for `train`.
        """
        return training_steps(self.config, self.components, self.state, ranks=self.ranks, prepare=prepare)


def training_steps(
    config: Config,
    components: Components,
    state: TrainState,
    *,
    images: int | None = None,
    ranks: Ranks | None = None,
    prepare: Prepare | None = None,
) -> Iterator[StepReport]:
    """Train with the components and hyperparameters of a configuration, as `train` does.

    Args:
        config: configuration of the run.
        components: the parts of the run; the network is compiled in place if `training.compile` is true, so the names
            of its weights do not change.
        state: the state, trained in place.
        images: images to see in the whole run; those of the configuration by default.
        ranks: this process and those it trains with; a single process by default.
        prepare: calls the function that makes the batch of a step, as for `train`.
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
        optimization=make_optimization(training),
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


def make_optimization(training: Training) -> Optimization:
    """The hyperparameters of the update of the weights.

    Args:
        training: the section `training` of the configuration.
    """
    return Optimization(training.rate, training.gradient_clip, training.micro_batch_size)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Context in which torch refuses operations whose results are not reproducible bit for bit.

    Args:
        enabled: False changes nothing.
    """
    if not enabled or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
