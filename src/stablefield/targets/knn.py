"""The k nearest neighbours of x_t as the support, found exhaustively or with a faiss index.

"The k nearest" is a cell that does not depend on the source, so the mean over it is unbiased where it holds the source;
elsewhere the source is kept. "The k nearest and the source" would be biased. Niedoba et al. 2024 (arXiv 2402.08018) use
the nearest with a proposal correction instead.

A faiss index finds most of the nearest and not always all. That costs variance and no bias: whatever it lists depends
on x_t alone, so the list is a cell too.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, chunk_size, float64_device
from stablefield.kernel.gaussian import stream
from stablefield.kernel.nearest import nearest_candidates
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch, move, per_example
from stablefield.targets.base import PoolTarget, keep_source


@dataclass(frozen=True)
class KNNTarget(PoolTarget):
    """The mean over the k data points nearest to x_t / alpha if the source is among them, else the source. Unbiased.

    Attributes:
        pool: the data.
        neighbours: number k of nearest data points.
        search: "exhaustive" compares x_t with all data in float64; "faiss" builds an approximate index for each class
            when it is first used.
        index: the faiss index as `faiss.index_factory` spells it: "Flat" is exhaustive in float32, "PCA64,Flat" (the
            default) in 64 coordinates, "PCA64,IVF1024,Flat" searches some of 1,024 cells.
        probes: number of cells of an inverted file (IVF) to search; 16 by default.

    Raises:
        ValueError: k below 1 or beyond the number of data points, an unknown search, index or probes without faiss,
            faiss not installed, or an index that it does not know.
    """

    pool: Pool
    neighbours: int = 64
    search: Literal["exhaustive", "faiss"] = "exhaustive"
    index: str | None = None
    probes: int | None = None
    _indices: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.neighbours <= len(self.pool):
            raise ValueError(
                f"neighbours must be between 1 and the pool's {len(self.pool)} data points, not {self.neighbours}"
            )
        if self.search not in ("exhaustive", "faiss"):
            raise ValueError(f'search must be "exhaustive" or "faiss", not {self.search!r}')
        if self.search == "exhaustive" and (self.index is not None or self.probes is not None):
            raise ValueError('index and probes belong to search="faiss"; the exhaustive search has neither')
        if self.probes is not None and self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")
        if self.search == "faiss":
            self._new_index()

    @override
    def average(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: Int[Tensor, "B"], seed: int) -> Posterior:
        values = label.unique().tolist()
        if len(values) == 1:
            return _mean_over(noisy, self.pool, index, self.nearest(noisy, values[0]))
        parts = [(label == value).nonzero().flatten() for value in values]
        found = [self.nearest(noisy.select(part), value) for value, part in zip(values, parts, strict=True)]
        width = max(each.shape[1] for each in found)
        nearest = torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[1]), value=-1) for each in found])
        return _mean_over(noisy, self.pool, index, nearest[move(torch.cat(parts).argsort(), nearest.device)])

    def nearest(self, noisy: NoisyBatch, label: int) -> Int[Tensor, "B k"]:
        """The k data points of a class nearest to x_t / alpha, each once; -1 where an index found fewer.

        They are on the device of x_t if these were compared there, else on the CPU.

        Args:
            noisy: the batch.
            label: the class; `NULL_LABEL`: all data.
        """
        return self._by_index(noisy, label) if self.search == "faiss" else self._exhaustive(noisy, label)

    def _exhaustive(self, noisy: NoisyBatch, label: int) -> Int[Tensor, "B k"]:
        _, position, _ = nearest_candidates(_query(noisy), partial(self.pool.blocks, label), self.neighbours)
        return position if label == NULL_LABEL else move(self.pool.indices(label), position.device)[position]

    def _by_index(self, noisy: NoisyBatch, label: int) -> Int[Tensor, "B k"]:
        indices = self.pool.indices(label)
        _, found = self._index_of(label).search(_as_numpy(_query(noisy)), min(self.neighbours, len(indices)))
        position = torch.from_numpy(found)
        return torch.where(position >= 0, indices[position.clamp(min=0)], -1)

    def _index_of(self, label: int) -> Any:
        if label not in self._indices:
            index, indices = self._new_index(), self.pool.indices(label)
            if not index.is_trained:
                step = max(1, len(indices) // 2**14)  # enough for the directions and the cells
                index.train(_as_numpy(self.pool.take(indices[::step])))
            for block in indices.split(4096):
                index.add(_as_numpy(self.pool.take(block)))
            self._indices[label] = index
        return self._indices[label]

    def _new_index(self) -> Any:
        try:
            import faiss
        except ImportError:
            raise ValueError('search="faiss" needs faiss: pip install faiss-cpu') from None
        spelling = self.index or "PCA64,Flat"
        try:
            index = faiss.index_factory(torch.Size(self.pool.shape).numel(), spelling)
        except RuntimeError as error:
            raise ValueError(f"faiss does not know the index {spelling!r}: {str(error).splitlines()[-1]}") from None
        if "IVF" in spelling:
            faiss.extract_index_ivf(index).nprobe = 16 if self.probes is None else self.probes
        return index


def _query(noisy: NoisyBatch) -> Float[Tensor, "B *D"]:
    """x_t / alpha; where alpha is 0, all data are equally near, and any finite query will do."""
    x_t = noisy.x_t.to(float64_device(noisy.x_t.device), torch.float64)
    return x_t / per_example(noisy.alpha.to(x_t).clamp(min=1e-6), x_t)


def _mean_over(noisy: NoisyBatch, pool: Pool, index: Int[Tensor, "B"], nearest: Int[Tensor, "B k"]) -> Posterior:
    """Mean over the listed data points (-1: none) of the examples whose source is listed; else the source.

    Any list that depends on x_t alone is a cell, whether or not these are the nearest: so this is unbiased.
    """
    device = noisy.x.device
    inside = (nearest == move(index, nearest.device)[:, None]).any(1)
    # an example whose source is not listed keeps its source, but must be allowed some candidate here
    allowed = move((nearest >= 0) | ~inside[:, None], device)
    inside = move(inside, device)
    size = chunk_size(noisy.x_t, len(noisy))
    blocks = (
        (pool.take(part.clamp(min=0).flatten(), device).unflatten(0, part.shape), mask)
        for part, mask in zip(nearest.split(size, 1), allowed.split(size, 1), strict=True)
    )
    found = stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha)
    source = keep_source(noisy)
    return Posterior(
        torch.where(per_example(inside, noisy.x), found.mean, source.mean),
        torch.where(inside, found.ess, source.ess),
        torch.where(inside, found.variance, source.variance),
    )


def _as_numpy(x: Float[Tensor, "n *D"]) -> Any:
    return x.detach().flatten(1).float().cpu().contiguous().numpy()
