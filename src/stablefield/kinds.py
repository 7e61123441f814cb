"""The table of all components: which class each `kind` of each section of a configuration is.

    [target]
    kind = "stf"            ->  stablefield.targets:STFTarget

A new kind is one class, and one line here: configuration, help and documentation follow. Classes are named, not
imported, so that this module costs nothing; `stablefield.config` imports those that a configuration names. Instead of a
kind, every section accepts `module:Class`, a class of the user's own that is derived from the section's base class.
"""


class ConfigError(ValueError):
    """A mistake in a configuration, or several, one per line."""


def refuse_if(*cases: tuple[object, str]) -> None:
    """Refuse arguments that contradict each other.

    Args:
        *cases: conditions, each with the message for it.

    Raises:
        ConfigError: a condition holds; the first one counts.
    """
    for condition, message in cases:
        if condition:
            raise ConfigError(message)


KINDS: dict[str, dict[str, str]] = {
    "data": {
        "digits": "stablefield.data:Digits",
        "arrays": "stablefield.data:Arrays",
        "unknown": "stablefield.data:UnknownData",
        "store": "stablefield.data:Store",
        "images": "stablefield.data:Images",
        "celeba": "stablefield.data:CelebA",
        "idx": "stablefield.data:IDX",
        "cifar": "stablefield.data:CIFAR",
        "huggingface": "stablefield.data:HuggingFace",
    },
    "augmentation": {
        "none": "stablefield.data:NoAugmentation",
        "mirror": "stablefield.data:Mirror",
        "edm": "stablefield.data:EDMAugmentation",
    },
    "process": {
        "ve": "stablefield.process:VE",
        "vp": "stablefield.process:VP",
        "subvp": "stablefield.process:SubVP",
        "cosine": "stablefield.process:Cosine",
        "flow": "stablefield.process:Flow",
        "tabulated": "stablefield.process:Tabulated",
        "tabulated-ve": "stablefield.process:TabulatedVE",
    },
    "times": {
        "lognormal": "stablefield.times:LogNormal",
        "loguniform": "stablefield.times:LogUniform",
        "uniform": "stablefield.times:Uniform",
        "logitnormal": "stablefield.times:LogitNormal",
        "adaptive": "stablefield.times:Adaptive",
        "vp": "stablefield.times:VPLevels",
    },
    "target": {
        "stf": "stablefield.targets:STFTarget",
        "dsm": "stablefield.targets:DSMTarget",
        "knn": "stablefield.targets:KNNTarget",
        "exact": "stablefield.targets:ExactTarget",
        "stf-published": "stablefield.targets:PublishedSTFTarget",
    },
    "weight": {
        "edm": "stablefield.objective:EDMWeight",
        "snr": "stablefield.objective:SNRWeight",
        "velocity": "stablefield.objective:VelocityWeight",
        "prediction": "stablefield.objective:PredictionWeight",
        "min-snr": "stablefield.objective:MinSNRWeight",
        "likelihood": "stablefield.objective:LikelihoodWeight",
    },
    "preconditioning": {
        "edm": "stablefield.preconditioning:EDMPreconditioning",
        "vp": "stablefield.preconditioning:VPPreconditioning",
        "ve": "stablefield.preconditioning:VEPreconditioning",
        "iddpm": "stablefield.preconditioning:IDDPMPreconditioning",
        "none": "stablefield.preconditioning:NoPreconditioning",
    },
    "network": {
        "unet": "stablefield.networks:UNet",
        "mlp": "stablefield.networks:MLP",
        "ddpmpp": "stablefield.networks:SongUNet",
        "ncsnpp": "stablefield.networks:SongUNet",
        "adm": "stablefield.networks:ADM",
    },
    "sampler": {
        "heun": "stablefield.sample:Heun",
        "euler": "stablefield.sample:Euler",
        "dpm": "stablefield.sample:DPMSolver",
        "rk45": "stablefield.sample:RK45",
        "ancestral": "stablefield.sample:Ancestral",
        "euler-maruyama": "stablefield.sample:EulerMaruyama",
        "reverse-diffusion": "stablefield.sample:ReverseDiffusion",
        "predictor-corrector": "stablefield.sample:PredictorCorrector",
    },
    "grid": {
        "edm": "stablefield.sample:EDMGrid",
        "geometric": "stablefield.sample:GeometricGrid",
        "vp": "stablefield.sample:VPGrid",
        "iddpm": "stablefield.sample:IDDPMGrid",
        "uniform": "stablefield.sample:UniformGrid",
    },
    "training": {"training": "stablefield.config.training:Training"},  # the section that has no kinds
}

# base class of the components of each section
BASES: dict[str, str] = {
    "data": "stablefield.data:Source",
    "augmentation": "stablefield.data:Augmentation",
    "process": "stablefield.process:Process",
    "times": "stablefield.times:TimeDistribution",
    "target": "stablefield.targets:TargetEstimator",
    "weight": "stablefield.objective:LossWeight",
    "preconditioning": "stablefield.preconditioning:Preconditioning",
    "network": "torch.nn:Module",
    "sampler": "stablefield.sample:Sampler",
    "grid": "stablefield.sample:TimeGrid",
}

# kinds that suit a process, used where the configuration gives none
_BOUNDED = {"times": "uniform", "weight": "snr", "grid": "uniform"}
PROCESS_DEFAULTS: dict[str, dict[str, str]] = {
    "ve": {"times": "lognormal", "weight": "edm", "grid": "edm"},
    "vp": _BOUNDED,
    "subvp": _BOUNDED,
    "cosine": _BOUNDED,
    "tabulated": _BOUNDED,
    "tabulated-ve": _BOUNDED,
    "flow": {**_BOUNDED, "weight": "velocity"},
}

# standard deviation of data around their mean, the default of every key `sigma_data`
SIGMA_DATA: dict[str, float] = {"digits": 0.75}

# defaults of a kind that differ from its class's own
KIND_DEFAULTS: dict[str, str] = {"ncsnpp": "stablefield.networks.song:NCSNPP"}

# settings of the objectives that `compare` knows by name
OBJECTIVES: dict[str, tuple[str, ...]] = {
    # flow matching as in Lipman et al. 2023: uniform t, and a network that predicts the velocity
    "flow": (
        "process.kind=flow",
        "times.kind=uniform",
        "weight.kind=velocity",
        "preconditioning.kind=none",
        "preconditioning.prediction_type=velocity",
    ),
    # Karras et al. 2022
    "edm": ("process.kind=ve", "times.kind=lognormal", "weight.kind=edm", "preconditioning.kind=edm", "grid.kind=edm"),
    # Song et al. 2021: log-uniform noise and weight 1 / sigma^2
    "ve": (
        "process.kind=ve",
        "times.kind=loguniform",
        "weight.kind=snr",
        "preconditioning.kind=ve",
        "grid.kind=geometric",
    ),
    "vp": ("process.kind=vp", "times.kind=uniform", "weight.kind=snr", "preconditioning.kind=vp", "grid.kind=uniform"),
}


def list_kinds(section: str) -> str:
    """The kinds of a section, for help and messages.

    >>> list_kinds("target")
    'stf, dsm, knn, exact, stf-published'

    Args:
        section: name of the section.
    """
    return ", ".join(KINDS[section])
