"""Posterior means over the data points of a class that a screen lets through.

The computations are tasks (`lockstep`): they need counts and masks on the host, and several classes get theirs
together.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator, chunk_size
from stablefield.kernel.matmul import INT8_OFFSET
from stablefield.pool import Pool
from stablefield.process import move
from stablefield.targets.lockstep import Task
from stablefield.targets.query import Examples, Query, uses_int8
from stablefield.targets.screening import Projection, Screen, count_true, likely, rounding_bound
from stablefield.targets.shard import Shard

MOST_DATA = 3 / 4  # of the data points: if more are needed, all are streamed as they are stored, none picked out
SCREENED_AT_ONCE = 2**25  # energies that are screened together (128 MB)
JOINING = 1 / 16  # of the data points: the cost of one more example in a pass over all data
SMALL_DATA = 2**22  # numbers: data of this size are streamed whole for any example
FEW_CANDIDATES = 256  # up to this many candidates cost less than the fixed work for an example
HEAVIEST = 512  # candidates of an example whose weights are computed in float64, if not all are


@dataclass(frozen=True, eq=False)
class Class:
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

        Args:
            index: the data points, on the CPU.

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
        self, examples: Examples, shard: Shard, missing_mass: float
    ) -> Task[tuple[Float[Tensor, "B n"], Bool[Tensor, "B n"]]]:
        """Projected energies of the own data points in order of isolation, and which of them may matter.

        Args:
            examples: the noisy examples.
            shard: the own part of the data.
            missing_mass: posterior mass that may be dropped.
        """
        query = self.projection(examples.x_t, examples.alpha)
        energy = query[:, :0]
        if self.screen is not None:
            energy = self.screen.energies(query, examples.alpha, examples.level)
        error = rounding_bound(query, examples.alpha, self.widest)
        inside = yield from likely(energy, examples.sigma, error, missing_mass, len(self.indices), shard)
        return energy, inside

    def holds(self, inside: Bool[Tensor, "B n"], position: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """True where own data points are among those inside.

        Args:
            inside: mask of the data points in order of isolation.
            position: the data points, in pool order; -1 if not own.
        """
        found = torch.zeros(len(inside), dtype=torch.bool, device=inside.device)
        if self.screen is not None:
            own = (position >= 0).nonzero().flatten()
            place = self.screen.position[torch.searchsorted(self.screen.indices, position[own])]
            own, place = move(own, inside.device), move(place, inside.device)
            found[own] = inside[own, place]
        return found

    def blocks(
        self, mask: Bool[Tensor, "b n"], wanted: Int[Tensor, "w"], everyone: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Blocks of stored data points, masks of the examples that may use them (None: all), and squared norms.

        Few data points are picked out, many are streamed as they are stored.

        Args:
            mask: data points that each example may use, in order of isolation.
            wanted: those that at least one example may use, on the CPU.
            everyone: number of true entries of the mask.
            size: data points per block.
        """
        assert self.screen is not None
        blocks: Iterable[Tensor]
        device = mask.device
        if len(wanted) < MOST_DATA * len(self.screen):
            position = self.screen.order[wanted]
            blocks = (move(self.own.stored(part), device) for part in self.screen.indices[position].split(size))
            allowed, square = mask[:, move(wanted, device)], self.screen.square[move(position, device)]
        else:
            blocks = (move(block, device) for block in self.own.stored_blocks(self.label, size))
            allowed, square = self.screen.in_pool_order(mask), self.screen.square
        masks = [None] * -(-len(square) // size) if everyone == allowed.numel() else allowed.split(size, 1)
        yield from zip(blocks, masks, square.split(size), strict=True)


def cell_means(
    examples: Examples, known: Class, shard: Shard, missing_mass: float
) -> Task[tuple[Int[Tensor, "s"], Posterior]]:
    """Means over the data points that may matter to each example, without those of `missing_mass`.

    Args:
        examples: noisy examples of the class.
        known: the class.
        shard: the part of the data that this process holds.
        missing_mass: posterior mass that may be dropped, on average over noisy data.

    Returns:
        The examples whose means are over their cells, on the CPU, and the posteriors of all examples. Those of the
        others mean nothing. If the sources are known, the others are those whose sources are cells of their own; if
        not, those whose x_t are too far from all candidates to come from any of them.
    """
    query = Query.of(examples, known.affine, known.projection.centre)
    ways = 0 if known.screen is None else 1 if known.in_int8 else 2
    rounding, digits = torch.full_like(examples.level, math.inf), torch.zeros(len(examples.level), dtype=torch.int64)
    if known.screen is not None and (known.in_int8 or query.narrow != torch.float64):
        rounding, digits = yield [query.rounding(known.screen.square), query.digits(known.screen.square)]
    facts, masks = list[Tensor](), [list[Tensor]() for _ in range(ways)]
    part_size = max(1, SCREENED_AT_ONCE // len(known.indices))
    for part in torch.arange(len(examples.level)).split(part_size):
        some = examples.select(part)
        energy, inside = yield from known.survivors(some, shard, missing_mass)
        here = count_true(inside) if some.position is None else known.holds(inside, some.position).long()
        facts.append(torch.stack([here, count_true(inside)]))
        by_way = () if not ways else (inside,) if known.in_int8 else _by_precision(energy, inside, rounding[part])
        for found, mask in zip(masks, by_way, strict=True):
            found.append(mask)
    has_source, count = shard.sum(torch.cat(facts, 1)).unbind(0)
    stacked = []
    for found in masks:
        stacked.append(_stack(found))
        found.clear()  # free the parts before the sums are computed
    has_source, count, *counts = yield [has_source, count, *map(count_true, stacked)]
    shared = (has_source > 0) & (count > (0 if examples.position is None else 1))
    counts = [each.where(shared, 0) for each in counts]
    groups = [list(_together(each, len(known.screen or ()), len(query.centre))) for each in counts]
    unions = yield [_unions(mask, some) for mask, some in zip(stacked, groups, strict=True)]
    sums = query.accumulator()
    for way, mask in enumerate(stacked):
        sums.merge(_sums(query, mask, known, counts[way], groups[way], unions[way], digits, precise=way == 0))
    sums = shard.merge(sums)
    if examples.position is None:
        (distance,) = yield [query.squared_distance(sums)]
        shared &= distance <= _farthest(len(query.centre), missing_mass)
    return shared.nonzero().flatten(), query.posterior(sums)


def _by_precision(
    energy: Float[Tensor, "B n"], inside: Bool[Tensor, "B n"], rounding: Float[Tensor, "B"]
) -> tuple[Bool[Tensor, "B n"], Bool[Tensor, "B n"]]:
    """The data points inside that are multiplied in float64, and those that are multiplied in float32."""
    in_float64 = _heaviest(energy, inside, rounding)
    return in_float64, inside & ~in_float64


def _unions(mask: Bool[Tensor, "B n"], groups: Sequence[Int[Tensor, "_"]]) -> Bool[Tensor, "G n"]:
    """Data points that at least one example of each group may use."""
    found = mask.new_empty(len(groups), mask.shape[1])
    for row, group in zip(found, groups, strict=True):
        # as bytes, many times faster than any()
        torch.amax(mask[move(group, mask.device)].view(torch.uint8), 0, out=row.view(torch.uint8))
    return found


def _sums(
    query: Query,
    mask: Bool[Tensor, "B n"],
    known: Class,
    count: Int[Tensor, "B"],
    groups: Sequence[Int[Tensor, "_"]],
    unions: Bool[Tensor, "G n"],
    digits: Int[Tensor, "B"],
    *,
    precise: bool,
) -> PosteriorAccumulator:
    """Sums over the data points of a mask, for groups of examples one after the other.

    Args:
        query: the examples.
        mask: the data points that each may use, in order of isolation.
        known: the class.
        count: number of true entries of each row of the mask, on the CPU.
        groups: the examples that are summed together, on the CPU.
        unions: data points that at least one example of each group may use, on the CPU.
        digits: number of digits that each example needs, on the CPU.
        precise: float64 products for data points that are not multiplied as bytes.
    """
    found = query.accumulator()
    for group, union in zip(groups, unions, strict=True):
        some, width = query.select(group), 8
        if known.in_int8:
            sums, width = some.int8_accumulator(int(digits[group].max())), known.own.data.itemsize
        else:
            sums = some.accumulator() if precise else some.accumulator(query.narrow)
        on_device, wanted = move(group, mask.device), union.nonzero().flatten()
        size, everyone = chunk_size(some.x_t, width=width), int(count[group].sum())
        for block, allowed, square in known.blocks(mask[on_device], wanted, everyone, size):
            sums.add(block.flatten(1), allowed, square / query.scale**2)
        found.put(on_device, sums)
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
    found = inside & ~move(rounding < 1e-6, inside.device)[:, None]
    some = ((rounding >= 1e-6) & (rounding <= 1e-5)).nonzero().flatten()
    if energy.shape[1] > HEAVIEST and len(some):
        some = move(some, inside.device)
        heaviest = energy[some].topk(HEAVIEST, largest=False).indices
        found[some] &= torch.zeros_like(found[some]).scatter_(1, heaviest, True)
    return found


def _together(count: Int[Tensor, "B"], data_points: int, dim: int) -> Iterator[Int[Tensor, "b"]]:
    """Split examples into groups that are worth summing together.

    Examples with many candidates share a pass over all data, those with few are summed in groups of eight, and the
    others one by one.
    Small data are streamed for all examples together, because a pass for each would cost more.
    """
    if data_points * dim <= SMALL_DATA:
        many = count > 0
    else:
        many = count > JOINING * data_points
        many &= count[many].sum() > MOST_DATA * data_points
    few = (count > 0) & (count <= FEW_CANDIDATES) & ~many
    some = (count > FEW_CANDIDATES) & ~many
    yield from filter(len, [many.nonzero().flatten(), *few.nonzero().flatten().split(8), *some.nonzero()])


def _farthest(dim: int, missing_mass: float) -> float:
    """Squared distance of x_t from alpha times its source, in units of sigma squared, that is almost never exceeded.

    A chi-squared number of D degrees of freedom exceeds D + 2 sqrt(D u) + 2 u with probability at most exp(-u)
    (Laurent & Massart 2000).
    """
    u = -math.log(missing_mass)
    return dim + 2 * math.sqrt(dim * u) + 2 * u
