"""`stablefield compare`: targets side by side, trained on the same budget from the same seeds, and a report."""

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
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stablefield.banded import in_words
from stablefield.checkpoint import write_text
from stablefield.cli.data import progress_bar
from stablefield.cli.train import Allow, allowing, layered
from stablefield.compare import Arm, Experiment, findings, run_all, write_report, yardstick_of
from stablefield.compare.experiment import place
from stablefield.compare.yardstick import Stages
from stablefield.config import Allowed, Config, overlay, override, resolve, typed
from stablefield.engine.fit import stop_signals
from stablefield.engine.saving import alone
from stablefield.run import Folder, Parts, assemble, choose_device
from stablefield.seeding import parse_seeds

TARGETS = "single,reference:256,reference:1024,full"
DEFAULTS: dict[str, Any] = {
    "arms": tuple(map(Arm.parse, TARGETS.split(","))),
    "seeds": (0, 1, 2),
    "looks": 8,
    "samples": 500,
    "rows": 256,
}
SAMPLER = {"kind": "dpm", "steps": 12}  # deterministic, and fast enough to look often


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the experiment; one that is there is gone on with.")] = Path(
        "runs/compare"
    ),
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"What to compare, by default {TARGETS}: all with the first. Also pruned, auto, neighbours:64.",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run of each target for each, by default 0-2.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images that each run sees; sets training.images.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="What all have in common: see stablefield recipes.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="What all train on; its kind is guessed as by stablefield train.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file that says what all have in common.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    allow: Allow = None,
    looks: Annotated[
        int | None, typer.Option(min=1, help=f"How often each run is scored, by default {DEFAULTS['looks']}.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help=f"Samples a look, by default {DEFAULTS['samples']}.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help=f"x_t a noise level and look, by default {DEFAULTS['rows']}.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at work at once, in processes of their own.")] = 1,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; report what is there.")] = False,
    summary_: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Where the summary goes, instead of the folder.")
    ] = None,
) -> None:
    """Train with several targets on the same budget, seed by seed, and report what it changed.

    Runs that share a seed start from the same weights and see the same images, times and noise. Some data are held out
    to score with (data.holdout; a sixth, at most 5,000, if not said). Stop it whenever you like: the same command goes
    on, and may add targets and seeds.
    """
    settings = [*(set_ or []), *([f"training.images={images}"] if images else [])]
    allowed = typed(settings, allow)
    if report_only:
        _report(out, summary_, allowed)
        return
    said = {
        "arms": tuple(map(Arm.parse, targets.split(","))) if targets else None,
        "seeds": tuple(parse_seeds(seeds)) if seeds else None,
        "looks": looks,
        "samples": samples,
        "rows": rows,
    }
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if place(out).exists():
        before = Experiment.read(out, allow=allowed)
        wanted = resolve(override(layered(before.config.sections, recipe, config, data), settings), allow=allowed)
        given["arms"] = tuple(dict.fromkeys((*before.arms, *given.get("arms", ()))))
        experiment = before.joined(replace(before, config=wanted, **given))
    else:
        command, today = shlex.join(["stablefield", *sys.argv[1:]]), date.today().isoformat()
        raw = layered({"sampler": SAMPLER}, recipe, config, data)
        experiment = Experiment(
            planned(override(raw, settings), allowed), **(DEFAULTS | given), command=command, begun=today
        )
    with progress_bar("decoding") as progress:
        experiment = experiment.with_data(progress)
    plan = tried(experiment, out, progress_bar)
    with progress_bar("choosing targets") as progress:
        experiment = experiment.decided(progress)
    print(plan)
    if Arm("auto") in experiment.arms:
        print(f"auto      by sigma / alpha: {in_words(experiment.config['target']['bands'])}")
    with alone(Folder(out)):
        experiment.write(out)
        _note(out / "yardstick.json", yardstick_of(out, progress_bar, allowed).about)
        _note(out / "machine.json", machine(experiment.config, jobs))
        done, stopped = run(experiment, out, jobs)
    _report(out, summary_, allowed)
    if not done:
        print(f"Stopped and saved. Go on with: stablefield compare --out {out}{allowing(experiment.config)}")
        raise typer.Exit(128 + stopped)


def planned(raw: Mapping[str, Any], allow: Iterable[Allowed] = ()) -> Config:
    """What all runs have in common: as said, with some data held out where nothing is said."""
    wanted = resolve(raw, allow=allow)
    if wanted["data"]["holdout"] == 0:
        with progress_bar("decoding") as progress:
            total = len(wanted.make("data").load(progress))
        held_out = {"data": {"holdout": min(max(2, total // 6), 5000)}}
        wanted = resolve(overlay(wanted.sections, held_out), allow=wanted.allowed)
    return wanted


def tried(experiment: Experiment, out: Path, stages: Stages) -> str:
    """What is about to happen, once every target has been made: one that the data cannot serve is refused before any
    work, and what is measured for it (neighbours' distances) is in the cache then. Nothing of it is kept in memory.

    Raises:
        ValueError: parts that do not fit the data, or each other.
    """
    configs = [arm.configured(experiment.config, 0) for arm in experiment.arms]
    with stages("decoding") as progress:
        configs[0].make("data").load(progress)
    said = []
    for arm, config in zip(experiment.arms, configs, strict=True):
        with stages(f"{arm.title}: nearest neighbours") as progress:
            said.append(summary(experiment, assemble(config, progress), out))
    return said[0]


def summary(experiment: Experiment, parts: Parts, out: Path) -> str:
    """What is about to happen, in a few lines."""
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    runs = len(experiment.arms) * len(experiment.seeds)
    return "\n".join(
        (
            f"data      {parts.data!r}, {len(parts.held_out or ()):,} of them held out",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"network   {experiment.config['network']['kind']}, {numbers:,} parameters, "
            f"on {next(parts.denoiser.parameters()).device}",
            f"targets   {'; '.join(arm.title for arm in experiment.arms)}",
            f"runs      {runs}: seeds {', '.join(map(str, experiment.seeds))}; {experiment.images:,} images each, "
            f"{experiment.looks} looks",
            f"folder    {out}",
        )
    )


def run(experiment: Experiment, out: Path, jobs: int) -> tuple[bool, int]:
    """Bring it to the end, with a bar; whether that was reached, and the signal that stopped it."""
    seen: dict[tuple[int, str], int] = {}
    total = experiment.images * len(experiment.arms) * len(experiment.seeds)
    with stop_signals() as asked, _progress() as progress:
        bar = progress.add_task("comparing", total=total, now="")

        def tell(seed: int, arm: Arm, images: int) -> None:
            seen[seed, str(arm)] = images
            _show(progress, bar, sum(seen.values()), f"seed {seed}, {arm.title}: {images:,} images")

        def prepare(seed: int, what: str) -> None:
            progress.update(bar, now=f"seed {seed}: {what}")

        done = run_all(experiment, out, jobs, tell, lambda: asked.number > 0, prepare)
    return done, asked.number


def machine(config: Config, jobs: int) -> dict[str, Any]:
    """What it runs on."""
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


def _report(out: Path, summary_: Path | None, allow: Iterable[Allowed]) -> None:
    results = write_report(out, summary_, allow=allow)
    print("\n".join(findings(results)))
    print(f"report    {out / 'report.html'}\nsummary   {summary_ or out / 'summary.md'}")
    print(f"numbers   {out / 'results.json'}, {out / 'results.csv'}")


def _note(path: Path, said: dict[str, Any]) -> None:
    write_text(path, json.dumps(said, indent=2) + "\n")


def _show(progress: Progress, bar: TaskID, completed: int, now: str) -> None:
    progress.update(bar, completed=completed, now=now)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left; {task.fields[now]}"),
    )
