"""Variance and bias of training targets by noise level, measured on a data set.

    V_DSM(t) = E Tr Cov[x | x_t],      V_STF(t, n) = E ||T_n - E[x | x_t]||^2,      over x_t, sources and references

(Xu et al. 2023, eq. 3 and 7), with the same estimator as the floor of a loss (`stablefield.floor.exact`).

| quantity       | unit             | meaning                                                                         |
|----------------|------------------|---------------------------------------------------------------------------------|
| dsm            | x squared        | V_DSM, the variance of the DSM target, summed over the dimensions               |
| stf[n]         | x squared        | V_STF and the squared bias, with the source in the support and without          |
| rounding       | x squared        | squared error of the exact mean when it is rounded to the data type of the data |
| ess_share      | share of N       | effective sample size 1 / sum w^2, over N                                       |
| kl             | nats             | KL of the posterior from the prior, sum w log(N w): at most log N               |
| divergence     | none             | the paper's D, sum w f(1 / (N w)): at most about N^2                            |
| single_source  | share of the x_t | those for which one data point has at least 99 % of the posterior               |

Noise units (the variance of the target of a network that predicts the noise, "sigma-weighted") are alpha^2 / sigma^2
times units of x squared; score units are alpha^2 / sigma^4 times units of x squared.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.data import Progress, silent
from stablefield.floor import ByNoise, Levels, SquaredError
from stablefield.floor.exact import MAX_ELEMENTS, Exact, TargetErrors, exact_posteriors
from stablefield.floor.probes import as_pool, draw_points
from stablefield.pool import Pool
from stablefield.process import VE, Process
from stablefield.studies.field.distances import DataDistances
from stablefield.studies.field.linear import LinearDenoiser

SIZES = (64, 256, 1024, 4096)  # default sizes of the support
STATISTICS = {"ess_share": "share of N", "kl": "nats", "divergence": "1", "single_source": "share"}  # and their units
COLUMNS = ("t", "alpha", "sigma", "quantity", "n", "value", "standard_error", "unit")


@dataclass(frozen=True, eq=False)
class STFErrors:
    """Errors of the STF target for one size of the support, in units of x squared (see `floor.exact.TargetErrors`).

    Attributes:
        variance, squared_bias: with the source in the support; the bias is 0 up to chance.
        without_source, without_source_squared_bias: of a support drawn independently of the source.
    """

    variance: ByNoise
    squared_bias: ByNoise
    without_source: ByNoise
    without_source_squared_bias: ByNoise


@dataclass(frozen=True, eq=False)
class VarianceStudy:
    """Variance and bias of training targets, and statistics of the posterior, at several noise levels.

    `by_bin` of each quantity is its mean at every noise level, `errors_by_bin` the standard errors.

    Attributes:
        process: the process that makes x_t from x.
        t: times, (L,).
        alpha, sigma: scale of the data in x_t and noise level at each time, (L,).
        num_data_points: N, the number of data points.
        dim: number of dimensions of a data point.
        linear: the linear denoiser of the data.
        dsm: V_DSM, the variance of the DSM target, in units of x squared, summed over the dimensions.
        rounding: squared error of the exact posterior mean when rounded to the data type of the data, in the same unit.
        ess_share: effective sample size 1 / sum w^2 of the posterior, divided by N.
        kl: KL divergence of the posterior from the prior, sum w log(N w), in nats.
        divergence: the paper's D(t), sum w f(1 / (N w)), dimensionless (Xu et al. 2023, section 4).
        single_source: fraction of the x_t for which one data point has at least 99 % of the posterior.
        stf: errors of the STF target by size of the support.
    """

    process: Process
    t: Float[Tensor, "L"]
    alpha: Float[Tensor, "L"]
    sigma: Float[Tensor, "L"]
    num_data_points: int
    dim: int
    linear: LinearDenoiser
    dsm: ByNoise
    rounding: ByNoise
    ess_share: ByNoise
    kl: ByNoise
    divergence: ByNoise
    single_source: ByNoise
    stf: Mapping[int, STFErrors]

    @property
    def noise_level(self) -> Float[Tensor, "L"]:
        """Noise level sigma / alpha, which is comparable between processes."""
        return self.sigma / self.alpha

    @property
    def phases(self) -> tuple[float | None, float | None]:
        """Noise levels between which several sources compete; None where that is outside the measured levels.

        Above the first level, less than half of the x_t have one likely source; above the second, the effective sample
        size is more than half of N.
        """
        log_level, order = self.noise_level.log().sort()
        several, ess_share = 1 - self.single_source.by_bin[order], self.ess_share.by_bin[order]
        return _crossing(log_level, several), _crossing(log_level, ess_share)

    def in_noise_units(self, variance: ByNoise) -> ByNoise:
        """Convert to noise units per dimension, in which V_DSM is between 0 and 1.

        Args:
            variance: in units of x squared, summed over the dimensions.
        """
        return _scaled(variance, (self.alpha / self.sigma).square() / self.dim)

    def in_score_units(self, variance: ByNoise) -> ByNoise:
        """Convert to score units, summed over the dimensions.

        Args:
            variance: in units of x squared, summed over the dimensions.
        """
        return _scaled(variance, self.alpha.square() / self.sigma**4)

    def table(self) -> list[list[str]]:
        """Variances per dimension in noise units and statistics of the posterior, as rows of cells under a head."""
        head = ["sigma", "DSM", *(f"STF {n:,}" for n in self.stf), "ESS/N", "KL", "D", "single source"]
        variances = [self.dsm, *(errors.variance for errors in self.stf.values())]
        columns = [
            self.noise_level,
            *(self.in_noise_units(variance).by_bin for variance in variances),
            *(getattr(self, name).by_bin for name in STATISTICS),
        ]
        return [head, *([f"{float(value):.3g}" for value in row] for row in zip(*columns, strict=True))]

    def records(self) -> Iterator[dict[str, Any]]:
        """One record with the keys `COLUMNS` for each quantity, unit and noise level.

        Variances and squared biases come in units of x squared (summed over the dimensions), in noise units (per
        dimension) and in score units (summed).
        """
        for name, unit in STATISTICS.items():
            yield from self._records(name, None, getattr(self, name), unit)
        variances: list[tuple[str, int | None, ByNoise]] = [("dsm", None, self.dsm), ("rounding", None, self.rounding)]
        for n, errors in self.stf.items():
            for field in fields(errors):
                name = {"variance": "stf", "squared_bias": "stf_squared_bias"}.get(field.name, field.name)
                variances.append((name, n, getattr(errors, field.name)))
        for name, size, variance in variances:
            yield from self._records(name, size, variance, "x^2")
            yield from self._records(name, size, self.in_noise_units(variance), "noise^2 per dimension")
            yield from self._records(name, size, self.in_score_units(variance), "score^2")

    def _records(self, name: str, n: int | None, quantity: ByNoise, unit: str) -> Iterator[dict[str, Any]]:
        columns = (self.t, self.alpha, self.sigma, quantity.by_bin, quantity.errors_by_bin)
        for t, alpha, sigma, value, error in zip(*(column.tolist() for column in columns), strict=True):
            yield dict(zip(COLUMNS, (t, alpha, sigma, name, n, value, error, unit), strict=True))


def measure(
    data: Any,
    process: Process | None = None,
    *,
    noise_levels: int | Float[Tensor, "L"] = 13,
    sizes: Sequence[int] = SIZES,
    examples: int = 256,
    draws: int = 16,
    seed: int = 0,
    conditional: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> VarianceStudy:
    """Measure variance and bias of targets, and statistics of the posterior, at several noise levels.

    >>> import torch
    >>> from stablefield.studies.field import measure
    >>> data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> study = measure(data, noise_levels=3, sizes=[16], examples=64)
    >>> bool((study.stf[16].variance.by_bin <= study.dsm.by_bin).all())
    True

    Args:
        data: the data: a `Pool`, a tensor or a memory map (N, *D).
        process: the process that makes x_t from x; VE by default.
        noise_levels: the levels sigma / alpha, (L,); or their number, for levels from a tenth of the smallest distance
            in the data to the largest.
        sizes: sizes of the support, the source included. Sizes above the number of data points are left out; of a
            class with fewer data points, all are used.
        examples: number of x_t at each level, at least 2.
        draws: number of reference batches of each size, shared by all examples; at least 3, for the standard errors.
        seed: seed of all draws.
        conditional: measure targets of a network that is conditioned on the class: only data points of the class of
            the source are candidates.
        device: device of the computation; that of the data by default.
        progress: called with (done, total).

    Raises:
        ValueError: fewer than 3 draws or 2 examples, a size below 1, noise levels that the process does not reach, or
            `conditional` for data without labels.
    """
    pool, process = as_pool(data), VE() if process is None else process
    _check(pool, sizes, examples, draws, conditional)
    pool = pool if conditional else replace(pool, labels=None)
    if isinstance(noise_levels, int):
        noise_levels = DataDistances.from_pool(pool, seed=seed).noise_levels(noise_levels, process)
    t = _times(noise_levels.double().cpu(), process)
    alpha, sigma = process.scales(t)
    loss = SquaredError(Levels(alpha, sigma))  # visits every level equally often
    dim, possible = math.prod(pool.shape), [n for n in sorted(set(sizes)) if n <= len(pool)]
    groups = torch.arange(len(t) * examples).split(examples * max(1, MAX_ELEMENTS // (4 * dim * examples)))
    found, rounding = [], []
    for done, numbers in enumerate(groups):  # so that the means of all examples need not fit into memory

        def advance(part: int, of: int, done: int = done) -> None:
            progress(done * of + part, len(groups) * of)

        noisy = draw_points(pool, loss, bins=len(t), per_bin=examples, seed=seed, only=numbers)
        exact = exact_posteriors(
            pool, noisy, sizes=possible, draws=draws, seed=seed, details=True, device=device, progress=advance
        )
        rounding.append((exact.mean.to(noisy.x.dtype) - exact.mean).flatten(1).square().sum(1))
        found.append(replace(exact, mean=exact.mean[:, :0].flatten(1)))
    exact = Exact.concatenate(found)

    def by_level(values: Tensor) -> ByNoise:
        return ByNoise(values.reshape(len(t), examples, -1), sigma / alpha)

    def stf_errors(errors: TargetErrors) -> STFErrors:
        return STFErrors(**{field.name: by_level(getattr(errors, field.name)) for field in fields(errors)})

    return VarianceStudy(
        process,
        t,
        alpha,
        sigma,
        len(pool),
        dim,
        LinearDenoiser.from_pool(pool),
        dsm=by_level(exact.dsm),
        rounding=by_level(torch.cat(rounding)),
        **{name: by_level(getattr(exact.statistics, name)) for name in STATISTICS},
        stf={n: stf_errors(errors) for n, errors in exact.stf.items()},
    )


def _scaled(quantity: ByNoise, factor: Float[Tensor, "L"]) -> ByNoise:
    return quantity.map(lambda values: values * factor[:, None, None])


def _crossing(log_level: Float[Tensor, "L"], rising: Float[Tensor, "L"]) -> float | None:
    """Noise level at which a share exceeds one half, interpolated linearly in log; None if it does not."""
    beyond = rising > 0.5
    if bool(beyond[0]) or not bool(beyond.any()):
        return None
    after = int(beyond.long().argmax())
    step = (0.5 - rising[after - 1]) / (rising[after] - rising[after - 1])
    return float(torch.lerp(log_level[after - 1], log_level[after], step).exp())


def _times(noise_levels: Float[Tensor, "L"], process: Process) -> Float[Tensor, "L"]:
    """Times of a process at noise levels that it reaches."""
    t = process.time(noise_levels)
    if len(t) == 0 or not ((noise_levels > 0) & (t > 0) & (t <= process.t_max) & torch.isfinite(t)).all():
        raise ValueError(
            f"noise levels sigma / alpha must be above 0 and reached by {process}, not {noise_levels.tolist()}"
        )
    return t


def _check(pool: Pool, sizes: Sequence[int], examples: int, draws: int, conditional: bool) -> None:
    if draws < 3 or examples < 2:
        raise ValueError(
            f"standard errors need at least 3 draws and 2 examples per noise level, not {draws} and {examples}"
        )
    if wrong := [n for n in sizes if n < 1]:
        raise ValueError(f"sizes of the support must be at least 1 (the source alone), not {wrong[0]}")
    if conditional and pool.labels is None:
        raise ValueError("conditional=True needs labels, and the data have no labels; set conditional=False")
