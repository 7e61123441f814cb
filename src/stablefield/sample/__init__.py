"""Sampling: samplers from noise to data, and the grids of times they step through."""

from stablefield.sample.adaptive import RK45
from stablefield.sample.base import BoundDenoiser, Callback, Sampler, Samples
from stablefield.sample.grids import EDMGrid, GeometricGrid, IDDPMGrid, TimeGrid, UniformGrid, VPGrid
from stablefield.sample.ode import DPMSolver, Euler, Heun
from stablefield.sample.sde import Ancestral, EulerMaruyama, PredictorCorrector, ReverseDiffusion

__all__ = [
    "RK45",
    "Ancestral",
    "BoundDenoiser",
    "Callback",
    "DPMSolver",
    "EDMGrid",
    "Euler",
    "EulerMaruyama",
    "GeometricGrid",
    "Heun",
    "IDDPMGrid",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "Samples",
    "TimeGrid",
    "UniformGrid",
    "VPGrid",
]
