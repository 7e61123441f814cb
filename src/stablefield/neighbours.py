"""How far each member of a data set is from its nearest others, and the noise below which that settles everything.

For a source s and x_t = alpha x_s + sigma noise, the weight of another member j at distance d is

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

from stablefield.products import full_precision, integer_product, multiplies_bytes, signed
from stablefield.reference import ALL, Pool

Seen = tuple[Tensor, Tensor]
Progress = Callable[[int, int], None]  # (done, of how many)


@full_precision()
def nearest(
    pool: Pool,
    label: int = ALL,
    *,
    k: int = 16,
    block: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Float[Tensor, "m k"]:
    """Distances from each member of a class to its k nearest others, ascending, in float64.

    All pairs, a square of blocks at a time, each pair once: half of 2 m^2 D operations, in float32, or for bytes in
    integers. They choose the candidates; the distances of those are then measured exactly, by float64 differences. What
    rounding may have passed over is bounded: the last column is lowered by as much, and no other member is nearer than
    it.

    Args:
        pool: the data; they are decoded block by block, so that they may be larger than memory.
        label: the class whose members count, each of them a row, in the order of `pool.members`; -1: all.
        k: neighbours to measure; fewer where the class has fewer, none in a class of one.
        block: members a block.
        device: where to compute.
        progress: told (pairs of blocks done, of how many).
    """
    members = pool.members(label)
    k = min(k, len(members) - 1)
    parts = members.split(block)
    best = torch.full((len(members), k), math.inf, device=device)
    where = torch.zeros(len(members), k, dtype=torch.int64, device=device)
    pairs, done = _pairs(pool, parts, device), 0
    for i, rows in enumerate(parts):
        x = pairs.see(rows)
        for j, columns in enumerate(parts[: i + 1]):
            square = pairs.squares(x, x if i == j else pairs.see(columns))
            if i == j:
                square.fill_diagonal_(math.inf)
            else:
                _keep_nearest(best, where, j * block, square.T.contiguous(), i * block)
            _keep_nearest(best, where, i * block, square, j * block)
            progress(done := done + 1, len(parts) * (len(parts) + 1) // 2)
    exact = best.double()
    for part, near in _rows(where):
        exact[part] = _measured(pool, members, part, near, device)
    if 0 < k < len(members) - 1:
        exact[:, -1] = torch.minimum(exact[:, -1], pairs.at_least(best[:, -1].double()).sqrt())
    return exact.cpu()


def isolation(distances: Float[Tensor, "m k"], others: int, lost: float, steps: int = 50) -> Float[Tensor, "m"]:
    """The level sigma / alpha up to which each member is isolated: a source there is all but certain to be recognised.

    Below it, sum_j 2 Phi(-a_j / 2) <= lost: with x_t made from this member, all others together have no more than
    that of the posterior, on average over the noise. The members beyond the k nearest count as if they were at the
    k-th's distance. 0 for a member that has a duplicate; infinite for one that has no others.

    Args:
        distances: to the k nearest others; no further one is nearer than the last says.
        others: how many others there are, m - 1.
        lost: the share of the posterior that may be overlooked.
    """
    if distances.shape[1] == 0:
        return torch.full((len(distances),), math.inf, dtype=torch.float64)
    count = torch.ones(distances.shape[1], dtype=torch.float64)
    count[-1] += others - len(count)
    # in units of the nearest distance, where a member of many equally near others has the lowest level there is
    least = distances.double().amin(1)
    unit = distances / least[:, None].clamp(min=1e-300)
    low = torch.full((len(unit),), 0.5 / _quantile(lost / (2 * others)), dtype=torch.float64)
    high = torch.full_like(low, 0.5 / _quantile(lost / 2))
    for _ in range(steps):
        middle = (low + high) / 2
        mass = (torch.erfc(unit / (8**0.5 * middle[:, None])) * count).sum(1)  # 2 Phi(-z) = erfc(z / sqrt 2)
        low, high = torch.where(mass <= lost, middle, low), torch.where(mass <= lost, high, middle)
    return low * least


def keep_least(
    best: Float[Tensor, "B j"], where: Int[Tensor, "B j"], new: Float[Tensor, "B n"], first: int, k: int
) -> tuple[Float[Tensor, "B i"], Int[Tensor, "B i"]]:
    """The k least numbers of each row so far and where they stood, once more numbers have come.

    Args:
        first: where the first of the new ones stands.
    """
    position = torch.arange(first, first + new.shape[1], device=new.device).expand_as(new)
    both = torch.cat([best, new], 1)
    best, kept = both.topk(min(k, both.shape[1]), largest=False)
    return best, torch.cat([where, position], 1).gather(1, kept)


def _quantile(p: float) -> float:
    """The z that a standard normal exceeds with probability p."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / 2**0.5) / 2 > p else (low, middle)
    return high


class _Pairs(ABC):
    """Squared distances between blocks of members, each seen once and compared with many."""

    @abstractmethod
    def see(self, members: Int[Tensor, "n"]) -> Seen:
        """What is compared of members, and their squared norms."""

    @abstractmethod
    def squares(self, x: Seen, y: Seen) -> Float[Tensor, "a b"]:
        """In float32, of all pairs."""

    @abstractmethod
    def at_least(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        """What squares are without rounding, at least; not below 0."""


class _Floats(_Pairs):
    """In float32, around the mean: distances do not change, but the rounding of the products does."""

    def __init__(self, pool: Pool, parts: Sequence[Tensor], device: torch.device | str) -> None:
        self.pool, self.device, self.largest = pool, device, torch.zeros((), device=device)
        total = torch.zeros(math.prod(pool.shape), dtype=torch.float64, device=device)
        for part in parts:
            total += self._flat(part).sum(0, dtype=torch.float64)
        self.centre = (total / sum(map(len, parts))).float()

    def see(self, members: Int[Tensor, "n"]) -> Seen:
        x = self._flat(members) - self.centre
        norm = x.square().sum(1)
        self.largest = torch.maximum(self.largest, norm.max())
        return x, norm

    def squares(self, x: Seen, y: Seen) -> Float[Tensor, "a b"]:
        return torch.addmm(x[1][:, None] + y[1], x[0], y[0].T, alpha=-2)

    def at_least(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        # |fl(<x, y>) - <x, y>| <= D 2^-24 |x| |y|, and the norms and the sum round no worse
        return (square - 4 * math.prod(self.pool.shape) * 2.0**-24 * float(self.largest)).clamp(min=0)

    def _flat(self, members: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        return self.pool.take(members).flatten(1).to(self.device, torch.float32)


class _Bytes(_Pairs):
    """In integers: exact, but for the way to float32."""

    LONGEST = 2**15  # numbers in a member such that any squared distance fits 32 bits

    def __init__(self, pool: Pool, device: torch.device | str) -> None:
        self.pool, self.device = pool, device

    def see(self, members: Int[Tensor, "n"]) -> Seen:
        stored = self.pool.stored(members).flatten(1)
        x = signed(stored, torch.empty_like(stored, device=self.device))
        return x, x.int().square_().sum(1, dtype=torch.int32)

    def squares(self, x: Seen, y: Seen) -> Float[Tensor, "a b"]:
        square = integer_product(x[0], y[0].T).mul_(-2).add_(x[1][:, None]).add_(y[1])
        return square.float().mul_(self.pool.affine[0] ** 2)

    def at_least(self, square: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        return square * (1 - 2.0**-22)


def _pairs(pool: Pool, parts: Sequence[Tensor], device: torch.device | str) -> _Pairs:
    bytes_ = pool.data.dtype == torch.uint8 and math.prod(pool.shape) <= _Bytes.LONGEST
    return _Bytes(pool, device) if bytes_ and multiplies_bytes(torch.device(device)) else _Floats(pool, parts, device)


def _keep_nearest(best: Tensor, where: Tensor, row: int, square: Float[Tensor, "a b"], column: int) -> None:
    """Let a square of distances pass: members row .. row + a against members column .. column + b."""
    found, at = square.topk(min(best.shape[1], square.shape[1]), largest=False)
    mine = slice(row, row + len(square))
    found, at = torch.cat([best[mine], found], 1), torch.cat([where[mine], at + column], 1)
    best[mine], kept = found.topk(best.shape[1], largest=False)
    where[mine] = at.gather(1, kept)


def _rows(where: Int[Tensor, "m k"], size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.arange(len(where)).split(size), where.split(size), strict=True)


def _measured(pool: Pool, members: Tensor, rows: Tensor, near: Tensor, device: torch.device | str) -> Tensor:
    """Distances to the candidates by differences in float64, ascending."""
    x = pool.take(members[rows]).flatten(1).to(device, torch.float64)
    found = []
    for column in near.unbind(1):
        y = pool.take(members[column.cpu()]).flatten(1).to(device, torch.float64)
        found.append(torch.linalg.vector_norm(y.sub_(x), dim=1))
    return torch.stack(found, 1).sort(1).values if found else x.new_zeros(len(x), 0)
