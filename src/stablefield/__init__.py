"""Diffusion models trained with the Stable Target Field.

The names that most people need; everything else stands in its submodule, such as `stablefield.targets` or
`stablefield.sample`. Names are imported when they are first used.

>>> import stablefield
>>> stablefield.STFTarget
<class 'stablefield.targets.stf.STFTarget'>
"""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m stablefield` begins with the current folder first on the path: a torch.py that lies there is not torch
    _word = sys.orig_argv[-len(sys.argv)]
    if (_word.partition("m")[2] if _word.startswith("-") else _word).partition(".")[0] == "stablefield":
        del sys.path[0]

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablefield.denoise import Denoiser, Guided, IdealDenoiser, Preconditioned
    from stablefield.engine import TrainState, train
    from stablefield.kernel import Posterior, posterior
    from stablefield.objective import Objective
    from stablefield.pool import Pool
    from stablefield.process import VE, VP, Cosine, Flow, NoisyBatch, SubVP
    from stablefield.run import load
    from stablefield.sample import Heun, Sampler
    from stablefield.stable import StableTarget
    from stablefield.targets import DSMTarget, ExactTarget, KNNTarget, STFTarget, TargetEstimator

__version__ = "0.1.0"

__all__ = [
    "VE",
    "VP",
    "Cosine",
    "DSMTarget",
    "Denoiser",
    "ExactTarget",
    "Flow",
    "Guided",
    "Heun",
    "IdealDenoiser",
    "KNNTarget",
    "NoisyBatch",
    "Objective",
    "Pool",
    "Posterior",
    "Preconditioned",
    "STFTarget",
    "Sampler",
    "StableTarget",
    "SubVP",
    "TargetEstimator",
    "TrainState",
    "load",
    "posterior",
    "train",
]

_HOMES = {
    "denoise": ("Denoiser", "Guided", "IdealDenoiser", "Preconditioned"),
    "engine": ("TrainState", "train"),
    "kernel": ("Posterior", "posterior"),
    "objective": ("Objective",),
    "pool": ("Pool",),
    "process": ("VE", "VP", "Cosine", "Flow", "NoisyBatch", "SubVP"),
    "run": ("load",),
    "sample": ("Heun", "Sampler"),
    "stable": ("StableTarget",),
    "targets": ("DSMTarget", "ExactTarget", "KNNTarget", "STFTarget", "TargetEstimator"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = {module.name for module in iter_modules(__path__)} - {"__main__"}


def __getattr__(name: str) -> object:
    """Import a public name, or a submodule, when it is first used (PEP 562)."""
    if name not in _HOME and name not in _SUBMODULES:
        raise AttributeError(f"module 'stablefield' has no attribute {name!r}")
    try:
        module = import_module(f"stablefield.{_HOME.get(name, name)}")
    except ModuleNotFoundError as error:
        extras = import_module("stablefield.extras")
        if error.name not in extras.TRAIN:
            raise
        if name in _HOME:  # so that `from stablefield import *` needs the core only
            return extras.needs_extra(f"stablefield.{name}", error)
        raise ModuleNotFoundError(extras.how_to_install(f"stablefield.{name}"), name=error.name) from error
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__, *_SUBMODULES})
