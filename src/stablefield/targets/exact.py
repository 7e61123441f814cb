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

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator, chunk_size, float64_device
from stablefield.kernel.gaussian import stream
from stablefield.kernel.matmul import INT8_OFFSET, full_precision
from stablefield.pool import Pool
from stablefield.process import NoisyBatch
from stablefield.targets.base import PerLabelTarget, keep_source, refuse_non_finite
from stablefield.targets.isolation import isolation_level
from stablefield.targets.query import Query, uses_int8
from stablefield.targets.screening import Projection, Screen, count_true, likely, principal_directions, rounding_bound
from stablefield.targets.shard import UNSHARDED, Shard

__all__ = ["Distances", "ExactTarget"]

MOST_DATA = 3 / 4  # of the data points: if more are needed, all are streamed as they are stored, none picked out
SCREENED_AT_ONCE = 2**25  # energies that are screened together (128 MB)
SUMMED_AT_ONCE = 2**27  # mask entries of the examples whose means are computed together (128 MB, and some copies)
JOINING = 1 / 16  # of the data points: the cost of one more example in a pass over all data
SMALL_DATA = 2**22  # numbers: data of this size are streamed whole for any example
FEW_CANDIDATES = 256  # up to this many candidates cost less than the fixed work for an example
HEAVIEST = 512  # candidates of an example whose weights are computed in float64, if not all are

Distances = Callable[[int], Float[Tensor, "m k"]]  # label -> distances to the nearest others of that class


@dataclass(frozen=True)
class ExactTarget(PerLabelTarget):
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
    _classes: dict[tuple[int, torch.device], "_Class"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
    def estimate(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: int) -> Posterior:
        return self._screened(noisy, index, label) if self.missing_mass else self._streamed(noisy, label)

    def _streamed(self, noisy: NoisyBatch, label: int) -> Posterior:
        blocks = ((block, None) for block in self._held(label, chunk_size(noisy.x_t), noisy.x_t.device))
        return stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha, merge=self.shard.merge)

    def _held(self, label: int, size: int, device: torch.device) -> Iterator[Tensor]:
        if self.shard.total == 1:
            return self.pool.blocks(label, size, device)
        position = self.shard.position(self.pool.indices(label))  # of a small class a process may hold none
        return (self.own.take(part, device) for part in position[position >= 0].split(size))

    @full_precision()
    def _screened(self, noisy: NoisyBatch, index: Int[Tensor, "B"], label: int) -> Posterior:
        refuse_non_finite(noisy)
        if (home := float64_device(noisy.x_t.device)) != noisy.x_t.device:
            found = self._screened(noisy.map(lambda values: values.to(home)), index, label)
            return found.map(lambda values: values.to(noisy.x_t.device))
        known, found = self._class(label, noisy.x_t.device), _writable_sources(noisy)
        isolated, position = known.level_of(index).to(noisy.sigma.device), self.shard.position(index)
        uncertain = (isolated <= noisy.sigma.double() / noisy.alpha.double()).nonzero().flatten()
        for part in filter(len, uncertain.split(max(1, SUMMED_AT_ONCE // len(known.indices)))):
            shared, means = self._cell_means(noisy.select(part), position[part.cpu()], known)
            _put(found, part[shared], means.select(shared))
        return found

    def _class(self, label: int, device: torch.device) -> "_Class":
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
            self._classes[label, device] = _Class(label, own, indices, level, projection, screen, widest)
        return self._classes[label, device]

    def _projection(self, device: torch.device) -> Projection:
        made = (known.projection for known in self._classes.values())
        found = next(made, None) or principal_directions(self.pool, self.projection_dims)
        # sums around centres that differ in the last digit would not merge
        centre, basis = self.shard.broadcast(found.centre), self.shard.broadcast(found.basis)
        return replace(found, centre=centre, basis=basis).to(device)

    def _cell_means(
        self, noisy: NoisyBatch, position: Int[Tensor, "B"], known: "_Class"
    ) -> tuple[Int[Tensor, "s"], Posterior]:
        """The examples whose sources share their cell with other data points, and the means over these cells."""
        query = Query.of(noisy, known.affine, known.projection.centre)
        starts = _accumulators(query, known)
        here, masks = list[Tensor](), [list[Tensor]() for _ in starts]
        part_size = max(1, SCREENED_AT_ONCE // len(known.indices))
        for part in torch.arange(len(noisy), device=noisy.x_t.device).split(part_size):
            energy, inside = known.survivors(noisy.select(part), self.shard, self.missing_mass / 3)
            here.append(torch.stack([known.holds(inside, position[part.cpu()]).long(), count_true(inside)]))
            for some, mask in zip(masks, _by_arithmetic(query.select(part), energy, inside, known), strict=True):
                some.append(mask)
        has_source, count = self.shard.sum(torch.cat(here, 1)).unbind(0)
        shared, sums = (has_source > 0) & (count > 1), query.accumulator()
        for start, some in zip(starts, masks, strict=True):
            inside = _stack(some).logical_and_(shared[:, None])
            some.clear()  # free the parts before the sums are computed
            sums.merge(_sums(query, inside, known, start))
        return shared.nonzero().flatten(), query.posterior(self.shard.merge(sums))


@dataclass(frozen=True, eq=False)
class _Class:
    """Facts about a class that are known before anything is drawn.

    Attributes:
        label: its label.
        own: the data points that this process holds, of all classes.
        indices: all of the class, whoever holds them.
        level: noise level sigma / alpha up to which each of these is isolated.
        projection: the coordinates to screen by, the same for all classes.
        screen: the own data points of the class; None if there are none.
        widest: the largest norm of coordinates in the class, whoever holds them.
    """

    label: int
    own: Pool
    indices: Int[Tensor, "m"]
    level: Float[Tensor, "m"]
    projection: Projection
    screen: Screen | None
    widest: float

    @property
    def in_int8(self) -> bool:
        """True if the data points are multiplied as int8."""
        return uses_int8(self.own, self.projection.centre.device)

    @property
    def affine(self) -> tuple[float, float]:
        """(scale, shift) such that a value that is multiplied stands for scale * value + shift."""
        scale, shift = self.own.affine
        return (scale, shift + INT8_OFFSET * scale) if self.in_int8 else (scale, shift)

    def level_of(self, index: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Isolation levels of some data points.

        Raises:
            ValueError: a data point of another class.
        """
        rank = torch.searchsorted(self.indices, index).clamp(max=len(self.indices) - 1)
        if (strange := self.indices[rank] != index).any():
            raise ValueError(
                f"data point {int(index[strange][0])} of the pool does not have the label of its example, {self.label}"
            )
        return self.level[rank]

    def survivors(
        self, noisy: NoisyBatch, shard: Shard, missing_mass: float
    ) -> tuple[Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
        """Projected energies of the own data points in order of isolation, and which of them may matter."""
        query = self.projection(noisy.x_t, noisy.alpha)
        energy = query[:, :0] if self.screen is None else self.screen.energies(query, noisy.sigma, noisy.alpha)
        error = rounding_bound(query, noisy.alpha, self.widest)
        return energy, likely(energy, noisy.sigma, error, missing_mass, len(self.indices), shard)

    def holds(self, inside: Bool[Tensor, "B n"], position: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """True where own data points, at positions in pool order (-1: not own), are among those inside."""
        found = torch.zeros(len(inside), dtype=torch.bool, device=inside.device)
        if self.screen is not None:
            examples = (position >= 0).nonzero().flatten()
            place = self.screen.position[torch.searchsorted(self.screen.indices, position[examples])]
            found[examples] = inside[examples, place.to(inside.device)]
        return found

    def blocks(self, mask: Bool[Tensor, "b n"], size: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Blocks of stored data points, masks of the examples that may use them (None: all), and squared norms.

        Few data points are picked out, many are streamed as they are stored.
        """
        assert self.screen is not None
        blocks: Iterable[Tensor]
        wanted = mask.view(torch.uint8).amax(0).nonzero().flatten()  # as bytes, many times faster than any()
        if len(wanted) < MOST_DATA * len(self.screen):
            position = self.screen.order[wanted.cpu()]
            blocks = (self.own.stored(part) for part in self.screen.indices[position].split(size))
            allowed, square = mask[:, wanted], self.screen.square[position.to(mask.device)]
        else:
            blocks = self.own.stored_blocks(self.label, size)
            allowed, square = self.screen.in_pool_order(mask), self.screen.square
        everyone = bool(count_true(allowed).sum() == allowed.numel())
        masks = [None] * -(-len(square) // size) if everyone else allowed.split(size, 1)
        yield from zip(blocks, masks, square.split(size), strict=True)


def _by_arithmetic(
    query: Query, energy: Float[Tensor, "B n"], inside: Bool[Tensor, "B n"], known: _Class
) -> tuple[Bool[Tensor, "B n"], ...]:
    """The data points inside, separated by how they are multiplied (`_accumulators`)."""
    if known.screen is None:
        return ()
    if known.in_int8:
        return (inside,)
    wide = query.narrow == torch.float64
    rounding = torch.full_like(query.sigma, math.inf) if wide else query.rounding(known.screen.square)
    in_float64 = _heaviest(energy, inside, rounding)
    return in_float64, inside & ~in_float64


def _accumulators(query: Query, known: _Class) -> list[Callable[[Query], PosteriorAccumulator]]:
    """Accumulators for the data points of each arithmetic; none where there are no data points."""
    if known.screen is None:
        return []
    if known.in_int8:
        return [partial(Query.int8_accumulator, square=known.screen.square)]
    return [Query.accumulator, partial(Query.accumulator, energies=query.narrow)]


def _sums(
    query: Query, inside: Bool[Tensor, "B n"], known: _Class, start: Callable[[Query], PosteriorAccumulator]
) -> PosteriorAccumulator:
    """Sums over the data points inside, multiplied as the accumulators of `start` do."""
    assert known.screen is not None
    found = query.accumulator()
    for part in _together(inside, len(known.screen), len(query.centre)):
        some = query.select(part)
        sums, size = start(some), chunk_size(some.x_t, width=known.own.data.itemsize if known.in_int8 else 8)
        for block, allowed, square in known.blocks(inside[part], size):
            sums.add(block.flatten(1), allowed, square / query.scale**2)
        found.put(part, sums)
    return found


def _stack(masks: Sequence[Bool[Tensor, "_ _"]]) -> Bool[Tensor, "B n"]:
    """Masks of some examples each, over more or fewer of the first data points, as one."""
    if len(masks) == 1:
        return masks[0]
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks])


def _heaviest(
    energy: Float[Tensor, "B n"], inside: Bool[Tensor, "B n"], rounding: Float[Tensor, "B"]
) -> Bool[Tensor, "B n"]:
    """Mask of the data points inside that need float64.

    None where float32 is accurate enough, all where it is too inaccurate. In between, those that seem to weigh most:
    the error of the others counts for their small share only.
    """
    found = inside & ~(rounding < 1e-6)[:, None]
    some = ((rounding >= 1e-6) & (rounding <= 1e-5)).nonzero().flatten()
    if energy.shape[1] > HEAVIEST and len(some):
        heaviest = energy[some].topk(HEAVIEST, largest=False).indices
        found[some] &= torch.zeros_like(found[some]).scatter_(1, heaviest, True)
    return found


def _together(inside: Bool[Tensor, "B n"], data_points: int, dim: int) -> Iterator[Int[Tensor, "b"]]:
    """Split examples into groups that are worth summing together.

    Examples with many candidates share a pass over all data, those with few are summed in groups of eight, and the
    others one by one.
    Small data are streamed for all examples together, because a pass for each would cost more.
    """
    count = count_true(inside)
    if data_points * dim <= SMALL_DATA:
        many = count > 0
    else:
        many = count > JOINING * data_points
        many &= count[many].sum() > MOST_DATA * data_points
    few = (count > 0) & (count <= FEW_CANDIDATES) & ~many
    some = (count > FEW_CANDIDATES) & ~many
    yield from filter(len, [many.nonzero().flatten(), *few.nonzero().flatten().split(8), *some.nonzero()])


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
    found.mean[index] = means.mean.to(found.mean.dtype)
    found.ess[index] = means.ess.to(found.ess.dtype)
    found.variance[index] = means.variance.to(found.variance.dtype)
