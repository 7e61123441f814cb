"""Diffusion models trained with the Stable Target Field.

>>> import stablefield
>>> stablefield.ReferenceBatch, stablefield.posterior  # doctest: +ELLIPSIS
(<class 'stablefield.target.ReferenceBatch'>, <function posterior at ...>)
"""

from typing import TYPE_CHECKING, Any

from stablefield.denoise import EDM, Denoiser, Ideal, Preconditioned
from stablefield.engine import TrainState, train
from stablefield.networks import MLP, UNet
from stablefield.objective import EDMWeight, LossReport, NoiseWeight, Objective, VelocityWeight
from stablefield.parametrize import convert, stable_target
from stablefield.posterior import Posterior, posterior
from stablefield.process import VE, VP, Cosine, Flow, Perturbed, Process, SubVP
from stablefield.reference import Pool
from stablefield.sample import EDMGrid, Euler, Heun, Sampler, Samples, UniformGrid
from stablefield.target import FullDataset, NearestNeighbours, ReferenceBatch, SingleSample, TargetEstimator
from stablefield.times import LogitNormal, LogNormal, LogUniform, Stratified, Times, Uniform

if TYPE_CHECKING:
    from stablefield.run import load

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "MLP",
    "VE",
    "VP",
    "Cosine",
    "Denoiser",
    "EDMGrid",
    "EDMWeight",
    "Euler",
    "Flow",
    "FullDataset",
    "Heun",
    "Ideal",
    "LogNormal",
    "LogUniform",
    "LogitNormal",
    "LossReport",
    "NearestNeighbours",
    "NoiseWeight",
    "Objective",
    "Perturbed",
    "Pool",
    "Posterior",
    "Preconditioned",
    "Process",
    "ReferenceBatch",
    "Sampler",
    "Samples",
    "SingleSample",
    "Stratified",
    "SubVP",
    "TargetEstimator",
    "Times",
    "TrainState",
    "UNet",
    "Uniform",
    "UniformGrid",
    "VelocityWeight",
    "convert",
    "load",
    "posterior",
    "stable_target",
    "train",
]


def __getattr__(name: str) -> Any:
    # what reads files needs pydantic and safetensors: imported when first asked for
    if name == "load":
        from stablefield.run import load

        return load
    raise AttributeError(f"module 'stablefield' has no attribute {name!r}")
