"""What the denoiser is taught: four estimates of E[x | x_t], one formula with four supports.

| estimator          | support of a row                              | unbiased | variance                          |
|--------------------|-----------------------------------------------|----------|-----------------------------------|
| `SingleSample`     | the source alone (DSM)                        | yes      | Tr Cov[x given x_t]               |
| `ReferenceBatch`   | the source and n - 1 others (STF)             | yes      | less; about 1 / (n - 1) for large n |
| `NearestNeighbours`| the k nearest if the source is one, else it   | yes      | at most DSM's                     |
| `FullDataset`      | all data (exact)                              | yes      | none                              |

Why they are unbiased: given x_t, the source is distributed as the posterior. Averaging over it within any cell that
was chosen without looking at which member it is changes no mean and lowers the variance (Rao-Blackwell). So an
estimator may look at t, the label, x_t and the data, but never at which member is the source, except to ask whether
it lies in the cell.

Labels confine the support: a row that tells the network its class has only members of that class. Each label in a
batch gets its own draw.

So do augmentations that the network is told: the references must be seen through the map that the row was. A flip is
undone on x_t, the plain references answer, and it is redone on the mean (distances do not change when both are
flipped); a row under any other map keeps its source alone, which is unbiased whatever was done to it. A rule that
looks at the label only, which is drawn without looking at the source, chooses between the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stablefield.augmentation import flip, permutes
from stablefield.neighbours import keep_least
from stablefield.posterior import Posterior, Sums, chunk_size, posterior, stream
from stablefield.process import Perturbed, per_row
from stablefield.reference import ALL, Pool
from stablefield.seeding import derive
from stablefield.shards import ALONE, Shards

MOST = 2**16  # rows that are answered at once


class TargetEstimator(ABC):
    """Answers what x was, on average, for each row of a batch."""

    @abstractmethod
    def __call__(self, noisy: Perturbed, *, generator: torch.Generator | None = None) -> Posterior:
        """The posterior mean for each row, and how many members shared in it.

        Raises:
            ValueError: rows without an index into the pool, or that are not the members they are said to be; a label
                without members, data that do not fit.
        """

    def steps(self, rows: int) -> int:
        """Of how many steps, of so many rows each, the answers are best asked for together (`several`)."""
        return 1

    def several(
        self, batches: Sequence[Perturbed], generators: Sequence[torch.Generator | None]
    ) -> Sequence[Posterior]:
        """The answers to the batches of several steps, each with its own generator."""
        return [self(noisy, generator=each) for noisy, each in zip(batches, generators, strict=True)]

    def arithmetic(self, device: torch.device) -> str:
        """How members are multiplied on a device, in words; empty where none are."""
        return "float64"


class ByLabel(TargetEstimator):
    """One that says it for rows that share a label; here a batch is split into those and put together again."""

    def __call__(self, noisy: Perturbed, *, generator: torch.Generator | None = None) -> Posterior:
        # each label draws from a generator of its own: what a row is taught does not depend on who else is in the batch
        seed = int(torch.randint(2**62, (), generator=generator))
        plain, shares = _undone(noisy), _shares(noisy)
        answers = [
            (rows, self.estimate(plain.rows(rows), label, torch.Generator().manual_seed(derive(seed, label))))
            for label, rows in _by_label(plain, shares)
        ]
        if not shares.all():
            alone = (~shares).nonzero().flatten()
            answers.append((alone, SingleSample()(plain.rows(alone))))
        found = joined(answers)
        return found if noisy.augmentation is None else replace(found, mean=flip(found.mean, noisy.augmentation))

    @abstractmethod
    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        """The answer for rows that all carry one label (-1: none)."""


class SharedOut(ByLabel):
    """One for which all members pass: the fewer times, the better.

    So the rows of several steps are answered together, and nothing but rounding depends on which. And several ranks
    may hold the members, each some of them: then all answer everyone's rows together. All must ask at once, for equally
    many rows each.
    """

    pool: Pool
    at_once: int
    shards: Shards

    def __post_init__(self) -> None:
        check_at_once(self.at_once)

    def __call__(self, noisy: Perturbed, *, generator: torch.Generator | None = None) -> Posterior:
        if self.shards.total == 1:
            return super().__call__(noisy, generator=generator)
        everyone = self.shards.everyone(noisy)
        return super().__call__(everyone, generator=generator).rows(self.shards.mine(len(everyone)))

    def steps(self, rows: int) -> int:
        return max(1, self.at_once // rows)

    def several(
        self, batches: Sequence[Perturbed], generators: Sequence[torch.Generator | None]
    ) -> Sequence[Posterior]:
        found = self(Perturbed.joined(batches), generator=generators[0])  # what is drawn is not used
        ends = accumulate(map(len, batches))
        return [found.rows(slice(end - len(noisy), end)) for noisy, end in zip(batches, ends, strict=True)]

    @cached_property
    def own(self) -> Pool:
        """The members that this rank holds."""
        return self.shards.own(self.pool)


@dataclass(frozen=True)
class SingleSample(TargetEstimator):
    """Denoising score matching: the source itself (Vincent 2011). Unbiased, and as noisy as it gets."""

    def __call__(self, noisy: Perturbed, *, generator: torch.Generator | None = None) -> Posterior:
        one = torch.ones(len(noisy.x), dtype=noisy.x.dtype, device=noisy.x.device)
        return Posterior(noisy.x.detach(), one, torch.zeros_like(one))

    def arithmetic(self, device: torch.device) -> str:
        return ""


@dataclass(frozen=True)
class ReferenceBatch(ByLabel):
    """The Stable Target Field: the source and size - 1 others, drawn once for the batch (Xu et al. 2023, algorithm 1).

    One ordered draw r_1 .. r_n without replacement serves all rows. A row whose source is among r_1 .. r_(n-1) uses
    all n; any other uses r_1 .. r_(n-1) and its source. So every row has its source and n - 1 distinct others, each
    choice of others equally likely; n = 1 is DSM bit for bit, n = N the exact target. (Drawing with replacement and
    dropping the source's repeats would be biased.)

    Attributes:
        size: members of a row's support, the source counted. A class with fewer is used whole.
    """

    pool: Pool
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= len(self.pool):
            raise ValueError(f"size must be between 1 and the pool's {len(self.pool)} members, not {self.size}")

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        return from_references(noisy, self.pool, self.pool.draw(self.size, label, generator), self.pool.take)


def from_references(
    noisy: Perturbed, pool: Pool, drawn: Int[Tensor, "n"], take: Callable[[Tensor], Tensor]
) -> Posterior:
    """The answer from an ordered draw r_1 .. r_n of distinct members, which `take` looks up.

    A row whose source is among r_1 .. r_(n-1) uses all n; any other uses r_1 .. r_(n-1) and its source.
    """
    shared = drawn[:-1]
    # the one member that a row does not share with all others: r_n where the source is shared, else the source
    is_shared, own = torch.isin(index_of(noisy, pool), shared), noisy.x
    if is_shared.any():
        own = torch.where(per_row(is_shared.to(own.device), own), take(drawn[-1:]).to(own), own)
    blocks = ((take(part), None) for part in shared.split(chunk_size(noisy.x_t)))
    return stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha, source=own)


@dataclass(frozen=True)
class FullDataset(SharedOut):
    """The exact posterior mean over all data, or all of a class: no bias and no variance.

    Attributes:
        sharded: in a run, whether ranks that train together share the members out; alone it changes nothing.
        at_once: in a run, how many rows of a rank are answered together, from as many steps as have so many.
        shards: among whom the members are.
    """

    pool: Pool
    sharded: bool = False
    at_once: int = 1024
    shards: Shards = field(default=ALONE, repr=False)

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        if noisy.index is not None:
            index_of(noisy, self.pool)
        blocks = ((block, None) for block in self._held(label, chunk_size(noisy.x_t)))
        return stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha, merge=self.shards.merge)

    def _held(self, label: int, size: int) -> Iterator[Tensor]:
        if self.shards.total == 1:
            return self.pool.blocks(label, size)
        place = self.shards.place(self.pool.members(label))  # of a small class a rank may hold none
        return map(self.own.take, place[place >= 0].split(size))


@dataclass(frozen=True)
class NearestNeighbours(ByLabel):
    """The k members nearest to x_t if the source is one of them, and else the source alone.

    "The k nearest" is a cell that does not look at the source, so this is unbiased; "the k nearest and the source"
    would not be. Niedoba et al. 2024 (arXiv 2402.08018) use the nearest with a proposal correction instead.

    Attributes:
        neighbours: the k of the cell.
    """

    pool: Pool
    neighbours: int

    def __post_init__(self) -> None:
        if not 1 <= self.neighbours <= len(self.pool):
            raise ValueError(
                f"neighbours must be between 1 and the pool's {len(self.pool)} members, not {self.neighbours}"
            )

    def estimate(self, noisy: Perturbed, label: int, generator: torch.Generator | None) -> Posterior:
        return from_nearest(noisy, self.pool, self.pool.members(label)[self._nearest(noisy, label).cpu()])

    def _nearest(self, noisy: Perturbed, label: int) -> Int[Tensor, "B k"]:
        """Positions, within the class, of the nearest members, of which the first of equals wins."""
        k = min(self.neighbours, len(self.pool.members(label)))
        sums = Sums(noisy.x_t, noisy.sigma, noisy.alpha)
        best = sums.total.new_empty(len(noisy.x_t), 0)
        where = best.long()
        passed = 0
        for block in self.pool.blocks(label, chunk_size(noisy.x_t)):
            _, _, energy = sums.compare(block)
            best, where = keep_least(best, where, energy, passed, k)
            passed += len(block)
        return where


def from_nearest(noisy: Perturbed, pool: Pool, nearest: Int[Tensor, "B k"]) -> Posterior:
    """The mean over the members listed for each row if its source is one of them, and else the source.

    Any list that x_t alone decides makes a cell, whether or not these are the nearest: so the answer is unbiased.

    Args:
        nearest: members of the pool, each once; -1: none.
    """
    there = (nearest >= 0).to(noisy.x.device)
    inside = (nearest == index_of(noisy, pool)[:, None]).any(1).to(noisy.x.device)
    support = pool.take(nearest.clamp(min=0).flatten()).to(noisy.x).unflatten(0, nearest.shape)
    # a row that is not inside is answered by its source: what it is allowed here does not matter
    allowed = there | ~inside[:, None]
    found = posterior(noisy.x_t, support, sigma=noisy.sigma, alpha=noisy.alpha, allowed=allowed)
    alone = SingleSample()(noisy)
    return Posterior(
        torch.where(per_row(inside, noisy.x), found.mean, alone.mean),
        torch.where(inside, found.ess, alone.ess),
        torch.where(inside, found.variance, alone.variance),
    )


def _by_label(noisy: Perturbed, shares: Bool[Tensor, "B"]) -> Iterator[tuple[int, Int[Tensor, "b"]]]:
    """Each label of rows that share references, and where these stand."""
    label = torch.full((len(noisy),), ALL) if noisy.label is None else noisy.label.cpu()
    return ((value, ((label == value) & shares).nonzero().flatten()) for value in label[shares].unique().tolist())


def _shares(noisy: Perturbed) -> Bool[Tensor, "B"]:
    """Which rows can use plain references, once their flips are undone."""
    if noisy.augmentation is None:
        return torch.ones(len(noisy), dtype=torch.bool)
    return permutes(noisy.augmentation).cpu()


def _undone(noisy: Perturbed) -> Perturbed:
    """The rows without the flips that the network is told of."""
    if (told := noisy.augmentation) is None:
        return noisy
    x, noise, x_t = (flip(value, told) for value in (noisy.x, noisy.noise, noisy.x_t))
    return replace(noisy, x=x, noise=noise, x_t=x_t)


def joined(answers: Sequence[tuple[Int[Tensor, "_"], Posterior]]) -> Posterior:
    """What was found for parts of a batch, in the order of the batch."""
    return Posterior.joined([found for _, found in answers]).rows(torch.cat([rows for rows, _ in answers]).argsort())


def check_at_once(rows: int) -> None:
    """Raises:
    ValueError: no row is to be answered at once, or more than could be waited for.
    """
    if not 1 <= rows <= MOST:
        raise ValueError(f"at_once is a number of rows, from 1 to {MOST:,}, and not {rows:,}")


def index_of(noisy: Perturbed, pool: Pool) -> Int[Tensor, "B"]:
    """Which members the rows are, after a look whether they can be members at all."""
    if tuple(noisy.x.shape[1:]) != pool.shape:
        raise ValueError(f"rows are {tuple(noisy.x.shape[1:])}, but members of the pool {pool.shape}")
    if noisy.index is None:
        raise ValueError("the batch does not say which members of the pool it holds: give it an index")
    index = noisy.index.cpu()
    if (beyond := (index < 0) | (index >= len(pool))).any():
        raise ValueError(f"no member {index[beyond][0].item()}: the pool has {len(pool)}, from 0")
    _compare(noisy.x[0], pool.take(index[:1])[0].to(noisy.x), int(index[0]))
    return index


def _compare(x: Tensor, member: Tensor, index: int) -> None:
    """Is this row the member that it is said to be? One row a call is looked at, which costs nothing.

    Data that were changed on the way (flipped, cropped, made lighter) and are compared with plain references would
    give biased targets, silently. Rows of a batch come in random order, so within some batches it is noticed.
    """
    difference, most = torch.stack([(x - member).abs().max(), member.abs().max()]).tolist()
    if difference > 0.01 * most:  # more than half precision rounds
        raise ValueError(
            f"a row is not the member {index} of the pool that it is said to be: they differ by {difference:.3g} (its "
            f"largest value is {most:.3g}). References must be seen as the rows are: put what was changed into the "
            "pool, tell it (Perturbed.augmentation), or use SingleSample"
        )
