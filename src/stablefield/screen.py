"""Which members could matter to a row, found in a few coordinates.

Let P project onto a few orthonormal directions. Seen through P, the source is distributed as the posterior over the
projected members, because the noise of P x_t is normal and independent of the rest:

    P(source = j | P x_t) = q_j,      log q_j = -||P x_t - alpha P x_j||^2 / (2 sigma^2)   (then softmax over j)

Let S be any set that is chosen by P x_t alone. By the tower property, what the posterior has outside S is on average

    E[ sum_{j not in S} w_j | P x_t ] = P(source not in S | P x_t) = sum_{j not in S} q_j

whatever P is. So S of the members with the largest q, as many as leave no more than `lost` of it to the others, loses
no more than that of the posterior, on average, and is found with m k operations instead of m D. A projection onto
directions in which the data vary most leaves few members in S; how few is all that its quality decides.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.reference import Pool
from stablefield.seeding import generator
from stablefield.shards import Shards

CLOSER = (1 / 64, 1 / 2)  # of the members: where so many are left, it pays to look for more that can go
BINS = 128  # of half a nat, in which their mass is added up


@dataclass(frozen=True, eq=False)
class Projection:
    """Orthonormal directions in which data vary, around a centre.

    Attributes:
        centre: taken from the data first, so that products are small and round little.
        basis: the directions, a column each.
    """

    centre: Float[Tensor, "D"]
    basis: Float[Tensor, "D k"]

    def __call__(self, x: Float[Tensor, "n *D"], alpha: Float[Tensor, "n"] | float = 1.0) -> Float[Tensor, "n k"]:
        """Coordinates of x around alpha times the centre."""
        return self.around(x, alpha) @ self.basis

    def around(self, x: Float[Tensor, "n *D"], alpha: Float[Tensor, "n"] | float = 1.0) -> Float[Tensor, "n D"]:
        """x, flattened, without alpha times the centre."""
        share = torch.as_tensor(alpha, dtype=torch.float32, device=x.device).reshape(-1, 1)
        return torch.addcmul(x.flatten(1).float(), share, self.centre, value=-1)

    def square(self, x: Float[Tensor, "n *D"]) -> Float[Tensor, "n"]:
        """Squared distances from the centre, in float64."""
        return (x.flatten(1).double() - self.centre).square().sum(1)

    def to(self, device: torch.device) -> "Projection":
        """The same on another device."""
        return Projection(self.centre.to(device), self.basis.to(device))


def principal(pool: Pool, dims: int, *, members: int = 4096, rounds: int = 3) -> Projection:
    """About the directions of largest variance: some rounds of subspace iteration over a part of the data.

    Args:
        dims: how many; data of no more dimensions than that are only turned.
        members: how many to look at, evenly spread over the data.
        rounds: of iteration; three are enough for all but the last directions.
    """
    chosen = torch.linspace(0, len(pool) - 1, min(members, len(pool)), dtype=torch.float64).round().long()
    x = pool.take(chosen).flatten(1).float()
    centre = x.mean(0)
    x -= centre
    basis = torch.randn(x.shape[1], min(dims, x.shape[1]), generator=generator(0, "projection")).to(x.device)
    for _ in range(rounds):
        basis = torch.linalg.qr((x.T @ (x @ basis)).double()).Q.float()
    return Projection(centre, basis)


@dataclass(frozen=True, eq=False)
class Screen:
    """The members of a class as a projection sees them, those that are isolated last of all first.

    Attributes:
        projection: what they are seen through.
        members: the class, as the pool gives it, in ascending order.
        order: positions in `members`, by ascending level of isolation.
        place: of each member in that order.
        level: sigma / alpha up to which each is isolated, in that order.
        seen: coordinates of each, and their squared norm, in that order.
        square: squared distance of each member from the centre, in all dimensions, in the order of the pool.
    """

    projection: Projection
    members: Int[Tensor, "m"]
    order: Int[Tensor, "m"]
    place: Int[Tensor, "m"]
    level: Float[Tensor, "m"]
    seen: Float[Tensor, "m _"]
    square: Float[Tensor, "m"]

    @classmethod
    def of(cls, pool: Pool, members: Int[Tensor, "m"], projection: Projection, level: Float[Tensor, "m"]) -> "Screen":
        """See members of a pool once, on the device of the projection."""
        level, order = level.sort(stable=True)
        device, here, (scale, shift) = projection.centre.device, projection.to(pool.data.device), pool.affine
        seen = projection.basis.new_empty(len(members), projection.basis.shape[1] + 1)
        square = seen.new_empty(len(members), dtype=torch.float64)
        # into memory of their own at once: small results kept between large blocks would leave holes of those
        for part in torch.arange(len(members)).split(1024):
            # in float64: where sigma is small, what float32 rounds of a byte's value is too much for a squared norm
            block = pool.stored(members[part]).double() * scale + shift
            some = slice(int(part[0]), int(part[-1]) + 1)
            seen[some, :-1], square[some] = here(block), here.square(block)
        seen[:, -1] = seen[:, :-1].square().sum(1)
        return cls(projection, members, order, order.argsort(), level.to(device), seen[order.to(device)], square)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def widest(self) -> float:
        """The largest norm of coordinates."""
        return float(self.seen[:, -1].max().sqrt())

    def as_stored(self, mask: Bool[Tensor, "B n"]) -> Bool[Tensor, "B m"]:
        """A mask over the first members in order, as one over all in the order in which the pool has them."""
        rest = mask.new_zeros(len(mask), len(self) - mask.shape[1])
        return torch.cat([mask, rest], 1)[:, self.place.to(mask.device)]

    def energies(
        self, seen: Float[Tensor, "B k"], sigma: Float[Tensor, "B"], alpha: Float[Tensor, "B"]
    ) -> Float[Tensor, "B n"]:
        """Projected energies of the members that are not isolated in one of the rows, the first in order.

        `seen` is what the projection leaves of x_t. Infinite where a member is isolated at the row's sigma / alpha.
        """
        active = torch.searchsorted(self.level, sigma.double() / alpha.double(), right=True)
        factor = alpha.float()[:, None]
        energy = torch.cat([-2 * factor * seen, factor.square()], 1) @ self.seen[: int(active.max())].T
        for row, first in zip(energy, active.tolist(), strict=True):
            row[first:] = math.inf  # a mask for all of them would take as long as the product
        return energy


def rounded(seen: Float[Tensor, "B k"], alpha: Float[Tensor, "B"], widest: float) -> Float[Tensor, "B"]:
    """By how much energies may be off, because their products are float32.

    Args:
        seen: what the projection leaves of x_t.
        widest: the largest norm of the members' coordinates.
    """
    farthest = alpha.float() * widest
    return 2.0**-22 * seen.shape[1] * farthest * (seen.norm(dim=1) + farthest)


def likely(
    energy: Float[Tensor, "B n"],
    sigma: Float[Tensor, "B"],
    off: Float[Tensor, "B"],
    lost: float,
    members: int,
    shards: Shards,
) -> Bool[Tensor, "B n"]:
    """Which members are kept, such that all others together have at most `lost` of q.

    Ruled out is first what has less than lost / m of the largest q. Where a good part is left, but not most, all are
    added up from the far end, which tells how many more can go.

    With energies off by at most r, and s = 2 r / (2 sigma^2), the share of members in q is at most exp(s) times what
    it seems to be.

    Args:
        energy: of the members that this rank holds; there may be none. Infinite: ruled out already.
        off: r, by how much they may be off.
        lost: a share of q, below 1.
        members: how many there are, m, whoever holds them.
        shards: among whom.
    """
    sharpness = (0.5 / sigma.double().square()).clamp(1e-30, 1e30).float()
    slack = 2 * off * sharpness
    least = shards.least(energy.amin(1) if energy.shape[1] else torch.full_like(off, math.inf))
    limit = least + ((slack - math.log(lost / members)) / sharpness).clamp(max=1e30)
    inside = energy <= limit[:, None]
    count = shards.sum(counted(inside))
    closer = ((count > CLOSER[0] * members) & (count < CLOSER[1] * members)).nonzero().flatten()
    if len(closer):
        nats = (energy[closer] - least[closer, None]).mul_(sharpness[closer, None])
        inside[closer] &= _likeliest(nats, lost * torch.exp(-slack[closer]), shards)
    return inside


def counted(mask: Bool[Tensor, "B n"]) -> Int[Tensor, "B"]:
    """How many are true in each row."""
    # bytes are added faster than truths; but all of them are copied to be added in a wider type, so some rows at a time
    return torch.cat([part.sum(1, dtype=torch.int32) for part in mask.view(torch.uint8).split(32)]).long()


def _likeliest(nats: Float[Tensor, "B n"], lost: Float[Tensor, "B"], shards: Shards) -> Bool[Tensor, "B n"]:
    """Whether members are among the likeliest, about the fewest that leave at most `lost` of the mass to the others.

    Args:
        nats: by which each is less likely than the likeliest of its row.
    """
    place = (nats * 2).clamp_(0, BINS - 1).long()
    # beyond 80 are numbers too small to be normal, which are slow; float32 would lose a part of a sum of millions
    mass = torch.exp(-nats.clamp_(max=80)).double()
    mass = shards.sum(mass.new_zeros(len(nats), BINS).scatter_add_(1, place, mass))
    # of each bin and those beyond; a GPU that must give the same bits again has no cumsum of floating numbers
    tail = mass @ mass.new_ones(BINS, BINS).tril()
    return place < (tail > lost[:, None] * tail[:, :1]).sum(1, keepdim=True)
