"""From noise to data: samplers, and the times at which they stop."""

from stablefield.sample.base import Sampler, Samples
from stablefield.sample.grids import EDMGrid, Grid, UniformGrid
from stablefield.sample.ode import Euler, Heun

__all__ = ["EDMGrid", "Euler", "Grid", "Heun", "Sampler", "Samples", "UniformGrid"]
