"""How much targets vary and how biased they are, against the noise level.

    V_DSM(t) = E Tr Cov[x | x_t],      V_STF(t, n) = E ||T_n - E[x | x_t]||^2,      over x_t, sources and references

(Xu et al. 2023, eq. 3 and 7.) One pass over the data gives, for a row x_t, the weight w_k of every member. From these
follow the exact mean, V_DSM and every other number of the posterior without a further draw; and the weights of any
reference batch are some of them, so that one costs no more than a look-up and a product.

Given x_t, its source is member k with probability w_k, whichever it was that x_t was made from. So every reference
batch meets two sources: the likeliest, which counts by its weight, and one drawn from the posterior over the others,
which counts by theirs. At small noise, where a second source is rare and all that varies, it is then never missed.

| quantity      | unit             | what                                                                             |
|---------------|------------------|----------------------------------------------------------------------------------|
| dsm           | x squared        | V_DSM, the variance of a single-sample target, summed over the dimensions        |
| stable[n]     | x squared        | V_STF and the squared bias, with the source in the support and without           |
| floor         | x squared        | what is left of the exact target's variance, 0, when its mean is rounded         |
| ess_share     | share of N       | effective number of members 1 / sum w^2, over N                                  |
| kl            | nats             | KL of the posterior from the prior, sum w log(N w): at most log N                |
| divergence    | none             | the paper's D, sum w f(1 / (N w)): at most about N^2 (Xu et al. 2023, section 4) |
| one_point     | share of rows    | whose posterior gives one member at least 99 %                                   |

Noise units (what the target varies by if the noise is predicted: "sigma-weighted") are alpha^2 / sigma^2 times units of
x squared, score units alpha^2 / sigma^4 times.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.data import Progress, silent
from stablefield.evaluate.field.estimate import Estimate, squared_bias, squared_error
from stablefield.evaluate.field.record import Field, Stable
from stablefield.posterior import Sums, chunk_size
from stablefield.process import Process, per_row
from stablefield.reference import ALL, Pool, distinct
from stablefield.seeding import generator

SIZES = (64, 256, 1024, 4096)
ONE_POINT = 0.99
NUMBERS = 2**26  # float64 numbers that may be held at once, twice: half a GB


def measure_field(
    pool: Pool,
    process: Process,
    t: Float[Tensor, "L"],
    *,
    sizes: Sequence[int] = SIZES,
    rows: int = 256,
    draws: int = 16,
    seed: int = 0,
    conditional: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Field:
    """Everything in the table above, at some times of a process.

    Args:
        pool: the data.
        process: how x becomes x_t.
        t: where to measure.
        sizes: members of a reference batch, the source counted. Those beyond the data's own number are left out; a
            class that has fewer is used whole.
        rows: x_t at each time.
        draws: reference batches, shared by all rows of a size (at least 3, so that errors can be told).
        seed: decides all draws. What a row meets does not depend on how many there are of anything else.
        conditional: the network is told the class: only its members may be sources.
        device: where the work is done.
        progress: told of work done, of how much.

    Raises:
        ValueError: fewer than 3 draws or 2 rows, a size below 1, times that are not between 0 and the process's
            limit, or `conditional` data without labels.
    """
    _check(pool, process, t, sizes, rows, draws, conditional)
    t = t.double().cpu()
    alpha, sigma = process.scales(t)
    small = tuple(n for n in sorted(set(sizes)) if n <= len(pool))
    lab = _Laboratory(pool, small, draws, seed, torch.device(device), progress)
    found = lab.measure(alpha.repeat_interleave(rows), sigma.repeat_interleave(rows), conditional)
    numbers = {name: Estimate.over_rows(each.unflatten(0, (-1, rows))) for name, each in found.numbers.items()}
    stable = {n: _stable(*(each.unflatten(0, (-1, rows)) for each in pair)) for n, pair in found.products.items()}
    return Field(t, alpha, sigma, len(pool), lab.dim, rows, draws, **numbers, stable=stable)


def _stable(squares: Float[Tensor, "L B R"], products: Float[Tensor, "L B 2 R R"]) -> Stable:
    own, free = products.unbind(2)
    without = squared_error(free.diagonal(dim1=2, dim2=3))
    return Stable(squared_error(squares), squared_bias(own), without, squared_bias(free))


@dataclass(frozen=True, eq=False)
class _Rows:
    """What was found row by row.

    Attributes:
        numbers: of the posterior.
        products: for each size, mean squared errors with the source in the support, (B, R), and over all pairs of
            draws the products of mean errors, (B, 2, R, R), with the source and without.
    """

    numbers: dict[str, Float[Tensor, "B"]]
    products: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def joined(cls, parts: Sequence["_Rows"], order: Int[Tensor, "B"]) -> "_Rows":
        """All parts, put in order."""
        first = parts[0]
        return cls(
            {name: _cat([part.numbers[name] for part in parts], order) for name in first.numbers},
            {
                n: (_cat([p.products[n][0] for p in parts], order), _cat([p.products[n][1] for p in parts], order))
                for n in first.products
            },
        )


def _cat(parts: Sequence[Tensor], order: Int[Tensor, "B"]) -> Tensor:
    return torch.cat(list(parts))[order]


class _Recorded(Sums):
    """Sums that remember the energy of every member that passed."""

    def __init__(self, x_t: Tensor, sigma: Tensor, alpha: Tensor, members: int) -> None:
        super().__init__(x_t, sigma, alpha)
        self.energies, self.passed = self.query.new_empty(len(x_t), members), 0

    def compare(self, members: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        found = super().compare(members, square)
        self.energies[:, self.passed : self.passed + len(members)] = found[2]
        self.passed += len(members)
        return found

    def log_weights(self) -> Float[Tensor, "B N"]:
        """log w of every member, normalised over all of them. The energies are used up."""
        relative = self.energies.sub_(self.lowest[:, None]).mul_(-self.sharpness[:, None])
        return relative.sub_(self.total.log()[:, None])


@dataclass(frozen=True, eq=False)
class _Laboratory:
    """The measurement: rows of one class at a time, and of these as many as memory holds."""

    pool: Pool
    sizes: tuple[int, ...]
    draws: int
    seed: int
    device: torch.device
    progress: Progress

    @property
    def dim(self) -> int:
        return math.prod(self.pool.shape)

    def measure(self, alpha: Float[Tensor, "B"], sigma: Float[Tensor, "B"], conditional: bool) -> _Rows:
        """What there is to know of rows at these scales."""
        source = torch.randint(len(self.pool), alpha.shape, generator=generator(self.seed, "field", "sources"))
        parts = [
            (label, part) for label, rows in self._by_label(source, conditional) for part in self._split(rows, label)
        ]
        work = _Work(self.progress, sum(self._work(label) for label, _ in parts))
        found = [self._rows(part, source[part], alpha[part], sigma[part], label, work) for label, part in parts]
        return _Rows.joined(found, torch.cat([part for _, part in parts]).argsort())

    def _by_label(self, source: Int[Tensor, "B"], conditional: bool) -> list[tuple[int, Tensor]]:
        if not conditional:
            return [(ALL, torch.arange(len(source)))]
        label = self.pool.label(source)
        assert label is not None
        label = label.cpu()
        return [(value, (label == value).nonzero().flatten()) for value in label.unique().tolist()]

    def _split(self, rows: Tensor, label: int) -> Sequence[Tensor]:
        return rows.split(max(1, NUMBERS // max(len(self.pool.members(label)), 2 * self.draws * self.dim)))

    def _work(self, label: int) -> int:
        members = len(self.pool.members(label))
        return members + self.draws * sum(min(n, members) for n in self.sizes)

    def _rows(self, rows: Tensor, source: Tensor, alpha: Tensor, sigma: Tensor, label: int, work: "_Work") -> _Rows:
        x = self.pool.take(source).to(self.device, torch.float64)
        alpha, sigma = alpha.to(self.device), sigma.to(self.device)
        x_t = per_row(alpha, x) * x + per_row(sigma, x) * self._random(torch.randn, rows, "noise", *x.shape[1:])
        sums = _Recorded(x_t, sigma, alpha, len(self.pool.members(label)))
        for block in self.pool.blocks(label, chunk_size(x_t)):
            sums.add(block)
            work.add(len(block))
        found, log_w = sums.finish(), sums.log_weights()
        uniform = self._random(torch.rand, rows, "posterior", len(self.sizes) * self.draws)
        numbers, sources = _of_weights(log_w, uniform)
        numbers |= {"dsm": found.variance, "ess_share": found.ess / sums.passed, "floor": self._rounding(found.mean)}
        mean = found.mean.flatten(1)
        products = {}
        for i, n in enumerate(self.sizes):
            others = sources.others[:, i * self.draws : (i + 1) * self.draws]
            products[n] = self._products(n, label, mean, log_w, replace(sources, others=others), work)
        return _Rows({name: value.cpu() for name, value in numbers.items()}, products)

    def _random(self, draw: Callable[..., Tensor], rows: Tensor, purpose: str, *shape: int) -> Float[Tensor, "B *D"]:
        """Random numbers that belong to a row, whatever part it is measured in."""
        each = (generator(self.seed, "field", purpose, row) for row in rows.tolist())
        return torch.stack([draw(shape, generator=g, dtype=torch.float64) for g in each]).to(self.device)

    def _rounding(self, mean: Float[Tensor, "B *D"]) -> Float[Tensor, "B"]:
        kept = mean.to(self.pool.take(torch.tensor([0])).dtype)
        return (kept - mean).flatten(1).square().sum(1)

    def _products(
        self,
        size: int,
        label: int,
        mean: Float[Tensor, "B D"],
        log_w: Float[Tensor, "B N"],
        sources: "_Sources",
        work: "_Work",
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B 2 R R"]]:
        """What `_Rows` keeps of a size."""
        members = self.pool.members(label)
        size = min(size, len(members))
        first, rest = self._take(members[sources.first.cpu()]), sources.rest[:, None]
        squares = mean.new_empty(len(mean), self.draws)
        errors = mean.new_empty(len(mean), 2, *squares.shape[1:], mean.shape[1])
        for r in range(self.draws):
            drawn = distinct(len(members), size, generator(self.seed, "field", "references", label, size, r))
            other = sources.others[:, r]
            owns = ((sources.first, first), (other, self._take(members[other.cpu()])))
            likely, less, free = _targets(log_w, self._take(members[drawn]), drawn.to(self.device), owns)
            likely, less = likely.sub_(mean), less.sub_(mean)
            squares[:, r] = torch.lerp(likely.square().sum(1), less.square().sum(1), sources.rest)
            errors[:, 0, r], errors[:, 1, r] = likely.lerp_(less, rest), free.sub_(mean)
            work.add(size)
        return squares.cpu(), (errors @ errors.mT).cpu()

    def _take(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        return self.pool.take(index).to(self.device, torch.float64).flatten(1)


@dataclass(frozen=True, eq=False)
class _Sources:
    """Which member x_t may have been made from, for each row.

    Attributes:
        first: the likeliest member.
        others: members drawn from the posterior over all others, a column each draw.
        rest: how likely it is one of those.
    """

    first: Int[Tensor, "B"]
    others: Int[Tensor, "B S"]
    rest: Float[Tensor, "B"]


def _targets(
    log_w: Float[Tensor, "B N"],
    support: Float[Tensor, "n D"],
    drawn: Int[Tensor, "n"],
    owns: Sequence[tuple[Int[Tensor, "B"], Float[Tensor, "B D"]]],
) -> list[Float[Tensor, "B D"]]:
    """Means over r_1 .. r_n and each of the sources, as `ReferenceBatch` has it; and, last, without a source.

    The weights are those over all data, where only those of the support count.
    """
    log_drawn = log_w[:, drawn]
    shared = log_drawn[:, :-1]
    total = shared.logsumexp(1)
    weight = (shared - torch.where(total == -torch.inf, 0.0, total)[:, None]).exp_()
    mean = weight @ support[:-1]

    def joined(x: Tensor, log_weight: Tensor) -> Tensor:
        return torch.lerp(mean, x, torch.sigmoid(log_weight - total)[:, None])

    found = []
    for source, own in owns:
        is_shared = torch.isin(source, drawn[:-1])
        log_own = torch.where(is_shared, log_drawn[:, -1], log_w.gather(1, source[:, None]).squeeze(1))
        found.append(joined(torch.where(is_shared[:, None], support[-1], own), log_own))
    return [*found, joined(support[-1].expand_as(mean), log_drawn[:, -1])]


def _of_weights(
    log_w: Float[Tensor, "B N"], uniform: Float[Tensor, "B S"]
) -> tuple[dict[str, Float[Tensor, "B"]], _Sources]:
    """What the weights alone tell of each row, and sources by them; a few rows at a time, to save memory."""
    parts = [_of_few(*part) for part in zip(log_w.split(16), uniform.split(16), strict=True)]
    numbers = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    sources = [torch.cat(values) for values in zip(*(part[1] for part in parts), strict=True)]
    return numbers, _Sources(*sources)


def _of_few(log_w: Tensor, uniform: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    w, members = log_w.exp(), log_w.shape[1]
    top, first = w.max(1)
    numbers = {
        "kl": (w * log_w).sum(1) + math.log(members),
        "divergence": _divergence(w),
        "one_point": (top >= ONE_POINT).double(),
    }
    below = w.scatter_(1, first[:, None], 0.0).cumsum(1)
    others = torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp(max=members - 1)
    return numbers, (first, others, below[:, -1].contiguous())


def _divergence(w: Float[Tensor, "B N"]) -> Float[Tensor, "B"]:
    """sum w f(y), y = 1 / (N w): f = (1 / y - 1)^2 below y = 1.5, and 8 y / 27 - 1 / 3 above, where w may be 0."""
    share = w * w.shape[1]
    return torch.where(share > 1 / 1.5, w * (share - 1).square(), 8 / 27 / w.shape[1] - w / 3).sum(1)


class _Work:
    """How much has been done, of how much."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.passed = progress, total, 0

    def add(self, amount: int) -> None:
        """So much more."""
        self.passed += amount
        self.progress(self.passed, self.total)


def _check(
    pool: Pool, process: Process, t: Tensor, sizes: Sequence[int], rows: int, draws: int, conditional: bool
) -> None:
    if draws < 3 or rows < 2:
        raise ValueError(f"errors need at least 3 draws and 2 rows a level, not {draws} and {rows}")
    if wrong := [n for n in sizes if n < 1]:
        raise ValueError(f"a reference batch has at least 1 member, its source, not {wrong[0]}")
    if t.ndim != 1 or len(t) == 0 or not ((t > 0) & (t <= process.limit) & torch.isfinite(t)).all():
        raise ValueError(f"times must be in a row, above 0 and at most {process.limit} for {process}, not {t.tolist()}")
    if conditional and pool.labels is None:
        raise ValueError("the data have no labels to confine the sources to: leave conditional out")
