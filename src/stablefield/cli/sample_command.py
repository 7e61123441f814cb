"""`stablefield sample`: samples of a trained run.

Each sample is written as soon as it is made, so an interrupted command resumes: samples that exist are not made again.
Under `torchrun` each rank makes a part of them; the samples are the same.
"""

from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.options import Allow
from stablefield.cli.stopping import stoppable
from stablefield.kinds import list_kinds

SamplerKind = Annotated[
    str | None,
    typer.Option(help=f"{list_kinds('sampler')}, or module:Class; by default the run's own."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights to use: average, average-HALFLIFE, model (without averaging), or best.",
        show_default="average, or the weights of an export",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Number of steps; rk45 chooses its own.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (classifier-free guidance; 1 = off).")]
Guide = Annotated[
    Path | None,
    typer.Option(
        help="Weaker run to guide away from (autoguidance), instead of this run without classes; requires --guidance."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set a key of sampler.* or grid.*; may be repeated."),
]
Batch = Annotated[int, typer.Option(min=1, max=2**20, help="Images per batch; samples do not depend on it.")]
Precision = Annotated[str, typer.Option(help="Arithmetic of the network: float32, tf32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, ...")]


def sample(
    run: Annotated[
        Path, typer.Argument(help="A run or an export (its folder, or hf:OWNER/NAME), or a checkpoint file.")
    ],
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
    sampler: SamplerKind = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guide: Guide = None,
    set_: Set = None,
    allow: Allow = None,
    batch: Batch = 64,
    precision: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Draw samples from a trained run. A sample depends on its seed, not on the batch."""
    from stablefield.build import choose_device
    from stablefield.cli.sampling import main_bar, open_plan, sample_progress
    from stablefield.distributed import process_group
    from stablefield.generate import SampleStore, sample_to
    from stablefield.seeding import parse_seeds

    all_seeds = parse_seeds(seeds)
    with process_group(choose_device(device)) as ranks:
        plan = open_plan(
            run,
            weights=weights,
            device=str(ranks.device),
            guide=guide,
            guidance=guidance,
            sampler=sampler,
            settings=set_ or [],
            allow=allow,
            steps=steps,
            label=class_,
            precision=precision,
        )
        place = SampleStore.at(out or plan.trained.folder / "samples", plan.images)
        with stoppable("sampling", lambda: sample_progress(place, all_seeds)), main_bar("sampling", ranks) as progress:
            existing = len(all_seeds) - len(place.missing(all_seeds))
            store = sample_to(plan, place.out, seeds=all_seeds, batch_size=batch, ranks=ranks, progress=progress)
        if ranks.is_main:
            sheet = f" (sheet of samples: {store.sheet})" if store.png else ""
            print(f"{len(all_seeds)} samples{f' ({existing} existed already)' if existing else ''}: {store.out}{sheet}")
            if evaluations := store.evaluations():
                low, high = evaluations
                print(f"{low if low == high else f'{low} to {high}'} network evaluations per sample: {plan.sampler}")
