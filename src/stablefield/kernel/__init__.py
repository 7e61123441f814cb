"""Posterior over a support: the one kernel behind every target."""

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator
from stablefield.kernel.gaussian import posterior, stream

__all__ = ["Posterior", "PosteriorAccumulator", "posterior", "stream"]
