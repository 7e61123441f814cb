"""`stablefield field`: variance and bias of training targets on any data, and what to expect of stable targets."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.options import MeasuredOptions, given_by
from stablefield.cli.progress import progress_bar
from stablefield.kinds import ConfigError


@given_by("measured", MeasuredOptions)
def field(
    *,
    out: Annotated[Path, typer.Option(help="Folder for tables and plots.")] = Path("field"),
    noise_levels: Annotated[
        int, typer.Option(min=2, max=4096, help="Number of noise levels, evenly spaced in log.")
    ] = 13,
    low: Annotated[
        float | None,
        typer.Option(help="Lowest sigma / alpha.", show_default="a tenth of the smallest distance in the data"),
    ] = None,
    high: Annotated[
        float | None, typer.Option(help="Highest sigma / alpha.", show_default="the largest distance in the data")
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="N,...", help="Sizes of the support, with the source.")
    ] = "64,256,1024,4096",
    examples: Annotated[int, typer.Option(min=2, max=2**20, help="Number of x_t at each noise level.")] = 256,
    draws: Annotated[int, typer.Option(min=3, max=2**20, help="Number of reference batches per size.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Measure class-conditional targets: only the source's class is used.")
    ] = False,
    measured: MeasuredOptions,
) -> None:
    """Measure variance and bias of training targets by noise level, and report what to expect of stable targets."""
    from stablefield.build import choose_device
    from stablefield.cli.measuring import aligned, configured, training_pool
    from stablefield.data import Store, content_hash
    from stablefield.studies.field import DataDistances, VarianceReport, measure, write_study

    chosen = _parse_sizes(sizes)
    training = configured(measured, "field")
    data_source = training.make("data")
    pool = training_pool(measured, training, None, "field")
    pool = replace(pool, data=pool.data.to(choose_device(measured.device)))
    process, times, weight = (training.make(section) for section in ("process", "times", "weight"))
    conditional = conditional or training.training.conditional
    distances = DataDistances.from_pool(pool, seed=seed)
    levels = distances.noise_levels(noise_levels, process, low=low, high=high)
    print(f"distances {distances.nearest:.3g} to {distances.farthest:.3g}, measured on a part of the data")
    print(
        f"process   {process}; {noise_levels} noise levels, {examples} examples and {draws} reference batches at each;"
        f" seed {seed}"
    )
    with progress_bar("measuring") as progress:
        study = measure(
            pool,
            process,
            noise_levels=levels,
            sizes=chosen,
            examples=examples,
            draws=draws,
            seed=seed,
            conditional=conditional,
            progress=progress,
        )
    report = VarianceReport.from_study(study, times, weight)
    print("\nVariance of the target per dimension, in noise units:")
    print("\n".join([*aligned(study.table()), "", *report.lines(), ""]))
    is_whole_store = isinstance(data_source, Store) and pool.view_index is None
    description = {
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
    }
    files = write_study(out, study, report, name=measured.source or str(data_source), description=description)
    print(f"written   {out}/{', '.join(files)}")


def _parse_sizes(text: str) -> tuple[int, ...]:
    """The sizes in a comma-separated list."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ConfigError(f"--sizes must be integers above 0 separated by commas, such as 64,256,1024, not {text!r}")
    return sizes
