"""Resolution of a configuration: every key gets a value, and every mistake is reported."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError

from stablefield.config.classes import (
    Allowed,
    close_match,
    component_class,
    import_name,
    runtime_arguments,
    runtime_values,
    schema,
)
from stablefield.config.text import add_checksum, kind_of, overlay, override
from stablefield.config.training import Training
from stablefield.files import printable
from stablefield.kinds import KIND_DEFAULTS, KINDS, PROCESS_DEFAULTS, SIGMA_DATA, ConfigError


@dataclass(frozen=True)
class Config:
    """A resolved configuration, in which every key has a value; it makes the components that its sections name.

    Attributes:
        sections: values of plain types by key, by section.
        allowed: classes outside this package that the configuration may name, as passed to `resolve`.
    """

    sections: dict[str, dict[str, Any]]
    allowed: tuple[Allowed, ...] = field(default=(), compare=False)

    def make(self, section: str, *runtime: object, **named: Any) -> Any:
        """The component of a section.

        Args:
            section: name of the section.
            *runtime: objects such as the pool or the time grid; each argument that is not configured gets the one of
                its type.
            **named: `shape` and `num_classes` of a network.

        Raises:
            ConfigError: the component needs an object of another type.
        """
        values = {key: value for key, value in self.sections[section].items() if key != "kind"}
        component = component_class(section, self.sections[section].get("kind", section), self.allowed)
        configured = dict(schema(section, component).model_validate(values))
        return component(**configured, **runtime_values(section, component, runtime), **named)

    def changed(self, settings: Iterable[str] = (), **sections: Mapping[str, Any]) -> "Config":
        """This configuration with other values of some keys.

        Args:
            settings: new values, each as `section.key=value`; a new kind replaces its whole section, as in `override`.
            **sections: further new values by key, by section.

        Raises:
            ConfigError: as for `resolve`.
        """
        return resolve(overlay(override(self.sections, settings), sections), allow=self.allowed)

    @property
    def own_classes(self) -> list[str]:
        """Names `module:Class` of the components that are not of this package."""
        kinds = [str(values.get("kind", "")) for values in self.sections.values()]
        return [kind for kind in kinds if ":" in kind]

    @cached_property
    def training(self) -> Training:
        """The section `training`, which has no kinds."""
        return self.make("training")

    @property
    def data_path(self) -> str:
        """Path of the data, or their name on the hub; "" for data without one."""
        return str(self.sections["data"].get("path") or "")

    @property
    def sigma_data(self) -> float | None:
        """Standard deviation of the data that the preconditioning assumes; None if it assumes none."""
        return self.sections["preconditioning"].get("sigma_data")

    def kind(self, section: str) -> str:
        """The kind of a section.

        Args:
            section: name of the section.
        """
        return str(self.sections[section]["kind"])

    def values(self, section: str) -> dict[str, Any]:
        """Values of a section that are set, as they are shown and written: plain types by key, the kind first.

        Args:
            section: name of the section.
        """
        return {key: value for key, value in self.sections[section].items() if value is not None}

    def toml(self) -> str:
        """Text of a config.toml that resolves to this configuration; its last line is a checksum of the others."""
        return add_checksum(tomli_w.dumps({section: self.values(section) for section in self.sections}))

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Values that differ, here and there, by `section.key`, sorted; None for a value that is missing.

        Args:
            other: the configuration to compare with.
        """
        here, there = _by_name(self.sections), _by_name(other.sections)
        names = sorted({*here, *there})
        return {
            ".".join(name): (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)
        }

    def has_data_of(self, other: "Config") -> bool:
        """True if the section `data` has the values that another configuration gives there, `holdout` aside.

        Args:
            other: the other configuration, maybe of an older version, which has fewer keys.
        """
        here = self.sections["data"]
        return all(here.get(key) == value for key, value in other.sections["data"].items() if key != "holdout")


def _by_name(sections: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Values by section and key; a section of a file that is not a table has the key ""."""
    tables = {name: part if isinstance(part, dict) else {"": part} for name, part in sections.items()}
    return {(section, key): value for section, part in tables.items() for key, value in part.items()}


def resolve(raw: Mapping[str, Any], *, allow: Iterable[Allowed] = ()) -> Config:
    """Resolve a configuration: check its values, and give every other key its default.

    Args:
        raw: sections with the values that differ from the defaults.
        allow: classes outside this package that the configuration may name, each as `module:Class` (which is imported
            if the configuration names it) or as the class itself. Any other such name is refused.

    Raises:
        ConfigError: unknown sections, kinds or keys (the message suggests the nearest), wrong types, values out of
            range, names of classes that are not allowed, or components that do not fit together. All mistakes are
            reported at once.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a configuration is a table of sections, not {raw!r}")
    mistakes: list[str] = []
    allowed = (allow,) if isinstance(allow, str | type) else tuple(allow)
    for section in raw.keys() - KINDS.keys():
        mistakes.append(f"{section}: there is no such section{_suggestion(section, KINDS)}")
    kinds, defaults = _kinds_for_process(raw, allowed), _common_defaults(raw, allowed)
    sections = {name: _section(name, raw.get(name, {}), kinds, defaults, allowed, mistakes) for name in KINDS}
    if not mistakes:
        mistakes += _conflicts(Config(sections, allowed))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Config(sections, allowed)


def _kinds_for_process(raw: Mapping[str, Any], allowed: Collection[Allowed]) -> dict[str, str]:
    """Kinds of other sections that suit the process; those of VP for a user's own with t from 0 to 1."""
    kind = kind_of(raw, "process", "ve")
    component: Any = _class_or_none("process", kind, allowed)
    return PROCESS_DEFAULTS.get(kind, PROCESS_DEFAULTS["ve" if component is None or component.t_max > 1 else "vp"])


def _common_defaults(raw: Mapping[str, Any], allowed: Collection[Allowed]) -> dict[str, Any]:
    """Defaults of keys of any section that depend on the data or the augmentation."""
    sigma_data = SIGMA_DATA.get(kind_of(raw, "data", "digits"))
    augmentation: Any = _class_or_none("augmentation", kind_of(raw, "augmentation", "none"), allowed)
    augment_dim = augmentation.augment_dim if augmentation else 0
    defaults = {"sigma_data": sigma_data, "augment_dim": augment_dim or None}
    return {key: value for key, value in defaults.items() if value is not None}


def _class_or_none(section: str, kind: str, allowed: Collection[Allowed]) -> Callable[..., Any] | None:
    """The class of a component; None for a mistake, which is reported with the section."""
    try:
        return component_class(section, kind, allowed)
    except ConfigError:
        return None


def _section(
    section: str,
    given: Any,
    default_kinds: Mapping[str, str],
    common_defaults: Mapping[str, Any],
    allowed: Collection[Allowed],
    mistakes: list[str],
) -> dict[str, Any]:
    """One section with a value for every key; its mistakes are added to `mistakes`."""
    if not isinstance(given, dict):
        mistakes.append(f"{section}: must be a section of keys, not {given!r}")
        return {}
    kinds = KINDS[section]
    has_kinds = section not in kinds
    kind = given.get("kind", default_kinds.get(section, next(iter(kinds)))) if has_kinds else section
    try:
        component = component_class(section, kind, allowed)
    except ConfigError as error:
        mistakes.append(str(error))
        return {}
    values = {key: value for key, value in given.items() if key != "kind" or not has_kinds}
    try:
        keys = schema(section, component)
        defaults = {key: value for key, value in common_defaults.items() if key in keys.model_fields}
        of_kind = import_name(KIND_DEFAULTS[kind]) if kind in KIND_DEFAULTS else {}
        valid = keys.model_validate(defaults | of_kind | values)
        if not runtime_arguments(section, component):
            component(**dict(valid))  # it checks the ranges of its values itself
    except ValidationError as error:
        mistakes += [_mistake(section, kind, found, component) for found in _merged(error.errors())]
        return {}
    except ValueError as error:
        mistakes.append(f"{section}: {error}")
        return {}
    resolved = valid.model_dump(mode="json")
    return {"kind": kind, **resolved} if has_kinds else resolved


def _merged(errors: Sequence[Any]) -> Iterator[Any]:
    """Errors of pydantic, with those of the alternatives of one key (`bool | Literal["auto"]`) as one."""
    for place, group in groupby(errors, lambda found: found["loc"][:1]):
        first, *others = group
        if others and all(found["input"] is first["input"] for found in others):
            yield {
                **first,
                "loc": place,
                "msg": ", or ".join(found["msg"].replace("Input", "input") for found in (first, *others)),
            }
        else:
            yield from (first, *others)


def _mistake(section: str, kind: str, found: Any, component: Callable[..., Any]) -> str:
    """A mistake that pydantic found, as one line."""
    place = ".".join(str(step) for step in (section, *found["loc"]))
    if found["type"] == "extra_forbidden":
        known, key = schema(section, component).model_fields, str(found["loc"][0])
        others = [
            other
            for other in KINDS[section]
            if other != kind and key in schema(section, component_class(section, other)).model_fields
        ]
        if others and not close_match(key, known):
            return f"{place}: {kind!r} has no such key; set {section}.kind too, to one that has it: {', '.join(others)}"
        return f"{place}: {kind!r} has no such key{_suggestion(key, known, section + '.')}"
    if found["type"] == "missing":
        option = ", with --data PATH at the terminal" if place == "data.path" else ""
        return f"{place}: has no default and must be set{option}"
    if found["type"] == "value_error":
        return f"{place}: {found['ctx']['error']}"
    return f"{place}: {found['msg'][0].lower()}{found['msg'][1:]}, not {printable(repr(found['input']), 200)}"


def _suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    all_known = f"; there are {', '.join(prefix + k for k in known)}" if known else ""
    return close_match(name, known, prefix) or all_known


def _conflicts(config: Config) -> list[str]:
    """Mistakes of components that are valid by themselves but do not fit together."""
    found = []
    process, times = config.make("process"), config.make("times")
    latest = float(times.quantile(torch.tensor([1 - 1e-9], dtype=torch.float64)))
    if latest > process.t_max:
        found.append(
            f"times.kind: {config.kind('times')!r} reaches t = {latest:.3g}, but the process "
            f"{config.kind('process')!r} ends at t = {process.t_max:g}; use uniform or logitnormal"
        )
    augment_dim = config.make("augmentation").augment_dim
    taken = config.sections["network"].get("augment_dim", augment_dim)
    if augment_dim and taken != augment_dim:
        found.append(
            f"network.augment_dim: the augmentation {config.kind('augmentation')!r} has labels of length "
            f"{augment_dim}, but the network takes {taken}; set augment_dim={augment_dim} "
            "or leave it out (augmentation.kind=mirror has no labels)"
        )
    try:
        sampler = config.make("sampler", config.make("grid"))
    except ValueError as error:
        return [*found, f"sampler: {error}"]
    try:
        config.make("grid").within(process, sampler.steps, config.make("preconditioning").noise_range)
    except ValueError as error:
        found.append(f"grid: {error}")
    return found
