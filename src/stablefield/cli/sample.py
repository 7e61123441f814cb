"""`stablefield sample`: from a run to images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor

from stablefield.config import override, resolve
from stablefield.evaluate.pictures import is_picture, save_grid, save_picture, to_bytes
from stablefield.run import Trained, make_sampler, open_run
from stablefield.sample import Sampler
from stablefield.seeding import parse_seeds


def sample(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint file.")],
    seeds: Annotated[str, typer.Option(help="One image a seed: 0-63, or 0,3,8-15.")] = "0-63",
    out: Annotated[
        Path | None, typer.Option(help="A folder for PNG files, or a file.npz; by default RUN/samples.")
    ] = None,
    class_: Annotated[
        int | None, typer.Option("--class", help="Only this class; by default each seed draws one.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="heun or euler; by default as the run was configured.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to data.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change sampler.* or grid.*.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time; changes nothing but speed.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Make images from a trained run: the same seed gives the same image, whatever the batch."""
    trained = open_run(run, device=device)
    settings = [*([f"sampler.kind={sampler}"] if sampler else []), *([f"sampler.steps={steps}"] if steps else [])]
    config = resolve(override(trained.config.sections, [*settings, *(set_ or [])]))
    wanted = parse_seeds(seeds)
    folder = out or (run if run.is_dir() else run.parent) / "samples"
    chosen = make_sampler(config)
    x, labels, evaluations = make(trained, chosen, wanted, class_, batch)
    written = save(folder, x, labels, wanted)
    print(f"{len(wanted)} samples, {evaluations} network evaluations each ({chosen}): {written}")


def make(
    trained: Trained, sampler: Sampler, seeds: Sequence[int], label: int | None = None, batch: int = 64
) -> tuple[Tensor, Tensor | None, int]:
    """Samples for all seeds, batch by batch, with a progress bar: data, labels or None, evaluations of each."""
    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    made = [
        sampler(trained.denoiser, trained.shape, seeds=part, label=label)
        for part in track(parts, description="sampling")
    ]
    labels = None if made[0].label is None else torch.cat([m.label for m in made if m.label is not None])
    return torch.cat([m.x for m in made]).cpu(), labels, made[0].evaluations


def save(out: Path, x: Tensor, labels: Tensor | None, seeds: Sequence[int]) -> str:
    """Write samples as PNG files and a grid, or as arrays where they are no pictures or an .npz is asked for."""
    if out.suffix != ".npz" and not is_picture(tuple(x.shape[1:])):
        out = out.with_suffix(".npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        arrays = to_bytes(x).movedim(1, -1) if is_picture(tuple(x.shape[1:])) else x.float()
        named: dict[str, Any] = {"arr_0": arrays.numpy(), "seeds": np.asarray(seeds)}
        named |= {} if labels is None else {"labels": labels.cpu().numpy()}
        np.savez(out, **named)
        return str(out)
    for image, seed in zip(x, seeds, strict=True):
        place = out / f"{seed - seed % 1000:06d}"
        place.mkdir(parents=True, exist_ok=True)
        save_picture(place / f"{seed:06d}.png", image)
    save_grid(out / "grid.png", x[:256])
    return f"{out}, at a glance in {out / 'grid.png'}"
