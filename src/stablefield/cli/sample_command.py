"""`stablefield sample`: samples of a trained run.

Each sample is written as soon as it is made, so an interrupted command resumes: samples that exist are not made again.
Under `torchrun` each rank makes a part of them; the samples are the same.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from stablefield.build import choose_device
from stablefield.cli.data_command import progress_bar
from stablefield.cli.stopping import stoppable
from stablefield.cli.train_command import Allow
from stablefield.config import Allowed, ConfigError
from stablefield.data import Progress, silent
from stablefield.distributed import Ranks, process_group
from stablefield.generate import SampleStore, SamplingPlan, sample_to
from stablefield.run import TrainedRun, open_run
from stablefield.seeding import parse_seeds

__all__ = [
    "Batch",
    "Device",
    "Guidance",
    "Guide",
    "SamplerKind",
    "Set",
    "Steps",
    "Weights",
    "main_bar",
    "open_guide",
    "sample",
    "sample_progress",
]

SamplerKind = Annotated[
    str | None,
    typer.Option(
        help="heun, euler, dpm, rk45, ancestral, euler-maruyama, reverse-diffusion or predictor-corrector; by default "
        "the run's own."
    ),
]
Weights = Annotated[
    str, typer.Option(help="Weights to use: average, average-HALFLIFE, model (without averaging), or best.")
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
Batch = Annotated[int, typer.Option(min=1, help="Images per batch; samples do not depend on it.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, ...")]


def sample(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint file.")],
    seeds: Annotated[str, typer.Option(help="Seeds, one per sample: 0-63, or 0,3,8-15.")] = "0-63",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for PNG files, or FILE.npz; for float data FILE.npz or FILE.npy. By default RUN/samples."
        ),
    ] = None,
    weights: Weights = "average",
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
    device: Device = "auto",
) -> None:
    """Draw samples from a trained run. A sample depends on its seed, not on the batch."""
    all_seeds = parse_seeds(seeds)
    with process_group(choose_device(device)) as ranks:
        device = str(ranks.device)
        trained = open_run(run, weights=weights, device=device, allow=allow or ())
        weaker = open_guide(guide, guidance, device, allow or ())
        plan = SamplingPlan.for_run(
            trained,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guide=weaker,
            settings=set_ or [],
            label=class_,
        )
        place = SampleStore.at(out or trained.folder / "samples", plan.images)
        with stoppable("sampling", lambda: sample_progress(place, all_seeds)), main_bar("sampling", ranks) as progress:
            existing = len(all_seeds) - len(place.missing(all_seeds))
            store = sample_to(plan, place.out, seeds=all_seeds, batch_size=batch, ranks=ranks, progress=progress)
        if ranks.is_main:
            sheet = f" (sheet of samples: {store.sheet})" if store.png else ""
            print(f"{len(all_seeds)} samples{f' ({existing} existed already)' if existing else ''}: {store.out}{sheet}")
            if evaluations := store.evaluations():
                low, high = evaluations
                print(f"{low if low == high else f'{low} to {high}'} network evaluations per sample: {plan.sampler}")


def sample_progress(store: SampleStore, seeds: Sequence[int]) -> str:
    """Number of samples that exist, as text for the user.

    Args:
        store: the store.
        seeds: seeds of the samples that are wanted.
    """
    return f"{len(seeds) - len(store.missing(seeds)):,} of {len(seeds):,} samples are in {store.folder}"


def main_bar(title: str, ranks: Ranks) -> AbstractContextManager[Progress]:
    """A progress bar on the main rank, and none on the others.

    Args:
        title: text beside the bar.
        ranks: the ranks.
    """
    return progress_bar(title) if ranks.is_main else nullcontext(silent)


def open_guide(
    guide: Path | None, guidance: float | None, device: str, allow: Iterable[Allowed] = ()
) -> TrainedRun | None:
    """The weaker run to guide away from, or None if none is given.

    Args:
        guide: its folder or checkpoint.
        guidance: guidance scale.
        device: device to load it on.
        allow: classes outside this package that its network may be.

    Raises:
        ConfigError: a run is given without a guidance scale.
    """
    if guide is None:
        return None
    if guidance is None:
        raise ConfigError("--guide requires --guidance, for example --guidance 1.5")
    return open_run(guide, device=device, allow=allow)
