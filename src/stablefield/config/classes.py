"""From a kind to a class, and from a class to the keys that can be configured.

A component may be a class of the user's own, named as `module:Class`. Such a name is code, so it is imported only if
the caller allows that very name; the source of a configuration (a checkpoint, a TOML file, a recipe) never decides it.

The arguments of a class are the keys of its section if they have types of values that TOML can hold: numbers, strings,
booleans, paths, and lists of them. Any other argument asks for an object that exists only at run time, such as a `Pool`
or a `TimeGrid`, and gets the one that has its type. Only networks are given something by name: `shape` and, if they are
conditional, `num_classes`.
"""

import difflib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import _MISSING_TYPE, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from stablefield.config.text import override
from stablefield.kinds import BASES, KINDS, ConfigError, list_kinds

Allowed = str | type  # `module:Class`, or the class itself

NETWORK_ARGUMENTS = ("shape", "num_classes")
_PLAIN = (bool, int, float, str, Path, NoneType, tuple, list, dict)
_CONTAINERS = (Union, UnionType, Annotated, tuple, list, dict, Sequence, Mapping)


def allowed_names(settings: Iterable[str], allow: Iterable[str] | None = None) -> tuple[Allowed, ...]:
    """Names of classes that a user allows at the terminal: by `--allow`, or by typing one as the kind of a section.

    Args:
        settings: settings of the command, as `section.key=value`.
        allow: names given with `--allow`.
    """
    kinds = [values.get("kind") for values in override({}, settings).values()]
    return (*(allow or ()), *(kind for kind in kinds if isinstance(kind, str) and ":" in kind))


def component_class(section: str, kind: Any, allowed: Collection[Allowed] = ()) -> Callable[..., Any]:
    """The class of a component.

    Args:
        section: name of the section.
        kind: a kind of this section, or `module:Class`.
        allowed: classes outside this package that may be used.

    Raises:
        ConfigError: an unknown kind, or a class that is not allowed, does not exist or has not the base class of the
            section.
    """
    if section in BASES and isinstance(kind, str) and ":" in kind:
        return _own_class(section, kind, allowed)
    if not isinstance(kind, str) or kind not in KINDS[section]:
        raise ConfigError(
            f"{section}.kind: {kind!r} is none of {list_kinds(section)}{close_match(str(kind), KINDS[section])}"
        )
    found: Callable[..., Any] = import_name(KINDS[section][kind])
    return found


def import_name(name: str) -> Any:
    """The object that a name such as `stablefield.targets:STFTarget` in the table of kinds stands for.

    Args:
        name: module and attribute.
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _own_class(section: str, name: str, allowed: Collection[Allowed]) -> Callable[..., Any]:
    """A class outside this package, imported only if its name is allowed."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(f"{section}.kind: {name!r} does not have the form module:Class")
    for given in allowed:
        if isinstance(given, type) and _has_name(given, module, attribute):
            return _checked_class(section, name, given)
    if name not in allowed:
        raise ConfigError(
            f"{section}.kind: {name!r} names code outside this package, and importing it runs it; if you trust it, "
            f"allow this name: --allow {name} at the terminal, allow=[{attribute}] (the class) or allow=[{name!r}] in "
            "Python"
        )
    try:
        with _current_folder_on_path():
            found = getattr(import_module(module), attribute)
    except AttributeError:
        raise ConfigError(f"{section}.kind: the module {module!r} has no {attribute!r}") from None
    except Exception as error:  # a module may fail in any way
        raise ConfigError(f"{section}.kind: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return _checked_class(section, name, found)


def _has_name(given: type, module: str, attribute: str) -> bool:
    """True if a class was defined under this name, or a module that is loaded already has it under this name."""
    loaded = getattr(sys.modules.get(module), "__dict__", {}).get(attribute)  # getattr of a lazy module may import
    return loaded is given or (given.__module__, given.__name__) == (module, attribute)


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Context in which modules are also searched in the current folder, after all other places."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:  # removes this very entry, not an equal one of the user's, and keeps what the module added
        sys.path[:] = [entry for entry in sys.path if entry is not folder]


def _checked_class(section: str, name: str, found: Any) -> Callable[..., Any]:
    if not (isinstance(found, type) and issubclass(found, import_name(BASES[section]))):
        raise ConfigError(f"{section}.kind: {name!r} is not a {BASES[section].replace(':', '.')}")
    return found


@cache
def schema(section: str, component: Callable[..., Any]) -> type[BaseModel]:
    """Keys that can be configured for a component: the arguments of its class, except those given at run time.

    Args:
        section: name of the section.
        component: class of the component.
    """
    given = runtime_arguments(section, component)
    arguments: dict[str, Any] = {
        name: (_type(argument), _default(component, argument))
        for name, argument in _arguments(component).items()
        if name not in given
    }
    options = ConfigDict(extra="forbid", protected_namespaces=())
    return create_model(getattr(component, "__name__", "component"), __config__=options, **arguments)


@cache
def runtime_arguments(section: str, component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a component that are given at run time, by name.

    Args:
        section: name of the section.
        component: class of the component.
    """
    return {
        name: argument
        for name, argument in _arguments(component).items()
        if not _is_plain(argument.annotation) or (section == "network" and name in NETWORK_ARGUMENTS)
    }


def runtime_values(section: str, component: Callable[..., Any], values: Iterable[object]) -> dict[str, object]:
    """Values of the arguments that are given at run time: for each, the first value of its type.

    Args:
        section: name of the section.
        component: class of the component.
        values: objects of the run.

    Raises:
        ConfigError: an argument without default asks for a type that none of the values has.
    """
    found: dict[str, object] = {}
    for name, argument in runtime_arguments(section, component).items():
        if section == "network" and name in NETWORK_ARGUMENTS:
            continue
        matching = [value for value in values if any(isinstance(value, kind) for kind in _classes(argument.annotation))]
        if matching:
            found[name] = matching[0]
        elif argument.default is inspect.Parameter.empty:
            offered = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
            wanted = inspect.formatannotation(argument.annotation)
            raise ConfigError(
                f"{section}: {getattr(component, '__name__', component)} needs {name}: {wanted}, but a {section} can "
                f"ask for {offered} only; give it a default, or a type that can be configured"
            )
    return found


def _arguments(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named arguments of a class with the types that their annotations stand for."""
    try:
        parameters = inspect.signature(component, eval_str=True).parameters
    except NameError:  # an annotation that exists for type checkers only
        parameters = inspect.signature(component).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: argument for name, argument in parameters.items() if argument.kind not in variable}


def _is_plain(annotation: Any) -> bool:
    """True for types of values that TOML can hold, and where there is no type."""
    if annotation in (Any, inspect.Parameter.empty, Ellipsis):
        return True
    origin = get_origin(annotation)
    if origin is not None:
        return origin is Literal or (origin in _CONTAINERS and all(map(_is_plain, get_args(annotation))))
    return isinstance(annotation, type) and issubclass(annotation, _PLAIN)


def _classes(annotation: Any) -> list[type]:
    """Classes of which a value may be an instance."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [option for option in options if isinstance(option, type) and option is not NoneType]


def _type(argument: inspect.Parameter) -> Any:
    """The type of a key as pydantic takes it; a list of numbers may also be the name of a file."""
    if argument.annotation == tuple[float, ...]:
        return Annotated[argument.annotation, BeforeValidator(_read_numbers)]
    return Any if argument.annotation is inspect.Parameter.empty else argument.annotation


def _read_numbers(value: Any) -> Any:
    """A list of numbers, maybe given as the name of a file: `.npy`, `.json` with a list, or one number per line."""
    if not isinstance(value, str):
        return value
    path = Path(value)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).astype(float).flatten().tolist()
        if path.suffix == ".json":
            return [float(number) for number in json.loads(path.read_text(encoding="utf-8-sig"))]
        return [float(word) for word in path.read_text(encoding="utf-8-sig").split()]
    except FileNotFoundError:
        raise ValueError(
            f"must be a list of numbers, or the path of a file with such a list; there is no file {value!r}"
        ) from None
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"the file {value!r} does not hold a list of numbers: {error}") from None


def _default(component: Callable[..., Any], argument: inspect.Parameter) -> Any:
    """The default of an argument as pydantic takes it: a value, a factory, or ... for none."""
    if is_dataclass(component):
        for field in fields(component):
            if field.name == argument.name and not isinstance(field.default_factory, _MISSING_TYPE):
                return Field(default_factory=field.default_factory)
    return ... if argument.default is inspect.Parameter.empty else argument.default


def close_match(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that suggests the nearest known name, or nothing if none is near.

    Args:
        name: the unknown name.
        known: names that exist.
        prefix: put before the suggestion.
    """
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
