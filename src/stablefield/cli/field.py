"""`stablefield field`: how much targets vary on any data, where, and what a training may expect of stable ones."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stablefield.checkpoint import finite, write_text
from stablefield.cli.data import progress_bar
from stablefield.cli.train import Allow
from stablefield.config import Allowed, Config, ConfigError, overlay, override, read_toml, resolve, typed
from stablefield.data import Store, content_hash, guess_kind, split
from stablefield.evaluate.field import (
    Advice,
    Extent,
    Field,
    Linear,
    TwoGaussians,
    measure_field,
    normal_errors,
    study_gaussians,
)
from stablefield.evaluate.field.measure import SIZES
from stablefield.evaluate.field.plots import plot_bias, plot_field, plot_study
from stablefield.evaluate.field.tables import lines_of, lines_of_study, write_csv
from stablefield.process import Process
from stablefield.reference import Pool
from stablefield.run import Folder, choose_device, fingerprint, refuse_other_data
from stablefield.seeding import generator

SMALL_SIZES = (4, 16, 64, 256, 1024)  # of the Gaussians, whose limit is nearer


def field(
    source: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A store, zip, folder, array, ...; or digits, or hf:NAME.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("field"),
    levels: Annotated[int, typer.Option(min=2, help="Noise levels, evenly spaced in their logarithm.")] = 13,
    low: Annotated[float | None, typer.Option(help="Lowest sigma / alpha; else where one source is likely.")] = None,
    high: Annotated[float | None, typer.Option(help="Highest; else the greatest distance in the data.")] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,...", help="Sizes of reference batches; 64,256,1024,4096 if not said.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="x_t at each level; 256, of the Gaussians 64.")] = None,
    draws: Annotated[int | None, typer.Option(min=3, help="References for each; 16, of the Gaussians 256.")] = None,
    seed: Annotated[int, typer.Option(help="Decides all draws.")] = 0,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="The network is told the class: only its members may be sources.")
    ] = False,
    two_gaussians: Annotated[
        bool, typer.Option("--two-gaussians", help="The paper's example with its closed form, instead of data.")
    ] = False,
    kind: Annotated[str | None, typer.Option(help="Kind of the data; else guessed.")] = None,
    config: Annotated[Path | None, typer.Option(help="A training: its process, times, weight (and data).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One key of it; may be repeated.")
    ] = None,
    allow: Allow = None,
    device: Annotated[str, typer.Option(help='"auto", or as torch names it.')] = "auto",
) -> None:
    """Measure variance and bias of training targets against the noise level, and say what to expect of stable ones."""
    chosen = parse_sizes(sizes) if sizes else SMALL_SIZES if two_gaussians else SIZES
    if two_gaussians:
        if source or kind or config or set_ or conditional or device != "auto":
            raise ConfigError(
                "--two-gaussians stands alone: no data, --kind, classes, --device, --config or --set go with it"
            )
        low, high = 0.03 if low is None else low, 3.0 if high is None else high
        _two_gaussians(out, chosen, levels, low, high, rows or 64, draws or 256, seed)
        return
    rows, draws = rows or 256, draws or 16
    training = configured(source, kind, config, set_ or [], typed(set_ or [], allow))
    found = training.make("data")
    with progress_bar("decoding") as progress:
        data = found.load(progress)
    if config and not source:
        refuse_others_than_the_runs(config, training, data)
    pool, _ = split(data, found.holdout)
    pool = training.make("augmentation").of_pool(pool)
    pool = replace(pool, data=pool.data.to(choose_device(device)))
    process = training.make("process")
    extent = Extent.of(pool, seed=seed)
    t = process.time(_levels(extent, process, levels, low, high))
    conditional = conditional or training.training.conditional
    print(f"data      {found!r}: {len(pool):,} of shape {pool.shape}")
    print(f"distances {extent.nearest:.3g} to {extent.farthest:.3g}, as far as was looked")
    print(f"process   {process}, {rows} rows and {draws} reference batches at {levels} levels, seed {seed}")
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("measuring") as progress:
        measured = measure_field(
            pool,
            process,
            t,
            sizes=chosen,
            rows=rows,
            draws=draws,
            seed=seed,
            conditional=conditional,
            device=pool.data.device,
            progress=progress,
        )
    advice = Advice.of(measured, process, training.make("times"), training.make("weight"), Linear.of(pool))
    print("\n".join(["", *table(measured), "", *advice.lines(), ""]))
    name = source or str(found)
    plot_field(out / "field.png", measured, f"Training targets: {name}")
    plot_bias(out / "bias.png", measured, f"With the source and without: {name}")
    about = {
        "data": repr(found),
        "hash": found.about()["hash"] if isinstance(found, Store) and pool.places is None else content_hash(pool),
        "members": len(pool),
        "shape": list(pool.shape),
        "conditional": conditional,
        "process": repr(process),
        "times": advice.times,
        "weight": repr(training.make("weight")),
        "rows": rows,
        "draws": draws,
        "seed": seed,
        "advice": asdict(advice),
    }
    _write(out, about, lines_of(measured))
    print(f"written   {out}/field.csv, field.json, field.png, bias.png")


def refuse_others_than_the_runs(config: Path, training: Config, data: Pool) -> None:
    """Raises:
    ConfigError: the configuration is a run's, and the data at its path are not those that the run was trained on.
    """
    folder = Folder(config.parent)
    if folder.config != config or not folder.checkpoint.exists():
        return
    saved = folder.newest().config
    if all(training["data"].get(key) == value for key, value in saved["config"]["data"].items() if key != "holdout"):
        way_out = "bring those back, or name the data: stablefield field DATA --config FILE"
        refuse_other_data(data, fingerprint(data), saved.get("data", ""), way_out)


def configured(
    source: str | None, kind: str | None, config: Path | None, settings: list[str], allow: Iterable[Allowed] = ()
) -> Config:
    """The training that is asked about, with the data it would have.

    Raises:
        ConfigError: no data are named, or what is said does not fit together.
    """
    raw = read_toml(config) if config else {}
    if source is None and kind is not None:
        raise ConfigError("--kind says what DATA is: name the data too, or say --set data.kind")
    if source is None and "data" not in raw:
        raise ConfigError("name the data: stablefield field DATA (or --config of a training, or --two-gaussians)")
    if source is not None:
        guessed, path = (kind, source) if kind else guess_kind(source)
        raw = overlay(raw, {"data": {"kind": guessed, **({"path": path} if path else {})}})
    return resolve(override(raw, settings), allow=allow)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes as people write them.

    >>> parse_sizes("64, 1024")
    (64, 1024)

    Raises:
        ConfigError: they are no whole numbers above 0.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError(f"sizes are whole numbers above 0, as 64,256,1024, not {text!r}")
    return sizes


def table(found: Field) -> list[str]:
    """The field as a person reads it: variances per dimension in noise units, shares of the posterior."""
    head = ["sigma", "DSM", *(f"STF {n:,}" for n in found.stable), "ESS/N", "KL", "D", "one point"]
    columns = [
        found.level,
        found.in_noise(found.dsm).value,
        *(found.in_noise(stable.variance).value for stable in found.stable.values()),
        *(each.value for each in (found.ess_share, found.kl, found.divergence, found.one_point)),
    ]
    rows = [[f"{float(value):.3g}" for value in row] for row in zip(*columns, strict=True)]
    return ["Variance of the target per dimension, in noise units:", *_aligned([head, *rows])]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _levels(extent: Extent, process: Process, count: int, low: float | None, high: float | None) -> torch.Tensor:
    usual = extent.levels(count, process)
    return _spread(float(usual[0]) if low is None else low, float(usual[-1]) if high is None else high, count)


def _spread(low: float, high: float, count: int) -> torch.Tensor:
    if not 0 < low < high:
        raise ConfigError(f"noise levels need 0 < low < high, not {low:.3g} and {high:.3g}")
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _two_gaussians(
    out: Path, sizes: tuple[int, ...], levels: int, low: float, high: float, rows: int, draws: int, seed: int
) -> None:
    population = TwoGaussians()
    sigma = _spread(low, high, levels)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("measuring") as progress:
        study = study_gaussians(population, sigma, sizes=sizes, rows=rows, draws=draws, seed=seed, progress=progress)
    print(f"{population}, seed {seed}; V in units of x squared, summed over the dimensions")
    columns = [
        study.sigma,
        study.dsm_closed,
        study.dsm.value,
        study.dsm.error,
        study.information_closed,
        study.information.value,
        study.divergence_closed,
        study.divergence.value,
        *((n - 1) * study.stable[n].value / study.limit.value for n in sizes),
    ]
    head = ["sigma", "V_DSM", "estimate", "+-", "KL", "estimate", "D", "estimate", *(f"law {n}" for n in sizes)]
    rows_ = [[f"{float(value):.4g}" for value in row] for row in zip(*columns, strict=True)]
    print("\n".join(_aligned([head, *rows_])))
    print("law n: (n - 1) V_STF over the limit of n V_STF; 1 is the law 1 / (n - 1)")
    at, g = 0.5, generator(seed, "field", "normal")
    y = population.draw(1, g) + at * torch.randn(1, population.dim, generator=g, dtype=torch.float64)
    errors = [(n, normal_errors(population, y, at, n, 8 * draws, g)) for n in (8, 64, 1024)]
    plot_study(out / "field.png", study, errors, "Two Gaussians in 64 dimensions, means ±0.1, variance 1e-4")
    _write(out, {"data": repr(population), "rows": rows, "draws": draws, "seed": seed}, lines_of_study(study))
    print(f"written   {out}/field.csv, field.json, field.png")


def _write(out: Path, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    lines = list(lines)
    write_csv(out / "field.csv", lines)
    text = json.dumps({"stablefield": version("stablefield"), **about, "levels": finite(lines)}, indent=1)
    write_text(out / "field.json", text + "\n")
