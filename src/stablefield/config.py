"""Configuration: the names of all parts, and the way from TOML to them and back.

    [target]
    kind = "reference"
    size = 1024

A section names a part by its `kind`; the other keys are the fields of that part's class, with its defaults. So a
configuration has no defaults of its own, but for what suits the process (`FAMILIES`) and the data (`SPREADS`). What a
part needs at run time (the pool, the shape of the data) is not configured.

A network may be anyone's own, as `module:Class`. Such a name is code, and it is imported only if the caller allows that
very name: where a configuration comes from (a checkpoint, a TOML file, a recipe) never decides it.
"""

import difflib
import hashlib
import inspect
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import _MISSING_TYPE, dataclass, field, is_dataclass
from dataclasses import fields as fields_of
from functools import cache
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from stablefield.banded import Banded
from stablefield.data import (
    CIFAR,
    IDX,
    Arrays,
    CelebA,
    Digits,
    EDMAugmentation,
    FoundNeighbours,
    HuggingFace,
    Images,
    Mirror,
    Plain,
    Rolling,
    Store,
    Unnamed,
)
from stablefield.denoise import EDM, IDDPMScaling, Predicts, VEScaling, VPScaling
from stablefield.networks import ADM, MLP, SongUNet, UNet
from stablefield.networks.song import NCSNPP
from stablefield.objective import EDMWeight, HeadWeight, LikelihoodWeight, MinSNR, NoiseWeight, VelocityWeight
from stablefield.process import VE, VP, Cosine, Flow, SubVP
from stablefield.pruned import PrunedDataset
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
from stablefield.schedule import EMA, Decay, LearningRate, average_names
from stablefield.target import FullDataset, NearestNeighbours, ReferenceBatch, SingleSample
from stablefield.times import LogitNormal, LogNormal, LogUniform, Uniform, VPLevels


@dataclass(frozen=True)
class Training:
    """How long, how fast, and with what seed.

    Attributes:
        images: seen in the whole run.
        batch_size: images a step, over all ranks.
        micro_batch: images that go through the network at once on one rank; all of its share if not said.
        learning_rate: of Adam, after the ramp.
        ramp: images over which the learning rate rises.
        decay: how it falls again: "none", "cosine" (to 0 at the end of the run) or "inverse-sqrt".
        decay_from: images after which it falls.
        clip: the norm that longer gradients are shortened to; none are if not said.
        ema_half_life: images after which a weight counts half in the average; several make as many averages, of which
            the first is sampled from.
        ema_ramp_up: early on, the half-life is at most this share of the images seen.
        precision: of products and convolutions: "float32", "bfloat16" or "float16". Weights and sums are float32.
        compile: let torch compile the network (a minute or more at the start).
        deterministic: only operations that give the same bits again, on a GPU too.
        stratified: draw the times of a batch evenly spread.
        conditional: tell the network the class of each image.
        label_dropout: share of images of which it is not told, so that it can be asked without one (for guidance).
        seed: decides initial weights, order, noise and references.
        device: "auto", or as torch names it.
        save_every: images between checkpoints.
        keep: how many of the last checkpoints stay.
        log_every: images between lines of the metrics.
        sample_every: images between grids of samples; none are made if 0.
    """

    images: int = 96_000
    batch_size: int = 64
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    ramp: int = 10_000
    decay: Decay = "none"
    decay_from: int = 0
    clip: float | None = None
    ema_half_life: float | tuple[float, ...] = 20_000
    ema_ramp_up: float = 0.1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    deterministic: bool = False
    stratified: bool = False
    conditional: bool = False
    label_dropout: float = 0.0
    seed: int = 0
    device: str = "auto"
    save_every: int = 50_000
    keep: int = 1
    log_every: int = 1_000
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "micro_batch", "learning_rate", "clip", "save_every", "keep", "log_every"):
            if (value := getattr(self, name)) is not None and not 0 < value < inf:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("ramp", "ema_ramp_up", "decay_from", "sample_every"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for half_life in self.half_lives:
            if not 0 <= half_life < inf:
                raise ValueError(f"ema_half_life must not be negative, but is {half_life}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is a share, not {self.label_dropout}")
        if self.label_dropout and not self.conditional:
            raise ValueError(f"label_dropout={self.label_dropout} needs labels to drop: say conditional=true")
        average_names(self.half_lives)
        self.rate  # noqa: B018 (it may refuse)

    @property
    def half_lives(self) -> tuple[float, ...]:
        """Of all averages."""
        return self.ema_half_life if isinstance(self.ema_half_life, tuple) else (self.ema_half_life,)

    @property
    def emas(self) -> tuple[EMA, ...]:
        """How each average follows."""
        return tuple(EMA(half_life, self.ema_ramp_up) for half_life in self.half_lives)

    @property
    def rate(self) -> LearningRate:
        """Learning rate against images seen."""
        return LearningRate(self.learning_rate, self.ramp, self.decay, self.decay_from, self.images)


PARTS: dict[str, dict[str, type]] = {
    "data": {
        "digits": Digits,
        "arrays": Arrays,
        "unnamed": Unnamed,
        "store": Store,
        "images": Images,
        "celeba": CelebA,
        "idx": IDX,
        "cifar": CIFAR,
        "huggingface": HuggingFace,
    },
    "augmentation": {"none": Plain, "mirror": Mirror, "edm": EDMAugmentation},
    "process": {"ve": VE, "vp": VP, "subvp": SubVP, "cosine": Cosine, "flow": Flow},
    "times": {
        "lognormal": LogNormal,
        "loguniform": LogUniform,
        "uniform": Uniform,
        "logitnormal": LogitNormal,
        "vp": VPLevels,
    },
    "target": {
        "reference": ReferenceBatch,
        "single": SingleSample,
        "full": FullDataset,
        "pruned": PrunedDataset,
        "auto": Banded,
        "neighbours": NearestNeighbours,
        "found": FoundNeighbours,
        "rolling": Rolling,
    },
    "weight": {
        "edm": EDMWeight,
        "noise": NoiseWeight,
        "velocity": VelocityWeight,
        "head": HeadWeight,
        "minsnr": MinSNR,
        "likelihood": LikelihoodWeight,
    },
    "scaling": {"edm": EDM, "vp": VPScaling, "ve": VEScaling, "iddpm": IDDPMScaling, "predicts": Predicts},
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

# what suits a process, where nothing else is said
FAMILIES: dict[str, dict[str, str]] = {
    "ve": {"times": "lognormal", "weight": "edm", "grid": "edm"},
    "vp": {"times": "uniform", "weight": "noise", "grid": "uniform"},
    "subvp": {"times": "uniform", "weight": "noise", "grid": "uniform"},
    "cosine": {"times": "uniform", "weight": "noise", "grid": "uniform"},
    "flow": {"times": "uniform", "weight": "velocity", "grid": "uniform"},
}

# what suits data, where nothing else is said: their standard deviation around the mean, for the parts that ask for it
SPREADS: dict[str, float] = {"digits": 0.75}

# what a kind means beyond its class's own defaults
SUITS: dict[str, dict[str, Any]] = {
    "reference": {"size": 1024},
    "rolling": {"size": 1024},
    "neighbours": {"neighbours": 64},
    "found": {"neighbours": 64},
    "ncsnpp": NCSNPP,
}

Allowed = str | type[torch.nn.Module]  # `module:Class`, or the class itself
MARK = "# SHA-256 of the lines above: "

RUNTIME = {"self", "pool", "distances", "shards", "order", "shape", "label_dim", "grid"}


class ConfigError(ValueError):
    """What is wrong with a configuration: one line a mistake."""


@dataclass(frozen=True)
class Config:
    """A configuration in which everything is said: sections of plain values, and the way to the parts they name.

    Attributes:
        sections: The values.
        allowed: Classes outside this package that it may name, as given to `resolve`.
    """

    sections: dict[str, dict[str, Any]]
    allowed: tuple[Allowed, ...] = field(default=(), compare=False)

    def __getitem__(self, section: str) -> dict[str, Any]:
        return self.sections[section]

    def make(self, section: str, **runtime: Any) -> Any:
        """The part that a section names, with what it needs at run time."""
        values = {key: value for key, value in self.sections[section].items() if key != "kind"}
        part = _part(section, self.sections[section].get("kind", section), self.allowed)
        return part(**dict(_schema(part).model_validate(values)), **runtime)

    @property
    def training(self) -> Training:
        """The section that has no kinds."""
        return self.make("training")

    def toml(self) -> str:
        """As a file that gives this configuration back. Its last line shows whether it was cut or edited."""
        said = {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in self.sections.items()
        }
        return _marked(tomli_w.dumps(said))

    def differences(self, other: "Config") -> list[str]:
        """Keys, as `section.key`, whose values differ."""
        keys = {(section, key) for config in (self, other) for section in config.sections for key in config[section]}
        return sorted(f"{section}.{key}" for section, key in keys if self[section].get(key) != other[section].get(key))


def resolve(raw: Mapping[str, Any], *, allow: Iterable[Allowed] = ()) -> Config:
    """A configuration in which everything is said, from one that says what is special.

    Args:
        raw: The sections.
        allow: Classes outside this package that the configuration may name, each as `module:Class` (which is imported
            if the configuration names it) or as the class itself. Any other such name is refused.

    Raises:
        ConfigError: unknown sections, kinds or keys (naming the nearest), wrong types, values out of range, names of
            classes that are not allowed, and parts that do not go together. All mistakes are reported at once.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a configuration is a table of sections, not {raw!r}")
    complaints: list[str] = []
    allowed = (allow,) if isinstance(allow, str | type) else tuple(allow)
    for section in raw.keys() - PARTS.keys():
        complaints.append(f"{section}: there is no such section{_nearest(section, PARTS)}")
    family = FAMILIES.get(_kind_said(raw, "process", "ve"), FAMILIES["ve"])
    suits = _suits(raw)
    sections = {name: _section(name, raw.get(name, {}), family, suits, allowed, complaints) for name in PARTS}
    if not complaints:
        complaints += _conflicts(Config(sections, allowed))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return Config(sections, allowed)


def typed(settings: Iterable[str], allow: Iterable[str] | None = None) -> tuple[Allowed, ...]:
    """Names of classes that a user typed, and so allows: by `--allow`, or as the `network.kind` of a setting."""
    kind = override({}, settings).get("network", {}).get("kind")
    return (*(allow or ()), *([kind] if isinstance(kind, str) and ":" in kind else []))


def _marked(text: str) -> str:
    return f"{text}\n{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n"


def unedited(text: str) -> bool:
    """Whether a text is, to its last character, as `Config.toml` wrote one."""
    return text == _marked(text.rpartition(f"\n{MARK}")[0])


def read_toml(path: Path) -> dict[str, Any]:
    """The sections of a TOML file.

    Raises:
        ConfigError: no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None


def override(raw: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Sections with single keys replaced, each as `section.key=value`, the value written as in TOML (or a bare word).

    A new kind starts a section afresh: the keys of the old one would not fit it.

    Raises:
        ConfigError: a setting of another form.
    """
    wanted: dict[str, Any] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        section, dot, key = place.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"{setting}: settings look like section.key=value, for example target.size=2048")
        wanted.setdefault(section, {})[key] = _value(text.strip())
    return overlay(raw, wanted)


def as_setting(key: str, value: Any) -> str:
    """A key (`section.key`) and its value as `override` reads them, quoted for a shell.

    >>> as_setting("training.images", 960), as_setting("sampler.kind", "heun"), as_setting("data.path", "a b.npz")
    ('training.images=960', 'sampler.kind=heun', "'data.path=a b.npz'")
    """
    bare = isinstance(value, str) and value == value.strip() and _value(value) == value
    return shlex.quote(f"{key}={value if bare else written(value)}")


def written(value: Any) -> str:
    """A value as TOML has it, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {written(part)}' for key, part in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)


def overlay(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with keys replaced by those of others.

    A new kind starts its section afresh, and a new process those that should suit it.
    """
    merged = dict(raw)
    for section, values in wanted.items():
        before = merged.get(section, {})
        other = (
            not isinstance(values, dict)
            or not isinstance(before, dict)
            or values.get("kind", before.get("kind")) != before.get("kind")
        )
        merged[section] = values if other else {**before, **values}
    if _kind_said(merged, "process", "ve") != _kind_said(raw, "process", "ve"):
        for section in FAMILIES["ve"].keys() - wanted.keys():
            merged.pop(section, None)  # what suited the old process
    return merged


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _kind_said(raw: Mapping[str, Any], section: str, otherwise: str) -> str:
    said = raw.get(section, {})
    return str(said.get("kind", otherwise)) if isinstance(said, dict) else otherwise


def _suits(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What keys of any part should be, where nothing else is said: what the data are, and what is told of them."""
    spread = SPREADS.get(_kind_said(raw, "data", "digits"))
    augmentation: Any = PARTS["augmentation"].get(_kind_said(raw, "augmentation", "none"), Plain)
    suits = {} if spread is None else {"sigma_data": spread}
    return suits | ({"augment_dim": augmentation.dim} if augmentation.dim else {})


def _section(
    section: str,
    said: Any,
    family: Mapping[str, str],
    suits: Mapping[str, Any],
    allowed: Collection[Allowed],
    complaints: list[str],
) -> dict[str, Any]:
    """One section with every key said; what is wrong with it is added to the complaints."""
    if not isinstance(said, dict):
        complaints.append(f"{section}: must be a section of keys, not {said!r}")
        return {}
    kinds = PARTS[section]
    has_kinds = section not in kinds
    kind = said.get("kind", family.get(section, next(iter(kinds)))) if has_kinds else section
    try:
        part = _part(section, kind, allowed)
    except ConfigError as error:
        complaints.append(str(error))
        return {}
    values = {key: value for key, value in said.items() if key != "kind" or not has_kinds}
    try:
        schema = _schema(part)
        suiting = {key: value for key, value in suits.items() if key in schema.model_fields}
        valid = schema.model_validate(suiting | SUITS.get(kind, {}) | values)
        if not RUNTIME & inspect.signature(part).parameters.keys():
            part(**dict(valid))  # ranges are the part's own business
    except ValidationError as error:
        complaints += [_complaint(section, kind, mistake, part) for mistake in error.errors()]
        return {}
    except ValueError as error:
        complaints.append(f"{section}: {error}")
        return {}
    said_all = valid.model_dump(mode="json")
    return {"kind": kind, **said_all} if has_kinds else said_all


def _part(section: str, kind: Any, allowed: Collection[Allowed] = ()) -> Callable[..., Any]:
    """The class behind a name; for a network also `module:Class`, anyone's own, if it is allowed."""
    if section == "network" and isinstance(kind, str) and ":" in kind:
        return _foreign(kind, allowed)
    if not isinstance(kind, str) or kind not in PARTS[section]:
        kinds = ", ".join(PARTS[section])
        raise ConfigError(f"{section}.kind: {kind!r} is none of {kinds}{_close(str(kind), PARTS[section])}")
    return PARTS[section][kind]


def _foreign(name: str, allowed: Collection[Allowed]) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(f"network.kind: {name!r} does not have the form module:Class")
    for each in allowed:
        if isinstance(each, type) and _is_named(each, module, attribute):
            return _network(name, each)
    if name not in allowed:
        raise ConfigError(
            f"network.kind: {name!r} names code outside this package, and importing it runs it; if you trust it, allow "
            f"this name: --allow {name} at the terminal, allow=[{attribute}] (the class) or allow=[{name!r}] in Python"
        )
    try:
        with _current_folder():
            found = getattr(import_module(module), attribute)
    except AttributeError:
        raise ConfigError(f"network.kind: the module {module!r} has no {attribute!r}") from None
    except Exception as error:  # a module may fail in any way
        raise ConfigError(f"network.kind: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return _network(name, found)


def _is_named(found: type, module: str, attribute: str) -> bool:
    """Whether a class goes by this name: where it was defined, or where a module that is loaded holds it."""
    held = getattr(sys.modules.get(module), "__dict__", {}).get(attribute)  # getattr of a lazy module may import
    return held is found or (found.__module__, found.__name__) == (module, attribute)


@contextmanager
def _current_folder() -> Iterator[None]:
    """Search the current folder for modules too, after all other places."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:  # this entry, and not an equal one of the user's; what the module added to the path stays
        sys.path[:] = [entry for entry in sys.path if entry is not folder]


def _network(name: str, found: Any) -> Callable[..., Any]:
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ConfigError(f"network.kind: {name!r} is no torch.nn.Module")
    return found


@cache
def _schema(part: Callable[..., Any]) -> type[BaseModel]:
    """What may be configured of a part: the arguments of its class that are not given at run time."""
    fields: dict[str, Any] = {
        name: (
            Any if argument.annotation is inspect.Parameter.empty else argument.annotation,
            _default(part, argument),
        )
        for name, argument in inspect.signature(part).parameters.items()
        if name not in RUNTIME and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    }
    options = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(getattr(part, "__name__", "part"), __config__=options, **fields)


def _default(part: Callable[..., Any], argument: inspect.Parameter) -> Any:
    if is_dataclass(part):
        for field in fields_of(part):
            if field.name == argument.name and not isinstance(field.default_factory, _MISSING_TYPE):
                return Field(default_factory=field.default_factory)
    return ... if argument.default is inspect.Parameter.empty else argument.default


def _complaint(section: str, kind: str, mistake: Any, part: Callable[..., Any]) -> str:
    place = ".".join(str(step) for step in (section, *mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        known, key = _schema(part).model_fields, str(mistake["loc"][0])
        others = [
            other for other in PARTS[section] if other != kind and key in _schema(_part(section, other)).model_fields
        ]
        if others and not _close(key, known):
            return f"{place}: {kind!r} has no such key; say also which {section}.kind it is for: {', '.join(others)}"
        return f"{place}: {kind!r} has no such key{_nearest(key, known, section + '.')}"
    if mistake["type"] == "missing":
        at_the_terminal = ", at the terminal as --data PATH" if place == "data.path" else ""
        return f"{place}: has no default, and must be said{at_the_terminal}"
    return f"{place}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}, not {mistake['input']!r}"


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    all_known = f"; there are {', '.join(prefix + k for k in known)}" if known else ""
    return _close(name, known, prefix) or all_known


def _close(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _conflicts(config: Config) -> list[str]:
    """Parts that are fine alone and impossible together."""
    found = []
    process, times = config.make("process"), config.make("times")
    latest = float(times.quantile(torch.tensor([1 - 1e-9], dtype=torch.float64)))
    if latest > process.limit:
        found.append(
            f"times.kind: {config['times']['kind']!r} reaches t = {latest:.3g}, but the process "
            f"{config['process']['kind']!r} ends at t = {process.limit:g}; uniform and logitnormal stay inside"
        )
    told = config.make("augmentation").dim
    if told and config["network"].get("augment_dim", told) != told:
        found.append(
            f"network.augment_dim: the augmentation {config['augmentation']['kind']!r} is told in {told} numbers, but "
            f"the network is made for {config['network']['augment_dim']}: say augment_dim={told}, or leave it out "
            "(augmentation.kind=mirror tells nothing)"
        )
    try:
        config.make("sampler", grid=config.make("grid"))
    except ValueError as error:
        return [*found, f"sampler: {error}"]
    try:
        config.make("grid").within(process, config["sampler"]["steps"], config.make("scaling").levels)
    except ValueError as error:
        found.append(f"grid: {error}")
    return found
