"""Configurations as text: TOML files with a checksum, and settings `section.key=value` on the command line.

The last line of a run's config.toml names the format and holds a checksum of the lines above it, so that an edited or
incomplete file is noticed. Files without this line are configurations that a user wrote.
"""

import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stablefield.checkpoint import FORMAT_VERSION, other_version
from stablefield.kinds import PROCESS_DEFAULTS, ConfigError

_CHECKSUM = "SHA-256 of the lines above: "
CHECKSUM_LINE = f"# stablefield {FORMAT_VERSION}, {_CHECKSUM}"

# target kinds of format 1, which configurations without a checksum line may have
_KINDS_OF_FORMAT_1 = {"single", "reference", "rolling", "neighbours", "found", "full", "pruned", "auto"}


def add_checksum(text: str) -> str:
    """The text of a configuration with its last line, the format and the checksum.

    Args:
        text: sections as TOML, ending with a newline.
    """
    return f"{text}\n{CHECKSUM_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_unedited(text: str) -> bool:
    """True if the text of a config.toml is exactly as `Config.toml` wrote it.

    Args:
        text: the whole file.
    """
    return text == add_checksum(text.rpartition(f"\n{CHECKSUM_LINE}")[0])


def refuse_other_format(text: str, path: Path) -> None:
    """Refuse a configuration that another version of this package wrote in another format.

    Format 1 is recognised by its last line or, without it, by names that only it has.

    Args:
        text: the whole file, which may be damaged.
        path: the file, for the message.

    Raises:
        ConfigError: the text has another format.
    """
    if (version := _format_version(text)) != FORMAT_VERSION:
        raise ConfigError(other_version(path, version))


def _format_version(text: str) -> int:
    """Format version that a text states or shows; the current one if it does neither."""
    if found := re.search(rf"^# (?:stablefield (\d{{1,9}}), )?{_CHECKSUM}", text, re.MULTILINE):
        return int(found[1] or 1)
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return FORMAT_VERSION
    return 1 if "scaling" in sections or kind_of(sections, "target", "") in _KINDS_OF_FORMAT_1 else FORMAT_VERSION


def read_toml(path: Path) -> dict[str, Any]:
    """Sections of a TOML file, as dictionaries.

    Args:
        path: the file.

    Raises:
        ConfigError: the file does not exist, is not TOML, or was written in another format.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Notepad writes a byte order mark
        sections = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    refuse_other_format(text, path)
    return sections


def override(raw: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Sections with single keys replaced by settings.

    A new kind replaces its whole section, because the keys of the old kind would not fit it.

    Args:
        raw: the sections.
        settings: each as `section.key=value`, the value written as in TOML, or a word without quotes.

    Raises:
        ConfigError: a setting of another form.
    """
    wanted: dict[str, Any] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        section, dot, key = place.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"settings have the form section.key=value, such as target.size=2048, not {setting!r}")
        wanted.setdefault(section, {})[key] = _parse_value(text.strip())
    return overlay(raw, wanted)


def overlay(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with keys replaced by those of others.

    A new kind replaces its whole section. A new process also removes the sections whose defaults depend on it, unless
    they are replaced too.

    Args:
        raw: the sections.
        wanted: sections with the keys to replace.
    """
    merged = dict(raw)
    for section, values in wanted.items():
        before = merged.get(section, {})
        replaced = (
            not isinstance(values, dict)
            or not isinstance(before, dict)
            or values.get("kind", before.get("kind")) != before.get("kind")
        )
        merged[section] = values if replaced else {**before, **values}
    if kind_of(merged, "process", "ve") != kind_of(raw, "process", "ve"):
        for section in PROCESS_DEFAULTS["ve"].keys() - wanted.keys():
            merged.pop(section, None)
    return merged


def kind_of(raw: Mapping[str, Any], section: str, default: str) -> str:
    """The kind that a section gives.

    Args:
        raw: the sections, not yet checked.
        section: name of a section, which may be missing.
        default: returned if no kind is given.
    """
    values = raw.get(section, {})
    return str(values.get("kind", default)) if isinstance(values, dict) else default


def as_setting(key: str, value: Any) -> str:
    """A key and its value as `override` reads them, quoted for a shell.

    >>> as_setting("training.images", 960), as_setting("sampler.kind", "heun"), as_setting("data.path", "a b.npz")
    ('training.images=960', 'sampler.kind=heun', "'data.path=a b.npz'")

    Args:
        key: the key as `section.key`.
        value: a value that TOML has.
    """
    bare = isinstance(value, str) and value == value.strip() and _parse_value(value) == value
    return shlex.quote(f"{key}={value if bare else toml_value(value)}")


def toml_value(value: Any) -> str:
    """Format a value as TOML on one line.

    Args:
        value: a number, string, boolean, list or table.
    """
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {toml_value(part)}' for key, part in value.items())}}}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)


def _parse_value(text: str) -> Any:
    """The value of a setting: as TOML reads it, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
