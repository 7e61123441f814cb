"""The paper's two Gaussians, for which every quantity of the variance study is known (Xu et al. 2023, section 4).

    python examples/two_gaussians.py                     prints closed forms beside estimates, writes two-gaussians.png
    python examples/two_gaussians.py --draws 16          fewer reference batches


    x ~ 1/2 N(mu, v I) + 1/2 N(-mu, v I),      mu = (0.1, ..., 0.1) in 64 dimensions, v = 1e-4,      y = x + sigma noise

(+-0.1 in each coordinate: the means are 1.6 apart. Along one axis alone they would be 0.2 apart.) Given y, x is again
a mixture of two Gaussians, whose weights are a logistic function of <mu, y>. So the targets of any process are known
without error, at y = x_t / alpha and noise level sigma / alpha, and estimates from draws can be compared with them.

As n grows, the error of the STF target becomes normal, in units of x

    sqrt(n) (T_n - E[x | y]) -> N(0, A(y)),      A(y) = Cov_x [ p(y | x) (x - E[x | y]) ] / p(y)^2,

which for the score, (T - y) / sigma^2, is Cov(p(y | x)(score(y | x) - score(y))) / p(y)^2. Without the centering by the
mean the covariance would be a different one.

The distance of the posterior from the prior, as KL or as the paper's D(t), is a mean over one number,

    l = log p(y | x) / p(y),      KL = E l,      D = E f(exp(-l)),      f(r) = (1/r - 1)^2 below 1.5, else 8r/27 - 1/3,

whose distribution is known. With s^2 = v + sigma^2, rho = sigma / s, kappa^2 = v / s^2, in units in which y is standard
normal around the mean of its Gaussian, a = (y - mu) / s and noise eps = rho a + kappa z are normal, and each coordinate
adds (a^2 - eps^2) / 2. Across the line between the means that is kappa times the product of two independent normals,
and the sum over D - 1 of them has a variance-gamma density; along the line, y also determines the weights of the two
Gaussians. So a mean over l is an integral over three numbers. (For N data points no such distribution is known.)
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import gammaln, kve
from torch import Generator, Tensor

from stablefield import posterior
from stablefield.evaluate.plots import label, save_figure
from stablefield.floor import ByNoise
from stablefield.seeding import generator

STYLES = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))


@dataclass(frozen=True)
class TwoGaussians:
    """Equal mixture of two spherical Gaussians with opposite means.

    Attributes:
        dim: number of dimensions.
        offset: each coordinate of the first mean; the second mean is its negative.
        variance: variance v of each coordinate around the means.
    """

    dim: int = 64
    offset: float = 0.1
    variance: float = 1e-4

    @property
    def means(self) -> Tensor:
        """The two means, (2, D)."""
        return torch.tensor([[self.offset], [-self.offset]], dtype=torch.float64).expand(2, self.dim)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draw n data points."""
        side = torch.randint(2, (n,), generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.means[side] + self.variance**0.5 * noise

    def mean(self, y: Tensor, sigma: float) -> Tensor:
        """Posterior mean E[x | y]."""
        means, _ = self._given(y, sigma**2)
        return torch.einsum("bk,bkd->bd", self._mixture_weights(y, sigma), means)

    def draw_source(self, y: Tensor, sigma: float, generator: Generator) -> Tensor:
        """Draw one x from the posterior of each y."""
        means, variance = self._given(y, sigma**2)
        uniform = torch.rand(len(y), generator=generator, dtype=torch.float64)
        side = (uniform > self._mixture_weights(y, sigma)[:, 0]).long()
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        return means[torch.arange(len(y)), side] + variance**0.5 * noise

    def dsm(self, sigma: Tensor) -> Tensor:
        """V_DSM, the mean trace of Cov[x | y], in units of x squared.

        It is the sum of the variance within a Gaussian and the variance due to the choice of the Gaussian.
        """
        within = self.dim * self.variance * sigma**2 / (self.variance + sigma**2)
        between = 4 * self.dim * self.offset**2 * (sigma**2 / (self.variance + sigma**2)) ** 2
        return within + between * self._mean_over_sides(lambda p: p * (1 - p), sigma)

    def kl(self, sigma: Tensor) -> Tensor:
        """Mean KL divergence of the posterior from the prior, in nats: the mutual information of x and y."""
        within = self.dim / 2 * torch.log1p(self.variance / sigma**2)
        return (
            within
            + math.log(2)
            - self._mean_over_sides(lambda p: torch.special.entr(p) + torch.special.entr(1 - p), sigma)
        )

    def divergence(self, sigma: Tensor) -> Tensor:
        """The paper's D(t), by quadrature; infinite where sigma^2 <= 3 v, because E exp(2 l) is.

        f is (exp(l) - 1)^2 plus 8 r / 27, whose means are known (E r = 1), minus a bounded function.
        """
        if self.dim < 4:
            raise ValueError(f"the quadrature for D(t) needs at least 4 dimensions, not {self.dim}; set dim=4 or more")

        def bounded(log_ratio: Tensor) -> Tensor:
            r = (-log_ratio).exp()
            return torch.where(r < 1.5, 8 * r / 27, 1 / 3 + (1 / r - 1).square())

        def at(noise_level: float) -> Tensor:
            if noise_level**2 <= 3 * self.variance:
                return torch.tensor(math.inf, dtype=torch.float64)
            squares = self._power(noise_level, 2) - 2 * self._power(noise_level, 1) + 1
            return squares + 8 / 27 - self._mean_over_ratio(bounded, noise_level)

        return torch.stack([at(noise_level) for noise_level in sigma.tolist()])

    def log_density(self, y: Tensor, sigma: float) -> Tensor:
        """Logarithm of the density p(y), (B,)."""
        return self._log_sides(y, self.variance + sigma**2).logsumexp(1)

    def limit(self, y: Tensor, sigma: float) -> Tensor:
        """Asymptotic covariance A(y) of sqrt(n) times the error of the STF target, in units of x squared.

        p(y | x)^2 is a Gaussian of half the variance, (4 pi sigma^2)^(-D/2) N(y; x, sigma^2 / 2), so that the mean over
        x is one over two Gaussians.
        """
        means, variance = self._given(y, sigma**2 / 2)
        log_square = self._log_sides(y, self.variance + sigma**2 / 2) - self.dim / 2 * math.log(4 * math.pi * sigma**2)
        weight = (log_square - 2 * self.log_density(y, sigma)[:, None]).exp()
        centered = means - self.mean(y, sigma)[:, None]
        within = variance * weight.sum(1)[:, None, None] * torch.eye(self.dim, dtype=torch.float64)
        return torch.einsum("bk,bki,bkj->bij", weight, centered, centered) + within

    def _given(self, y: Tensor, noise_variance: float) -> tuple[Tensor, float]:
        """Means and variance of x given y and the Gaussian that x is from."""
        share = self.variance / (self.variance + noise_variance)
        return (1 - share) * self.means + share * y[:, None], share * noise_variance

    def _mixture_weights(self, y: Tensor, sigma: float) -> Tensor:
        """Posterior probability of the two Gaussians."""
        return self._log_sides(y, self.variance + sigma**2).softmax(1)

    def _log_sides(self, y: Tensor, variance: float) -> Tensor:
        """Logarithm of 1/2 N(y; mean, variance) for both means."""
        square = (y[:, None] - self.means).square().sum(2)
        return -square / (2 * variance) - self.dim / 2 * math.log(2 * math.pi * variance) - math.log(2)

    def _line(self, sigma: float, reach: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
        """Quadrature along the line between the means, for an x from the first Gaussian.

        Returns a, the logarithms of its quadrature weights, and the part of l that does not depend on single
        coordinates: l is this and (a^2 - eps^2) / 2 summed over coordinates.
        """
        a = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        s = (self.variance + sigma**2) ** 0.5
        length = self.offset * self.dim**0.5
        other = torch.nn.functional.softplus(
            -2 * length * (length + s * a) / s**2
        )  # the second Gaussian's part of p(y)
        log_weight = -a.square() / 2 + math.log(2 * reach / 400) - math.log(2 * math.pi) / 2
        return a, log_weight, self.dim * math.log(s / sigma) + math.log(2) - other

    def _power(self, sigma: float, power: int) -> Tensor:
        """E exp(power l) for power 1 or 2: in closed form across the line, and along it given y."""
        kappa_square = self.variance / (self.variance + sigma**2)
        width = (
            1 - power * (power + 1) * kappa_square / (1 + power * kappa_square)
        ) ** -0.5  # of a under the integrand
        a, log_weight, log_shared = self._line(sigma, 10 * width)
        across = -(self.dim - 1) / 2 * math.log(1 - power**2 * kappa_square)
        # E exp(-p eps^2 / 2), eps ~ N(rho a, kappa^2)
        noise = (
            -power * (1 - kappa_square) * a.square() / (2 * (1 + power * kappa_square))
            - math.log(1 + power * kappa_square) / 2
        )
        return torch.exp(log_weight + power * (log_shared + a.square() / 2) + across + noise).sum()

    def _mean_over_ratio(self, function: Callable[[Tensor], Tensor], sigma: float) -> Tensor:
        """Mean over l of a function that does not grow exponentially.

        It is accurate to 1e-9 from 8 dimensions on, and to 1e-4 in 4.
        """
        a, log_weight, log_shared = self._line(sigma)
        kappa = (self.variance / (self.variance + sigma**2)) ** 0.5
        rho = (1 - kappa**2) ** 0.5
        z, along = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
        shared = log_shared[:, None] + (a[:, None].square() - (rho * a[:, None] + kappa * z).square()) / 2
        x, across = _products(self.dim - 1)
        values = torch.stack([function(row[:, None] + kappa * x) @ across for row in shared])
        return (log_weight.exp()[:, None] * values * along).sum() / math.sqrt(2 * math.pi)

    def _mean_over_sides(self, function: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """Mean of a symmetric function of the posterior probability of one Gaussian.

        Along the line between the means y is one-dimensional, and by symmetry it may be assumed to come from the first.
        The trapezoidal rule is exact up to rounding for functions as smooth as this.
        """
        z = torch.linspace(-12, 12, 9601, dtype=torch.float64)
        length, spread = self.offset * self.dim**0.5, (self.variance + sigma**2).sqrt()[:, None]
        share = torch.sigmoid(2 * length * (length + spread * z) / spread**2)
        return (function(share) * torch.exp(-z.square() / 2)).sum(1) * (z[1] - z[0]) / math.sqrt(2 * math.pi)


def _products(n: int) -> tuple[Tensor, Tensor]:
    """Quadrature points and weights for the sum of n products of two independent standard normals.

    |x|^m K_m(|x|) / (sqrt(pi) 2^m Gamma(n / 2)), m = (n - 1) / 2: the density of half the difference of two chi^2_n.
    """
    x = torch.arange(-400, 400, dtype=torch.float64) / 5 + 0.1
    m, size = (n - 1) / 2, x.abs().numpy()
    log_density = m * np.log(size / 2) + np.log(kve(m, size)) - size - gammaln(n / 2) - math.log(math.pi) / 2
    return x, torch.from_numpy(np.exp(log_density)) / 5


@dataclass(frozen=True, eq=False)
class Study:
    """Estimates from fresh draws at several noise levels, in units of x squared.

    Attributes:
        sigma: noise levels, (L,).
        dsm: V_DSM.
        kl: mean KL divergence of the posterior from the prior, in nats.
        divergence: D(t). Below sigma^2 = 15 v it has no finite variance, and its standard error is too small.
        limit: mean trace of A, the limit of (n - 1) V_STF.
        stf: V_STF by size of the support.
        bias: mean inner product of the errors of two independent draws, the squared bias, by size; 0 up to chance.
    """

    sigma: Tensor
    dsm: ByNoise
    kl: ByNoise
    divergence: ByNoise
    limit: ByNoise
    stf: dict[int, ByNoise]
    bias: dict[int, ByNoise]


def study(
    population: TwoGaussians,
    sigma: Tensor,
    sizes: Sequence[int],
    examples: int,
    draws: int,
    samples: int,
    seed: int = 0,
) -> Study:
    """Estimate the quantities from fresh draws.

    Args:
        population: the distribution of x and of the references.
        sigma: noise levels, (L,).
        sizes: sizes of the support, the source included.
        examples: number of y at each noise level.
        draws: even number of reference batches of each size, each with a source drawn anew from the posterior.
        samples: number of pairs (x, y) for the quantities that need no references. At small noise, few of them lie
            between the two Gaussians, and these cause all of the variance.
        seed: seed of all draws.
    """
    rows = []
    for i, level in enumerate(sigma.tolist()):
        g = generator(seed, "gaussians", i)
        y = noisy(population.draw(examples, g), level, g)
        mean = population.mean(y, level)
        sources = torch.stack([population.draw_source(y, level, g) for _ in range(draws)], 1)
        row = {"limit": population.limit(y, level).diagonal(dim1=1, dim2=2).sum(1)[:, None]}
        for n in sizes:
            batches = ((population.draw(n - 1, g), sources[:, r]) for r in range(draws))
            means = [posterior(y, others, sigma=level, source=source).mean for others, source in batches]
            errors = torch.stack(means, 1) - mean[:, None]
            row[f"stf {n}"] = errors.square().sum(2)
            row[f"bias {n}"] = (errors[:, ::2] * errors[:, 1::2]).sum(2)
        rows.append(row | without_references(population, level, samples, g))
    found = {name: ByNoise(torch.stack([row[name] for row in rows]), sigma) for name in rows[0]}
    stf, bias = ({n: found.pop(f"{name} {n}") for n in sizes} for name in ("stf", "bias"))
    return Study(sigma, **found, stf=stf, bias=bias)


def without_references(population: TwoGaussians, sigma: float, samples: int, g: Generator) -> dict[str, Tensor]:
    """Squared error of the DSM target, log p(y | x) / p(y) and the f of D(t), for many samples."""
    x = population.draw(samples, g)
    y = noisy(x, sigma, g)
    log_given = -(y - x).square().sum(1) / (2 * sigma**2) - population.dim / 2 * math.log(2 * math.pi * sigma**2)
    log_ratio = log_given - population.log_density(y, sigma)
    # The term 8 r / 27 - 8 / 27 of f is replaced by its mean 0: where the two Gaussians are far apart, half of E r = 1
    # comes from x of the one and y of the other, which no sample contains.
    r = (-log_ratio).exp()
    divergence = 8 / 27 + torch.where(r < 1.5, (log_ratio.exp() - 1).square() - 8 * r / 27, -1 / 3)
    squares = (x - population.mean(y, sigma)).square().sum(1)
    return {"dsm": squares[:, None], "kl": log_ratio[:, None], "divergence": divergence[:, None]}


def normal_errors(population: TwoGaussians, y: Tensor, sigma: float, n: int, draws: int, g: Generator) -> Tensor:
    """Standardized errors of the STF target at one y, which tend to N(0, 1) as n grows.

    They are sqrt(n) <u, T_n - E[x | y]> / sqrt(u A u), with u the direction between the means.
    """
    u = torch.nn.functional.normalize(population.means[:1], dim=1)
    scale = torch.einsum("bi,bij,bj->", u, population.limit(y, sigma), u).sqrt()

    def targets(count: int) -> Tensor:
        support = population.draw(count * (n - 1), g).unflatten(0, (count, n - 1))
        copies = y.expand(count, -1)
        return posterior(copies, support, sigma=sigma, source=population.draw_source(copies, sigma, g)).mean

    parts = torch.cat([targets(min(100, draws - start)) for start in range(0, draws, 100)])
    return n**0.5 * ((parts - population.mean(y, sigma)) * u).sum(1) / scale


def noisy(x: Tensor, sigma: float, g: Generator) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)


def table(population: TwoGaussians, found: Study) -> list[str]:
    """Closed forms beside estimates."""
    head = ["sigma", "V_DSM", "estimate", "+-", "KL", "estimate", "D", "estimate", *(f"law {n}" for n in found.stf)]
    columns = [
        found.sigma,
        population.dsm(found.sigma),
        found.dsm.by_bin,
        found.dsm.errors_by_bin,
        population.kl(found.sigma),
        found.kl.by_bin,
        population.divergence(found.sigma),
        found.divergence.by_bin,
        *((n - 1) * variance.by_bin / found.limit.by_bin for n, variance in found.stf.items()),
    ]
    rows = [head, *([f"{float(value):.4g}" for value in row] for row in zip(*columns, strict=True))]
    return ["  ".join(cell.rjust(9) for cell in row) for row in rows]


def plot(path: Path, population: TwoGaussians, found: Study, errors: Iterable[tuple[int, Tensor]]) -> None:
    """Plot V_DSM and V_STF, the law 1 / (n - 1), and quantiles of standardized errors."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    variance, law, normal = figure.subplots(1, 3)
    figure.suptitle("Two Gaussians in 64 dimensions, means ±0.1, variance 1e-4", x=0.01, ha="left", fontsize=11)
    label(variance, "noise level sigma (units of x)", "V / sigma² (noise units, summed)")
    sigma, scale = found.sigma, 1 / found.sigma.square()
    variance.plot(sigma, population.dsm(sigma) * scale, color="0.6", linewidth=3, label="DSM, closed form")
    bars = {"yerr": 2 * found.dsm.errors_by_bin * scale, "fmt": "o", "ms": 4, "color": "black"}
    variance.errorbar(sigma, found.dsm.by_bin * scale, **bars, label="DSM, estimated")
    for style, (n, values) in zip(STYLES[1:], found.stf.items(), strict=False):
        variance.plot(sigma, values.by_bin * scale, linestyle=style, color="black", label=f"STF, n = {n:,}")
        low, high = ((values.by_bin + sign * 2 * values.errors_by_bin) * scale for sign in (-1, 1))
        variance.fill_between(sigma, low, high, color="0.85", linewidth=0)
    variance.set_yscale("log")
    variance.set_xscale("log")
    variance.set_ylim(bottom=float(min((each.by_bin * scale).min() for each in found.stf.values())) / 200)
    variance.legend(frameon=False, fontsize=8, loc="lower left")
    label(law, "size n of the support", "(n − 1) V_STF / its limit")
    sizes = [n for n in found.stf if n > 1]
    for style, at in zip(STYLES, torch.linspace(1, len(sigma) - 2, 4).long().unique().tolist(), strict=False):
        ratios = [(n - 1) * float(found.stf[n].by_bin[at] / found.limit.by_bin[at]) for n in sizes]
        law.plot(sizes, ratios, linestyle=style, marker="o", ms=3, color="black", label=f"sigma = {sigma[at]:.2g}")
    law.axhline(1, color="0.7", linewidth=0.8)
    law.set_xscale("log")
    law.set_ylim(0, 1.4)
    law.legend(frameon=False, fontsize=8)
    label(normal, "quantile of N(0, 1)", "quantile of the standardized error")
    for style, (n, values) in zip(STYLES, errors, strict=False):
        quantiles = torch.special.ndtri((torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values))
        normal.plot(quantiles, values.sort().values, linestyle=style, color="black", label=f"n = {n:,}")
    normal.plot([-3, 3], [-3, 3], color="0.7", linewidth=0.8)
    normal.set_xlim(-3.2, 3.2)
    normal.set_ylim(-4, 4)
    normal.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Closed forms and estimates of target variance for two Gaussians.")
    parser.add_argument("--out", type=Path, default=Path("two-gaussians.png"), help="file of the figure")
    parser.add_argument("--samples", type=int, default=50_000, help="samples of V_DSM, KL and D at each noise level")
    parser.add_argument("--examples", type=int, default=64, help="number of y at each noise level for V_STF")
    parser.add_argument("--draws", type=int, default=256, help="reference batches of each size, an even number")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    given = parser.parse_args()
    population, sigma = TwoGaussians(), torch.logspace(math.log10(0.03), math.log10(3), 13, dtype=torch.float64)
    counts = {"examples": given.examples, "draws": given.draws, "samples": given.samples}
    found = study(population, sigma, sizes=(4, 16, 64, 256, 1024), **counts, seed=given.seed)
    print(f"{population}, seed {given.seed}; V in units of x squared, summed over the dimensions")
    print("\n".join(table(population, found)))
    print("law n: (n - 1) V_STF divided by the limit of n V_STF; the law 1 / (n - 1) holds where this is 1")
    g = generator(given.seed, "field", "normal")
    y = noisy(population.draw(1, g), 0.5, g)
    errors = [(n, normal_errors(population, y, 0.5, n, 8 * given.draws, g)) for n in (8, 64, 1024)]
    plot(given.out, population, found, errors)
    print(f"written   {given.out}")


if __name__ == "__main__":
    main()
