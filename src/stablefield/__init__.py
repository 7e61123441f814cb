"""Diffusion models trained with the Stable Target Field.

>>> import stablefield
>>> stablefield.ReferenceBatch, stablefield.posterior  # doctest: +ELLIPSIS
(<class 'stablefield.target.ReferenceBatch'>, <function posterior at ...>)
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m stablefield` begins with the current folder first on the path: a torch.py that lies there is not torch
    _word = sys.orig_argv[-len(sys.argv)]
    if (_word.partition("m")[2] if _word.startswith("-") else _word).partition(".")[0] == "stablefield":
        del sys.path[0]

from typing import TYPE_CHECKING, Any

from stablefield.banded import Banded
from stablefield.denoise import (
    EDM,
    Denoiser,
    Guided,
    IDDPMScaling,
    Ideal,
    Preconditioned,
    Predicts,
    Scaling,
    VEScaling,
    VPScaling,
)
from stablefield.engine import TrainState, train
from stablefield.likelihood import bits_per_dim
from stablefield.networks import ADM, MLP, SongUNet, UNet, adm, ddpmpp, ncsnpp
from stablefield.objective import (
    EDMWeight,
    HeadWeight,
    LikelihoodWeight,
    LossReport,
    MinSNR,
    NoiseWeight,
    Objective,
    VelocityWeight,
    Weight,
)
from stablefield.parametrize import convert, stable_target
from stablefield.posterior import Posterior, posterior
from stablefield.process import VE, VP, Cosine, Flow, Perturbed, Process, SubVP
from stablefield.pruned import PrunedDataset
from stablefield.reference import Pool
from stablefield.sample import (
    RK45,
    Ancestral,
    DPMSolver,
    EDMGrid,
    Euler,
    EulerMaruyama,
    GeometricGrid,
    Grid,
    Heun,
    IDDPMGrid,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    Samples,
    UniformGrid,
    VPGrid,
)
from stablefield.target import FullDataset, NearestNeighbours, ReferenceBatch, SingleSample, TargetEstimator
from stablefield.times import LogitNormal, LogNormal, LogUniform, Stratified, Times, Uniform, VPLevels

if TYPE_CHECKING:
    from stablefield.run import load

__version__ = "0.1.0"

__all__ = [
    "ADM",
    "EDM",
    "MLP",
    "RK45",
    "VE",
    "VP",
    "Ancestral",
    "Banded",
    "Cosine",
    "DPMSolver",
    "Denoiser",
    "EDMGrid",
    "EDMWeight",
    "Euler",
    "EulerMaruyama",
    "Flow",
    "FullDataset",
    "GeometricGrid",
    "Grid",
    "Guided",
    "HeadWeight",
    "Heun",
    "IDDPMGrid",
    "IDDPMScaling",
    "Ideal",
    "LikelihoodWeight",
    "LogNormal",
    "LogUniform",
    "LogitNormal",
    "LossReport",
    "MinSNR",
    "NearestNeighbours",
    "NoiseWeight",
    "Objective",
    "Perturbed",
    "Pool",
    "Posterior",
    "Preconditioned",
    "PredictorCorrector",
    "Predicts",
    "Process",
    "PrunedDataset",
    "ReferenceBatch",
    "ReverseDiffusion",
    "Sampler",
    "Samples",
    "Scaling",
    "SingleSample",
    "SongUNet",
    "Stratified",
    "SubVP",
    "TargetEstimator",
    "Times",
    "TrainState",
    "UNet",
    "Uniform",
    "UniformGrid",
    "VEScaling",
    "VPGrid",
    "VPLevels",
    "VPScaling",
    "VelocityWeight",
    "Weight",
    "adm",
    "bits_per_dim",
    "convert",
    "ddpmpp",
    "load",
    "ncsnpp",
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
