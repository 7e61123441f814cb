"""The configuration that `stablefield field` and `stablefield floor` measure for."""

from collections.abc import Iterable
from pathlib import Path

from stablefield.config import Allowed, Config, ConfigError, overlay, override, read_toml, resolve
from stablefield.data import guess_kind
from stablefield.data.identity import fingerprint, refuse_other_data
from stablefield.pool import Pool
from stablefield.run import RunFolder


def refuse_other_data_than_of_run(config: Path, training: Config, data: Pool) -> None:
    """Check the data against the run that a configuration belongs to.

    Args:
        config: path of the configuration file.
        training: the resolved configuration.
        data: the data at the path of the configuration.

    Raises:
        ConfigError: the configuration belongs to a run that was trained on other data.
    """
    folder = RunFolder(config.parent)
    if folder.config != config or not folder.checkpoint.exists():
        return
    saved = folder.newest().config
    if all(training["data"].get(key) == value for key, value in saved["config"]["data"].items() if key != "holdout"):
        way_out = "restore those data, or name the data: stablefield field DATA --config FILE"
        refuse_other_data(data, fingerprint(data), saved.get("data", ""), way_out)


def configured(
    source: str | None,
    kind: str | None,
    config: Path | None,
    settings: list[str],
    allow: Iterable[Allowed] = (),
    command: str = "field",
) -> Config:
    """The configuration of the training to measure, with its data.

    Args:
        source: path or name of the data; None to use the data of the configuration.
        kind: kind of the data; guessed from `source` by default.
        config: path of a configuration file; None for the default configuration.
        settings: settings "section.key=value" that override it.
        allow: names of networks that may be imported.
        command: name of the command, for errors.

    Raises:
        ConfigError: no data are given, or the settings contradict each other.
    """
    raw = read_toml(config) if config else {}
    if source is None and kind is not None:
        raise ConfigError(
            f"--kind {kind} is the kind of DATA, which is missing: add DATA, or use --set data.kind={kind}"
        )
    if source is None and "data" not in raw:
        other = "" if command == "field" else ", or --run RUN"
        raise ConfigError(f"no data given: use stablefield {command} DATA, or --config FILE with data{other}")
    if source is not None:
        guessed, path = (kind, source) if kind else guess_kind(source)
        raw = overlay(raw, {"data": {"kind": guessed, **({"path": path} if path else {})}})
    return resolve(override(raw, settings), allow=allow)
