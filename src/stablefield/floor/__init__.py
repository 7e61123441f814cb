"""The floor of a training loss, and the excess of a network over it.

`LossFloor` measures what a loss cannot go below on a data set. `Probes` measure how far a network is from the best
prediction, at fixed noisy examples. Both belong to a loss, which a `SquaredError` describes.
"""

from stablefield.floor.estimate import ByNoise
from stablefield.floor.loss import Levels, SquaredError, Steps, edm_loss
from stablefield.floor.loss_floor import LossFloor
from stablefield.floor.probes import Probes

__all__ = ["ByNoise", "Levels", "LossFloor", "Probes", "SquaredError", "Steps", "edm_loss"]
