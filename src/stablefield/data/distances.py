"""Distances of each member to its nearest others, measured once and kept in the cache.

They belong to the data, not to a run: a file carries the hash of the data that it was measured on, and one that is of
other data, damaged, or of another version is not used but replaced.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import CheckpointError, read, save
from stablefield.data.contents import Progress, content_hash, silent
from stablefield.data.store import alone, cache_folder
from stablefield.neighbours import nearest
from stablefield.reference import ALL, Pool


@dataclass(frozen=True, eq=False)
class NeighbourDistances:
    """label -> `neighbours.nearest` of a pool, from the cache or measured.

    Attributes:
        k: neighbours of each member.
        device: where they are measured.
        progress: told (pairs of blocks done, of how many) if they must be.
    """

    pool: Pool
    k: int = 16
    device: torch.device | str = "cpu"
    progress: Progress = silent

    def __call__(self, label: int) -> Float[Tensor, "m k"]:
        """The distances of the members of a class; -1: of all."""
        data = self.data
        about = {"kind": "neighbours 1", "data": data, "label": label, "k": self.k}
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{data[:32]}-neighbours-{label}.safetensors"
        with alone(file.with_suffix(".lock")):  # so that of several ranks one measures
            try:
                kept = read(file)
                if kept.config == about:
                    return kept.tensors["distances"]
            except CheckpointError:
                pass
            found = nearest(self.pool, label, k=self.k, device=self.device, progress=self.progress)
            save(file, {"distances": found}, config=about, images=0)
        return found

    def prepare(self, *, untold: bool = False) -> "NeighbourDistances":
        """Measure what training will ask for: within each class if there are any; among all if not, or if `untold`."""
        labels = [*range(self.pool.classes)] if self.pool.labels is not None else [ALL]
        for label in (*labels, ALL) if untold else labels:
            self(label)
        return self

    @cached_property
    def data(self) -> str:
        """The hash of the data."""
        return content_hash(self.pool)
