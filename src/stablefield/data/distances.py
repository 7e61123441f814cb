"""Distances from each data point to its nearest others, measured once for a data set and kept in the cache.

They depend on the data alone and not on a run. A cache file contains the hash of the data that it was measured on; a
file of other data, of another version, or damaged is replaced.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import cached_tensors
from stablefield.data.contents import Progress, content_hash, silent
from stablefield.pool import NULL_LABEL, Pool
from stablefield.targets.isolation import nearest_distances

MOST_PRODUCTS = 1e11  # of numbers, for all pairs of data points: some seconds on one core


@dataclass(frozen=True, eq=False)
class NeighbourDistances:
    """The function label -> `isolation.nearest_distances` of a pool, read from the cache or measured.

    Attributes:
        pool: the data.
        k: number of neighbours of each data point.
        device: device that distances are measured on.
        progress: called with (data points done, total) while distances are measured.
    """

    pool: Pool
    k: int = 16
    device: torch.device | str = "cpu"
    progress: Progress = silent

    def __call__(self, label: int) -> Float[Tensor, "m k"]:
        """Distances within a class, in the order of `pool.indices`.

        Args:
            label: a class, or `NULL_LABEL` for all data points.
        """
        data_hash = self.data_hash
        metadata = {"kind": "neighbours 1", "data": data_hash, "label": label, "k": self.k}

        def compute() -> dict[str, Tensor]:
            distances = nearest_distances(self.pool, label, k=self.k, device=self.device, progress=self.progress)
            return {"distances": distances}

        return cached_tensors(f"{data_hash[:32]}-neighbours-{label}.safetensors", metadata, compute)["distances"]

    def prepare(self, *, null_label: bool = False) -> "NeighbourDistances | None":
        """Measure the distances that training needs: within each class, or among all data without labels.

        They make exact targets faster by milliseconds per step, but all pairs are compared. So they are measured only
        if there are few of them (`MOST_PRODUCTS`); this depends on the data alone, so that a run resumes with the
        same targets.

        Args:
            null_label: True to measure those among all data too, for training with label dropout.

        Returns:
            This object, or None if the distances are not worth measuring.
        """
        labels = [*range(self.pool.num_classes)] if self.pool.labels is not None else [NULL_LABEL]
        if null_label and NULL_LABEL not in labels:
            labels.append(NULL_LABEL)
        pairs = sum(len(self.pool.indices(label)) ** 2 for label in labels) / 2
        if pairs * math.prod(self.pool.shape) > MOST_PRODUCTS:
            return None
        for label in labels:
            self(label)
        return self

    @cached_property
    def data_hash(self) -> str:
        """Hash of the data, `content_hash`."""
        return content_hash(self.pool)
