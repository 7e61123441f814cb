"""`stablefield sample`: samples of a trained run.

Each sample is written as soon as it is made, so an interrupted command resumes: samples that exist are not made again.
Under `torchrun` each rank makes a part of them; the samples are the same.
"""

from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.options import Batch, SamplingOptions, Weights, given_by
from stablefield.cli.progress import progress_bar
from stablefield.cli.stopping import stoppable


@given_by("sampling", SamplingOptions)
def sample(
    run: Annotated[
        Path, typer.Argument(help="A run or an export (its folder, or hf:OWNER/NAME), or a checkpoint file.")
    ],
    *,
    seeds: Annotated[str, typer.Option(help="Seeds, one per sample: 0-63, or 0,3,8-15.")] = "0-63",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for PNG files, or FILE.npz; for float data FILE.npz or FILE.npy. By default RUN/samples."
        ),
    ] = None,
    weights: Weights = None,
    class_: Annotated[
        int | None, typer.Option("--class", help="Class of all samples; by default each seed draws one.")
    ] = None,
    sampling: SamplingOptions,
    batch: Batch = 64,
) -> None:
    """Draw samples from a trained run. A sample depends on its seed, not on the batch."""
    from stablefield.build import choose_device
    from stablefield.distributed import process_group
    from stablefield.generate import SampleStore, sample_to
    from stablefield.seeding import parse_seeds

    all_seeds = parse_seeds(seeds)
    with process_group(choose_device(sampling.device)) as ranks:
        plan = sampling.open_plan(run, ranks.device, weights=weights, label=class_)
        place = SampleStore.at(out or plan.trained.folder / "samples", plan.images)
        bar = progress_bar("sampling", visible=ranks.is_main)

        def done() -> str:
            made = len(all_seeds) - len(place.missing(all_seeds))
            return f"{made:,} of {len(all_seeds):,} samples are in {place.folder}"

        with stoppable("sampling", done), bar as progress:
            existing = len(all_seeds) - len(place.missing(all_seeds))
            store = sample_to(plan, place.out, seeds=all_seeds, batch_size=batch, ranks=ranks, progress=progress)
        if ranks.is_main:
            sheet = f" (sheet of samples: {store.sheet})" if store.png else ""
            print(f"{len(all_seeds)} samples{f' ({existing} existed already)' if existing else ''}: {store.out}{sheet}")
            if evaluations := store.evaluations():
                low, high = evaluations
                print(f"{low if low == high else f'{low} to {high}'} network evaluations per sample: {plan.sampler}")
