"""`stablefield evaluate`: scores of samples, written together with everything that they depend on.

For a run, samples are made first and kept, so that an interrupted command resumes and a repeated one finds them. Under
`torchrun` the ranks share sampling, features and distances; the scores are the same.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from stablefield.cli.options import Batch, SamplingOptions, given_by
from stablefield.cli.progress import progress_bar
from stablefield.cli.stopping import stoppable
from stablefield.kinds import ConfigError, refuse_if


@given_by("sampling", SamplingOptions)
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="RUN|IMAGES|NPZ", help="A run, samples, or data of any kind that `train` reads.")
    ],
    *,
    reference: Annotated[
        str | None,
        typer.Option(metavar="DATA|STATS.npz", help="Data or statistics to compare with; by default a run's own data."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="classifier (trained on the reference's labels), pixels, inception (FID), or the file of a "
            "TorchScript network; may be repeated."
        ),
    ] = None,
    trust_features: Annotated[
        bool,
        typer.Option(
            "--trust-features",
            help="Also open feature files that can run code: .pt2, or TorchScript that reads or writes files.",
        ),
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="File with Inception's weights; by default torch-fidelity downloads them.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of samples; by default all, or for a run as many as the reference holds, up to 50,000."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of a run's samples; by default 0 to the number of samples - 1.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Repeats, each with new samples of the run from other seeds.")
    ] = 1,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Data that the run was not trained on, for the memorisation scores; by default the data it held out, "
            "or its training data, each compared with all others.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="STATS.npz", help="Write mean and covariance of the features here, for --reference."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to append the scores to; by default scores.jsonl in the run or beside the samples."),
    ] = None,
    sampling: SamplingOptions,
    batch: Batch = 64,
) -> None:
    """Score a run or samples: Frechet and kernel distance, precision and recall, memorisation; with Inception, FID."""
    from stablefield.build import choose_device
    from stablefield.cli.evaluating import TablePrinter, write_statistics
    from stablefield.data import guess_kind
    from stablefield.distributed import process_group
    from stablefield.evaluate import evaluate as score
    from stablefield.evaluate import feature_statistics
    from stablefield.evaluate.inputs import is_run
    from stablefield.generate import SamplingPlan
    from stablefield.seeding import parse_seeds

    run, first_seeds = is_run(Path(what)), parse_seeds(seeds) if seeds else None
    if not run:
        guess_kind(what)  # refuses a path that does not exist
    given = [*(["seeds"] if seeds is not None else []), *sampling.given()]
    refuse_if(
        (not run and given, f"--{''.join(given[:1])} is for runs, but {what} holds samples that exist already"),
        (not run and repeats > 1, f"--repeats {repeats} needs new samples for each repeat; pass a run"),
        (samples and first_seeds, "--samples and --seeds exclude each other; pass one of them"),
        (
            not (run or reference or statistics),
            "there is no reference; pass --reference DATA, or a STATS.npz file that --statistics wrote",
        ),
        (
            statistics and len(features or []) > 1,
            f"--statistics holds one kind of features, not {len(features or [])}; pass --features once",
        ),
        (held_out and not (run or reference), "--held-out needs data, not statistics, both itself and as --reference"),
        (out and not (run or reference), "--out is for scores, which need a reference; pass --reference"),
    )
    file, keep = _files(what, run, out)

    def done() -> str:
        return f"samples that were made are kept{f', and scores are in {file}' if file.exists() else ''}"

    with process_group(choose_device(sampling.device)) as ranks, stoppable("evaluation", done):
        subject: str | SamplingPlan = sampling.open_plan(what, ranks.device) if run else what
        common: dict[str, Any] = {
            "count": samples,
            "batch_size": batch,
            "ranks": ranks,
            "progress": progress_bar,
            "features": features or (),
            "weights": weights,
            "trusted": trust_features,
        }
        if not (run or reference):
            found = feature_statistics(what, **common)
            if found and statistics:
                write_statistics(statistics, found)
            return
        scores = score(
            subject,
            reference,
            seeds=first_seeds,
            repeats=repeats,
            held_out=held_out,
            keep=keep,
            on_table=TablePrinter(file, statistics),
            **common,
        )
        if scores.tables:
            print(f"\nscores      {file}")


def _files(what: str, run: bool, out: Path | None) -> tuple[Path, Path | None]:
    """File of the scores, by default in the run or beside the samples; folder of samples of a run that is read-only."""
    from stablefield.run import RunFolder, run_folder

    if not run:
        return out or Path(f"{what.rstrip('/')}.scores.jsonl" if Path(what).exists() else "scores.jsonl"), None
    folder = run_folder(Path(what))
    writable = os.access(folder, os.W_OK)
    if out:
        return out, None if writable else out.with_name("evaluated")
    if folder.is_dir() and not writable:
        raise ConfigError(f"{folder} cannot be written; pass --out FILE for the scores, and samples will be beside it")
    return RunFolder(folder).scores, None
