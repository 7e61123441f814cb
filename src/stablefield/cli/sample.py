"""`stablefield sample`: from a run to images.

An image is a file as soon as it is made, so a command that was stopped goes on where it was: finished images are not
made again. Under `torchrun` each rank makes its share; the images are the same.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor

from stablefield.checkpoint import replacing
from stablefield.config import ConfigError, override, resolve
from stablefield.denoise import Denoiser, Guided
from stablefield.evaluate.pictures import is_picture, open_picture, save_grid, save_picture, to_bytes
from stablefield.run import Trained, make_sampler, open_run
from stablefield.sample import Sampler, Samples
from stablefield.seeding import parse_seeds


def sample(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint file.")],
    seeds: Annotated[str, typer.Option(help="One image a seed: 0-63, or 0,3,8-15.")] = "0-63",
    out: Annotated[Path | None, typer.Option(help="A folder for PNG files, or a file.npz; else RUN/samples.")] = None,
    class_: Annotated[int | None, typer.Option("--class", help="Only this class; else each seed draws one.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="heun, euler, dpm, rk45, ancestral, euler-maruyama, reverse-diffusion or predictor-corrector; "
            "else as the run was configured."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps from noise to data; rk45 chooses its own.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Lead away from a weaker answer: 1 is none; the weaker one is not told the class."),
    ] = None,
    guide: Annotated[Path | None, typer.Option(help="With --guidance: a weaker run to be led away from.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change sampler.* or grid.*.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time; changes nothing but speed.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Make images from a trained run: the same seed gives the same image, whatever the batch."""
    wanted = parse_seeds(seeds)
    with _ranks() as (rank, ranks, wait):
        device = _device_of(device)
        trained = open_run(run, device=device)
        settings = list(set_ or [])
        settings += [] if sampler is None else [f"sampler.kind={sampler}"]
        settings += [] if steps is None else [f"sampler.steps={steps}"]
        chosen = make_sampler(configured(trained, settings))
        weaker = opened_guide(guide, guidance, device)
        denoiser = guided(trained.denoiser, guidance, weaker)
        if class_ is not None and not denoiser.label_dim:
            raise ConfigError(f"no class {class_}: this run was trained without classes")
        if class_ is not None and not 0 <= class_ < denoiser.label_dim:
            raise ConfigError(f"no class {class_}: this run knows {denoiser.label_dim} classes, counted from 0")
        where = out or (run if run.is_dir() else run.parent) / "samples"
        identity = {
            "checkpoint": trained.checksum,
            "sampler": repr(chosen),
            "class": class_,
            "guidance": guidance,
            "guide": weaker and weaker.checksum,
        }
        if rank == 0:
            Album.open(where, trained.shape, identity)
        wait()  # until there is an album: one half begun would look like somebody else's folder
        album = Album.open(where, trained.shape, identity)
        missing = album.missing(wanted)
        wait()  # until all ranks have looked: what one makes now must not change the others' shares
        evaluations = set()
        for part, made in batches(denoiser, album.shape, chosen, missing[rank::ranks], class_, batch, quiet=rank > 0):
            album.add(part, made.x.cpu(), None if made.label is None else made.label.cpu())
            evaluations.add(made.evaluations)
        wait()
        if rank == 0:
            written = album.finish(wanted)
            before = f", {len(wanted) - len(missing)} of them made before" if len(missing) < len(wanted) else ""
            print(f"{len(wanted)} samples{before}: {written}")
            if evaluations:
                low, high = min(evaluations), max(evaluations)
                each = f"{low}" if low == high else f"{low} to {high}"
                print(f"{each} network evaluations each: {chosen}")


def configured(trained: Trained, settings: Sequence[str]) -> Any:
    """The run's configuration with another sampler or grid.

    Raises:
        ConfigError: a setting that sampling does not look at.
    """
    if other := [s for s in settings if s.partition(".")[0] not in ("sampler", "grid")]:
        raise ConfigError(f"{other[0]}: sampling listens to sampler.* and grid.* only")
    return resolve(override(trained.config.sections, settings))


def opened_guide(guide: Path | None, strength: float | None, device: str) -> Trained | None:
    """The weaker run to be led away from, if one is named.

    Raises:
        ConfigError: a guide without a strength.
    """
    if guide is None:
        return None
    if strength is None:
        raise ConfigError("--guide needs to know how far: add --guidance, 1.5 for example")
    return open_run(guide, device=device)


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


@dataclass(frozen=True)
class Album:
    """Samples on the disk, one file each: PNG pictures in a folder, or pieces that are bound into one archive.

    Attributes:
        out: the folder, or the archive.
        folder: where the single files are.
        shape: of one sample.
        pictures: whether they are PNG files.
    """

    out: Path
    folder: Path
    shape: tuple[int, ...]
    pictures: bool

    @classmethod
    def open(cls, out: Path, shape: tuple[int, ...], identity: dict[str, Any]) -> "Album":
        """Begin an album, or go on with one.

        Raises:
            ConfigError: there are samples of another run or sampler.
        """
        pictures = out.suffix != ".npz" and is_picture(shape)
        if not pictures:
            out = out.with_suffix(".npz")
        folder = out if pictures else out.with_suffix(".parts")
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "samples.json"
        if note.exists():
            if _identity(note) != identity:
                raise ConfigError(f"{out} holds samples of another run or sampler: choose another --out, or remove it")
        elif any(folder.iterdir()) or (not pictures and out.exists()):
            raise ConfigError(f"{out} is there already, and was not written by this command: choose another --out")
        else:
            with replacing(note) as beside:
                beside.write_text(json.dumps(identity))
        return cls(out, folder, shape, pictures)

    def place(self, seed: int) -> Path:
        """The file of a seed."""
        suffix = "png" if self.pictures else "npz"
        return self.folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.{suffix}"

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds that have no file yet."""
        return [seed for seed in seeds if not self.place(seed).exists()]

    def add(self, seeds: Sequence[int], x: Tensor, labels: Tensor | None) -> None:
        """Write samples, each at once or not at all."""
        for row, seed in enumerate(seeds):
            place = self.place(seed)
            place.parent.mkdir(exist_ok=True)
            with replacing(place) as beside, beside.open("wb") as file:
                if self.pictures:
                    save_picture(file, x[row])
                else:
                    np.savez(file, x=_array(x[row]), label=-1 if labels is None else int(labels[row]))

    def finish(self, seeds: Sequence[int]) -> str:
        """A grid to look at, or the archive; says where it is."""
        if self.pictures:
            shown = torch.stack([open_picture(self.place(seed)) for seed in seeds[:256]])
            save_grid(self.out / "grid.png", shown)
            return f"{self.out}, at a glance in {self.out / 'grid.png'}"
        pieces = [np.load(self.place(seed)) for seed in seeds]
        labels = np.array([int(piece["label"]) for piece in pieces])
        named: dict[str, Any] = {"arr_0": np.stack([piece["x"] for piece in pieces]), "seeds": np.asarray(seeds)}
        named |= {"labels": labels} if (labels >= 0).any() else {}
        with replacing(self.out) as beside, beside.open("wb") as file:
            np.savez(file, **named)
        return str(self.out)


def _array(x: Tensor) -> np.ndarray:
    """One sample as archives of the field hold it: pictures as bytes, channels last; other data as float32."""
    return to_bytes(x).movedim(0, -1).numpy() if is_picture(tuple(x.shape)) else x.float().numpy()


def _identity(note: Path) -> Any:
    try:
        return json.loads(note.read_text())
    except ValueError:
        raise ConfigError(f"{note} is damaged: remove {note.parent}, and its samples will be made again") from None


@contextmanager
def _ranks() -> Iterator[tuple[int, int, Any]]:
    """(rank, number of ranks, a call that waits for all of them), as `torchrun` or `accelerate launch` set them up."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, lambda: None
        return
    # gloo, whatever the device: the ranks only wait for each other
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.distributed.barrier
    finally:
        torch.distributed.destroy_process_group()


def _device_of(name: str) -> str:
    if name == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name
