"""Exact posteriors of noisy examples, and errors of targets at them, in float64.

    V_DSM = Tr Cov[x | x_t],      V_STF(n) = E ||T_n - E[x | x_t]||^2,      over sources and references, given x_t

(Xu et al. 2023, eq. 3 and 7.) The target over the k nearest data points A keeps the source where it is not in A. By the
law of total variance, V_kNN = V_DSM - P(A | x_t) Tr Cov[x | x_t, A].

One pass over the data gives the weight w_k of every data point for an x_t. The weights of a reference batch are a
subset of them, so that its stable target costs only a lookup and a matrix product.

Given x_t, data point k is the source with probability w_k, whichever one x_t was made from. So every reference batch is
combined with two sources: the most likely one, which counts by its weight, and one drawn from the posterior over the
others, which counts by their total weight. At small noise, where a second source is rare and yet causes all of the
variance, it is then never missed.

With the references of draw r, the STF target of an example has the error vector e_r = T_r - E[x | x_t]. The mean of
<e_r, e_s> over pairs of different draws is ||E[T | x_t] - E[x | x_t]||^2, the squared bias, without the Monte-Carlo
variance that the square of a mean would add. It may be negative, by about its standard error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import PosteriorAccumulator, chunk_size, float64_device
from stablefield.pool import NULL_LABEL, Pool, draw_without_replacement
from stablefield.process import BatchRecord, NoisyBatch
from stablefield.seeding import generator

MAX_ELEMENTS = 2**26  # float64 numbers per tensor; about two such tensors are held at once (1 GB)
SINGLE_SOURCE = 0.99  # posterior probability from which a data point counts as the only likely source

Progress = Callable[[int, int], object]


@dataclass(frozen=True, eq=False)
class TargetErrors(BatchRecord):
    """Errors of stable targets with one size of the support at each example, for every draw of references.

    Squared biases are jackknife pseudo-values: their mean over the draws is the estimate, and their spread gives its
    standard error as that of a mean of independent values would. All but the first are None unless they are asked for.

    Attributes:
        variance: V_STF, the squared distance to E[x | x_t] with the source in the support, on average over the source.
            It is all variance, because that target is unbiased, (B, R).
        squared_bias: squared bias with the source in the support; 0 up to chance, (B, R).
        without_source: squared distance to E[x | x_t] if the support is drawn independently of the source, (B, R).
        without_source_squared_bias: squared bias without the source, a part of `without_source`, (B, R).
    """

    variance: Float[Tensor, "B R"]
    squared_bias: Float[Tensor, "B R"] | None = None
    without_source: Float[Tensor, "B R"] | None = None
    without_source_squared_bias: Float[Tensor, "B R"] | None = None


@dataclass(frozen=True, eq=False)
class PosteriorStatistics(BatchRecord):
    """Statistics of the posterior of each x_t over N candidates.

    Attributes:
        ess_share: effective sample size 1 / sum w^2, divided by N, (B,).
        kl: KL divergence of the posterior from the prior, sum w log(N w), in nats: at most log N, (B,).
        divergence: the paper's D, sum w f(1 / (N w)): at most about N^2 (Xu et al. 2023, section 4), (B,).
        single_source: 1 where one candidate has at least 99 % of the posterior, else 0, (B,).
    """

    ess_share: Float[Tensor, "B"]
    kl: Float[Tensor, "B"]
    divergence: Float[Tensor, "B"]
    single_source: Float[Tensor, "B"]


@dataclass(frozen=True, eq=False)
class Exact:
    """Exact posteriors at noisy examples, and errors of targets given x_t, in units of x squared (float64).

    Attributes:
        mean: E[x | x_t], (B, *D).
        dsm: variance of the DSM target, Tr Cov[x | x_t], (B,).
        stf: errors of stable targets by the size of their support.
        knn: variance of the target over the k nearest data points by k, (B,).
        statistics: statistics of the posteriors; None unless they are asked for.
    """

    mean: Float[Tensor, "B *D"]
    dsm: Float[Tensor, "B"]
    stf: dict[int, TargetErrors]
    knn: dict[int, Float[Tensor, "B"]]
    statistics: PosteriorStatistics | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["Exact"]) -> "Exact":
        """One record of the examples of several.

        Args:
            parts: at least one, all with the same sizes.
        """
        statistics = [part.statistics for part in parts if part.statistics is not None]
        return cls(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.dsm for part in parts]),
            {size: TargetErrors.concatenate([part.stf[size] for part in parts]) for size in parts[0].stf},
            {k: torch.cat([part.knn[k] for part in parts]) for k in parts[0].knn},
            PosteriorStatistics.concatenate(statistics) if statistics else None,
        )

    def select(self, index: Int[Tensor, "b"]) -> "Exact":
        """The record of some of the examples.

        Args:
            index: their positions.
        """
        stf = {size: errors.select(index) for size, errors in self.stf.items()}
        knn = {k: variance[index] for k, variance in self.knn.items()}
        return Exact(self.mean[index], self.dsm[index], stf, knn, self.statistics and self.statistics.select(index))


def exact_posteriors(
    pool: Pool,
    noisy: NoisyBatch,
    *,
    sizes: Sequence[int] = (),
    neighbours: Sequence[int] = (),
    draws: int = 8,
    seed: int = 0,
    details: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Exact:
    """The exact posteriors of noisy examples over all data, or over those of their label; one pass over the data.

    Args:
        pool: the data.
        noisy: the examples, as `draw_points` returns them.
        sizes: sizes of the support for which the variance of stable targets is measured too. A support as large as the
            data (of the label) is exact.
        neighbours: numbers k of nearest data points for which the variance of the target over them is measured too.
        draws: number of reference batches for it, shared by all examples.
        seed: seed of these draws.
        details: True for statistics of the posterior, biases, and supports without the source too; `draws` must be 3
            or more.
        device: device of the computation; that of the data by default.
        progress: called with (done, total).
    """
    device = float64_device(torch.device(device) if device is not None else pool.data.device)
    measurement = _Measurement(pool, tuple(sizes), tuple(neighbours), draws, seed, details, device)
    parts = [
        (label, part) for label, index in _by_label(noisy) for part in index.split(measurement.examples_at_once(label))
    ]
    done, total = 0, sum(measurement.work(label) for label, _ in parts)

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total)

    found = [measurement.measure(noisy.select(part), label, advance) for label, part in parts]
    return Exact.concatenate(found).select(torch.cat([part for _, part in parts]).argsort())


def _by_label(noisy: NoisyBatch) -> Iterator[tuple[int, Int[Tensor, "b"]]]:
    label = torch.full((len(noisy),), NULL_LABEL) if noisy.label is None else noisy.label.cpu()
    return ((value, (label == value).nonzero().flatten()) for value in label.unique().tolist())


class _EnergyRecorder(PosteriorAccumulator):
    """Posterior accumulator that keeps the energies of all candidates, from which it returns their weights."""

    def __init__(self, x_t: Tensor, sigma: Tensor, alpha: Tensor, num_candidates: int) -> None:
        super().__init__(x_t, sigma, alpha)
        self.energies, self.count = self.query.new_empty(len(x_t), num_candidates), 0

    @override
    def compare(self, candidates: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        result = super().compare(candidates, square)
        self.energies[:, self.count : self.count + len(candidates)] = result[2]
        self.count += len(candidates)
        return result

    def log_weights(self) -> Float[Tensor, "B N"]:
        """Logarithm of the weight of every candidate, normalized over all of them; overwrites the energies."""
        relative = self.energies.sub_(self.lowest[:, None]).mul_(-self.sharpness[:, None])
        return relative.sub_(self.total.log()[:, None])


@dataclass(frozen=True, eq=False)
class _Sources(BatchRecord):
    """Possible sources of each x_t: the most likely one, one of the others for each draw, and the weight of these."""

    first: Int[Tensor, "B"]
    others: Int[Tensor, "B S"]
    other_weight: Float[Tensor, "B"]

    @classmethod
    def draw(cls, w: Float[Tensor, "B N"], uniform: Float[Tensor, "B S"]) -> "_Sources":
        """Sources drawn from posterior probabilities, which are overwritten, with numbers in [0, 1)."""
        first = w.max(1).indices
        below = w.scatter_(1, first[:, None], 0.0).cumsum(1)
        others = torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp(max=w.shape[1] - 1)
        return cls(first, others, below[:, -1].contiguous())


def _statistics(log_w: Float[Tensor, "B N"], w: Float[Tensor, "B N"]) -> PosteriorStatistics:
    """Statistics of posteriors from the weight of every data point, which may be 0."""
    count = w.shape[1]
    share = w * count
    # f(y) = (1 / y - 1)^2 below y = 1 / share = 1.5, and 8 y / 27 - 1 / 3 above
    terms = torch.where(share > 1 / 1.5, w * (share - 1).square(), 8 / 27 / count - w / 3)
    return PosteriorStatistics(
        1 / w.square().sum(1) / count,
        (w * log_w).sum(1) + math.log(count),
        terms.sum(1),
        (w.max(1).values >= SINGLE_SOURCE).double(),
    )


def stable_means(
    log_w: Float[Tensor, "B N"],
    support: Float[Tensor, "n D"],
    drawn: Int[Tensor, "n"],
    sources: Sequence[tuple[Int[Tensor, "B"], Float[Tensor, "B D"]]],
) -> list[Float[Tensor, "B D"]]:
    """Means over r_1 .. r_n and each of the sources, by the rule of `STFTarget`; and, last, without a source.

    The weights are normalized over all data; only their ratios within the support matter.

    Args:
        log_w: logarithm of the weight of every data point.
        support: the drawn data points r_1 .. r_n.
        drawn: their indices.
        sources: pairs of indices and data points, each a possible source of every example.
    """
    log_drawn = log_w[:, drawn]
    shared = log_drawn[:, :-1]
    total = shared.logsumexp(1)
    weight = (shared - torch.where(total == -torch.inf, 0.0, total)[:, None]).exp_()
    mean = weight @ support[:-1]

    def mean_with(x: Tensor, log_weight: Tensor) -> Tensor:
        return torch.lerp(mean, x, torch.sigmoid(log_weight - total)[:, None])

    targets = []
    for source, x in sources:
        is_shared = torch.isin(source, drawn[:-1])
        log_weight = torch.where(is_shared, log_drawn[:, -1], log_w.gather(1, source[:, None]).squeeze(1))
        targets.append(mean_with(torch.where(is_shared[:, None], support[-1], x), log_weight))
    return [*targets, mean_with(support[-1].expand_as(mean), log_drawn[:, -1])]


@dataclass(frozen=True, eq=False)
class _Measurement:
    """Measures examples with one label."""

    pool: Pool
    sizes: tuple[int, ...]
    neighbours: tuple[int, ...]
    draws: int
    seed: int
    details: bool
    device: torch.device

    @property
    def weighted(self) -> bool:
        """True if the weight of every data point is needed."""
        return bool(self.sizes or self.neighbours or self.details)

    def examples_at_once(self, label: int) -> int:
        """Number of examples whose weights and errors fit into memory."""
        dim = math.prod(self.pool.shape)
        weights = len(self.pool.indices(label)) if self.weighted else 1
        errors = 2 * self.draws * dim if self.details else self.draws
        return max(1, MAX_ELEMENTS // max(weights, 4 * dim, errors))

    def work(self, label: int) -> int:
        """Number of candidates that examples are compared with."""
        count = len(self.pool.indices(label))
        return count + self.draws * sum(size for size in self.sizes if size < count)

    def measure(self, noisy: NoisyBatch, label: int, advance: Callable[[int], None]) -> Exact:
        x_t, sigma, alpha = (value.to(self.device, torch.float64) for value in (noisy.x_t, noisy.sigma, noisy.alpha))
        count = len(self.pool.indices(label))
        sums = _EnergyRecorder(x_t, sigma, alpha, count) if self.weighted else PosteriorAccumulator(x_t, sigma, alpha)
        for block in self.pool.blocks(label, chunk_size(x_t)):
            sums.add(block.to(self.device))
            advance(len(block))
        posterior, stf, knn, statistics = sums.finish(), {}, {}, None
        if isinstance(sums, _EnergyRecorder):
            assert noisy.image_number is not None
            generators = (generator(self.seed, "floor", "sources", number) for number in noisy.image_number.tolist())
            uniform = torch.stack([torch.rand(self.draws, generator=g, dtype=torch.float64) for g in generators])
            log_w, mean = sums.log_weights(), posterior.mean.flatten(1)
            sources, statistics = self._sources(log_w, uniform.to(self.device))
            stf = {size: self._errors(label, mean, log_w, sources, size, advance) for size in self.sizes}
            knn = {k: self._variance_of_knn(label, posterior.variance, log_w, k) for k in self.neighbours}
        return Exact(posterior.mean.cpu(), posterior.variance.cpu(), stf, knn, statistics)

    def _sources(
        self, log_w: Float[Tensor, "B N"], uniform: Float[Tensor, "B R"]
    ) -> tuple[_Sources, PosteriorStatistics | None]:
        """Possible sources of each example and, for details, statistics; 16 examples at a time to save memory."""
        sources, statistics = [], []
        for part, u in zip(log_w.split(16), uniform.split(16), strict=True):
            w = part.exp()
            statistics += [_statistics(part, w).map(Tensor.cpu)] if self.details else []
            sources.append(_Sources.draw(w, u))
        return _Sources.concatenate(sources), PosteriorStatistics.concatenate(statistics) if statistics else None

    def _variance_of_knn(
        self, label: int, dsm: Float[Tensor, "B"], log_w: Float[Tensor, "B N"], k: int
    ) -> Float[Tensor, "B"]:
        """Variance of the target over the k nearest data points, those with the largest weights."""
        index = self.pool.indices(label)
        if k >= len(index):
            return torch.zeros_like(dsm).cpu()
        found = []
        for rows in torch.arange(len(dsm)).split(max(1, MAX_ELEMENTS // (4 * k * math.prod(self.pool.shape)))):
            log_inside, nearest = log_w[rows.to(log_w.device)].topk(k)
            x = self.pool.take(index[nearest.flatten().cpu()]).to(self.device, torch.float64).reshape(len(rows), k, -1)
            mean = log_inside.softmax(1)[:, None] @ x
            found.append((log_inside.exp() * (x - mean).square().sum(2)).sum(1))
        return (dsm - torch.cat(found)).clamp(min=0).cpu()

    def _errors(
        self,
        label: int,
        mean: Float[Tensor, "B D"],
        log_w: Float[Tensor, "B N"],
        sources: _Sources,
        size: int,
        advance: Callable[[int], None],
    ) -> TargetErrors:
        """Errors of stable targets with one size of the support, on average over the source."""
        index = self.pool.indices(label)
        squares = mean.new_zeros(len(mean), self.draws)
        if size >= len(index):
            zero = squares.cpu()
            return TargetErrors(zero, zero, zero, zero) if self.details else TargetErrors(zero)
        errors = mean.new_empty(2, *squares.shape, mean.shape[1] if self.details else 0)

        def take(chosen: Tensor) -> Tensor:
            return self.pool.take(index[chosen.cpu()]).to(self.device, torch.float64).flatten(1)

        first = (sources.first, take(sources.first))
        for r in range(self.draws):
            draw = generator(self.seed, "floor", "references", label, size, r)
            drawn, other = draw_without_replacement(len(index), size, draw), sources.others[:, r]
            pair = (first, (other, take(other)))
            means = stable_means(log_w, take(drawn), drawn.to(self.device), pair)
            of_first, of_other, without = (each.sub_(mean) for each in means)
            squares[:, r] = torch.lerp(of_first.square().sum(1), of_other.square().sum(1), sources.other_weight)
            if self.details:
                errors[0, :, r], errors[1, :, r] = of_first.lerp_(of_other, sources.other_weight[:, None]), without
            advance(size)
        if not self.details:
            return TargetErrors(squares.cpu())
        with_source, without_source = (errors @ errors.mT).cpu()
        error = without_source.diagonal(dim1=1, dim2=2)
        return TargetErrors(squares.cpu(), _off_diagonal(with_source), error, _off_diagonal(without_source))


def _off_diagonal(products: Float[Tensor, "B R R"]) -> Float[Tensor, "B R"]:
    """Jackknife pseudo-values over draws of the mean off the diagonal."""
    draws = products.shape[1]
    row = products.sum(2) - products.diagonal(dim1=1, dim2=2)
    total = row.sum(1, keepdim=True)
    return total / (draws - 1) - (total - 2 * row) / (draws - 2)
