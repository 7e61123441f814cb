"""Storage of samples, one file per seed, so that an interrupted command resumes where it stopped.

    samples/000000/000000.png  the sample of seed 0, with its class in a text chunk if there is one
            dataset.json       the class of every image, in EDM's format
            samples.json       the identity: everything that decides a sample except its seed
            evaluations.txt    network evaluations per sample, one line per batch
    samples.png                a sheet of the first samples, beside the folder and not in it

Files are written without waiting for the disk and renamed when they are complete, so a killed process leaves only
complete files. After a power failure a file may be cut short; its last bytes show it, and its sample is made again.
"""

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stablefield.config import ConfigError
from stablefield.data.arrays import read_archive
from stablefield.data.decode import Preprocessing, decode
from stablefield.data.png import encode_png
from stablefield.files import append, atomic_path, sweep, temporary_folder, write_text
from stablefield.generate.images import save_sheet, to_pixels
from stablefield.sample import Samples

_WRITERS = 4  # threads that compress and write; both release the interpreter
_SHEET = 256  # samples on a sheet
_OTHER_FORMATS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".zip", ".tar", ".gz", ".pt", ".pkl", ".safetensors", ".h5"}
_LABEL = "label"  # keyword of the text chunk that holds the class
_ENDS = {".png": (b"IEND", 8), ".npz": (b"PK\x05\x06", 22)}  # last mark of a complete file, and its distance to the end


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
        suffix = out.suffix.lower()
        if suffix == ".npz":
            return cls(out, out.with_suffix(".parts"), False, images)
        if images:
            return cls(out, out, True, images)
        if suffix == ".npy":
            return cls(out, out.with_suffix(".npy.parts"), False, images)
        return cls(out.with_name(f"{out.name}.npz"), out.with_name(f"{out.name}.parts"), False, images)

    @classmethod
    def open(cls, out: Path, images: bool, identity: dict[str, Any]) -> "SampleStore":
        """Create a store, or open it to add samples.

        Args:
            out: a folder or file, as for `at`.
            images: True if the samples are images.
            identity: everything that decides a sample except its seed.

        Raises:
            ConfigError: the store has another identity, something else is at that path, or its suffix is that of a
                format that samples are not written in.
            OSError: the store cannot be created.
        """
        suffix = out.suffix.lower()
        if suffix in _OTHER_FORMATS or (images and suffix == ".npy"):
            choices = "images are written to a folder of PNG files" if images else "floats are written to a file.npy"
            raise ConfigError(f"--out {out}: {choices}, or to a file.npz")
        store = cls.at(out, images)
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            sweep(store.out.parent, store.folder, *store.folder.glob("[0-9]*"))
            store._claim(identity)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"could not create {store.folder} ({reason}); choose another --out") from None
        return store

    def _claim(self, identity: dict[str, Any]) -> None:
        """Write the identity, or compare it with the one that is there."""
        if self.identity_file.exists():
            if self.identity() != identity:
                raise ConfigError(
                    f"{self.out} holds samples of another run or sampler; choose another --out, or remove it"
                )
        elif any(self.folder.iterdir()) or (not self.png and self.out.exists()):
            raise ConfigError(f"{self.out} exists and was not written by this command; choose another --out")
        else:
            write_text(self.identity_file, json.dumps(identity))

    @property
    def identity_file(self) -> Path:
        """The file that holds the identity."""
        return self.folder / "samples.json"

    @property
    def sheet(self) -> Path:
        """The sheet of the first samples, beside a folder of PNG files."""
        folder = self.out if self.out.name else self.out.absolute()
        return folder.with_name(f"{folder.name}.png")

    def identity(self) -> Any:
        """Everything that decides a sample except its seed, as it was stored.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            return {**json.loads(self.identity_file.read_text())}
        except (ValueError, TypeError, RecursionError):
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
        return self.folder / self._name(seed)

    def _name(self, seed: int) -> str:
        return f"{seed - seed % 1000:06d}/{seed:06d}.{'png' if self.png else 'npz'}"

    def seeds(self) -> list[int]:
        """Seeds of all samples in the store, ascending."""
        return sorted(int(file.stem) for file in self.folder.glob(f"*/*{self.path(0).suffix}") if file.stem.isdigit())

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds whose samples are not in the store yet, or not complete.

        Args:
            seeds: the seeds that are needed.
        """
        return [seed for seed in seeds if not _is_complete(self.path(seed))]

    def add(self, seeds: Sequence[int], samples: Samples) -> None:
        """Write samples and their number of network evaluations.

        Args:
            seeds: seed of each sample.
            samples: the samples.

        Raises:
            OSError: a sample cannot be written, for example because the disk is full.
        """
        append(self.folder / "evaluations.txt", f"{samples.evaluations}\n")
        x = to_pixels(samples.x) if self.images else samples.x.float().cpu().numpy()
        labels = [-1] * len(seeds) if samples.label is None else samples.label.tolist()
        with temporary_folder(self.path(seeds[0])) as folder:
            for start in {seed - seed % 1000 for seed in seeds}:
                self.path(start).parent.mkdir(exist_ok=True)

            def write(first: int) -> None:
                share = slice(first, None, _WRITERS)  # one at a time, handing over takes as long as compressing
                for seed, sample, label in zip(seeds[share], x[share], labels[share], strict=True):
                    temporary = f"{folder}/{seed}"  # paths as text: pathlib takes longer than the system
                    with open(temporary, "wb") as file:
                        file.write(self._encode(sample, label))
                    os.replace(temporary, f"{self.folder}/{self._name(seed)}")

            with ThreadPoolExecutor(_WRITERS) as writers:
                list(writers.map(write, range(_WRITERS)))  # raises the first error

    def _encode(self, sample: np.ndarray, label: int) -> bytes:
        """Content of the file of a sample."""
        if self.png:
            return encode_png(sample, {} if label < 0 else {_LABEL: str(label)})
        file = io.BytesIO()
        np.savez(file, x=sample, label=label)
        return file.getvalue()

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
        samples = [self._read(seed) for seed in seeds]
        for seed, sample in zip(seeds, samples, strict=True):
            if sample.shape != samples[0].shape:
                shapes = f"{tuple(sample.shape)}, and not {tuple(samples[0].shape)} as {self.path(seeds[0])}"
                raise ConfigError(f"{self.path(seed)} has the shape {shapes}; remove the one that is wrong")
        return torch.stack(samples)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """Class of each sample; None if the run has no classes.

        Args:
            seeds: seeds of samples in the store.
        """
        found = [_png_label(self.path(seed)) if self.png else int(self._part(seed)["label"]) for seed in seeds]
        return None if all(label < 0 for label in found) else found

    def finish(self, seeds: Sequence[int]) -> None:
        """Write what other programs read: the classes and a sheet beside PNG files, or the combined archive or array.

        Args:
            seeds: seeds of the samples, in the order of the archive.

        Raises:
            OSError: the files cannot be written.
        """
        if self.png:
            every = self.seeds()
            labels = self.labels(every)
            pairs = None if labels is None else [[self._name(seed), labels[i]] for i, seed in enumerate(every)]
            write_text(self.folder / "dataset.json", json.dumps({"labels": pairs}))
            save_sheet(self.sheet, self.take(seeds[:_SHEET]))
            return
        parts = [self._part(seed) for seed in seeds]
        x, classes = np.stack([part["x"] for part in parts]), np.array([int(part["label"]) for part in parts])
        arrays: dict[str, Any] = {"arr_0": x, "seeds": np.asarray(seeds)}
        arrays |= {"labels": classes} if (classes >= 0).any() else {}
        with atomic_path(self.out) as temporary, temporary.open("wb") as file:
            if self.out.suffix.lower() == ".npy":
                np.save(file, x)
            else:
                np.savez(file, **arrays)

    def _read(self, seed: int) -> Tensor:
        """A sample as it was written: an image in [-1, 1], or float32."""
        if self.png:
            pixels = decode(self.path(seed).read_bytes(), str(self.path(seed)), Preprocessing()).pixels
            return torch.from_numpy(pixels).float() / 127.5 - 1
        array = torch.from_numpy(self._part(seed)["x"])
        return array.movedim(-1, 0).float() / 127.5 - 1 if array.dtype == torch.uint8 else array

    def _part(self, seed: int) -> dict[str, np.ndarray]:
        """The arrays `x` and `label` of a sample."""
        found = read_archive(self.path(seed), ("x", "label"))
        if not {"x", "label"} <= found.keys():
            raise ConfigError(f"{self.path(seed)} is not a sample; remove it, and it will be made again")
        return found


def _is_complete(path: Path) -> bool:
    """True if a file exists and has the end of a complete one."""
    mark, distance = _ENDS[path.suffix]
    try:
        with path.open("rb") as file:
            file.seek(-distance, os.SEEK_END)
            return file.read(len(mark)) == mark
    except OSError:
        return False


def _png_label(path: Path) -> int:
    """Class in the text chunk of a PNG file; -1 if there is none."""
    try:
        with Image.open(path) as image:
            return int(image.info.get(_LABEL, -1))
    except Exception as error:  # the decoders of damaged files fail in any way
        raise ConfigError(f"{path} is damaged ({error}); remove it, and it will be made again") from None
