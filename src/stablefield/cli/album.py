"""Samples on the disk, a file each: so a command that was stopped goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import replacing, write_text
from stablefield.config import ConfigError
from stablefield.evaluate.pictures import open_picture, save_grid, save_picture, to_bytes
from stablefield.sample import Samples


@dataclass(frozen=True)
class Album:
    """PNG pictures in a folder, or pieces that are bound into one archive (`.npz`) or array (`.npy`).

    Attributes:
        out: the folder, or the file.
        folder: where the single files are.
        pictures: whether they are PNG files.
        images: whether samples are images, written as bytes; others are written as float32, as they were made.
    """

    out: Path
    folder: Path
    pictures: bool
    images: bool

    @classmethod
    def at(cls, out: Path, images: bool) -> "Album":
        """The album that this path stands for, begun or not. Floats have no folder: `.npz` is added to its name."""
        if out.suffix == ".npz":
            return cls(out, out.with_suffix(".parts"), False, images)
        if images:
            return cls(out, out, True, images)
        out = out if out.suffix == ".npy" else out.with_name(f"{out.name}.npz")
        return cls(out, out.with_suffix(".parts" if out.suffix == ".npz" else ".npy.parts"), False, images)

    @classmethod
    def open(cls, out: Path, images: bool, identity: dict[str, Any]) -> "Album":
        """Begin an album, or go on with one.

        Raises:
            ConfigError: there are samples of another run or sampler, or images are to be written as `.npy`.
        """
        if images and out.suffix == ".npy":
            raise ConfigError(f"--out {out}: images are written to a folder of PNG files, or to a file.npz")
        album = cls.at(out, images)
        album.folder.mkdir(parents=True, exist_ok=True)
        if album.note.exists():
            if album.identity() != identity:
                raise ConfigError(
                    f"{album.out} holds samples of another run or sampler: choose another --out, or remove it"
                )
        elif any(album.folder.iterdir()) or (not album.pictures and album.out.exists()):
            raise ConfigError(
                f"{album.out} is there already, and was not written by this command: choose another --out"
            )
        else:
            write_text(album.note, json.dumps(identity))
        return album

    @property
    def note(self) -> Path:
        """The file that says what the samples are of."""
        return self.folder / "samples.json"

    def identity(self) -> Any:
        """What it says.

        Raises:
            ConfigError: nothing, any more.
        """
        try:
            return json.loads(self.note.read_text())
        except ValueError:
            raise ConfigError(
                f"{self.note} is damaged: remove {self.folder}, and its samples will be made again"
            ) from None

    def place(self, seed: int) -> Path:
        """The file of a seed."""
        suffix = "png" if self.pictures else "npz"
        return self.folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.{suffix}"

    def seeds(self) -> list[int]:
        """Seeds that have a file."""
        return sorted(int(file.stem) for file in self.folder.glob(f"*/*{self.place(0).suffix}") if file.stem.isdigit())

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds that have no file yet."""
        return [seed for seed in seeds if not self.place(seed).exists()]

    def add(self, seeds: Sequence[int], made: Samples) -> None:
        """Write samples, each at once or not at all, and what they cost."""
        with (self.folder / "evaluations.txt").open("a") as file:
            file.write(f"{made.evaluations}\n")
        for row, seed in enumerate(seeds):
            place = self.place(seed)
            place.parent.mkdir(exist_ok=True)
            x = made.x[row].cpu()
            with replacing(place) as beside, beside.open("wb") as file:
                if self.pictures:
                    save_picture(file, x)
                else:
                    np.savez(file, x=_array(x, self.images), label=-1 if made.label is None else int(made.label[row]))

    def evaluations(self) -> tuple[int, int] | None:
        """The least and the most network evaluations that a sample cost; None if nobody wrote it down."""
        file = self.folder / "evaluations.txt"
        counts = [int(line) for line in file.read_text().split()] if file.exists() else []
        return (min(counts), max(counts)) if counts else None

    def take(self, seeds: Sequence[int]) -> Float[Tensor, "n *D"]:
        """Samples as they were written: images in [-1, 1], others as float32."""
        return torch.stack([open_picture(self.place(seed)) if self.pictures else self._piece(seed) for seed in seeds])

    def finish(self, seeds: Sequence[int]) -> str:
        """A grid to look at, or the archive or array; says where it is."""
        if self.pictures:
            save_grid(self.out / "grid.png", self.take(seeds[:256]))
            return f"{self.out}, at a glance in {self.out / 'grid.png'}"
        pieces = [np.load(self.place(seed)) for seed in seeds]
        x, labels = np.stack([piece["x"] for piece in pieces]), np.array([int(piece["label"]) for piece in pieces])
        named: dict[str, Any] = {"arr_0": x, "seeds": np.asarray(seeds)}
        named |= {"labels": labels} if (labels >= 0).any() else {}
        with replacing(self.out) as beside, beside.open("wb") as file:
            if self.out.suffix == ".npy":
                np.save(file, x)
            else:
                np.savez(file, **named)
        return str(self.out)

    def _piece(self, seed: int) -> Tensor:
        array = torch.from_numpy(np.load(self.place(seed))["x"])
        return array.movedim(-1, 0).float() / 127.5 - 1 if array.dtype == torch.uint8 else array


def _array(x: Tensor, image: bool) -> np.ndarray:
    """One sample as archives of the field hold it: images as bytes, channels last; other data as float32."""
    return to_bytes(x).movedim(0, -1).numpy() if image else x.float().numpy()
