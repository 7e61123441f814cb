"""Distances from each data point to its nearest others, and the noise levels up to which it is isolated.

For a source s and x_t = alpha x_s + sigma noise, the weight of another data point j at distance d satisfies

    log (w_j / w_s) ~ Normal(-a^2 / 2, a^2),      a = alpha d / sigma

so E min(1, w_j / w_s) = 2 Phi(-a / 2), and the posterior mass outside the source is at most sum_j 2 Phi(-a_j / 2) on
average over the noise. This depends on the data and on sigma / alpha alone: it is known before anything is drawn.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.matmul import full_precision, has_int8_matmul, int8_matmul, to_int8
from stablefield.pool import NULL_LABEL, Pool

__all__ = ["isolation_level", "keep_smallest", "nearest_distances"]

Encoded = tuple[Tensor, Tensor]  # data points as they are multiplied, and their squared norms
Progress = Callable[[int, int], None]  # (done, total)


@full_precision()
def nearest_distances(
    pool: Pool,
    label: int = NULL_LABEL,
    *,
    k: int = 16,
    block: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Float[Tensor, "m k"]:
    """Distances from each data point of a class to its k nearest others, ascending, in float64.

    All pairs are compared, a square of blocks at a time, each pair once: half of 2 m^2 D operations, in float32 or, for
    bytes, in integers. That selects the candidates, whose distances are then measured by float64 differences. What
    rounding may have missed is bounded: the last column is lowered by as much, and no other data point is nearer than
    it.

    Args:
        pool: the data; decoded block by block, so that they may be larger than memory.
        label: the class; all data for `NULL_LABEL`. Each of its data points has a row, in the order of `pool.indices`.
        k: number of neighbours; fewer where the class has fewer, none in a class of one.
        block: data points per block.
        device: where to compute.
        progress: called with (pairs of blocks done, total).
    """
    indices = pool.indices(label)
    k = min(k, len(indices) - 1)
    parts = indices.split(block)
    best = torch.full((len(indices), k), math.inf, device=device)
    where = torch.zeros(len(indices), k, dtype=torch.int64, device=device)
    pairs, done = _pairs(pool, parts, device), 0
    for i, rows in enumerate(parts):
        x = pairs.encode(rows)
        for j, columns in enumerate(parts[: i + 1]):
            square = pairs.squared_distances(x, x if i == j else pairs.encode(columns))
            if i == j:
                square.fill_diagonal_(math.inf)
            else:
                _keep_nearest(best, where, j * block, square.T.contiguous(), i * block)
            _keep_nearest(best, where, i * block, square, j * block)
            progress(done := done + 1, len(parts) * (len(parts) + 1) // 2)
    exact = best.double()
    for part, near in _parts(where):
        exact[part] = _measure(pool, indices, part, near, device)
    if 0 < k < len(indices) - 1:
        exact[:, -1] = torch.minimum(exact[:, -1], pairs.lower_bound(best[:, -1].double()).sqrt())
    return exact.cpu()


def isolation_level(
    distances: Float[Tensor, "m k"], others: int, missing_mass: float, steps: int = 50
) -> Float[Tensor, "m"]:
    """Noise level sigma / alpha up to which each data point is isolated, so that as a source it has almost all mass.

    Below it, sum_j 2 Phi(-a_j / 2) <= missing_mass: with x_t made from this data point, all others together have at
    most that posterior mass, on average over the noise. Those beyond the k nearest count as if they were at the k-th's
    distance. The level is 0 for a data point with a duplicate, and infinite for one without others.

    Args:
        distances: distances to the k nearest others, ascending; all further ones are at least at the last column's.
        others: number of others, m - 1.
        missing_mass: posterior mass that may be dropped.
        steps: number of bisections.
    """
    if distances.shape[1] == 0:
        return torch.full((len(distances),), math.inf, dtype=torch.float64)
    count = torch.ones(distances.shape[1], dtype=torch.float64)
    count[-1] += others - len(count)
    # in units of the nearest distance, in which the level is lowest if all others are equally near, highest if one is
    least = distances.double().amin(1)
    ratio = distances / least[:, None].clamp(min=1e-300)
    low = torch.full((len(ratio),), 0.5 / _quantile(missing_mass / (2 * others)), dtype=torch.float64)
    high = torch.full_like(low, 0.5 / _quantile(missing_mass / 2))
    for _ in range(steps):
        middle = (low + high) / 2
        mass = (torch.erfc(ratio / (8**0.5 * middle[:, None])) * count).sum(1)  # 2 Phi(-z) = erfc(z / sqrt 2)
        low, high = torch.where(mass <= missing_mass, middle, low), torch.where(mass <= missing_mass, high, middle)
    return low * least


def keep_smallest(
    best: Float[Tensor, "B j"], where: Int[Tensor, "B j"], new: Float[Tensor, "B n"], first: int, k: int
) -> tuple[Float[Tensor, "B i"], Int[Tensor, "B i"]]:
    """The k smallest numbers of each row and their positions, after more numbers have arrived.

    Args:
        best: the smallest numbers so far.
        where: their positions.
        new: the new numbers.
        first: position of the first new number.
        k: how many to keep.
    """
    position = torch.arange(first, first + new.shape[1], device=new.device).expand_as(new)
    both = torch.cat([best, new], 1)
    best, kept = both.topk(min(k, both.shape[1]), largest=False)
    return best, torch.cat([where, position], 1).gather(1, kept)


def _quantile(p: float) -> float:
    """The z that a standard normal variable exceeds with probability p."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / 2**0.5) / 2 > p else (low, middle)
    return high


class _Pairs(ABC):
    """Squared distances between blocks of data points, each encoded once and compared with many."""

    @abstractmethod
    def encode(self, indices: Int[Tensor, "n"]) -> Encoded:
        """Data points as they are multiplied, and their squared norms."""

    @abstractmethod
    def squared_distances(self, x: Encoded, y: Encoded) -> Float[Tensor, "a b"]:
        """Squared distances of all pairs, in float32."""

    @abstractmethod
    def lower_bound(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        """Lower bounds of the exact squared distances, given computed ones; at least 0."""


class _FloatPairs(_Pairs):
    """Products in float32 around the mean: distances do not change, but the rounding of the products does."""

    def __init__(self, pool: Pool, parts: Sequence[Tensor], device: torch.device | str) -> None:
        self.pool, self.device, self.largest = pool, device, torch.zeros((), device=device)
        total = torch.zeros(math.prod(pool.shape), dtype=torch.float64, device=device)
        for part in parts:
            total += self._flat(part).sum(0, dtype=torch.float64)
        self.centre = (total / sum(map(len, parts))).float()

    @override
    def encode(self, indices: Int[Tensor, "n"]) -> Encoded:
        x = self._flat(indices) - self.centre
        norm = x.square().sum(1)
        self.largest = torch.maximum(self.largest, norm.max())
        return x, norm

    @override
    def squared_distances(self, x: Encoded, y: Encoded) -> Float[Tensor, "a b"]:
        return torch.addmm(x[1][:, None] + y[1], x[0], y[0].T, alpha=-2)

    @override
    def lower_bound(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        # |fl(<x, y>) - <x, y>| <= D 2^-24 |x| |y|, and the norms and the sum round no worse
        return (square - 4 * math.prod(self.pool.shape) * 2.0**-24 * float(self.largest)).clamp(min=0)

    def _flat(self, indices: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        return self.pool.take(indices).flatten(1).to(self.device, torch.float32)


class _BytePairs(_Pairs):
    """Products in integers: exact, except for the conversion to float32."""

    MAX_DIMENSIONS = 2**15  # such that any squared distance fits 32 bits

    def __init__(self, pool: Pool, device: torch.device | str) -> None:
        self.pool, self.device = pool, device

    @override
    def encode(self, indices: Int[Tensor, "n"]) -> Encoded:
        stored = self.pool.stored(indices).flatten(1)
        x = to_int8(stored, torch.empty_like(stored, device=self.device))
        return x, x.int().square_().sum(1, dtype=torch.int32)

    @override
    def squared_distances(self, x: Encoded, y: Encoded) -> Float[Tensor, "a b"]:
        square = int8_matmul(x[0], y[0].T).mul_(-2).add_(x[1][:, None]).add_(y[1])
        return square.float().mul_(self.pool.affine[0] ** 2)

    @override
    def lower_bound(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        return square * (1 - 2.0**-22)


def _pairs(pool: Pool, parts: Sequence[Tensor], device: torch.device | str) -> _Pairs:
    fits = pool.data.dtype == torch.uint8 and math.prod(pool.shape) <= _BytePairs.MAX_DIMENSIONS
    return (
        _BytePairs(pool, device) if fits and has_int8_matmul(torch.device(device)) else _FloatPairs(pool, parts, device)
    )


def _keep_nearest(best: Tensor, where: Tensor, row: int, square: Float[Tensor, "a b"], column: int) -> None:
    """Take in distances between data points row .. row + a and column .. column + b."""
    found, at = square.topk(min(best.shape[1], square.shape[1]), largest=False)
    mine = slice(row, row + len(square))
    found, at = torch.cat([best[mine], found], 1), torch.cat([where[mine], at + column], 1)
    best[mine], kept = found.topk(best.shape[1], largest=False)
    where[mine] = at.gather(1, kept)


def _parts(where: Int[Tensor, "m k"], size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.arange(len(where)).split(size), where.split(size), strict=True)


def _measure(pool: Pool, indices: Tensor, rows: Tensor, near: Tensor, device: torch.device | str) -> Tensor:
    """Distances to the candidates by differences in float64, ascending."""
    x = pool.take(indices[rows]).flatten(1).to(device, torch.float64)
    found = []
    for column in near.unbind(1):
        y = pool.take(indices[column.cpu()]).flatten(1).to(device, torch.float64)
        found.append(torch.linalg.vector_norm(y.sub_(x), dim=1))
    return torch.stack(found, 1).sort(1).values if found else x.new_zeros(len(x), 0)
