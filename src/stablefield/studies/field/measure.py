"""Variance and bias of training targets at several noise levels, measured on a data set.

    V_DSM(t) = E Tr Cov[x | x_t],      V_STF(t, n) = E ||T_n - E[x | x_t]||^2,      over x_t, sources and references

(Xu et al. 2023, eq. 3 and 7.) One pass over the data gives the weight w_k of every data point for an x_t. The exact
mean, V_DSM and all statistics of the posterior follow from these without further draws, and stable targets with few
(`stablefield.floor.weights`).

| quantity      | unit             | meaning                                                                          |
|---------------|------------------|----------------------------------------------------------------------------------|
| dsm           | x squared        | V_DSM, the variance of the DSM target, summed over the dimensions                |
| stf[n]        | x squared        | V_STF and the squared bias, with the source in the support and without           |
| rounding      | x squared        | squared error of the exact mean when it is rounded to the data type of the data  |
| ess_share     | share of N       | effective sample size 1 / sum w^2, over N                                        |
| kl            | nats             | KL of the posterior from the prior, sum w log(N w): at most log N                |
| divergence    | none             | the paper's D, sum w f(1 / (N w)): at most about N^2 (Xu et al. 2023, section 4) |
| single_source | share of the x_t | those for which one data point has at least 99 % of the posterior                |

Noise units (the variance of the target of a network that predicts the noise, "sigma-weighted") are alpha^2 / sigma^2
times units of x squared; score units are alpha^2 / sigma^4 times units of x squared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.data import Progress, silent
from stablefield.floor.weights import EnergyRecorder, Sources, draw_sources, stable_means
from stablefield.kernel.accumulator import chunk_size
from stablefield.pool import NULL_LABEL, Pool, draw_without_replacement
from stablefield.process import Process, draw_noise, per_example
from stablefield.seeding import generator
from stablefield.studies.field.estimate import Estimate, squared_bias, squared_error
from stablefield.studies.field.record import Field, STFErrors

__all__ = ["MAX_ELEMENTS", "SINGLE_SOURCE", "SIZES", "measure_field"]

SIZES = (64, 256, 1024, 4096)  # default sizes of the support
SINGLE_SOURCE = 0.99  # posterior probability from which a data point counts as the only likely source
MAX_ELEMENTS = 2**26  # float64 numbers per tensor; about two such tensors are held at once (1 GB)


def measure_field(
    pool: Pool,
    process: Process,
    t: Float[Tensor, "L"],
    *,
    sizes: Sequence[int] = SIZES,
    examples: int = 256,
    draws: int = 16,
    seed: int = 0,
    conditional: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Field:
    """Measure variance and bias of targets, and statistics of the posterior, at several times of a process.

    Args:
        pool: the data.
        process: the process that makes x_t from x.
        t: the times, (L,).
        sizes: sizes of the support, the source included. Sizes above the number of data points are left out; of a
            class with fewer data points, all are used.
        examples: number of x_t at each time, at least 2.
        draws: number of reference batches of each size, shared by all examples; at least 3, for the standard errors.
        seed: seed of all draws. The draws of an example depend neither on the number of examples nor on `sizes`.
        conditional: measure targets of a network that is conditioned on the class: only data points of the class of
            the source are candidates.
        device: device of the computation.
        progress: called with (done, total).

    Raises:
        ValueError: fewer than 3 draws or 2 examples, a size below 1, times that are not between 0 and the limit of the
            process, or `conditional` for data without labels.
    """
    _check(pool, process, t, sizes, examples, draws, conditional)
    t = t.double().cpu()
    alpha, sigma = process.scales(t)
    possible = tuple(n for n in sorted(set(sizes)) if n <= len(pool))
    measurement = _Measurement(pool, possible, draws, seed, torch.device(device), progress)
    result = measurement.measure(alpha.repeat_interleave(examples), sigma.repeat_interleave(examples), conditional)
    statistics = {
        name: Estimate.over_examples(values.unflatten(0, (-1, examples))) for name, values in result.statistics.items()
    }
    stf = {n: _stf_errors(*(part.unflatten(0, (-1, examples)) for part in pair)) for n, pair in result.products.items()}
    return Field(t, alpha, sigma, len(pool), measurement.dim, examples, draws, **statistics, stf=stf)


def _stf_errors(squares: Float[Tensor, "L B R"], products: Float[Tensor, "L B 2 R R"]) -> STFErrors:
    with_source, without_source = products.unbind(2)
    error = squared_error(without_source.diagonal(dim1=2, dim2=3))
    return STFErrors(squared_error(squares), squared_bias(with_source), error, squared_bias(without_source))


@dataclass(frozen=True, eq=False)
class _ExampleResults:
    """Results for each example.

    Attributes:
        statistics: statistics of the posterior by name, (B,).
        products: for each size, mean squared errors with the source in the support, (B, R), and inner products of the
            errors of all pairs of draws, (B, 2, R, R), with the source and without.
    """

    statistics: dict[str, Float[Tensor, "B"]]
    products: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def concatenate(cls, parts: Sequence["_ExampleResults"], order: Int[Tensor, "B"]) -> "_ExampleResults":
        """Concatenation of all parts, reordered."""
        first = parts[0]
        return cls(
            {name: _cat([part.statistics[name] for part in parts], order) for name in first.statistics},
            {
                n: (_cat([p.products[n][0] for p in parts], order), _cat([p.products[n][1] for p in parts], order))
                for n in first.products
            },
        )


def _cat(parts: Sequence[Tensor], order: Int[Tensor, "B"]) -> Tensor:
    return torch.cat(list(parts))[order]


@dataclass(frozen=True, eq=False)
class _Measurement:
    """Measures the examples of one class at a time, in parts that fit into memory."""

    pool: Pool
    sizes: tuple[int, ...]
    draws: int
    seed: int
    device: torch.device
    progress: Progress

    @property
    def dim(self) -> int:
        return math.prod(self.pool.shape)

    def measure(self, alpha: Float[Tensor, "B"], sigma: Float[Tensor, "B"], conditional: bool) -> _ExampleResults:
        """Results for examples with these scales; their sources are drawn at random."""
        source = torch.randint(len(self.pool), alpha.shape, generator=generator(self.seed, "field", "sources"))
        parts = [
            (label, part)
            for label, examples in self._by_label(source, conditional)
            for part in self._split(examples, label)
        ]
        counter = _WorkCounter(self.progress, sum(self._work(label) for label, _ in parts))
        results = [
            self._measure_part(part, source[part], alpha[part], sigma[part], label, counter) for label, part in parts
        ]
        return _ExampleResults.concatenate(results, torch.cat([part for _, part in parts]).argsort())

    def _by_label(self, source: Int[Tensor, "B"], conditional: bool) -> list[tuple[int, Tensor]]:
        """Numbers of the examples by label; all under the null label if unconditional."""
        if not conditional:
            return [(NULL_LABEL, torch.arange(len(source)))]
        label = self.pool.label(source)
        assert label is not None
        label = label.cpu()
        return [(value, (label == value).nonzero().flatten()) for value in label.unique().tolist()]

    def _split(self, examples: Tensor, label: int) -> Sequence[Tensor]:
        """Parts of the examples that fit into memory."""
        return examples.split(max(1, MAX_ELEMENTS // max(len(self.pool.indices(label)), 2 * self.draws * self.dim)))

    def _work(self, label: int) -> int:
        """Number of candidates that a part is compared with, which measures its work."""
        candidates = len(self.pool.indices(label))
        return candidates + self.draws * sum(min(n, candidates) for n in self.sizes)

    def _measure_part(
        self, examples: Tensor, source: Tensor, alpha: Tensor, sigma: Tensor, label: int, counter: "_WorkCounter"
    ) -> _ExampleResults:
        x = self.pool.take(source).to(self.device, torch.float64)
        alpha, sigma = alpha.to(self.device), sigma.to(self.device)
        noise = draw_noise(x, self._generators(examples, "noise"))
        x_t = per_example(alpha, x) * x + per_example(sigma, x) * noise
        recorder = EnergyRecorder(x_t, sigma, alpha, len(self.pool.indices(label)))
        for block in self.pool.blocks(label, chunk_size(x_t)):
            recorder.add(block)
            counter.add(len(block))
        posterior, log_w = recorder.finish(), recorder.log_weights()
        draws = [
            torch.rand(len(self.sizes) * self.draws, generator=g, dtype=torch.float64)
            for g in self._generators(examples, "posterior")
        ]
        uniform = torch.stack(draws).to(self.device)
        statistics, sources = _posterior_statistics(log_w, uniform)
        statistics |= {
            "dsm": posterior.variance,
            "ess_share": posterior.ess / recorder.count,
            "rounding": self._rounding(posterior.mean),
        }
        mean = posterior.mean.flatten(1)
        products = {}
        for i, n in enumerate(self.sizes):
            others = sources.others[:, i * self.draws : (i + 1) * self.draws]
            products[n] = self._products(n, label, mean, log_w, replace(sources, others=others), counter)
        return _ExampleResults({name: value.cpu() for name, value in statistics.items()}, products)

    def _generators(self, examples: Tensor, purpose: str) -> Iterator[torch.Generator]:
        """Generators that depend on the example's number, not on the part it is measured in."""
        return (generator(self.seed, "field", purpose, number) for number in examples.tolist())

    def _rounding(self, mean: Float[Tensor, "B *D"]) -> Float[Tensor, "B"]:
        """Squared error of the mean when rounded to the data type of the data."""
        rounded = mean.to(self.pool.take(torch.tensor([0])).dtype)
        return (rounded - mean).flatten(1).square().sum(1)

    def _products(
        self,
        size: int,
        label: int,
        mean: Float[Tensor, "B D"],
        log_w: Float[Tensor, "B N"],
        sources: Sources,
        counter: "_WorkCounter",
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B 2 R R"]]:
        """Squared errors and inner products of errors for one size, as in `_ExampleResults`."""
        index = self.pool.indices(label)
        size = min(size, len(index))
        first, other_weight = self._take(index[sources.first.cpu()]), sources.other_weight[:, None]
        squares = mean.new_empty(len(mean), self.draws)
        errors = mean.new_empty(len(mean), 2, *squares.shape[1:], mean.shape[1])
        for r in range(self.draws):
            drawn = draw_without_replacement(
                len(index), size, generator(self.seed, "field", "references", label, size, r)
            )
            other = sources.others[:, r]
            pair = ((sources.first, first), (other, self._take(index[other.cpu()])))
            of_first, of_other, without = stable_means(log_w, self._take(index[drawn]), drawn.to(self.device), pair)
            of_first, of_other = of_first.sub_(mean), of_other.sub_(mean)
            squares[:, r] = torch.lerp(of_first.square().sum(1), of_other.square().sum(1), sources.other_weight)
            errors[:, 0, r], errors[:, 1, r] = of_first.lerp_(of_other, other_weight), without.sub_(mean)
            counter.add(size)
        return squares.cpu(), (errors @ errors.mT).cpu()

    def _take(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        return self.pool.take(index).to(self.device, torch.float64).flatten(1)


def _posterior_statistics(
    log_w: Float[Tensor, "B N"], uniform: Float[Tensor, "B S"]
) -> tuple[dict[str, Float[Tensor, "B"]], Sources]:
    """Statistics of the posterior of each example, and sources drawn from it; 16 examples at a time to save memory."""
    parts = [_statistics_of_part(*part) for part in zip(log_w.split(16), uniform.split(16), strict=True)]
    statistics = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return statistics, Sources.concatenate([part[1] for part in parts])


def _statistics_of_part(log_w: Tensor, uniform: Tensor) -> tuple[dict[str, Tensor], Sources]:
    w, num_candidates = log_w.exp(), log_w.shape[1]
    statistics = {
        "kl": (w * log_w).sum(1) + math.log(num_candidates),
        "divergence": _divergence(w),
        "single_source": (w.max(1).values >= SINGLE_SOURCE).double(),
    }
    return statistics, draw_sources(w, uniform)


def _divergence(w: Float[Tensor, "B N"]) -> Float[Tensor, "B"]:
    """Mean of f(1 / (N w)) under w: f(y) = (1 / y - 1)^2 below y = 1.5, and 8 y / 27 - 1 / 3 above; w may be 0."""
    share = w * w.shape[1]
    return torch.where(share > 1 / 1.5, w * (share - 1).square(), 8 / 27 / w.shape[1] - w / 3).sum(1)


class _WorkCounter:
    """Counts the work done and reports it."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, amount: int) -> None:
        self.done += amount
        self.progress(self.done, self.total)


def _check(
    pool: Pool, process: Process, t: Tensor, sizes: Sequence[int], examples: int, draws: int, conditional: bool
) -> None:
    if draws < 3 or examples < 2:
        raise ValueError(
            f"standard errors need at least 3 draws and 2 examples per noise level, not {draws} and {examples}"
        )
    if wrong := [n for n in sizes if n < 1]:
        raise ValueError(f"sizes of the support must be at least 1 (the source alone), not {wrong[0]}")
    if t.ndim != 1 or len(t) == 0 or not ((t > 0) & (t <= process.t_max) & torch.isfinite(t)).all():
        raise ValueError(
            f"t must be a vector of times above 0 and at most {process.t_max} for {process}, not {t.tolist()}"
        )
    if conditional and pool.labels is None:
        raise ValueError("conditional=True needs labels, and the data have no labels; set conditional=False")
