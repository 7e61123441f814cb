"""`stablefield train`: start a run or resume one.

    recipe < --config FILE < --data PATH < --target TARGET < --set SECTION.KEY=VALUE

A configuration is merged from these layers, each of which overrides those before it; keys that none of them sets have
their defaults. Under `torchrun` or `accelerate launch` this runs on every rank, and the main rank prints and writes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.options import Allow, ConfigFile, Data, Recipe, Set
from stablefield.kinds import list_kinds


def train(
    recipe: Recipe = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run. Default: runs/RECIPE-TARGET.")] = None,
    config: ConfigFile = None,
    set_: Set = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help=f"Training target, one of {list_kinds('target')}, with its size and keys: dsm, stf:256, knn:32, "
            "exact, stf:256,references=recent.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Train a network of your own, built as Class(shape), or as Class(shape, num_classes=...) with "
            "training.conditional=true. Implies --allow.",
        ),
    ] = None,
    allow: Allow = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Initialize the weights and the configuration from this run or checkpoint; a new run."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Resume the run in this folder; --set can change a few keys, such as images."),
    ] = None,
    resume_if_exists: Annotated[
        bool,
        typer.Option(
            "--resume-if-exists",
            help="Resume the run in the folder if there is one, so that one command starts and resumes; a run of "
            "another configuration is refused.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
) -> None:
    """Train a denoiser. By default: scikit-learn's digits, EDM's settings, stable targets from 1,024 references."""
    from stablefield.build import build, choose_device
    from stablefield.cli.progress import progress_bar
    from stablefield.cli.training import allow_option, init_from_run, merge_layers, resumed_config, run, summary
    from stablefield.config import ConfigError, allowed_names, overlay, override, resolve, target_kind, target_section
    from stablefield.data.identity import fingerprint, is_same
    from stablefield.distributed import process_group
    from stablefield.engine.checkpoints import latest_config, refuse_changed_config, saved_weights
    from stablefield.run import RunFolder, open_run

    settings = [*(set_ or []), *([f"network.kind={network}"] if network else [])]
    allowed = allowed_names([*settings, *([f"target.kind={target_kind(target)}"] if target else [])], allow)
    if resume:
        others: dict[str, object] = {"--recipe": recipe, "--data": data, "--config": config, "--out": out}
        others |= {"--init-from": init_from, "--target": target, "--resume-if-exists": resume_if_exists}
        if given := [option for option, value in others.items() if value]:
            raise ConfigError(
                f"--resume cannot be combined with {', '.join(given)}: a run keeps its own configuration; change "
                "single keys with --set, or start a new run with --init-from"
            )
    base = open_run(init_from, device="cpu", allow=allowed) if init_from else None
    if resume:
        folder, wanted = RunFolder(resume), resumed_config(RunFolder(resume), settings, allowed)
    else:
        raw = merge_layers(base.config.sections if base else {}, recipe, config, data)
        raw = overlay(raw, {"target": target_section(target, allowed)} if target else {})
        wanted = resolve(override(raw, settings), allow=allowed)
        folder = RunFolder(out or Path("runs") / f"{recipe or wanted.kind('data')}-{wanted.kind('target')}")
        if resume_if_exists and (before := latest_config(folder, allowed)) is not None:
            refuse_changed_config(before, wanted)
            resume, base = folder.path, None
    with process_group(choose_device(wanted.training.device), wanted.training.precision) as ranks:
        if not (resume or dry_run):
            ranks.on_main(folder.refuse_if_occupied)
        with progress_bar("decoding") as progress:
            parts = build(wanted, progress, ranks, saved_weights(folder) if resume else None)
        if base:
            init_from_run(base, parts)
        report: Callable[[str], None] = print if ranks.is_main else lambda text: None
        report(summary(wanted, parts, folder, ranks))
        same_section = base is not None and wanted.has_data_of(base.config)
        if base and same_section and ranks.is_main and not is_same(fingerprint(parts.data), base.data):
            report(f"note      the data have changed since {init_from} was trained")
        if dry_run:
            report(f"\n{wanted.toml()}\nThis was a dry run: nothing was trained or written.")
            return
        if not resume:
            ranks.on_main(lambda: folder.claim(wanted))
        if stopped := run(wanted, parts, folder, ranks):
            report(f"Stopped and saved. Resume with: stablefield train --resume {folder.path}{allow_option(wanted)}")
            raise typer.Exit(128 + stopped)
        report(f"Done: {folder.path}. Sample with: stablefield sample {folder.path} --seeds 0-63{allow_option(wanted)}")
