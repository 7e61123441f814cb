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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.neighbours import isolation
from stablefield.posterior import Posterior, Sums, chunk_size, exact
from stablefield.process import Perturbed
from stablefield.products import LONGEST, MIDDLE, ByteProducts, FloatProducts, full_precision, multiplies_bytes
from stablefield.reference import Pool
from stablefield.screen import Projection, Screen, counted, likely, principal, rounded
from stablefield.shards import ALONE, Shards
from stablefield.target import SharedOut, SingleSample, index_of

MANY = 3 / 4  # of the members: beyond that they are taken as they are stored, not picked out
SCREENED = 2**25  # energies of rows, 128 MB, that are looked at together
ANSWERED = 2**27  # truths about members, 128 MB and some copies, of the rows that are answered together
JOINING = 1 / 16  # of the members: what a row costs that joins others for which all members pass
FEW = 2**22  # numbers in data that are few: they are passed whole for any row
LITTLE = 256  # members: what a row costs beside them is more
HEAVIEST = 512  # members of a row whose weights are computed in float64, if not all are

Distances = Callable[[int], Float[Tensor, "m k"]]  # label -> distances to the nearest others of that class


@dataclass(frozen=True)
class PrunedDataset(SharedOut):
    """The exact posterior mean over all data, or all of a class, but for `lost` of its mass. Unbiased.

    Attributes:
        distances: gives those of each member to its nearest others (`neighbours.nearest`), for a label. Without, no
            row is spared the screening, and all else is the same.
        lost: the share of the posterior that may be missing, on average over the rows.
        dims: coordinates to screen by.
        sharded: in a run, whether ranks that train together share the members out; alone it changes nothing.
        at_once: in a run, how many rows of a rank are answered together, from as many steps as have so many. All
            members pass for one row as for many.
        shards: among whom the members are.
    """

    pool: Pool
    distances: Distances | None = field(default=None, repr=False)
    lost: float = 1e-8
    dims: int = 64
    sharded: bool = False
    at_once: int = 1024
    shards: Shards = field(default=ALONE, repr=False)
    _known: dict[tuple[int, torch.device], "_Known"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lost < 1:
            raise ValueError(f"lost is a share of the posterior, between 0 and 1, and not {self.lost}")
        if self.dims < 1:
            raise ValueError(f"dims must be at least 1, not {self.dims}")

    @full_precision()
    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        _refuse_what_is_not_finite(noisy)
        if (home := exact(noisy.x_t.device)) != noisy.x_t.device:
            found = self.estimate(noisy.each(lambda values: values.to(home)), label, generator)
            return found.each(lambda values: values.to(noisy.x_t.device))
        known, found, index = self.known(label, noisy.x_t.device), _alone(noisy), index_of(noisy, self.pool)
        isolated, place = known.level_of(index).to(noisy.sigma.device), self.shards.place(index)
        uncertain = (isolated <= noisy.sigma.double() / noisy.alpha.double()).nonzero().flatten()
        for rows in filter(len, uncertain.split(max(1, ANSWERED // len(known.members)))):
            shared, answers = self._answer(noisy.rows(rows), place[rows.cpu()], known)
            _put(found, rows[shared], answers.rows(shared))
        return found

    def arithmetic(self, device: torch.device) -> str:
        if in_integers(self.pool, exact(device)):
            return "bytes as integers, exactly"
        wide = self.pool.data.dtype == torch.float64
        return "float64" if wide else "float32 where sigma is large or a member weighs little, else float64"

    def known(self, label: int, device: torch.device) -> "_Known":
        """What is known of a class before anything is drawn; found out when first asked for."""
        if (label, device) not in self._known:
            members = self.pool.members(label)
            level = torch.zeros(len(members), dtype=torch.float64)
            if self.distances is not None:
                level = isolation(_checked(self.distances(label), len(members)), len(members) - 1, self.lost / 3)
                level = self.shards.first(level)  # or ranks would not ask about the same rows
            place, own = self.shards.place(members), self.own
            held = place >= 0
            projection = self._projection(device)
            screen = Screen.of(own, place[held], projection, level[held]) if held.any() else None
            widest = 0.0 if screen is None else screen.widest
            widest = -float(self.shards.least(torch.tensor([-widest], device=device)))
            self._known[label, device] = _Known(label, own, members, level, projection, screen, widest)
        return self._known[label, device]

    def _projection(self, device: torch.device) -> Projection:
        made = (known.projection for known in self._known.values())
        found = next(made, None) or principal(self.pool, self.dims)
        # sums around centres that differ in the last digit would not merge
        return replace(found, centre=self.shards.first(found.centre), basis=self.shards.first(found.basis)).to(device)

    def _answer(self, noisy: Perturbed, place: Int[Tensor, "B"], known: "_Known") -> tuple[Int[Tensor, "s"], Posterior]:
        """Rows that are not isolated: which of them share their cell with others, and the means over the cells."""
        query = Query.of(noisy, known.affine, known.projection.centre)
        starts = _starts(query, known)
        here, masks = list[Tensor](), [list[Tensor]() for _ in starts]
        for rows in torch.arange(len(noisy), device=noisy.x_t.device).split(max(1, SCREENED // len(known.members))):
            energy, inside = known.survivors(noisy.rows(rows), self.shards, self.lost / 3)
            here.append(torch.stack([known.among(inside, place[rows.cpu()]).long(), counted(inside)]))
            for some, mask in zip(masks, _by_arithmetic(query.rows(rows), energy, inside, known), strict=True):
                some.append(mask)
        has_source, count = self.shards.sum(torch.cat(here, 1)).unbind(0)
        shared, sums = (has_source > 0) & (count > 1), query.sums()
        for start, some in zip(starts, masks, strict=True):
            inside = _stacked(some).logical_and_(shared[:, None])
            some.clear()  # or they would be held twice
            sums.merge(_passed(query, inside, known, start))
        return shared.nonzero().flatten(), query.posterior(self.shards.merge(sums))


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of a class before anything is drawn.

    Attributes:
        label: its label.
        own: the members that this rank holds, of all classes.
        members: all of the class, whoever holds them.
        level: sigma / alpha up to which each of these is isolated.
        projection: what members are screened by, the same for all classes.
        screen: the own ones of the class, through a projection; None if there are none.
        widest: the largest norm of their coordinates, and of those that others hold.
    """

    label: int
    own: Pool
    members: Int[Tensor, "m"]
    level: Float[Tensor, "m"]
    projection: Projection
    screen: Screen | None
    widest: float

    @property
    def in_integers(self) -> bool:
        """Whether the members are multiplied as bytes."""
        return in_integers(self.own, self.projection.centre.device)

    @property
    def affine(self) -> tuple[float, float]:
        """(scale, shift) such that a value that is multiplied stands for scale * value + shift."""
        scale, shift = self.own.affine
        return (scale, shift + MIDDLE * scale) if self.in_integers else (scale, shift)

    def level_of(self, index: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The levels of isolation of some members.

        Raises:
            ValueError: one is no member of the class.
        """
        rank = torch.searchsorted(self.members, index).clamp(max=len(self.members) - 1)
        if (strange := self.members[rank] != index).any():
            raise ValueError(f"member {int(index[strange][0])} of the pool does not carry the label that its row tells")
        return self.level[rank]

    def survivors(
        self, noisy: Perturbed, shards: Shards, lost: float
    ) -> tuple[Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
        """Projected energies of the own members in their order of isolation, and which of them may matter."""
        seen = self.projection(noisy.x_t, noisy.alpha)
        energy = seen[:, :0] if self.screen is None else self.screen.energies(seen, noisy.sigma, noisy.alpha)
        off = rounded(seen, noisy.alpha, self.widest)
        return energy, likely(energy, noisy.sigma, off, lost, len(self.members), shards)

    def among(self, inside: Bool[Tensor, "B n"], place: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Whether own members, at their places in the order of the pool (-1: not own), are among those inside."""
        found = torch.zeros(len(inside), dtype=torch.bool, device=inside.device)
        if self.screen is not None:
            rows = (place >= 0).nonzero().flatten()
            position = self.screen.place[torch.searchsorted(self.screen.members, place[rows])]
            found[rows] = inside[rows, position.to(inside.device)]
        return found

    def blocks(self, mask: Bool[Tensor, "b n"], size: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Stored members, who may use them, and their norms: few are picked out, many pass in the order stored."""
        assert self.screen is not None
        blocks: Iterable[Tensor]
        wanted = mask.view(torch.uint8).amax(0).nonzero().flatten()  # as bytes, many times faster than any()
        if len(wanted) < MANY * len(self.screen):
            position = self.screen.order[wanted.cpu()]
            blocks = (self.own.stored(part) for part in self.screen.members[position].split(size))
            allowed, square = mask[:, wanted], self.screen.square[position.to(mask.device)]
        else:
            blocks = self.own.stored_blocks(self.label, size)
            allowed, square = self.screen.as_stored(mask), self.screen.square
        everyone = bool(counted(allowed).sum() == allowed.numel())
        masks = [None] * -(-len(square) // size) if everyone else allowed.split(size, 1)
        yield from zip(blocks, masks, square.split(size), strict=True)


@dataclass(frozen=True, eq=False)
class Query:
    """Rows as the kernel sees them: x_t around alpha times a centre c, in units of stored values.

    A stored value b stands for x = scale b + shift. With the norms ||x - c||^2 / scale^2, known before, energies differ
    from those of x_t and x by what is the same for all members of a row. So bytes are multiplied as they are, and what
    float32 rounds is the noise times a member, not the brightness of all images.
    """

    x_t: Float[Tensor, "B D"]
    sigma: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    like: Float[Tensor, "B *D"]
    source: Float[Tensor, "B *D"]
    centre: Float[Tensor, "D"]
    scale: float
    shift: float

    @classmethod
    def of(cls, noisy: Perturbed, affine: tuple[float, float], centre: Float[Tensor, "D"]) -> "Query":
        """The rows of a batch, for members whose values stand for (scale, shift) = `affine`."""
        (scale, shift), centre, alpha = affine, centre.double(), noisy.alpha.double()
        x_t = (noisy.x_t.flatten(1).double() - alpha[:, None] * centre) / scale
        return cls(x_t, noisy.sigma.double() / scale, alpha, noisy.x_t, noisy.x, centre, scale, shift)

    def rows(self, rows: Int[Tensor, "b"]) -> "Query":
        """Some of the rows."""
        some = {name: getattr(self, name)[rows] for name in ("x_t", "sigma", "alpha", "like", "source")}
        return replace(self, **some)

    @property
    def narrow(self) -> torch.dtype:
        """The least type that anything is computed in: float32, or x_t's own where that is wider."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def sums(self, energies: torch.dtype = torch.float64) -> Sums:
        """Sums over members, of which nothing has passed yet."""
        return Sums(self.x_t, self.sigma, self.alpha, partial(FloatProducts, types=(energies, self.narrow)))

    def byte_sums(self, square: Float[Tensor, "m"]) -> Sums:
        """The same over bytes, multiplied in integers; to begin with they are weighed against the source.

        Where the sums begin changes nothing but how soon most members of a block need not be summed.

        Args:
            square: squared distances of the members from the centre.
        """
        sums = Sums(self.x_t, self.sigma, self.alpha, partial(ByteProducts, digits=self.digits(square)))
        member = ((self.source.flatten(1).double() - self.shift) / self.scale).round()
        norm = (member * self.scale + self.shift - self.centre).square().sum(1) / self.scale**2
        energy = self.alpha * (self.alpha * norm - 2 * (self.x_t * member).sum(1))
        sums.lowest = energy + 1 / sums.sharpness  # not lower than what rounding may make of the source
        return sums

    def digits(self, square: Float[Tensor, "m"]) -> int:
        """How many leave log weights as they are, to about 1e-6.

        k digits round an entry of x_t to at most about 256^-k of the largest, evenly; so the product with a member at
        a distance r from the centre is off by a third of that times r, and what all members share does not count.
        """
        entry = self.x_t.abs().amax(1) * square.max().sqrt() / self.scale / 3
        finest = (1e-6 * self.sigma**2 / (self.alpha * entry).clamp(min=1e-300)).min()
        return min(7, max(2, math.ceil(-math.log(max(float(finest), 1e-300)) / math.log(256))))

    def posterior(self, sums: Sums) -> Posterior:
        """What sums over stored values, with norms around the centre, say of x."""
        mean = self.scale * (sums.weighted / sums.total[:, None]) + self.shift
        spread = self.scale**2 * sums.moment / sums.total - (mean - self.centre).square().sum(1)
        return Posterior(mean.reshape(self.like.shape), sums.total.square() / sums.squares, spread.clamp(min=0))

    def rounding(self, square: Float[Tensor, "m"]) -> Float[Tensor, "B"]:
        """About what products in float32 change log weights by: in practice a tenfold of it, at most.

        An entry of the product with a member b is rounded by about 2^-24 of ||x_t|| ||b|| / sqrt D, because the terms
        of the sum have both signs; log w has it times alpha / sigma^2.

        Args:
            square: squared distances of the members from the centre.
        """
        radius = (square.max().sqrt() + (self.centre - self.shift).norm()) / self.scale
        entry = 2.0**-24 * self.x_t.norm(dim=1) * radius / len(self.centre) ** 0.5
        return entry * self.alpha / self.sigma**2


def in_integers(pool: Pool, device: torch.device) -> bool:
    """Whether the members of a pool are multiplied as bytes on a device."""
    return pool.data.dtype == torch.uint8 and math.prod(pool.shape) <= LONGEST and multiplies_bytes(device)


def _by_arithmetic(
    query: Query, energy: Float[Tensor, "B n"], inside: Bool[Tensor, "B n"], known: _Known
) -> tuple[Bool[Tensor, "B n"], ...]:
    """The members inside, those apart that are multiplied in another way (`_starts`)."""
    if known.screen is None:
        return ()
    if known.in_integers:
        return (inside,)
    wide = query.narrow == torch.float64
    rounding = torch.full_like(query.sigma, math.inf) if wide else query.rounding(known.screen.square)
    exactly = _heaviest(energy, inside, rounding)
    return exactly, inside & ~exactly


def _starts(query: Query, known: _Known) -> list[Callable[[Query], Sums]]:
    """In which sums the members go, that are multiplied in one way or the other; none where there are no members."""
    if known.screen is None:
        return []
    if known.in_integers:
        return [partial(Query.byte_sums, square=known.screen.square)]
    return [Query.sums, partial(Query.sums, energies=query.narrow)]


def _passed(query: Query, inside: Bool[Tensor, "B n"], known: _Known, start: Callable[[Query], Sums]) -> Sums:
    """Sums over the members inside, multiplied as `start` makes them for some of the rows."""
    assert known.screen is not None
    found = query.sums()
    for rows in _together(inside, len(known.screen), len(query.centre)):
        some = query.rows(rows)
        passed, size = start(some), chunk_size(some.x_t, width=known.own.data.itemsize if known.in_integers else 8)
        for block, allowed, square in known.blocks(inside[rows], size):
            passed.add(block.flatten(1), allowed, square / query.scale**2)
        found.put(rows, passed)
    return found


def _stacked(masks: Sequence[Bool[Tensor, "_ _"]]) -> Bool[Tensor, "B n"]:
    """Masks of some rows each, over more or fewer of the first members, as one."""
    if len(masks) == 1:
        return masks[0]
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks])


def _heaviest(
    energy: Float[Tensor, "B n"], inside: Bool[Tensor, "B n"], rounded: Float[Tensor, "B"]
) -> Bool[Tensor, "B n"]:
    """Which of the members inside need float64.

    None where float32 leaves the weights as they are. Otherwise those that seem to weigh most: what the rest is off by
    counts for its own small share only. And all of them where float32 would lose too much.
    """
    found = inside & ~(rounded < 1e-6)[:, None]
    some = ((rounded >= 1e-6) & (rounded <= 1e-5)).nonzero().flatten()
    if energy.shape[1] > HEAVIEST and len(some):
        heaviest = energy[some].topk(HEAVIEST, largest=False).indices
        found[some] &= torch.zeros_like(found[some]).scatter_(1, heaviest, True)
    return found


def _together(inside: Bool[Tensor, "B n"], members: int, dim: int) -> Iterator[Int[Tensor, "b"]]:
    """Rows worth answering together: those with many members, which they share, and some with little work each.

    Where the data are few, all together: members that are not shared cost less than a row alone.
    """
    count = counted(inside)
    if members * dim <= FEW:
        many = count > 0
    else:
        many = count > JOINING * members
        many &= count[many].sum() > MANY * members
    little = (count > 0) & (count <= LITTLE) & ~many
    alone = (count > LITTLE) & ~many
    yield from filter(len, [many.nonzero().flatten(), *little.nonzero().flatten().split(8), *alone.nonzero()])


def _checked(distances: Tensor, members: int) -> Tensor:
    if distances.ndim != 2 or len(distances) != members:
        raise ValueError(f"{members} members need a row of distances each, not {tuple(distances.shape)}")
    return distances


def _refuse_what_is_not_finite(noisy: Perturbed) -> None:
    for name in ("x_t", "sigma", "alpha"):
        if (bad := ~torch.isfinite(getattr(noisy, name).flatten(1 if name == "x_t" else 0))).any():
            raise ValueError(f"{name} is not finite in row {int(bad.nonzero()[0, 0])}")
    if (noisy.sigma < 0).any():
        raise ValueError(f"sigma must not be negative; a row has {float(noisy.sigma.min())}")


def _alone(noisy: Perturbed) -> Posterior:
    """The sources, in memory where other answers can be written over them."""
    single, dtype = SingleSample()(noisy), torch.promote_types(noisy.x_t.dtype, torch.float32)
    return single.each(lambda values: values.to(dtype, copy=True))


def _put(found: Posterior, rows: Int[Tensor, "b"], answers: Posterior) -> None:
    found.mean[rows] = answers.mean.to(found.mean.dtype)
    found.ess[rows] = answers.ess.to(found.ess.dtype)
    found.variance[rows] = answers.variance.to(found.variance.dtype)
