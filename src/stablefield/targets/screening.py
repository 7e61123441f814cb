"""Screening: which data points can matter to an example, found in a few coordinates.

Let P project onto a few orthonormal directions. Seen through P, the source is distributed as the posterior over the
projected data, because the noise of P x_t is normal and independent of the rest:

    P(source = j | P x_t) = q_j,      log q_j = -||P x_t - alpha P x_j||^2 / (2 sigma^2)   (then softmax over j)

Let S be any set that depends on P x_t alone. By the tower property, the posterior mass outside S is on average

    E[ sum_{j not in S} w_j | P x_t ] = P(source not in S | P x_t) = sum_{j not in S} q_j

whatever P is. So the set S of the data points with the largest q, such that the others have at most `missing_mass` of
it, drops no more than that of the posterior on average, and is found with m k operations instead of m D. A projection
onto directions in which the data vary most leaves few data points in S; how few is all that its quality decides.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.pool import Pool
from stablefield.process import move
from stablefield.seeding import generator
from stablefield.targets.lockstep import Task
from stablefield.targets.shard import Shard

CLOSER = (1 / 64, 1 / 2)  # of the data points: if a share between these is left, it pays to drop more by summed mass
SETUP_BLOCK = 128  # data points that are projected together, such that they stay in a cache
BINS = 128  # of half a nat, in which their mass is summed


@dataclass(frozen=True, eq=False)
class Projection:
    """Orthonormal directions in which data vary, around a centre.

    Attributes:
        centre: subtracted from the data first, so that products are small and round little, (D,).
        basis: the directions, one per column, (D, k).
    """

    centre: Float[Tensor, "D"]
    basis: Float[Tensor, "D k"]

    def __call__(self, x: Float[Tensor, "n *D"], alpha: Float[Tensor, "n"] | float = 1.0) -> Float[Tensor, "n k"]:
        """Coordinates of x around alpha times the centre.

        Args:
            x: data or noisy data.
            alpha: scale of the data in x.
        """
        return self.centred(x, alpha) @ self.basis

    def centred(self, x: Float[Tensor, "n *D"], alpha: Float[Tensor, "n"] | float = 1.0) -> Float[Tensor, "n D"]:
        """x, flattened, minus alpha times the centre.

        Args:
            x: data or noisy data.
            alpha: scale of the data in x.
        """
        share = torch.as_tensor(alpha, dtype=torch.float32, device=x.device).reshape(-1, 1)
        return torch.addcmul(x.flatten(1).float(), share, self.centre, value=-1)

    def to(self, device: torch.device) -> "Projection":
        """The projection on another device.

        Args:
            device: where to move it.
        """
        return Projection(self.centre.to(device), self.basis.to(device))


def principal_directions(pool: Pool, dims: int, *, data_points: int = 4096, rounds: int = 3) -> Projection:
    """Approximately the directions of largest variance: subspace iteration over a part of the data.

    Args:
        pool: the data.
        dims: number of directions; data of no more dimensions than that are only rotated.
        data_points: how many to look at, evenly spread over the data.
        rounds: iterations; three are enough for all but the last directions.
    """
    chosen = torch.linspace(0, len(pool) - 1, min(data_points, len(pool)), dtype=torch.float64).round().long()
    x = pool.take(chosen).flatten(1).float()
    centre = x.mean(0)
    x -= centre
    basis = torch.randn(x.shape[1], min(dims, x.shape[1]), generator=generator(0, "projection")).to(x.device)
    for _ in range(rounds):
        basis = torch.linalg.qr((x.T @ (x @ basis)).double()).Q.float()
    return Projection(centre, basis)


@dataclass(frozen=True, eq=False)
class Screen:
    """The data points of a class as a projection sees them, in ascending order of their isolation level.

    Attributes:
        projection: the coordinates.
        indices: the class, as the pool gives it, ascending, (m,).
        order: positions in `indices`, by ascending isolation level, (m,).
        position: of each data point in that order, (m,).
        level: noise level sigma / alpha up to which each is isolated, in that order, on the CPU, (m,).
        coordinates: of each data point, and their squared norm, in that order, (m, k + 1).
        square: squared distance of each data point from the centre, in all dimensions, in the order of the pool, (m,).
    """

    projection: Projection
    indices: Int[Tensor, "m"]
    order: Int[Tensor, "m"]
    position: Int[Tensor, "m"]
    level: Float[Tensor, "m"]
    coordinates: Float[Tensor, "m _"]
    square: Float[Tensor, "m"]

    @classmethod
    def of(cls, pool: Pool, indices: Int[Tensor, "m"], projection: Projection, level: Float[Tensor, "m"]) -> "Screen":
        """Project data points of a pool once, on the device of the projection.

        Args:
            pool: the data.
            indices: which data points, ascending.
            projection: the coordinates.
            level: isolation level of each, in the order of `indices`.
        """
        level, order = level.sort(stable=True)
        device, (scale, shift) = projection.centre.device, pool.affine
        coordinates = projection.basis.new_empty(len(indices), projection.basis.shape[1] + 1)
        square = coordinates.new_empty(len(indices), dtype=torch.float64)
        # into memory of their own at once: small results kept between large blocks would fragment memory
        for start in range(0, len(indices), SETUP_BLOCK):
            some = slice(start, start + SETUP_BLOCK)
            # in float64: at small sigma, the float32 rounding of a byte's value is too much for a squared norm
            block = move(pool.stored(indices[some]), device).flatten(1).to(torch.float64, copy=True)
            coordinates[some, :-1] = projection(block.mul_(scale).add_(shift))
            square[some] = block.sub_(projection.centre).square_().sum(1)
        coordinates[:, -1] = coordinates[:, :-1].square().sum(1)
        ordered = coordinates[move(order, device)]
        return cls(projection, indices, order, order.argsort(), level, ordered, square)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def widest(self) -> float:
        """The largest norm of the coordinates."""
        return float(self.coordinates[:, -1].max().sqrt())

    def in_pool_order(self, mask: Bool[Tensor, "B n"]) -> Bool[Tensor, "B m"]:
        """A mask over the first n data points in order as a mask over all in the order of the pool.

        Args:
            mask: over the first data points by isolation level; the others are excluded.
        """
        rest = mask.new_zeros(len(mask), len(self) - mask.shape[1])
        return torch.cat([mask, rest], 1)[:, move(self.position, mask.device)]

    def energies(
        self, query: Float[Tensor, "B k"], alpha: Float[Tensor, "B"], level: Float[Tensor, "B"]
    ) -> Float[Tensor, "B n"]:
        """Projected energies of the n first data points in order, those not isolated for at least one example.

        Infinite where a data point is isolated at the example's noise level.

        Args:
            query: coordinates of x_t.
            alpha: scales of the data in x_t.
            level: noise levels sigma / alpha in float64, on the CPU.
        """
        active = torch.searchsorted(self.level, level, right=True)
        factor = alpha.float()[:, None]
        energy = torch.cat([-2 * factor * query, factor.square()], 1) @ self.coordinates[: int(active.max())].T
        for row, first in zip(energy, active.tolist(), strict=True):
            if first < len(row):
                row[first:] = math.inf  # a mask for all of them would take as long as the product
        return energy


def rounding_bound(query: Float[Tensor, "B k"], alpha: Float[Tensor, "B"], widest: float) -> Float[Tensor, "B"]:
    """Largest error of projected energies, whose products are float32.

    Args:
        query: coordinates of x_t.
        alpha: scales of the data in x_t.
        widest: largest norm of the data's coordinates.
    """
    farthest = alpha.float() * widest
    return 2.0**-22 * query.shape[1] * farthest * (query.norm(dim=1) + farthest)


def likely(
    energy: Float[Tensor, "B n"],
    sigma: Float[Tensor, "B"],
    error: Float[Tensor, "B"],
    missing_mass: float,
    total: int,
    shard: Shard,
) -> Task[Bool[Tensor, "B n"]]:
    """Mask of the data points to keep, such that all others together have at most `missing_mass` of q.

    First, data points with less than missing_mass / m of the largest q are dropped. If a good part is left, but not
    most, the masses are summed from the smallest on to find how many more can be dropped.

    With energies off by at most r, and s = 2 r / (2 sigma^2), the share of data points in q is at most exp(s) times its
    computed value.

    Args:
        energy: projected energies of the data points that this process holds, possibly none; infinite ones are dropped.
        sigma: noise levels.
        error: r, the largest error of the energies.
        missing_mass: a share of q, below 1.
        total: number of data points m over all processes.
        shard: this process's part of them.
    """
    sharpness = (0.5 / sigma.double().square()).clamp(1e-30, 1e30).float()
    slack = 2 * error * sharpness
    least = shard.minimum(energy.amin(1) if energy.shape[1] else torch.full_like(error, math.inf))
    limit = least + ((slack - math.log(missing_mass / total)) / sharpness).clamp(max=1e30)
    inside = energy <= limit[:, None]
    (count,) = yield [shard.sum(count_true(inside))]
    closer = ((count > CLOSER[0] * total) & (count < CLOSER[1] * total)).nonzero().flatten()
    if len(closer):
        closer = move(closer, energy.device)
        nats = (energy[closer] - least[closer, None]).mul_(sharpness[closer, None])
        inside[closer] &= _likeliest(nats, missing_mass * torch.exp(-slack[closer]), shard)
    return inside


def count_true(mask: Bool[Tensor, "B n"]) -> Int[Tensor, "B"]:
    """Number of true entries in each row.

    Args:
        mask: any mask.
    """
    # bytes are summed faster than bools; but all of them are copied to be summed in a wider type, so in parts
    return torch.cat([part.sum(1, dtype=torch.int32) for part in mask.view(torch.uint8).split(32)]).long()


def _likeliest(nats: Float[Tensor, "B n"], missing_mass: Float[Tensor, "B"], shard: Shard) -> Bool[Tensor, "B n"]:
    """Mask of about the fewest data points that leave at most `missing_mass` to the others.

    Args:
        nats: negative log of each mass relative to the largest.
        missing_mass: of each example.
        shard: this process's part of the data.
    """
    place = (nats * 2).clamp_(0, BINS - 1).long()
    # subnormal numbers (beyond 80) are slow; float32 would lose a part of a sum of millions
    mass = torch.exp(-nats.clamp_(max=80)).double()
    mass = shard.sum(mass.new_zeros(len(nats), BINS).scatter_add_(1, place, mass))
    # of each bin and those beyond; in deterministic mode a GPU has no cumsum of floating-point numbers
    tail = mass @ mass.new_ones(BINS, BINS).tril()
    return place < (tail > missing_mass[:, None] * tail[:, :1]).sum(1, keepdim=True)
