"""Training: the training loop and its state; the driver of a whole run is `stablefield.engine.fit`."""

from stablefield.engine.loop import Optimization, StepReport, train
from stablefield.engine.state import TrainState

__all__ = ["Optimization", "StepReport", "TrainState", "train"]
