"""Targets as text, as the options `train --target` and `compare --targets` have them.

    dsm    stf:256    stf:256,references=recent    knn:32    exact    exact,missing_mass=0    mine:Target,level=3

The number after the kind is the size of the support: the first key of the target, if that takes a whole number. Further
keys of the section follow after commas. In a comparison, a target may also bring settings of other sections:

    dsm+times.kind=adaptive    stf:256,references=recent+times.kind=adaptive+times.every=2048
"""

import re
from collections.abc import Iterable
from typing import Any

from stablefield.config.classes import Allowed, component_class, schema
from stablefield.config.resolution import Config
from stablefield.config.text import override
from stablefield.kinds import KINDS, ConfigError


def split_targets(text: str) -> list[str]:
    """Targets of a list; a part such as `references=recent` belongs to the target before it.

    >>> split_targets("dsm, stf:256,references=recent,dsm+times.kind=adaptive")
    ['dsm', 'stf:256,references=recent', 'dsm+times.kind=adaptive']

    Args:
        text: targets, separated by commas.
    """
    targets: list[str] = []
    for part in (part.strip() for part in re.split(r",(?![^\[]*\])", text)):  # not inside of [1.0, 2.0]
        if re.match(r"\w+\s*=", part) and targets:
            targets[-1] += f",{part}"
        else:
            targets.append(part)
    return targets


def split_settings(text: str) -> tuple[str, list[str]]:
    """A target, and the settings of other sections that follow it.

    >>> split_settings("stf:256+times.kind=adaptive+training.learning_rate=1e-3")
    ('stf:256', ['times.kind=adaptive', 'training.learning_rate=1e-3'])

    Args:
        text: a target as text, with settings `+section.key=value` or without.
    """
    target, *settings = re.split(r"\s*\+(?=\s*\w+\.\w+\s*=)\s*", text.strip())  # not the plus of 1e+3
    return target, settings


def describe_target(text: str) -> str:
    """Name of a target with settings, for titles and legends.

    >>> describe_target("stf:256+times.kind=adaptive+times.every=2048")
    'stf:256 with adaptive times, times.every=2048'

    Args:
        text: a target as text, with settings or without.
    """
    target, settings = split_settings(text)
    names = [re.sub(r"^(\w+)\.kind=(.*)$", r"\2 \1", setting) for setting in settings]
    return f"{target} with {', '.join(names)}" if names else target


def target_kind(text: str) -> str:
    """The kind that a target's text names.

    >>> target_kind("stf:256"), target_kind("mine:Target,level=3")
    ('stf', 'mine:Target')

    Args:
        text: a target as text.
    """
    head = text.partition(",")[0].strip()
    kind, _, number = head.rpartition(":")
    return kind if kind and number.strip().isdecimal() else head


def floor_target(config: Config, data_points: int) -> str | None:
    """Name of the target of a configuration as `LossFloor` has it, such as stf:256; None if its floor is not known.

    Args:
        config: the configuration.
        data_points: number of data points that are trained on, at most which a support has.
    """
    target = config.sections["target"]
    if target["kind"] not in ("dsm", "stf", "knn", "exact") or target.get("search") == "faiss":
        return None
    size = target.get("size", target.get("neighbours"))
    return target["kind"] if size is None else f"{target['kind']}:{min(size, data_points)}"


def target_section(text: str, allow: Iterable[Allowed] = ()) -> dict[str, Any]:
    """The section `target` of a configuration that a target's text stands for.

    >>> target_section("stf:256,references=recent")
    {'kind': 'stf', 'size': 256, 'references': 'recent'}

    Args:
        text: a target as text.
        allow: classes outside this package that it may name.

    Raises:
        ConfigError: there is no such kind, it has no size, or a key has another form.
    """
    kind = target_kind(text)
    head, _, rest = text.partition(",")
    if (of_ours := kind.partition(":")[0]) in KINDS["target"] and kind != of_ours:
        raise ConfigError(f"the size in the target {text!r} is not a whole number; write for example {of_ours}:64")
    keys = schema("target", component_class("target", kind, tuple(allow))).model_fields
    first = next(iter(keys), "")
    number = head.strip().removeprefix(kind).removeprefix(":")
    if number and not (first and keys[first].annotation is int):
        raise ConfigError(f"the target {text!r} has a size, but {kind!r} has none; leave it out")
    size = {first: int(number)} if number else {}
    further = override({}, [f"target.{part.strip()}" for part in rest.split(",")] if rest else [])
    return {"kind": kind, **size, **further.get("target", {})}
