"""The nearest neighbours of x_t through an index, for data too large to look at all of them (Niedoba et al. 2024).

An index finds most of the nearest and not always all. That costs variance, and no bias: whatever it lists, it was asked
about x_t alone, so the list is a cell (`target.from_nearest`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.posterior import Posterior
from stablefield.process import Perturbed, per_row
from stablefield.reference import Pool
from stablefield.target import ByLabel, from_nearest


@dataclass(frozen=True)
class FoundNeighbours(ByLabel):
    """The k members that an index of faiss finds for x_t if the source is one of them, and else the source alone.

    Attributes:
        neighbours: how many to ask for, k.
        index: the index, as `faiss.index_factory` spells it: "Flat" is exhaustive in float32, "PCA64,Flat" in 64
            coordinates, "PCA64,IVF1024,Flat" looks at some of 1,024 cells. Each class has its own.
        probes: cells of an inverted file (IVF) to look at.

    Raises:
        ValueError: faiss is not installed, or knows no such index; more neighbours than members.
    """

    pool: Pool
    neighbours: int
    index: str = "PCA64,Flat"
    probes: int = 16
    _indices: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.neighbours <= len(self.pool):
            raise ValueError(
                f"neighbours must be between 1 and the pool's {len(self.pool)} members, not {self.neighbours}"
            )
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")
        self._new()

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        return from_nearest(noisy, self.pool, self.found(noisy, label))

    def found(self, noisy: Perturbed, label: int) -> Int[Tensor, "B k"]:
        """Members of the pool that carry the label, near x_t / alpha; -1 where fewer were found."""
        members = self.pool.members(label)
        # where no data are left in x_t, all are as near; any number will do
        query = noisy.x_t / per_row(noisy.alpha.clamp(min=1e-6), noisy.x_t)
        _, at = self._of(label).search(_numbers(query), min(self.neighbours, len(members)))
        place = torch.from_numpy(at)
        return torch.where(place >= 0, members[place.clamp(min=0)], -1)

    def _of(self, label: int) -> Any:
        if label not in self._indices:
            index, blocks = self._new(), list(self.pool.members(label).split(4096))
            if not index.is_trained:
                step = max(1, len(self.pool.members(label)) // 2**14)  # enough for the directions and the cells
                index.train(_numbers(self.pool.take(self.pool.members(label)[::step])))
            for block in blocks:
                index.add(_numbers(self.pool.take(block)))
            self._indices[label] = index
        return self._indices[label]

    def _new(self) -> Any:
        try:
            import faiss
        except ImportError:
            raise ValueError("looking up neighbours needs faiss: pip install faiss-cpu") from None
        try:
            index = faiss.index_factory(torch.Size(self.pool.shape).numel(), self.index)
        except RuntimeError as error:
            raise ValueError(f"faiss knows no index {self.index!r}: {str(error).splitlines()[-1]}") from None
        if "IVF" in self.index:
            faiss.extract_index_ivf(index).nprobe = self.probes
        return index


def _numbers(x: Float[Tensor, "n *D"]) -> Any:
    return x.detach().flatten(1).float().cpu().contiguous().numpy()
