"""`stablefield sample`: samples of a trained run.

Each sample is written as soon as it is made, so an interrupted command resumes: samples that exist are not made again.
Under `torchrun` each rank makes a part of them; the samples are the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from stablefield.build import build_sampler, choose_device
from stablefield.cli.options import Allow
from stablefield.cli.sample_store import SampleStore
from stablefield.config import Allowed, ConfigError, override, resolve
from stablefield.denoise import Denoiser, Guided
from stablefield.distributed import Ranks, process_group
from stablefield.run import TrainedRun, open_run
from stablefield.sample import Sampler, Samples
from stablefield.seeding import parse_seeds

__all__ = [
    "Batch",
    "Device",
    "Guidance",
    "Guide",
    "SamplerKind",
    "SamplingPlan",
    "Set",
    "Steps",
    "Weights",
    "make_samples",
    "open_guide",
    "run_folder",
    "sample",
    "sample_batches",
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
        plan = SamplingPlan.for_run(trained, sampler, steps, guidance, weaker, set_ or [], class_)
        store, made = make_samples(plan, out or run_folder(run) / "samples", all_seeds, batch, ranks)
        if ranks.is_main:
            location = store.finish(all_seeds)
            existing = f" ({len(all_seeds) - made} existed already)" if made < len(all_seeds) else ""
            print(f"{len(all_seeds)} samples{existing}: {location}")
            if evaluations := store.evaluations():
                low, high = evaluations
                print(f"{low if low == high else f'{low} to {high}'} network evaluations per sample: {plan.sampler}")


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Everything that decides a sample except its seed.

    Attributes:
        trained: the opened run whose weights are sampled.
        denoiser: the run's denoiser, with guidance if it was requested.
        sampler: the sampler.
        label: class of all samples; None if each seed draws one.
        identity: description of all of these, which is stored with the samples.
    """

    trained: TrainedRun
    denoiser: Denoiser
    sampler: Sampler
    label: int | None
    identity: dict[str, Any]

    @classmethod
    def for_run(
        cls,
        trained: TrainedRun,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guide: TrainedRun | None = None,
        settings: Sequence[str] = (),
        label: int | None = None,
    ) -> "SamplingPlan":
        """Plan with the run's own configuration, except for what is given here.

        Args:
            trained: the opened run whose weights are sampled.
            sampler: kind of the sampler.
            steps: number of steps.
            guidance: guidance scale; None for no guidance.
            guide: weaker run to guide away from; by default the same run without classes.
            settings: settings "SECTION.KEY=VALUE" of the sections sampler and grid.
            label: class of all samples.

        Raises:
            ConfigError: a setting, the guidance scale or the class is not valid for this run.
        """
        all_settings = [*settings]
        all_settings += [] if sampler is None else [f"sampler.kind={sampler}"]
        all_settings += [] if steps is None else [f"sampler.steps={steps}"]
        chosen = build_sampler(_sampling_config(trained, all_settings))
        denoiser = _with_guidance(trained.denoiser, guidance, guide)
        if label is not None and not denoiser.num_classes:
            raise ConfigError(f"no class {label}: this run was trained without classes; leave out --class")
        if label is not None and not 0 <= label < denoiser.num_classes:
            raise ConfigError(f"no class {label}: this run has {denoiser.num_classes} classes, counted from 0")
        identity = {
            "checkpoint": trained.checksum,
            "sampler": repr(chosen),
            "class": label,
            "guidance": guidance,
            "guide": guide and guide.checksum,
            **({} if trained.values == "image" else {"values": trained.values}),
        }
        return cls(trained, denoiser, chosen, label, identity)


def make_samples(
    plan: SamplingPlan, out: Path, seeds: Sequence[int], batch_size: int, ranks: Ranks
) -> tuple[SampleStore, int]:
    """Make the samples that are not in the store yet, each rank a part of them.

    Args:
        plan: how to make them.
        out: folder or file of the store.
        seeds: seeds of the samples.
        batch_size: samples per batch.
        ranks: the ranks that share the work.

    Returns:
        The store, and the number of samples that were made.

    Raises:
        ConfigError: the store holds samples of another run or sampler.
        FloatingPointError: some samples are not finite.
    """
    images = plan.trained.values == "image"
    # the main rank creates the store first: half created, it would look like somebody else's folder to the others
    ranks.on_main(lambda: SampleStore.open(out, images, plan.identity))
    store = SampleStore.open(out, images, plan.identity)
    missing = store.missing(seeds)
    ranks.barrier()  # a sample made before all ranks have listed the missing ones would change how these are shared
    mine = ranks.shard(missing)
    made = sample_batches(
        plan.denoiser, plan.trained.shape, plan.sampler, mine, plan.label, batch_size, quiet=not ranks.is_main
    )
    for part, samples in made:
        store.add(part, samples)
    ranks.barrier()
    return store, len(missing)


def run_folder(run: Path) -> Path:
    """Folder of a run.

    Args:
        run: the folder itself, or a checkpoint in it.
    """
    return run if run.is_dir() else run.parent


def _sampling_config(trained: TrainedRun, settings: Sequence[str]) -> Any:
    """The run's configuration with other settings of the sections sampler and grid."""
    if other := [setting for setting in settings if setting.partition(".")[0] not in ("sampler", "grid")]:
        raise ConfigError(f"--set {other[0]}: only sampler.* and grid.* can be set when sampling")
    return resolve(override(trained.config.sections, settings), allow=trained.config.allowed)


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


def _with_guidance(denoiser: Denoiser, guidance: float | None, guide: TrainedRun | None) -> Denoiser:
    if guidance is None:
        return denoiser
    if not isfinite(guidance):
        raise ConfigError(f"--guidance must be finite, not {guidance}")
    return Guided(denoiser, guidance, guide.denoiser if guide else None)


def sample_batches(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    seeds: Sequence[int],
    label: int | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> Iterator[tuple[Sequence[int], Samples]]:
    """Samples batch by batch, with a progress bar.

    Args:
        denoiser: the denoiser.
        shape: shape of one sample.
        sampler: the sampler.
        seeds: seed of each sample.
        label: class of all samples; None if each seed draws one.
        batch_size: samples per batch.
        quiet: show no progress bar.

    Yields:
        Seeds and samples of each batch.

    Raises:
        FloatingPointError: some samples are not finite.
    """
    parts = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    for part in track(parts, description="sampling", disable=quiet or not parts):
        samples = sampler(denoiser, shape, seeds=part, label=label)
        if not torch.isfinite(samples.x).all():
            raise FloatingPointError(
                "some samples are not finite: the run has diverged, or the sampler does not suit it"
            )
        yield part, samples
