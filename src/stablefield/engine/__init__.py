"""Training: a loop that yields, and the state it leaves behind."""

from stablefield.engine.state import TrainState
from stablefield.engine.train import Descent, StepReport, train

__all__ = ["Descent", "StepReport", "TrainState", "train"]
