"""The table of all components: the class behind each `kind` of each section, and defaults that depend on other choices.

The fields of these classes are the keys of a section, and their defaults are the defaults of the configuration. The
tables below add only what depends on the process, on the data or on the kind.
"""

from typing import Any

from stablefield.config.training import Training
from stablefield.data import (
    CIFAR,
    IDX,
    Arrays,
    CelebA,
    Digits,
    EDMAugmentation,
    HuggingFace,
    Images,
    Mirror,
    NoAugmentation,
    Store,
    UnknownData,
)
from stablefield.networks import ADM, MLP, SongUNet, UNet
from stablefield.networks.song import NCSNPP
from stablefield.objective import EDMWeight, LikelihoodWeight, MinSNRWeight, PredictionWeight, SNRWeight, VelocityWeight
from stablefield.preconditioning import (
    EDMPreconditioning,
    IDDPMPreconditioning,
    NoPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from stablefield.process import VE, VP, Cosine, Flow, SubVP
from stablefield.sample import (
    RK45,
    Ancestral,
    DPMSolver,
    EDMGrid,
    Euler,
    EulerMaruyama,
    GeometricGrid,
    Heun,
    IDDPMGrid,
    PredictorCorrector,
    ReverseDiffusion,
    UniformGrid,
    VPGrid,
)
from stablefield.targets import DSMTarget, ExactTarget, KNNTarget, STFTarget
from stablefield.times import LogitNormal, LogNormal, LogUniform, Uniform, VPLevels

__all__ = ["COMPONENTS", "KIND_DEFAULTS", "PROCESS_DEFAULTS", "RUNTIME_ARGUMENTS", "SIGMA_DATA"]

COMPONENTS: dict[str, dict[str, type]] = {
    "data": {
        "digits": Digits,
        "arrays": Arrays,
        "unknown": UnknownData,
        "store": Store,
        "images": Images,
        "celeba": CelebA,
        "idx": IDX,
        "cifar": CIFAR,
        "huggingface": HuggingFace,
    },
    "augmentation": {"none": NoAugmentation, "mirror": Mirror, "edm": EDMAugmentation},
    "process": {"ve": VE, "vp": VP, "subvp": SubVP, "cosine": Cosine, "flow": Flow},
    "times": {
        "lognormal": LogNormal,
        "loguniform": LogUniform,
        "uniform": Uniform,
        "logitnormal": LogitNormal,
        "vp": VPLevels,
    },
    "target": {"stf": STFTarget, "dsm": DSMTarget, "knn": KNNTarget, "exact": ExactTarget},
    "weight": {
        "edm": EDMWeight,
        "snr": SNRWeight,
        "velocity": VelocityWeight,
        "prediction": PredictionWeight,
        "min-snr": MinSNRWeight,
        "likelihood": LikelihoodWeight,
    },
    "preconditioning": {
        "edm": EDMPreconditioning,
        "vp": VPPreconditioning,
        "ve": VEPreconditioning,
        "iddpm": IDDPMPreconditioning,
        "none": NoPreconditioning,
    },
    "network": {"unet": UNet, "mlp": MLP, "ddpmpp": SongUNet, "ncsnpp": SongUNet, "adm": ADM},
    "sampler": {
        "heun": Heun,
        "euler": Euler,
        "dpm": DPMSolver,
        "rk45": RK45,
        "ancestral": Ancestral,
        "euler-maruyama": EulerMaruyama,
        "reverse-diffusion": ReverseDiffusion,
        "predictor-corrector": PredictorCorrector,
    },
    "grid": {"edm": EDMGrid, "geometric": GeometricGrid, "vp": VPGrid, "iddpm": IDDPMGrid, "uniform": UniformGrid},
    "training": {"training": Training},  # the section that has no kinds
}

# kinds that suit a process, used where the configuration gives none
PROCESS_DEFAULTS: dict[str, dict[str, str]] = {
    "ve": {"times": "lognormal", "weight": "edm", "grid": "edm"},
    "vp": {"times": "uniform", "weight": "snr", "grid": "uniform"},
    "subvp": {"times": "uniform", "weight": "snr", "grid": "uniform"},
    "cosine": {"times": "uniform", "weight": "snr", "grid": "uniform"},
    "flow": {"times": "uniform", "weight": "velocity", "grid": "uniform"},
}

# standard deviation of data around their mean, the default of every key `sigma_data`
SIGMA_DATA: dict[str, float] = {"digits": 0.75}

# defaults of a kind that differ from its class's own
KIND_DEFAULTS: dict[str, dict[str, Any]] = {"ncsnpp": NCSNPP}

# arguments of components that are given when they are made, and are not configured
RUNTIME_ARGUMENTS = {"self", "pool", "distances", "shard", "order", "shape", "num_classes", "grid"}
