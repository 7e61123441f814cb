"""Training: a loop that yields, and the average of the weights it leaves behind."""

from stablefield.engine.ema import EMA
from stablefield.engine.train import LearningRate, StepReport, TrainState, train

__all__ = ["EMA", "LearningRate", "StepReport", "TrainState", "train"]
