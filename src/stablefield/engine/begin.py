"""How a run begins: its state, how gradients become steps, and how it is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stablefield.config import Config, Training
from stablefield.engine.state import TrainState
from stablefield.engine.train import Descent
from stablefield.run import Parts


def begun(config: Config, parts: Parts) -> TrainState:
    """The state of a run that has seen nothing yet."""
    training = config.training
    return TrainState(parts.denoiser, emas=training.emas, precision=getattr(torch, training.precision))


def descent_of(training: Training) -> Descent:
    """How the gradients of a run become steps."""
    return Descent(training.rate, training.clip, training.micro_batch)


def compile_network(config: Config, parts: Parts) -> None:
    """Let torch compile the network, if that is wanted."""
    if config.training.compile:
        for network in parts.denoiser.children():
            network.compile()  # in place: the names of its weights stay as they are


@contextmanager
def exactly(wanted: bool) -> Iterator[None]:
    """Only operations that give the same bits again, if wanted."""
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
