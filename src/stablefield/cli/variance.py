"""The work of `stablefield field`: configuration, noise levels and the table."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from stablefield.cli.field_command import aligned
from stablefield.config import Allowed, Config, ConfigError, overlay, override, read_toml, resolve
from stablefield.data import guess_kind
from stablefield.pool import Pool
from stablefield.process import Process
from stablefield.run import RunFolder, fingerprint, refuse_other_data
from stablefield.studies.field import (
    DataDistances,
    Field,
)

__all__ = ["configured", "log_spaced", "noise_levels_between", "refuse_other_data_than_of_run", "table"]


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
        other = "--two-gaussians" if command == "field" else "--run RUN"
        raise ConfigError(f"no data given: use stablefield {command} DATA, or --config FILE with data, or {other}")
    if source is not None:
        guessed, path = (kind, source) if kind else guess_kind(source)
        raw = overlay(raw, {"data": {"kind": guessed, **({"path": path} if path else {})}})
    return resolve(override(raw, settings), allow=allow)


def table(field: Field) -> list[str]:
    """The measured field as lines of text: variances per dimension in noise units, and statistics of the posterior.

    Args:
        field: the measured field.
    """
    head = ["sigma", "DSM", *(f"STF {n:,}" for n in field.stf), "ESS/N", "KL", "D", "single source"]
    columns = [
        field.noise_level,
        field.in_noise_units(field.dsm).value,
        *(field.in_noise_units(errors.variance).value for errors in field.stf.values()),
        *(estimate.value for estimate in (field.ess_share, field.kl, field.divergence, field.single_source)),
    ]
    rows = [[f"{float(value):.3g}" for value in row] for row in zip(*columns, strict=True)]
    return ["Variance of the target per dimension, in noise units:", *aligned([head, *rows])]


def noise_levels_between(
    distances: DataDistances, process: Process, count: int, low: float | None, high: float | None
) -> torch.Tensor:
    """Noise levels between the given ends; by default those of the distances in the data.

    Args:
        distances: distances in the data.
        process: the process, whose noise levels they are.
        count: number of noise levels.
        low: the lowest; None for the default.
        high: the highest; None for the default.
    """
    default = distances.noise_levels(count, process)
    return log_spaced(float(default[0]) if low is None else low, float(default[-1]) if high is None else high, count)


def log_spaced(low: float, high: float, count: int) -> torch.Tensor:
    """Noise levels that are evenly spaced in log.

    Args:
        low: the lowest.
        high: the highest.
        count: number of noise levels.

    Raises:
        ConfigError: not 0 < low < high.
    """
    if not 0 < low < high:
        raise ConfigError(f"noise levels need 0 < low < high, not {low:.3g} and {high:.3g}; change --low or --high")
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)
