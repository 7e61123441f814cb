"""From noise to data: samplers, and the times at which they stop."""

from stablefield.sample.adaptive import RK45
from stablefield.sample.base import Sampler, Samples
from stablefield.sample.grids import EDMGrid, GeometricGrid, Grid, IDDPMGrid, UniformGrid, VPGrid
from stablefield.sample.ode import DPMSolver, Euler, Heun
from stablefield.sample.sde import Ancestral, EulerMaruyama, PredictorCorrector, ReverseDiffusion

__all__ = [
    "RK45",
    "Ancestral",
    "DPMSolver",
    "EDMGrid",
    "Euler",
    "EulerMaruyama",
    "GeometricGrid",
    "Grid",
    "Heun",
    "IDDPMGrid",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "Samples",
    "UniformGrid",
    "VPGrid",
]
