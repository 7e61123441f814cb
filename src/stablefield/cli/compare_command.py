"""`stablefield compare`: train with several targets on the same budget and the same seeds, and write a page."""

import math
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from stablefield.cli.options import Allow, ConfigFile, Data, Recipe, Set
from stablefield.cli.progress import progress_bar
from stablefield.kinds import OBJECTIVES

TARGETS = "dsm,stf:256,exact"
SAMPLER = {"kind": "dpm", "steps": 12}  # deterministic, and fast enough to evaluate often


def compare(
    out: Annotated[Path, typer.Option(help="Folder of the comparison; one that exists is resumed.")] = Path(
        "runs/compare"
    ),
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Targets, by default {TARGETS}; knn:32 too. The first is the baseline. dsm+times.kind=adaptive "
            "changes a setting for that one.",
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Objectives to compare the targets with: {', '.join(OBJECTIVES)}; by default the configured one.",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Training seeds, by default 0-2; every arm has one run per seed.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images that each run trains on; sets training.images.")
    ] = None,
    recipe: Recipe = None,
    data: Data = None,
    config: ConfigFile = None,
    set_: Set = None,
    allow: Allow = None,
    evaluations: Annotated[int | None, typer.Option(help="Evaluations of each run, by default 12.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, max=2**24, help="Samples per evaluation, by default 500.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Examples for the excess, by default 2,048.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs to train at once; with more than one, each in a process of one thread.")
    ] = 1,
    stop_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop and save after this time, such as 60m; resume later.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure-steps", help="Measure the time of steps, on an idle machine; trains nothing.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the page from the records, without training.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Path of the page, by default README.md in the folder.")
    ] = None,
) -> None:
    """Train with several targets on the same budget, seed by seed, and report the differences.

    What decides is fixed before the first run and written to comparison.json. Some data are held out for evaluation
    (data.holdout; by default a sixth, at most 5,000). The command can be stopped at any time; the same command resumes
    it, and may add targets, objectives and seeds.
    """
    from stablefield.cli.comparing import print_step_times, run_with_progress
    from stablefield.cli.training import allow_option, merge_layers
    from stablefield.config import allowed_names, override, resolve, split_targets
    from stablefield.seeding import parse_seeds
    from stablefield.studies.compare import Comparison, Experiment, define, summarize, write_page

    settings = [*(set_ or []), *([f"training.images={images}"] if images else [])]
    allowed = allowed_names(settings, allow)
    seconds = _parse_duration(stop_after) if stop_after else math.inf
    if not report_only:
        options = {"evaluations": evaluations, "samples": samples, "examples": examples}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given |= {"targets": split_targets(targets)} if targets else {}
        given |= {"objectives": tuple(map(str.strip, objectives.split(",")))} if objectives else {}
        given |= {"seeds": parse_seeds(seeds)} if seeds else {}
        sections: dict[str, Any] = {"sampler": SAMPLER}
        if (out / "comparison.json").exists():  # what is not given stays as it is
            before = Experiment.read(out, allow=allowed)
            sections = before.config.sections
            kept = ("evaluations", "samples", "examples", "targets", "seeds")
            named = tuple(filter(None, before.objectives))
            given = {name: getattr(before, name) for name in kept} | {"objectives": named} | given
        shared = resolve(override(merge_layers(sections, recipe, config, data), settings), allow=allowed)
        command = (date.today().isoformat(), shlex.join(["stablefield", *sys.argv[1:]]))
        defaults = {"targets": split_targets(TARGETS), "seeds": range(3)}
        with progress_bar("decoding") as progress:
            experiment = define(shared, **(defaults | given), command=command, progress=progress)
        if measure:
            print_step_times(experiment, out)
            return
        run_with_progress(experiment, out, jobs, seconds)
    comparison = Comparison.read(out, allow=allowed)
    path = page or out / "README.md"
    write_page(comparison, path)
    print("\n".join(summarize(comparison)))
    print(f"page      {path}\nrecords   {out / 'records'}")
    if not comparison.complete and not report_only:
        option = allow_option(comparison.experiment.config)
        print(f"Stopped and saved. The same command resumes, or: stablefield compare --out {out}{option}")
        raise typer.Exit(75)  # EX_TEMPFAIL: to be tried again


def _parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `60m` or `1.5h`."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())):
        raise ValueError(f"--stop-after is a time such as 90s, 60m or 2h, not {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
