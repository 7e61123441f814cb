"""The posterior mean over the whole data set, without the data points of negligible posterior probability.

Two partitions divide the data into cells, by rules that do not depend on which data point is the source. The target of
an example is the posterior mean over the cell that contains its source, which is unbiased for any thresholds
(`stablefield.targets.base`):

1. *Isolation.* At each t, every data point that is so far from all others that its x_t almost surely identifies it
   (`isolation`) is a cell of its own. An example with such a source needs no work: its target is the source.
2. *Screening.* Of the others, those that are not improbable given the projection of x_t onto a few directions
   (`screening`) form one cell S(x_t), and each of the rest is a cell of its own. Only S(x_t) has to be summed over.

What a cell leaves out is the error of the target. On average over x_t that is at most `missing_mass` of the posterior:
a third for the others of an isolated source; by symmetry (exchange the source and a second draw from the posterior) a
third for the isolated others of a source that is not; a third for what is screened out. By Markov's inequality more
than p of the mass is missing for at most a fraction missing_mass / p of the examples.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, chunk_size, float64_device
from stablefield.kernel.gaussian import stream
from stablefield.kernel.matmul import full_precision
from stablefield.pool import Pool
from stablefield.process import NoisyBatch, move
from stablefield.targets.base import PoolTarget, keep_source, refuse_non_finite
from stablefield.targets.cells import Class, cell_means
from stablefield.targets.isolation import isolation_level
from stablefield.targets.lockstep import Task, run_together
from stablefield.targets.query import Examples
from stablefield.targets.screening import Projection, Screen, principal_directions
from stablefield.targets.shard import UNSHARDED, Shard

SUMMED_AT_ONCE = 2**27  # mask entries of the examples whose means are computed together (128 MB, and some copies)

Distances = Callable[[int], Float[Tensor, "m k"]]  # label -> distances to the nearest others of that class


@dataclass(frozen=True)
class ExactTarget(PoolTarget):
    """The exact posterior mean over all data, or all of a class, except for `missing_mass` of it. Unbiased.

    Attributes:
        pool: the data.
        distances: function from a label to the distances of each data point of that class to its nearest others
            (`isolation.nearest_distances`). Without it every example is screened; the targets are the same up to
            `missing_mass`.
        missing_mass: posterior mass that may be dropped, on average over the examples; at least 0 and below 1. 0
            streams all data for every example, without isolation and screening.
        projection_dims: number of coordinates to screen by.
        shard: the part of the data that this process holds (set by `Sharded`).

    Raises:
        ValueError: missing_mass outside [0, 1), or projection_dims below 1.
    """

    pool: Pool
    distances: Distances | None = field(default=None, repr=False)
    missing_mass: float = 1e-8
    projection_dims: int = 64
    shard: Shard = field(default=UNSHARDED, repr=False)
    _classes: dict[tuple[int, torch.device], Class] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.missing_mass < 1:
            raise ValueError(f"missing_mass must be at least 0 and below 1, not {self.missing_mass}")
        if self.projection_dims < 1:
            raise ValueError(f"projection_dims must be at least 1, not {self.projection_dims}")

    def over(self, shard: Shard) -> "ExactTarget":
        """The estimator of one of several processes that hold the data together; all of them must call it together.

        Args:
            shard: this process's part of the data.
        """
        return replace(self, shard=shard)

    @cached_property
    def own(self) -> Pool:
        """The data points that this process holds."""
        return self.shard.own(self.pool)

    @property
    @override
    def needs_index(self) -> bool:
        return self.missing_mass > 0

    @override
    @full_precision()
    def average(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: Int[Tensor, "B"], seed: int) -> Posterior:
        if not self.missing_mass:
            return self._streamed(noisy.x_t, noisy.sigma, noisy.alpha, label)
        refuse_non_finite(noisy)
        if (home := float64_device(noisy.x_t.device)) != noisy.x_t.device:
            found = self.average(noisy.map(lambda values: values.to(home)), index, label, seed)
            return found.map(lambda values: values.to(noisy.x_t.device))
        found, tasks = _writable_sources(noisy), list[tuple[int, Task[None]]]()
        examples = _examples(noisy.x_t, noisy.sigma, noisy.alpha)
        examples = replace(examples, x=noisy.x, position=self.shard.position(index))
        for known, part in self._by_class(label, noisy.x_t.device):
            uncertain = part[known.level_of(index[part]) <= examples.level[part]]
            tasks += self._tasks(examples, uncertain, known, self.missing_mass / 3, found)
        self._run(tasks, noisy.x_t.device)
        return found

    @full_precision()
    def posterior(
        self, x_t: Float[Tensor, "B *D"], sigma: Float[Tensor, "B"], alpha: Float[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Posterior:
        """The posterior of noisy data whose sources are not known, as in sampling.

        All data of the class are screened, and at most `missing_mass` is dropped, on average over x_t of the process.
        An x_t that is farther from all candidates than noise almost ever is comes from elsewhere; it is compared with
        all data of the class.

        Args:
            x_t: noisy data.
            sigma: scale of the noise.
            alpha: scale of the data in x_t.
            label: label of each example, on the CPU; `NULL_LABEL` for all data.

        Raises:
            ValueError: values that are not finite, a negative sigma, or a label that no data point has.
        """
        if not self.missing_mass:
            return self._streamed(x_t, sigma, alpha, label)
        if (home := float64_device(x_t.device)) != x_t.device:
            found = self.posterior(x_t.to(home), sigma.to(home), alpha.to(home), label)
            return found.map(lambda values: values.to(x_t.device))
        examples = _examples(x_t, sigma, alpha)
        refuse_non_finite(examples)
        # NaN until they are computed
        nothing = torch.full_like(sigma, torch.nan, dtype=torch.promote_types(x_t.dtype, torch.float32))
        found = Posterior(torch.full_like(x_t, torch.nan, dtype=nothing.dtype), nothing, nothing.clone())
        tasks = list[tuple[int, Task[None]]]()
        for known, part in self._by_class(label, x_t.device):
            tasks += self._tasks(examples, part, known, self.missing_mass, found)
        self._run(tasks, x_t.device)
        rest = found.ess.isnan().nonzero().flatten()
        if len(rest):
            _put(found, rest, self._streamed(x_t[rest], sigma[rest], alpha[rest], label[rest.cpu()]))
        return found

    def _streamed(self, x_t: Tensor, sigma: Tensor, alpha: Tensor, label: Int[Tensor, "B"]) -> Posterior:
        """Posteriors over all data of the classes."""
        found = []
        parts = [(value, (label == value).nonzero().flatten()) for value in label.unique().tolist()]
        for value, part in parts:
            some = slice(None) if len(parts) == 1 else move(part, x_t.device)
            blocks = ((block, None) for block in self._held(value, chunk_size(x_t[some]), x_t.device))
            found.append(stream(x_t[some], blocks, sigma=sigma[some], alpha=alpha[some], merge=self.shard.merge))
        if len(parts) == 1:
            return found[0]
        return Posterior.concatenate(found).select(torch.cat([part for _, part in parts]).argsort())

    def _held(self, label: int, size: int, device: torch.device) -> Iterator[Tensor]:
        if self.shard.total == 1:
            return self.pool.blocks(label, size, device)
        position = self.shard.position(self.pool.indices(label))  # of a small class a process may hold none
        return (self.own.take(part, device) for part in position[position >= 0].split(size))

    def _by_class(self, label: Int[Tensor, "B"], device: torch.device) -> Iterator[tuple[Class, Int[Tensor, "b"]]]:
        """The classes of a batch, and the examples of each."""
        for value in label.unique().tolist():
            yield self._class(value, device), (label == value).nonzero().flatten()

    def _tasks(
        self, examples: Examples, which: Int[Tensor, "b"], known: Class, missing_mass: float, found: Posterior
    ) -> Iterator[tuple[int, Task[None]]]:
        """Computations of some means of a class, and the sizes of their masks."""

        def means(part: Int[Tensor, "b"]) -> Task[None]:
            shared, means = yield from cell_means(examples.select(part), known, self.shard, missing_mass)
            _put(found, part[shared], means.select(shared))

        for part in filter(len, which.split(max(1, SUMMED_AT_ONCE // len(known.indices)))):
            yield len(part) * len(known.indices), means(part)

    def _run(self, tasks: Iterable[tuple[int, Task[None]]], device: torch.device) -> None:
        """Run computations, as many together as have masks of `SUMMED_AT_ONCE` entries."""
        # a CPU has nothing to wait for, and ranks must exchange their sums in one order
        most = SUMMED_AT_ONCE if device.type == "cuda" and self.shard.total == 1 else 0
        together, entries = list[Task[None]](), 0
        for size, task in tasks:
            if entries + size > most:
                run_together(together)
                together, entries = [], 0
            together.append(task)
            entries += size
        run_together(together)

    def _class(self, label: int, device: torch.device) -> Class:
        """The precomputed facts of a class; computed on first use."""
        if (label, device) not in self._classes:
            indices = self.pool.indices(label)
            level = torch.zeros(len(indices), dtype=torch.float64)
            if self.distances is not None:
                distances = _checked(self.distances(label), len(indices))
                level = isolation_level(distances, len(indices) - 1, self.missing_mass / 3)
                level = self.shard.broadcast(level)  # otherwise ranks would not screen the same examples
            position, own = self.shard.position(indices), self.own
            held = position >= 0
            projection = self._projection(device)
            screen = Screen.of(own, position[held], projection, level[held]) if held.any() else None
            widest = 0.0 if screen is None else screen.widest
            widest = -float(self.shard.minimum(torch.tensor([-widest], device=device)))
            self._classes[label, device] = Class(label, own, indices, level, projection, screen, widest)
        return self._classes[label, device]

    def _projection(self, device: torch.device) -> Projection:
        made = (known.projection for known in self._classes.values())
        found = next(made, None) or principal_directions(self.pool, self.projection_dims)
        # sums around centres that differ in the last digit would not merge
        centre, basis = self.shard.broadcast(found.centre), self.shard.broadcast(found.basis)
        return replace(found, centre=centre, basis=basis).to(device)


def _examples(x_t: Tensor, sigma: Tensor, alpha: Tensor) -> Examples:
    """Examples of unknown sources, with their noise levels on the CPU."""
    return Examples(x_t, sigma, alpha, (sigma.double() / alpha.double()).cpu())


def _checked(distances: Tensor, data_points: int) -> Tensor:
    if distances.ndim != 2 or len(distances) != data_points:
        raise ValueError(
            f"distances must have one row for each of {data_points} data points, not {tuple(distances.shape)}"
        )
    return distances


def _writable_sources(noisy: NoisyBatch) -> Posterior:
    """The sources as targets, in memory where other targets can be written over them."""
    source, dtype = keep_source(noisy), torch.promote_types(noisy.x_t.dtype, torch.float32)
    return source.map(lambda values: values.to(dtype, copy=True))


def _put(found: Posterior, index: Int[Tensor, "b"], means: Posterior) -> None:
    """Write the posteriors of some examples into those of a batch."""
    index = move(index, found.mean.device)
    found.mean[index] = means.mean.to(found.mean.dtype)
    found.ess[index] = means.ess.to(found.ess.dtype)
    found.variance[index] = means.variance.to(found.variance.dtype)
