"""`stablefield field`: variance and bias of training targets on any data, and what to expect of stable targets."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stablefield.build import choose_device
from stablefield.checkpoint import finite
from stablefield.cli.data_command import progress_bar
from stablefield.cli.train_command import Allow
from stablefield.config import Allowed, Config, ConfigError, allowed_names, overlay, override, read_toml, resolve
from stablefield.data import Store, content_hash, guess_kind, split
from stablefield.files import sweep, write_text
from stablefield.pool import Pool
from stablefield.process import Process
from stablefield.run import RunFolder, fingerprint, refuse_other_data
from stablefield.seeding import generator
from stablefield.studies.field import (
    DataDistances,
    Field,
    LinearDenoiser,
    TwoGaussians,
    VarianceReport,
    measure_field,
    normal_errors,
    study_gaussians,
)
from stablefield.studies.field.measure import SIZES
from stablefield.studies.field.plots import plot_bias, plot_field, plot_study
from stablefield.studies.field.tables import field_records, study_records, write_csv

__all__ = ["configured", "field", "parse_sizes", "refuse_other_data_than_of_run", "table"]

GAUSSIAN_SIZES = (4, 16, 64, 256, 1024)  # default sizes for two Gaussians, where the limit is reached sooner


def field(
    source: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help='Data: a store, zip, folder, array, ..., "digits" or "hf:NAME".'),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and plots.")] = Path("field"),
    noise_levels: Annotated[int, typer.Option(min=2, help="Number of noise levels, evenly spaced in log.")] = 13,
    low: Annotated[
        float | None,
        typer.Option(help="Lowest sigma / alpha.", show_default="a tenth of the smallest distance in the data"),
    ] = None,
    high: Annotated[
        float | None,
        typer.Option(help="Highest sigma / alpha.", show_default="the largest distance in the data"),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Sizes of the support, with the source.", show_default="64,256,1024,4096"),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=2, help="Number of x_t at each noise level.", show_default="256; 64 with --two-gaussians"),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=3, help="Number of reference batches per size.", show_default="16; 256 with --two-gaussians"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    conditional: Annotated[
        bool,
        typer.Option("--conditional", help="Measure class-conditional targets: only the source's class is used."),
    ] = False,
    two_gaussians: Annotated[
        bool,
        typer.Option("--two-gaussians", help="Measure the paper's two Gaussians instead of data, with closed forms."),
    ] = False,
    kind: Annotated[str | None, typer.Option(help="Kind of the data.", show_default="guessed from DATA")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Training configuration: its process, times and weight (and data) are used.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key of the configuration; may be repeated."),
    ] = None,
    allow: Allow = None,
    device: Annotated[str, typer.Option(help='Device: "auto", "cpu", "cuda", ...')] = "auto",
) -> None:
    """Measure variance and bias of training targets by noise level, and report what to expect of stable targets."""
    chosen = parse_sizes(sizes) if sizes else GAUSSIAN_SIZES if two_gaussians else SIZES
    if two_gaussians:
        given = {
            "DATA": source,
            "--kind": kind,
            "--config": config,
            "--set": set_,
            "--conditional": conditional,
            "--device": device != "auto",
        }
        if other := [name for name, value in given.items() if value]:
            raise ConfigError(f"--two-gaussians cannot be combined with {', '.join(other)}; leave one of them out")
        low, high = 0.03 if low is None else low, 3.0 if high is None else high
        _two_gaussians(out, chosen, noise_levels, low, high, examples or 64, draws or 256, seed)
        return
    examples, draws = examples or 256, draws or 16
    training = configured(source, kind, config, set_ or [], allowed_names(set_ or [], allow))
    data_source = training.make("data")
    with progress_bar("decoding") as progress:
        data = data_source.load(progress)
    if config and not source:
        refuse_other_data_than_of_run(config, training, data)
    pool, _ = split(data, data_source.holdout)
    pool = training.make("augmentation").augment_pool(pool)
    pool = replace(pool, data=pool.data.to(choose_device(device)))
    process = training.make("process")
    distances = DataDistances.from_pool(pool, seed=seed)
    t = process.time(_noise_levels(distances, process, noise_levels, low, high))
    conditional = conditional or training.training.conditional
    print(f"data      {data_source!r}: {len(pool):,} data points of shape {pool.shape}")
    print(f"distances {distances.nearest:.3g} to {distances.farthest:.3g}, measured on a part of the data")
    print(
        f"process   {process}; {noise_levels} noise levels, {examples} examples and {draws} reference batches at each;"
        f" seed {seed}"
    )
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    with progress_bar("measuring") as progress:
        measured = measure_field(
            pool,
            process,
            t,
            sizes=chosen,
            examples=examples,
            draws=draws,
            seed=seed,
            conditional=conditional,
            device=pool.data.device,
            progress=progress,
        )
    times, weight = training.make("times"), training.make("weight")
    report = VarianceReport.from_field(measured, process, times, weight, LinearDenoiser.from_pool(pool))
    print("\n".join(["", *table(measured), "", *report.lines(), ""]))
    name = source or str(data_source)
    plot_field(out / "field.png", measured, f"Variance of training targets: {name}")
    plot_bias(out / "bias.png", measured, f"Squared error with and without the source in the support: {name}")
    is_whole_store = isinstance(data_source, Store) and pool.view_index is None
    metadata = {
        "data": repr(data_source),
        "hash": data_source.metadata()["hash"] if is_whole_store else content_hash(pool),
        "num_data_points": len(pool),
        "shape": list(pool.shape),
        "conditional": conditional,
        "process": repr(process),
        "times": report.times,
        "weight": repr(weight),
        "examples": examples,
        "draws": draws,
        "seed": seed,
        "report": asdict(report),
    }
    _write(out, metadata, field_records(measured))
    print(f"written   {out}/field.csv, field.json, field.png, bias.png")


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
    source: str | None, kind: str | None, config: Path | None, settings: list[str], allow: Iterable[Allowed] = ()
) -> Config:
    """The configuration of the training to measure, with its data.

    Args:
        source: path or name of the data; None to use the data of the configuration.
        kind: kind of the data; guessed from `source` by default.
        config: path of a configuration file; None for the default configuration.
        settings: settings "section.key=value" that override it.
        allow: names of networks that may be imported.

    Raises:
        ConfigError: no data are given, or the settings contradict each other.
    """
    raw = read_toml(config) if config else {}
    if source is None and kind is not None:
        raise ConfigError(
            f"--kind {kind} is the kind of DATA, which is missing: add DATA, or use --set data.kind={kind}"
        )
    if source is None and "data" not in raw:
        raise ConfigError("no data given: use stablefield field DATA, or --config FILE with data, or --two-gaussians")
    if source is not None:
        guessed, path = (kind, source) if kind else guess_kind(source)
        raw = overlay(raw, {"data": {"kind": guessed, **({"path": path} if path else {})}})
    return resolve(override(raw, settings), allow=allow)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of sizes.

    >>> parse_sizes("64, 1024")
    (64, 1024)

    Args:
        text: the list as text.

    Raises:
        ConfigError: a part is not an integer above 0.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError(f"--sizes must be integers above 0 separated by commas, such as 64,256,1024, not {text!r}")
    return sizes


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
    return ["Variance of the target per dimension, in noise units:", *_aligned([head, *rows])]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _noise_levels(
    distances: DataDistances, process: Process, count: int, low: float | None, high: float | None
) -> torch.Tensor:
    """Noise levels between the given ends; by default those of the distances in the data."""
    default = distances.noise_levels(count, process)
    return _log_spaced(float(default[0]) if low is None else low, float(default[-1]) if high is None else high, count)


def _log_spaced(low: float, high: float, count: int) -> torch.Tensor:
    if not 0 < low < high:
        raise ConfigError(f"noise levels need 0 < low < high, not {low:.3g} and {high:.3g}; change --low or --high")
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _two_gaussians(
    out: Path, sizes: tuple[int, ...], count: int, low: float, high: float, examples: int, draws: int, seed: int
) -> None:
    """Measure the paper's two Gaussians, print estimates and closed forms, and write tables and plots."""
    population = TwoGaussians()
    sigma = _log_spaced(low, high, count)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    with progress_bar("measuring") as progress:
        study = study_gaussians(
            population, sigma, sizes=sizes, examples=examples, draws=draws, seed=seed, progress=progress
        )
    print(f"{population}, seed {seed}; V in units of x squared, summed over the dimensions")
    columns = [
        study.sigma,
        study.dsm_closed,
        study.dsm.value,
        study.dsm.error,
        study.kl_closed,
        study.kl.value,
        study.divergence_closed,
        study.divergence.value,
        *((n - 1) * study.stf[n].value / study.limit.value for n in sizes),
    ]
    head = ["sigma", "V_DSM", "estimate", "+-", "KL", "estimate", "D", "estimate", *(f"law {n}" for n in sizes)]
    rows = [[f"{float(value):.4g}" for value in row] for row in zip(*columns, strict=True)]
    print("\n".join(_aligned([head, *rows])))
    print("law n: (n - 1) V_STF divided by the limit of n V_STF; the law 1 / (n - 1) holds where this is 1")
    noise_level, g = 0.5, generator(seed, "field", "normal")
    y = population.draw(1, g) + noise_level * torch.randn(1, population.dim, generator=g, dtype=torch.float64)
    errors = [(n, normal_errors(population, y, noise_level, n, 8 * draws, g)) for n in (8, 64, 1024)]
    plot_study(out / "field.png", study, errors, "Two Gaussians in 64 dimensions, means ±0.1, variance 1e-4")
    metadata = {"data": repr(population), "examples": examples, "draws": draws, "seed": seed}
    _write(out, metadata, study_records(study))
    print(f"written   {out}/field.csv, field.json, field.png")


def _write(out: Path, metadata: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """Write the records as CSV, and metadata and records as JSON."""
    records = list(records)
    write_csv(out / "field.csv", records)
    text = json.dumps({"stablefield": version("stablefield"), **metadata, "records": finite(records)}, indent=1)
    write_text(out / "field.json", text + "\n")
