"""`stablefield compare`: train with several targets on the same budget and the same seeds, and write a report."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stablefield.build import Components, build, choose_device
from stablefield.cli.options import Allow
from stablefield.cli.progress import progress_bar
from stablefield.cli.training import allow_option, merge_layers
from stablefield.config import Allowed, Config, allowed_names, overlay, override, resolve
from stablefield.data import StageProgress
from stablefield.engine.checkpoints import locked
from stablefield.engine.fit import stop_signals
from stablefield.files import write_text
from stablefield.run import RunFolder
from stablefield.seeding import parse_seeds
from stablefield.studies.compare import Arm, Experiment, cached_evaluator, run_all, summarize, write_report
from stablefield.studies.compare.experiment import experiment_file

__all__ = ["check_targets", "compare", "describe_machine", "describe_plan", "run_experiment", "with_holdout"]

TARGETS = "dsm,stf:256,stf:1024,exact"
DEFAULTS: dict[str, Any] = {
    "arms": tuple(map(Arm.parse, TARGETS.split(","))),
    "seeds": (0, 1, 2),
    "evaluations": 8,
    "samples": 500,
    "examples": 256,
}
SAMPLER = {"kind": "dpm", "steps": 12}  # deterministic, and fast enough to evaluate often


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the comparison; one that exists is resumed.")] = Path(
        "runs/compare"
    ),
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Targets to compare, by default {TARGETS}; knn:64 is possible too. The first is the baseline.",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Training seeds, by default 0-2; every target has one run per seed.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images that each run trains on; sets training.images.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Recipe that all runs share: see stablefield recipes.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Data that all runs train on; the kind is guessed as by stablefield train."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the configuration that all runs share.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key for all runs; may be repeated."),
    ] = None,
    allow: Allow = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help=f"Evaluations of each run, by default {DEFAULTS['evaluations']}.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help=f"Samples per evaluation, by default {DEFAULTS['samples']}.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, help=f"Examples per noise level and evaluation, by default {DEFAULTS['examples']}."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of seeds to train at once, each in a process of its own.")
    ] = 1,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what has been evaluated, without training.")
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Path of the summary, by default summary.md in the folder."),
    ] = None,
) -> None:
    """Train with several targets on the same budget, seed by seed, and report the differences.

    Runs with the same seed start from the same weights and train on the same images, times and noise. Some data are
    held out for evaluation (data.holdout; by default a sixth, at most 5,000). The command can be stopped at any time;
    the same command resumes it, and may add targets and seeds.
    """
    settings = [*(set_ or []), *([f"training.images={images}"] if images else [])]
    allowed = allowed_names(settings, allow)
    if report_only:
        _report(out, summary, allowed)
        return
    options: dict[str, Any] = {
        "arms": tuple(map(Arm.parse, targets.split(","))) if targets else None,
        "seeds": tuple(parse_seeds(seeds)) if seeds else None,
        "evaluations": evaluations,
        "samples": samples,
        "examples": examples,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if experiment_file(out).exists():
        before = Experiment.read(out, allow=allowed)
        shared = resolve(override(merge_layers(before.config.sections, recipe, config, data), settings), allow=allowed)
        given["arms"] = tuple(dict.fromkeys((*before.arms, *given.get("arms", ()))))
        experiment = before.extended_by(replace(before, config=shared, **given))
    else:
        raw = override(merge_layers({"sampler": SAMPLER}, recipe, config, data), settings)
        command, today = shlex.join(["stablefield", *sys.argv[1:]]), date.today().isoformat()
        experiment = Experiment(with_holdout(raw, allowed), **(DEFAULTS | given), command=command, started=today)
    with progress_bar("decoding") as progress:
        experiment = experiment.with_data_hash(progress)
    print(check_targets(experiment, out, progress_bar))
    with locked(RunFolder(out)):
        experiment.write(out)
        _write_json(out / "evaluator.json", cached_evaluator(out, progress_bar, allowed).description)
        _write_json(out / "machine.json", describe_machine(experiment.config, jobs))
        complete, signal = run_experiment(experiment, out, jobs)
    _report(out, summary, allowed)
    if not complete:
        print(f"Stopped and saved. Resume with: stablefield compare --out {out}{allow_option(experiment.config)}")
        raise typer.Exit(128 + signal)


def with_holdout(raw: Mapping[str, Any], allow: Iterable[Allowed] = ()) -> Config:
    """Configuration that all runs share; a sixth of the data, at most 5,000, are held out if it holds out none.

    Args:
        raw: sections of the configuration as given.
        allow: classes outside this package that it may name, as for `resolve`.
    """
    config = resolve(raw, allow=allow)
    if config["data"]["holdout"] == 0:
        with progress_bar("decoding") as progress:
            total = len(config.make("data").load(progress))
        holdout = {"data": {"holdout": min(max(2, total // 6), 5000)}}
        config = resolve(overlay(config.sections, holdout), allow=config.allowed)
    return config


def check_targets(experiment: Experiment, out: Path, stage_progress: StageProgress) -> str:
    """Build every target before any training, and describe the plan.

    Targets that do not fit the data are refused here. The distances to nearest neighbours that exact targets need are
    computed and cached.

    Args:
        experiment: the experiment.
        out: folder of the experiment, which may not exist yet.
        stage_progress: opens a progress callback for each stage, given its title.

    Raises:
        ValueError: components that do not fit the data or each other.
    """
    configs = [arm.configure(experiment.config, 0) for arm in experiment.arms]
    with stage_progress("decoding") as progress:
        configs[0].make("data").load(progress)
    plans = []
    for arm, config in zip(experiment.arms, configs, strict=True):
        with stage_progress(f"{arm.title}: nearest neighbours") as progress:
            plans.append(describe_plan(experiment, build(config, progress), out))
    return plans[0]


def describe_plan(experiment: Experiment, parts: Components, out: Path) -> str:
    """Data, network, targets and runs of a comparison in a few lines.

    Args:
        experiment: the experiment.
        parts: components of one of its runs.
        out: folder of the experiment.
    """
    parameters = sum(p.numel() for p in parts.denoiser.parameters())
    runs = len(experiment.arms) * len(experiment.seeds)
    return "\n".join(
        (
            f"data      {parts.data!r}, {len(parts.held_out or ()):,} of them held out",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"network   {experiment.config['network']['kind']}, {parameters:,} parameters, "
            f"on {next(parts.denoiser.parameters()).device}",
            f"targets   {'; '.join(arm.title for arm in experiment.arms)}",
            f"runs      {runs}: seeds {', '.join(map(str, experiment.seeds))}; {experiment.images:,} images each, "
            f"{experiment.evaluations} evaluations",
            f"folder    {out}",
        )
    )


def run_experiment(experiment: Experiment, out: Path, jobs: int) -> tuple[bool, int]:
    """Train and evaluate all runs, with a progress bar.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        jobs: number of seeds to train at once.

    Returns:
        True if the experiment is complete, and the number of the signal that stopped it (0 if none did).
    """
    seen: dict[tuple[int, str], int] = {}
    total = experiment.images * len(experiment.arms) * len(experiment.seeds)
    with stop_signals() as stop, _progress() as progress:
        bar = progress.add_task("comparing", total=total, status="")

        def report(seed: int, arm: Arm, images: int) -> None:
            seen[seed, str(arm)] = images
            status = f"seed {seed}, {arm.title}: {images:,} images"
            progress.update(bar, completed=sum(seen.values()), status=status)

        def report_stage(seed: int, stage: str) -> None:
            progress.update(bar, status=f"seed {seed}: {stage}")

        complete = run_all(experiment, out, jobs, report, lambda: stop.number > 0, report_stage)
    return complete, stop.number


def describe_machine(config: Config, jobs: int) -> dict[str, Any]:
    """Device, processor and versions for the report.

    Args:
        config: configuration that names the device.
        jobs: number of seeds that are trained at once.
    """
    device = choose_device(config.training.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs),
        "jobs": jobs,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _report(out: Path, summary: Path | None, allow: Iterable[Allowed]) -> None:
    """Write the report, and print its sentences and files."""
    results = write_report(out, summary, allow=allow)
    print("\n".join(summarize(results)))
    print(f"report    {out / 'report.html'}\nsummary   {summary or out / 'summary.md'}")
    print(f"numbers   {out / 'results.json'}, {out / 'results.csv'}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _progress() -> Progress:
    """A progress bar with the remaining time and the run that is training."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left; {task.fields[status]}"),
    )
