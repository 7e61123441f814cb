"""The whole data set as the support, without the work that nobody could see.

Two labellings of the data, neither of which looks at which member is the source, make cells; the target of a row is
the mean over the source's own cell, and so unbiased whatever follows (the cell law, `stablefield.target`):

1. *Isolation.* At each t, every member so far from all others that its noise could hardly hide it
   (`neighbours.isolation`) is a cell of its own. A row with such a source needs no work: the target is the source.
2. *Screening.* Of the others, those that the coordinates of x_t in a few directions leave a chance (`screen`) are one
   cell, S(x_t), and the rest a cell each. A row needs the exact arithmetic over S(x_t) only.

What a cell leaves out is what the target may be off by. On average over x_t that is at most `lost` of the posterior's
mass: a third for the others of an isolated source; by symmetry (exchange the source and a second draw from the
posterior) a third for the isolated others of a source that is not; a third for what is screened out. By Markov's
inequality more than p of the mass is missing in at most a share lost / p of the rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.neighbours import isolation
from stablefield.posterior import Posterior, Sums, chunk_size
from stablefield.process import Perturbed
from stablefield.reference import Pool
from stablefield.screen import Projection, Screen, principal
from stablefield.target import SingleSample, TargetEstimator, index_of

MANY = 1 / 4  # of the members: a row that needs more takes them as they are stored, not picked out
HEAVIEST = 512  # members of a row whose weights are computed in float64, if not all are

Distances = Callable[[int], Float[Tensor, "m k"]]  # label -> distances to the nearest others of that class


@dataclass(frozen=True)
class PrunedDataset(TargetEstimator):
    """The exact posterior mean over all data, or all of a class, but for `lost` of its mass. Unbiased.

    Attributes:
        distances: gives those of each member to its nearest others (`neighbours.nearest`), for a label. Without, no
            row is spared the screening, and all else is the same.
        lost: the share of the posterior that may be missing, on average over the rows.
        dims: coordinates to screen by.
    """

    pool: Pool
    distances: Distances | None = None
    lost: float = 1e-8
    dims: int = 64
    _screens: dict[tuple[int, torch.device], Screen] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 0 < self.lost < 1:
            raise ValueError(f"lost is a share of the posterior, between 0 and 1, and not {self.lost}")
        if self.dims < 1:
            raise ValueError(f"dims must be at least 1, not {self.dims}")

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        _refuse_what_is_not_finite(noisy)
        screen = self.screen(label, noisy.x_t.device)
        place = screen.position(index_of(noisy, self.pool)).to(noisy.x_t.device)
        active = screen.active(noisy.sigma.double() / noisy.alpha.double())
        found = _alone(noisy)
        uncertain = (place < active).nonzero().flatten()
        for start in range(0, len(uncertain), screen.batch):
            rows = uncertain[start : start + screen.batch]
            part = noisy.rows(rows)
            energy = screen.survivors(part.x_t, part.sigma, part.alpha, active[rows], self.lost / 3)
            has_source = energy.gather(1, place[rows, None]).flatten() < math.inf
            for few in _together(energy < math.inf, has_source, len(screen.members)):
                _put(found, rows[few], self._over(part.rows(few), energy[few], screen, label))
        return found

    def screen(self, label: int, device: torch.device) -> Screen:
        """What is known of a class before anything is drawn; made when first asked for."""
        if (label, device) not in self._screens:
            members = len(self.pool.members(label))
            level = torch.zeros(members, dtype=torch.float64)
            if self.distances is not None:
                level = isolation(_checked(self.distances(label), members), members - 1, self.lost / 3)
            self._screens[label, device] = Screen.of(self.pool, label, self._projection(), level, device)
        return self._screens[label, device]

    def _projection(self) -> Projection:
        made = next(iter(self._screens.values()), None)
        return made.projection if made else principal(self.pool, self.dims)

    def _over(self, noisy: Perturbed, energy: Float[Tensor, "b n"], screen: Screen, label: int) -> Posterior:
        """The posterior over the members that were not ruled out, of those in their order of isolation.

        The kernel sees stored values b, with x = scale b + shift, and x_t around alpha times the centre c, in units of
        the scale: energies then differ by what is the same for all members of a row. So bytes are multiplied as they
        are, and what float32 rounds is the noise times a member, not the brightness of all images.
        """
        scale, shift = self.pool.affine
        centre = screen.projection.centre.double()
        query = (noisy.x_t.flatten(1).double() - noisy.alpha.double()[:, None] * centre) / scale
        sigma, alpha = noisy.sigma.double() / scale, noisy.alpha.double()
        radius = (screen.square.max().sqrt() + (centre - shift).norm()) / scale
        inside = energy < math.inf
        wide, narrow = torch.float64, torch.promote_types(noisy.x_t.dtype, torch.float32)
        exactly = inside if narrow == wide else _heaviest(energy, float(rounding(query, sigma, alpha, radius).max()))
        sums = Sums(query, sigma, alpha, (wide, narrow)), Sums(query, sigma, alpha, (narrow, narrow))
        for part, mask in zip(sums, (exactly, inside & ~exactly), strict=True):
            for block, allowed, square in self._blocks(mask, screen, label, chunk_size(query)):
                part.add(block.flatten(1), allowed, square / scale**2)
        return _around(sums[0].merge(sums[1]), noisy, scale, shift, centre)

    def _blocks(
        self, mask: Bool[Tensor, "b n"], screen: Screen, label: int, size: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Stored members, who may use them, and their norms: few are picked out, many pass in the order stored."""
        blocks: Iterable[Tensor]
        wanted = mask.any(0).nonzero().flatten()
        if len(wanted) < MANY * len(screen.members):
            position = screen.order[wanted.cpu()]
            blocks = (self.pool.stored(part) for part in screen.members[position].split(size))
            allowed, square = mask[:, wanted], screen.square[position.to(mask.device)]
        else:
            blocks, allowed, square = self.pool.stored_blocks(label, size), screen.as_stored(mask), screen.square
        yield from zip(blocks, allowed.split(size, 1), square.split(size), strict=True)


def rounding(
    query: Float[Tensor, "B D"], sigma: Float[Tensor, "B"], alpha: Float[Tensor, "B"], radius: float | Tensor
) -> Float[Tensor, "B"]:
    """About what products in float32 change log weights by, as a part of what they change in practice (a tenth).

    An entry of the product with a member b is rounded by about 2^-24 of ||query|| ||b|| / sqrt D, because the terms of
    the sum have both signs; log w has it times alpha / sigma^2.

    Args:
        radius: the largest norm of a member, in the units of the query and of sigma.
    """
    return 2.0**-24 * query.norm(dim=1) * radius / query.shape[1] ** 0.5 * alpha / sigma**2


def _heaviest(energy: Float[Tensor, "b n"], rounded: float) -> Bool[Tensor, "b n"]:
    """Which of the members that are not ruled out need float64.

    None where float32 leaves the weights as they are. Otherwise those that seem to weigh most: what the rest is off by
    counts for its own small share only. And all of them where float32 would lose too much.
    """
    inside = energy < math.inf
    if rounded < 1e-6:
        return torch.zeros_like(inside)
    if rounded > 1e-5 or energy.shape[1] <= HEAVIEST:
        return inside
    return torch.zeros_like(inside).scatter_(1, energy.topk(HEAVIEST, largest=False).indices, True) & inside


def _together(inside: Bool[Tensor, "B n"], has_source: Bool[Tensor, "B"], members: int) -> Iterator[Int[Tensor, "b"]]:
    """Rows worth answering together: those with many of the members. The others share too few.

    No rows whose cell is the source alone.
    """
    count = inside.sum(1)
    wanted, many = has_source & (count > 1), count > MANY * members
    if (wanted & many).any():
        yield (wanted & many).nonzero().flatten()
    yield from (wanted & ~many).nonzero()


def _checked(distances: Tensor, members: int) -> Tensor:
    if distances.ndim != 2 or len(distances) != members:
        raise ValueError(f"{members} members need a row of distances each, not {tuple(distances.shape)}")
    return distances


def _around(sums: Sums, like: Perturbed, scale: float, shift: float, centre: Float[Tensor, "D"]) -> Posterior:
    """What sums over stored values, with norms around the centre, say of x."""
    mean = scale * (sums.weighted / sums.total[:, None]) + shift
    spread = scale**2 * sums.moment / sums.total - (mean - centre).square().sum(1)
    ess = sums.total.square() / sums.squares
    return Posterior(mean.reshape(like.x_t.shape), ess, spread.clamp(min=0))


def _refuse_what_is_not_finite(noisy: Perturbed) -> None:
    for name in ("x_t", "sigma", "alpha"):
        if (bad := ~torch.isfinite(getattr(noisy, name).flatten(1 if name == "x_t" else 0))).any():
            raise ValueError(f"{name} is not finite in row {int(bad.nonzero()[0, 0])}")
    if (noisy.sigma < 0).any():
        raise ValueError(f"sigma must not be negative; a row has {float(noisy.sigma.min())}")


def _alone(noisy: Perturbed) -> Posterior:
    """The sources, in memory where other answers can be written over them."""
    single, dtype = SingleSample()(noisy), torch.promote_types(noisy.x_t.dtype, torch.float32)
    return Posterior(*(value.to(dtype, copy=True) for value in (single.mean, single.ess, single.variance)))


def _put(found: Posterior, rows: Int[Tensor, "b"], answers: Posterior) -> None:
    found.mean[rows] = answers.mean.to(found.mean.dtype)
    found.ess[rows] = answers.ess.to(found.ess.dtype)
    found.variance[rows] = answers.variance.to(found.variance.dtype)
