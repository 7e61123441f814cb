"""`stablefield sample`: from a run to images.

An image is a file as soon as it is made, so a command that was stopped goes on where it was: finished images are not
made again. Under `torchrun` each rank makes its share; the images are the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from stablefield.cli.album import Album
from stablefield.cli.train import Allow
from stablefield.config import Allowed, ConfigError, override, resolve
from stablefield.denoise import Denoiser, Guided
from stablefield.ranks import Ranks, joined
from stablefield.run import Trained, choose_device, make_sampler, open_run
from stablefield.sample import Sampler, Samples
from stablefield.seeding import parse_seeds

SamplerKind = Annotated[
    str | None,
    typer.Option(
        help="heun, euler, dpm, rk45, ancestral, euler-maruyama, reverse-diffusion or predictor-corrector; "
        "else as the run was configured."
    ),
]
Weights = Annotated[str, typer.Option(help="average, average-HALFLIFE, model (the last ones), or best.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps from noise to data; rk45 chooses its own.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Lead away from a weaker answer: 1 is none; the weaker one is not told the class."),
]
Guide = Annotated[Path | None, typer.Option(help="With --guidance: a weaker run to be led away from.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change sampler.* or grid.*.")
]
Batch = Annotated[int, typer.Option(min=1, help="Images at a time; changes nothing but speed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


def sample(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint file.")],
    seeds: Annotated[str, typer.Option(help="One image a seed: 0-63, or 0,3,8-15.")] = "0-63",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for PNG files, or a file.npz; of float data FILE.npz or FILE.npy; else RUN/samples."
        ),
    ] = None,
    weights: Weights = "average",
    class_: Annotated[int | None, typer.Option("--class", help="Only this class; else each seed draws one.")] = None,
    sampler: SamplerKind = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guide: Guide = None,
    set_: Set = None,
    allow: Allow = None,
    batch: Batch = 64,
    device: Device = "auto",
) -> None:
    """Make images from a trained run: the same seed gives the same image, whatever the batch."""
    wanted = parse_seeds(seeds)
    with joined(choose_device(device)) as ranks:
        device = str(ranks.device)
        trained = open_run(run, weights=weights, device=device, allow=allow or ())
        weaker = opened_guide(guide, guidance, device, allow or ())
        way = Way.of(trained, sampler, steps, guidance, weaker, set_ or [], class_)
        album, made = make(way, out or folder_of(run) / "samples", wanted, batch, ranks)
        if ranks.first:
            written = album.finish(wanted)
            before = f", {len(wanted) - made} of them made before" if made < len(wanted) else ""
            print(f"{len(wanted)} samples{before}: {written}")
            if cost := album.evaluations():
                low, high = cost
                print(f"{low if low == high else f'{low} to {high}'} network evaluations each: {way.sampler}")


@dataclass(frozen=True, eq=False)
class Way:
    """All that decides a sample but its seed.

    Attributes:
        trained: the run.
        denoiser: what is asked: the run's, maybe guided.
        sampler: how.
        label: the one class that is wanted; None for any.
        identity: all of it, in words.
    """

    trained: Trained
    denoiser: Denoiser
    sampler: Sampler
    label: int | None
    identity: dict[str, Any]

    @classmethod
    def of(
        cls,
        trained: Trained,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guide: Trained | None = None,
        settings: Sequence[str] = (),
        label: int | None = None,
    ) -> "Way":
        """As the run was configured, but for what is said here.

        Raises:
            ConfigError: a setting, a strength or a class of no meaning for this run.
        """
        said = [*settings]
        said += [] if sampler is None else [f"sampler.kind={sampler}"]
        said += [] if steps is None else [f"sampler.steps={steps}"]
        chosen = make_sampler(configured(trained, said))
        denoiser = guided(trained.denoiser, guidance, guide)
        if label is not None and not denoiser.label_dim:
            raise ConfigError(f"no class {label}: this run was trained without classes")
        if label is not None and not 0 <= label < denoiser.label_dim:
            raise ConfigError(f"no class {label}: this run knows {denoiser.label_dim} classes, counted from 0")
        identity = {
            "checkpoint": trained.checksum,
            "sampler": repr(chosen),
            "class": label,
            "guidance": guidance,
            "guide": guide and guide.checksum,
            **({} if trained.values == "image" else {"values": trained.values}),
        }
        return cls(trained, denoiser, chosen, label, identity)


def make(way: Way, out: Path, seeds: Sequence[int], batch: int, ranks: Ranks) -> tuple[Album, int]:
    """Make the samples that are not there yet, each rank its share; how many they were.

    Raises:
        ConfigError: there are samples of another run or sampler.
        FloatingPointError: samples that are not finite.
    """
    shape, images = way.trained.shape, way.trained.values == "image"
    # one begins, and the others wait: an album half begun would look like somebody else's folder
    ranks.lead(lambda: Album.open(out, images, way.identity))
    album = Album.open(out, images, way.identity)
    missing = album.missing(seeds)
    ranks.wait()  # until all ranks have looked: what one makes now must not change the others' shares
    share = ranks.share(missing)
    for part, made in batches(way.denoiser, shape, way.sampler, share, way.label, batch, quiet=not ranks.first):
        album.add(part, made)
    ranks.wait()
    return album, len(missing)


def folder_of(run: Path) -> Path:
    """The folder of a run: the path itself, or where its checkpoint is."""
    return run if run.is_dir() else run.parent


def configured(trained: Trained, settings: Sequence[str]) -> Any:
    """The run's configuration with another sampler or grid.

    Raises:
        ConfigError: a setting that sampling does not look at.
    """
    if other := [s for s in settings if s.partition(".")[0] not in ("sampler", "grid")]:
        raise ConfigError(f"{other[0]}: sampling listens to sampler.* and grid.* only")
    return resolve(override(trained.config.sections, settings), allow=trained.config.allowed)


def opened_guide(
    guide: Path | None, strength: float | None, device: str, allow: Iterable[Allowed] = ()
) -> Trained | None:
    """The weaker run to be led away from, if one is named.

    Raises:
        ConfigError: a guide without a strength.
    """
    if guide is None:
        return None
    if strength is None:
        raise ConfigError("--guide needs to know how far: add --guidance, 1.5 for example")
    return open_run(guide, device=device, allow=allow)


def guided(denoiser: Denoiser, strength: float | None, guide: Trained | None) -> Denoiser:
    """The denoiser, led away from a weaker one if asked.

    Raises:
        ConfigError: a strength that is no number.
    """
    if strength is None:
        return denoiser
    if not isfinite(strength):
        raise ConfigError(f"--guidance must be finite, not {strength}")
    return Guided(denoiser, strength, guide.denoiser if guide else None)


def batches(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    seeds: Sequence[int],
    label: int | None = None,
    batch: int = 64,
    quiet: bool = False,
) -> Iterator[tuple[Sequence[int], Samples]]:
    """Samples for all seeds, batch by batch, with a progress bar.

    Raises:
        FloatingPointError: samples that are not finite.
    """
    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    for part in track(parts, description="sampling", disable=quiet or not parts):
        made = sampler(denoiser, shape, seeds=part, label=label)
        if not torch.isfinite(made.x).all():
            raise FloatingPointError("the samples are not finite: the run diverged, or the sampler does not suit it")
        yield part, made
