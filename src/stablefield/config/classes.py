"""From a kind to a class, and from a class to the keys that can be configured.

A network may be a class of the user's own, named as `module:Class`. Such a name is code, so it is imported only if the
caller allows that very name; the source of a configuration (a checkpoint, a TOML file, a recipe) never decides it.
"""

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import _MISSING_TYPE, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, create_model

from stablefield.config.components import COMPONENTS, RUNTIME_ARGUMENTS
from stablefield.config.text import ConfigError, override

__all__ = ["Allowed", "allowed_names", "close_match", "component_class", "schema"]

Allowed = str | type[torch.nn.Module]  # `module:Class`, or the class itself


def allowed_names(settings: Iterable[str], allow: Iterable[str] | None = None) -> tuple[Allowed, ...]:
    """Names of classes that a user allows at the terminal: by `--allow`, or by typing one as `network.kind`.

    Args:
        settings: settings of the command, as `section.key=value`.
        allow: names given with `--allow`.
    """
    kind = override({}, settings).get("network", {}).get("kind")
    return (*(allow or ()), *([kind] if isinstance(kind, str) and ":" in kind else []))


def component_class(section: str, kind: Any, allowed: Collection[Allowed] = ()) -> Callable[..., Any]:
    """The class of a component.

    Args:
        section: name of the section.
        kind: a kind of this section; for a network also `module:Class`.
        allowed: classes outside this package that may be used.

    Raises:
        ConfigError: an unknown kind, or a class that is not allowed, does not exist or is not a network.
    """
    if section == "network" and isinstance(kind, str) and ":" in kind:
        return _own_network(kind, allowed)
    if not isinstance(kind, str) or kind not in COMPONENTS[section]:
        kinds = ", ".join(COMPONENTS[section])
        raise ConfigError(f"{section}.kind: {kind!r} is none of {kinds}{close_match(str(kind), COMPONENTS[section])}")
    return COMPONENTS[section][kind]


def _own_network(name: str, allowed: Collection[Allowed]) -> Callable[..., Any]:
    """A network outside this package, imported only if its name is allowed."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(f"network.kind: {name!r} does not have the form module:Class")
    for given in allowed:
        if isinstance(given, type) and _has_name(given, module, attribute):
            return _checked_network(name, given)
    if name not in allowed:
        raise ConfigError(
            f"network.kind: {name!r} names code outside this package, and importing it runs it; if you trust it, allow "
            f"this name: --allow {name} at the terminal, allow=[{attribute}] (the class) or allow=[{name!r}] in Python"
        )
    try:
        with _current_folder_on_path():
            found = getattr(import_module(module), attribute)
    except AttributeError:
        raise ConfigError(f"network.kind: the module {module!r} has no {attribute!r}") from None
    except Exception as error:  # a module may fail in any way
        raise ConfigError(f"network.kind: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return _checked_network(name, found)


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


def _checked_network(name: str, found: Any) -> Callable[..., Any]:
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ConfigError(f"network.kind: {name!r} is not a torch.nn.Module")
    return found


@cache
def schema(component: Callable[..., Any]) -> type[BaseModel]:
    """Keys that can be configured for a component: the arguments of its class, except those given when it is made.

    Args:
        component: class of the component.
    """
    arguments: dict[str, Any] = {
        name: (
            Any if argument.annotation is inspect.Parameter.empty else argument.annotation,
            _default(component, argument),
        )
        for name, argument in inspect.signature(component).parameters.items()
        if name not in RUNTIME_ARGUMENTS and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    }
    options = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(getattr(component, "__name__", "component"), __config__=options, **arguments)


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
