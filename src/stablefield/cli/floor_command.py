"""`stablefield floor`: what a training loss cannot go below on any data, and how far a run is above it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stablefield import __version__
from stablefield.cli.options import MeasuredOptions, Weights, given_by
from stablefield.cli.progress import progress_bar
from stablefield.kinds import ConfigError

if TYPE_CHECKING:
    from stablefield.config import Config


@given_by("measured", MeasuredOptions)
def floor(
    *,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run or checkpoint to measure too; its data and settings are used."),
    ] = None,
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("floor"),
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="T,...", help="Targets: dsm, stf:N, knn:K, exact.", show_default="dsm and that of the settings"
        ),
    ] = None,
    bins: Annotated[int, typer.Option(min=1, max=4096, help="Ranges of the noise level, visited equally often.")] = 16,
    examples: Annotated[int, typer.Option(min=2, max=2**20, help="Number of x_t in each range.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    measured: MeasuredOptions,
) -> None:
    """Measure what a training loss cannot go below on these data, and how far a run is above it."""
    from stablefield.build import choose_device
    from stablefield.checkpoint import finite
    from stablefield.cli.measuring import aligned, configured, training_pool
    from stablefield.evaluate.plots import plot_floor
    from stablefield.files import write_text
    from stablefield.floor import ByNoise, Probes, SquaredError
    from stablefield.run import open_run
    from stablefield.studies.floor import FloorReport, cached_floor, loss_of_linear_denoiser

    own = {"DATA": measured.source, "--config": measured.config, "--set": measured.set_}
    if run and (given := [name for name, value in own.items() if value]):
        raise ConfigError(f"--run cannot be combined with {', '.join(given)}: a run has its own data and settings")
    trained = open_run(run, weights=weights, device=measured.device, allow=measured.allow or ()) if run else None
    training = trained.config if trained else configured(measured, "floor")
    pool = training_pool(measured, training, trained, "floor")
    if not training.training.conditional:
        pool = replace(pool, labels=None)
    elif pool.labels is None:
        raise ConfigError("training.conditional=true needs labels, and the data have none; set it to false")
    loss = SquaredError(training.make("process"), training.make("times"), weight=training.make("weight"))
    names = _floor_targets(targets, training, len(pool))
    print(f"loss      {loss.process}, times {loss.times}, weight {loss.weight}; mean over the dimensions")
    points: dict[str, Any] = {
        "bins": bins,
        "per_bin": examples,
        "seed": seed,
        "label_dropout": training.training.label_dropout,
        "device": choose_device(measured.device),
    }
    with progress_bar("measuring") as progress:
        floors = cached_floor(pool, loss, targets=names, progress=progress, **points)
    excess: ByNoise | None = None
    if trained:
        excess = Probes(pool, loss, **points).excess(trained.denoiser)
    report = FloorReport(floors.floors, loss_of_linear_denoiser(pool, loss), excess)
    print("\n".join(["", *aligned(report.table()), "", *report.lines(), ""]))
    out.mkdir(parents=True, exist_ok=True)
    plot_floor(
        out / "floor.png",
        floors.floors,
        f"Floor of the loss: {Path(run or measured.source or training.data_path or training.kind('data')).name}",
        excess,
    )
    record = {"stablefield": __version__, "data": repr(training.make("data")), "loss": repr(loss)}
    write_text(out / "floor.json", json.dumps(finite({**record, "seed": seed, **report.record()}), indent=1) + "\n")
    print(f"written   {out}/floor.png, floor.json")


def _floor_targets(text: str | None, config: "Config", data_points: int) -> list[str]:
    """Names of the targets whose floor is measured; by default DSM, and the configured one if its floor is another."""
    from stablefield.config import floor_target, split_targets, target_section

    if text is None:
        own = floor_target(config, data_points)
        return ["dsm", *([own] if own and ":" in own else [])]
    names = []
    for each in split_targets(text):
        changed = config.changed(target=target_section(each, config.allowed))
        if (name := floor_target(changed, data_points)) is None:
            indexed = changed.kind("target") == "knn"
            reason = "it depends on its index" if indexed else "choose from dsm, stf:N, knn:K and exact"
            raise ConfigError(f"the floor of the target {each!r} is not known: {reason}")
        names.append(name)
    return list(dict.fromkeys(names))
