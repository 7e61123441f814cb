"""The list of all configuration keys with their types, defaults and meanings, from the classes of the components."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from stablefield.config.classes import close_match, component_class, import_name, schema
from stablefield.config.text import toml_value
from stablefield.kinds import BASES, KIND_DEFAULTS, KINDS, PROCESS_DEFAULTS, ConfigError

_PREAMBLE = """\
# All configuration keys

`stablefield config --markdown` writes this page; `stablefield config SECTION` or `SECTION.KIND` prints a part of it.

A configuration is a TOML file of sections, or `--set section.key=value` at the terminal. In a section, `kind` chooses a
class, and the other keys are its own. A kind can also be [a class of your own](extending.md), written `module:Class`.
The first kind of a section is its default, except where the process decides:

| `process.kind` | `times.kind` | `weight.kind` | `grid.kind` |
|---|---|---|---|"""


class _Key(NamedTuple):
    """A key of a section: its name, the type of its values, its default as TOML ("" if it must be set), its meaning."""

    name: str
    type: str
    default: str
    meaning: str


class _Kind(NamedTuple):
    """A kind of a section (that of the section if it has none), the first sentence about its class, and its keys."""

    section: str
    kind: str
    summary: str
    keys: tuple[_Key, ...]

    @property
    def place(self) -> str:
        return f"{self.section}.kind={self.kind}" if self.section in BASES else self.section


def _list_keys(section: str, kind: str) -> _Kind:
    component = component_class(section, kind)
    of_kind = import_name(KIND_DEFAULTS[kind]) if kind in KIND_DEFAULTS else {}
    meanings = _meanings(component)
    keys = []
    for name, field in schema(section, component).model_fields.items():
        required = field.is_required() and name not in of_kind
        default = "" if required else _default_text(of_kind.get(name, field.get_default(call_default_factory=True)))
        keys.append(_Key(name, _type_text(field.annotation), default, meanings.get(name, "")))
    summary = inspect.getdoc(component) or ""
    return _Kind(section, kind, " ".join(summary.partition("\n\n")[0].split()), tuple(keys))


def describe_config(place: str = "") -> list[_Kind]:
    """The kinds of all sections, of one section, or a single kind.

    Args:
        place: a section, or `section.kind`; all by default.

    Raises:
        ConfigError: there is no such section or kind.
    """
    section, _, kind = place.partition(".")
    if section and section not in KINDS:
        raise ConfigError(f"there is no section {section!r}{close_match(section, KINDS)}")
    if kind and kind not in KINDS[section]:
        raise ConfigError(f"there is no {section}.kind {kind!r}{close_match(kind, KINDS[section])}")
    sections = [section] if section else list(KINDS)
    return [_list_keys(each, one) for each in sections for one in ([kind] if kind else KINDS[each])]


def text_reference(entries: list[_Kind]) -> str:
    """The list for a terminal.

    Args:
        entries: kinds as `describe_config` returns them.
    """
    return "\n\n".join("\n".join(_text_lines(entry)) for entry in entries)


def _text_lines(entry: _Kind) -> Iterator[str]:
    yield f"{entry.place}: {entry.summary}"
    for key in entry.keys:
        default = f" = {key.default}" if key.default else " (must be set)"
        yield f"  {entry.section}.{key.name}{default}  [{key.type}]"
        yield f"      {key.meaning}"


def markdown_reference() -> str:
    """The page docs/configuration.md."""
    return "\n".join(_markdown_lines()) + "\n"


def _markdown_lines() -> Iterator[str]:
    yield _PREAMBLE
    for process, kinds in PROCESS_DEFAULTS.items():
        yield f"| `{process}` | `{kinds['times']}` | `{kinds['weight']}` | `{kinds['grid']}` |"
    section = ""
    for entry in describe_config():
        if entry.section != section:
            section = entry.section
            yield from ("", f"## {section}")
        yield from ("", f"### {entry.place}" if section in BASES else "", entry.summary)
        if entry.keys:
            yield from ("", f"| `{section}.` | type | default | meaning |", "|---|---|---|---|")
            for key in entry.keys:
                cells = (f"`{key.name}`", f"`{key.type}`", f"`{key.default}`" if key.default else "", key.meaning)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meanings(component: Callable[..., Any]) -> dict[str, str]:
    """Descriptions in the sections Attributes and Args of the docstrings of a class and its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(inspect.getmro(component)) if isinstance(component, type) else ():
        name, section = "", ""
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            if line and not line.startswith(" "):
                name, section = "", line
            elif section in ("Attributes:", "Args:"):
                if entry := re.match(r"    (\w+): (.*)", line):
                    name = entry[1]
                    found[name] = entry[2].strip()
                elif name and line.strip():
                    found[name] += f" {line.strip()}"
    return found


def _type_text(annotation: Any) -> str:
    """A type in the words of TOML."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(options[0])
    if origin is Literal:
        return " or ".join(toml_value(option) for option in options)
    if origin in (Union, UnionType):
        return " or ".join(_type_text(option) for option in options if option is not NoneType)
    if options:
        return f"list of {_type_text(options[0])}"
    names = {int: "integer", float: "number", str: "string", bool: "true or false", Path: "path", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default_text(default: Any) -> str:
    return "none" if default is None else toml_value(str(default) if isinstance(default, Path) else default)
