"""`stablefield field`: variance and bias of training targets on any data, and what to expect of stable targets."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from stablefield.cli.options import Allow
from stablefield.cli.progress import progress_bar
from stablefield.kinds import ConfigError

__all__ = ["aligned", "field", "parse_sizes"]


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
    from stablefield.build import choose_device
    from stablefield.cli.variance import configured, noise_levels_between, refuse_other_data_than_of_run, table
    from stablefield.config import allowed_names
    from stablefield.data import Store, content_hash, split
    from stablefield.files import sweep
    from stablefield.studies.field import DataDistances, LinearDenoiser, VarianceReport, measure_field
    from stablefield.studies.field.measure import SIZES
    from stablefield.studies.field.plots import plot_bias, plot_field
    from stablefield.studies.field.tables import field_records

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
    t = process.time(noise_levels_between(distances, process, noise_levels, low, high))
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


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of text, aligned on the right.

    Args:
        rows: the cells, the first row being the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _two_gaussians(
    out: Path, sizes: tuple[int, ...], count: int, low: float, high: float, examples: int, draws: int, seed: int
) -> None:
    """Measure the paper's two Gaussians, print estimates and closed forms, and write tables and plots."""
    import torch

    from stablefield.cli.variance import log_spaced
    from stablefield.files import sweep
    from stablefield.seeding import generator
    from stablefield.studies.field import TwoGaussians, normal_errors, study_gaussians
    from stablefield.studies.field.plots import plot_study
    from stablefield.studies.field.tables import study_records

    population = TwoGaussians()
    sigma = log_spaced(low, high, count)
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
    print("\n".join(aligned([head, *rows])))
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
    from stablefield.checkpoint import finite
    from stablefield.files import write_text
    from stablefield.studies.field.tables import write_csv

    records = list(records)
    write_csv(out / "field.csv", records)
    text = json.dumps({"stablefield": version("stablefield"), **metadata, "records": finite(records)}, indent=1)
    write_text(out / "field.json", text + "\n")
