"""Storage of samples, one file per seed, so that an interrupted command resumes where it stopped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.config import ConfigError
from stablefield.evaluate.images import read_image, save_image, save_sheet, to_bytes
from stablefield.files import append, atomic_path, sweep, write_text
from stablefield.sample import Samples

__all__ = ["SampleStore"]


@dataclass(frozen=True)
class SampleStore:
    """Samples in a folder of PNG files, or in an archive (`.npz`) or array (`.npy`).

    An archive or array is combined by `finish`; until then its samples are single files in a folder beside it.

    Attributes:
        out: the folder of PNG files, or the archive or array.
        folder: the folder of the single files.
        png: True if the single files are PNG images.
        images: True if the samples are images, which are written as bytes; others are written as float32.
    """

    out: Path
    folder: Path
    png: bool
    images: bool

    @classmethod
    def at(cls, out: Path, images: bool) -> "SampleStore":
        """The store that a path stands for, whether or not it exists.

        Args:
            out: a folder for PNG files, or a `.npz` or `.npy` file. Floats have no folder: `.npz` is added to the path.
            images: True if the samples are images.
        """
        if out.suffix == ".npz":
            return cls(out, out.with_suffix(".parts"), False, images)
        if images:
            return cls(out, out, True, images)
        out = out if out.suffix == ".npy" else out.with_name(f"{out.name}.npz")
        return cls(out, out.with_suffix(".parts" if out.suffix == ".npz" else ".npy.parts"), False, images)

    @classmethod
    def open(cls, out: Path, images: bool, identity: dict[str, Any]) -> "SampleStore":
        """Create a store, or open it to add samples.

        Args:
            out: a folder or file, as for `at`.
            images: True if the samples are images.
            identity: everything that decides a sample except its seed.

        Raises:
            ConfigError: the store has another identity, something else is at that path, or images are to be written
                as `.npy`.
        """
        if images and out.suffix == ".npy":
            raise ConfigError(f"--out {out}: images are written to a folder of PNG files, or to a file.npz")
        store = cls.at(out, images)
        store.folder.mkdir(parents=True, exist_ok=True)
        sweep(store.out.parent, store.folder, *store.folder.glob("[0-9]*"))
        if store.identity_file.exists():
            if store.identity() != identity:
                raise ConfigError(
                    f"{store.out} holds samples of another run or sampler; choose another --out, or remove it"
                )
        elif any(store.folder.iterdir()) or (not store.png and store.out.exists()):
            raise ConfigError(f"{store.out} exists and was not written by this command; choose another --out")
        else:
            write_text(store.identity_file, json.dumps(identity))
        return store

    @property
    def identity_file(self) -> Path:
        """The file that holds the identity."""
        return self.folder / "samples.json"

    def identity(self) -> Any:
        """Everything that decides a sample except its seed, as it was stored.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            return json.loads(self.identity_file.read_text())
        except ValueError:
            raise ConfigError(
                f"{self.identity_file} is damaged; remove {self.folder}, and its samples will be made again"
            ) from None

    def metadata(self) -> dict[str, Any]:
        """The identity and the number of network evaluations per sample, which are stored with scores."""
        return self.identity() | {"evaluations": self.evaluations()}

    def path(self, seed: int) -> Path:
        """The file of a sample.

        Args:
            seed: seed of the sample.
        """
        suffix = "png" if self.png else "npz"
        return self.folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.{suffix}"

    def seeds(self) -> list[int]:
        """Seeds of all samples in the store, ascending."""
        return sorted(int(file.stem) for file in self.folder.glob(f"*/*{self.path(0).suffix}") if file.stem.isdigit())

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds whose samples are not in the store yet.

        Args:
            seeds: the seeds that are needed.
        """
        return [seed for seed in seeds if not self.path(seed).exists()]

    def add(self, seeds: Sequence[int], samples: Samples) -> None:
        """Write samples, each file atomically, and their number of network evaluations.

        Args:
            seeds: seed of each sample.
            samples: the samples.
        """
        append(self.folder / "evaluations.txt", f"{samples.evaluations}\n")
        for i, seed in enumerate(seeds):
            path = self.path(seed)
            x = samples.x[i].cpu()
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                if self.png:
                    save_image(file, x)
                else:
                    label = -1 if samples.label is None else int(samples.label[i])
                    np.savez(file, x=_array(x, self.images), label=label)

    def evaluations(self) -> tuple[int, int] | None:
        """Smallest and largest number of network evaluations per sample; None if unknown."""
        file = self.folder / "evaluations.txt"
        counts = [int(line) for line in file.read_text().split()] if file.exists() else []
        return (min(counts), max(counts)) if counts else None

    def take(self, seeds: Sequence[int]) -> Float[Tensor, "n *D"]:
        """Samples as they were written: images in [-1, 1], others as float32.

        Args:
            seeds: seeds of samples in the store.
        """
        return torch.stack([read_image(self.path(seed)) if self.png else self._read_array(seed) for seed in seeds])

    def finish(self, seeds: Sequence[int]) -> str:
        """Write a sheet of the first 256 samples, or combine the archive or array.

        Args:
            seeds: seeds of the samples, in the order of the archive.

        Returns:
            Where the samples are, as text for the user.
        """
        if self.png:
            sheet = self.out / "samples.png"
            save_sheet(sheet, self.take(seeds[:256]))
            return f"{self.out} (sheet of samples: {sheet})"
        parts = [np.load(self.path(seed)) for seed in seeds]
        x, labels = np.stack([part["x"] for part in parts]), np.array([int(part["label"]) for part in parts])
        arrays: dict[str, Any] = {"arr_0": x, "seeds": np.asarray(seeds)}
        arrays |= {"labels": labels} if (labels >= 0).any() else {}
        with atomic_path(self.out) as temporary, temporary.open("wb") as file:
            if self.out.suffix == ".npy":
                np.save(file, x)
            else:
                np.savez(file, **arrays)
        return str(self.out)

    def _read_array(self, seed: int) -> Tensor:
        array = torch.from_numpy(np.load(self.path(seed))["x"])
        return array.movedim(-1, 0).float() / 127.5 - 1 if array.dtype == torch.uint8 else array


def _array(x: Tensor, image: bool) -> np.ndarray:
    """One sample as it is stored in archives: an image as bytes with channels last, other data as float32."""
    return to_bytes(x).movedim(0, -1).numpy() if image else x.float().numpy()
