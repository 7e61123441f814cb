"""The paper's two Gaussians, where every quantity of the field has a closed form (Xu et al. 2023, section 4).

    x ~ 1/2 N(mu, v I) + 1/2 N(-mu, v I),      mu = (0.1, ..., 0.1) in 64 dimensions, v = 1e-4,      y = x + sigma noise

(+-0.1 in each coordinate: the means are 1.6 apart. Along one axis alone they would be 0.2 apart.) Given y, x is again
a mixture of two Gaussians; its shares are a logistic function of <mu, y>. So the targets of any process are known
without error, at y = x_t / alpha and sigma / alpha, and estimates from draws can be held against them.

As n grows, the error of a target is normal, in units of x

    sqrt(n) (T_n - E[x | y]) -> N(0, A(y)),      A(y) = Cov_x [ p(y | x) (x - E[x | y]) ] / p(y)^2,

which for the score, (T - y) / sigma^2, is Cov(p(y | x)(score(y | x) - score(y))) / p(y)^2. Without the centring by the
mean the covariance would be another one.

How far the posterior is from the prior, the KL and the paper's D(t), is a mean over one number,

    l = log p(y | x) / p(y),      KL = E l,      D = E f(exp(-l)),      f(r) = (1/r - 1)^2 below 1.5, else 8r/27 - 1/3,

and its law is known. With s^2 = v + sigma^2, rho = sigma / s, kappa^2 = v / s^2, in units in which y is standard normal
around the mean of its sphere, a = (y - mu) / s and noise eps = rho a + kappa z are normal, and each coordinate adds
(a^2 - eps^2) / 2. Across the line between the means that is kappa times the product of two independent normals, and the
sum over D - 1 of them has a variance-gamma density; along the line, y also decides the shares of the two spheres. So a
mean over l is an integral over three numbers. (Over N data points there is no such law: the posterior is theirs.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.data import Progress, silent
from stablefield.evaluate.field.estimate import Estimate, squared_bias, squared_error
from stablefield.posterior import posterior
from stablefield.seeding import generator

SINGLE = (
    50_000  # samples for what needs no references: at small noise few lie between the spheres, and all varies there
)


@dataclass(frozen=True)
class TwoGaussians:
    """A mixture of two equally likely spheres.

    Attributes:
        dim: dimensions.
        offset: each coordinate of the one mean, and minus that of the other.
        variance: of each coordinate around them, v.
    """

    dim: int = 64
    offset: float = 0.1
    variance: float = 1e-4

    @property
    def means(self) -> Float[Tensor, "2 D"]:
        return torch.tensor([[self.offset], [-self.offset]], dtype=torch.float64).expand(2, self.dim)

    def draw(self, n: int, g: torch.Generator) -> Float[Tensor, "n D"]:
        """n members."""
        side = torch.randint(2, (n,), generator=g)
        return self.means[side] + self.variance**0.5 * torch.randn(n, self.dim, generator=g, dtype=torch.float64)

    def mean(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B D"]:
        """E[x | y]."""
        means, _ = self._given(y, sigma**2)
        return torch.einsum("bk,bkd->bd", self._shares(y, sigma), means)

    def draw_source(self, y: Float[Tensor, "B D"], sigma: float, g: torch.Generator) -> Float[Tensor, "B D"]:
        """An x for each y, from its posterior."""
        means, variance = self._given(y, sigma**2)
        side = (torch.rand(len(y), generator=g, dtype=torch.float64) > self._shares(y, sigma)[:, 0]).long()
        noise = torch.randn(y.shape, generator=g, dtype=torch.float64)
        return means[torch.arange(len(y)), side] + variance**0.5 * noise

    def dsm(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """V_DSM, the mean trace of Cov[x | y]: that of a sphere, and that of which sphere it is."""
        sphere = self.dim * self.variance * sigma**2 / (self.variance + sigma**2)
        apart = 4 * self.dim * self.offset**2 * (sigma**2 / (self.variance + sigma**2)) ** 2
        return sphere + apart * self._over_sides(lambda p: p * (1 - p), sigma)

    def information(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """The mean KL of the posterior from the prior, which is the information between x and y, in nats."""
        sphere = self.dim / 2 * torch.log1p(self.variance / sigma**2)
        return (
            sphere + math.log(2) - self._over_sides(lambda p: torch.special.entr(p) + torch.special.entr(1 - p), sigma)
        )

    def divergence(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """The paper's D(t), by quadrature; infinite where sigma^2 <= 3 v, since E exp(2 l) is.

        f is (exp(l) - 1)^2 and 8 r / 27, whose means are known (E r = 1), less something bounded.

        Raises:
            ValueError: in fewer than 4 dimensions, where densities are too rough for it.
        """
        if self.dim < 4:
            raise ValueError(f"the quadrature for D(t) needs at least 4 dimensions, not {self.dim}")

        def bounded(log_ratio: Tensor) -> Tensor:
            r = (-log_ratio).exp()
            return torch.where(r < 1.5, 8 * r / 27, 1 / 3 + (1 / r - 1).square())

        def at(level: float) -> Tensor:
            if level**2 <= 3 * self.variance:
                return torch.tensor(math.inf, dtype=torch.float64)
            squares = self._power(level, 2) - 2 * self._power(level, 1) + 1
            return squares + 8 / 27 - self._over_ratio(bounded, level)

        return torch.stack([at(level) for level in sigma.tolist()])

    def log_density(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B"]:
        """log p(y)."""
        return self._log_sides(y, self.variance + sigma**2).logsumexp(1)

    def limit(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B D D"]:
        """A(y), in units of x squared.

        p(y | x)^2 is a Gaussian of half the variance, (4 pi sigma^2)^(-D/2) N(y; x, sigma^2 / 2), so that the sum over
        x is one over two Gaussians.
        """
        means, variance = self._given(y, sigma**2 / 2)
        log_square = self._log_sides(y, self.variance + sigma**2 / 2) - self.dim / 2 * math.log(4 * math.pi * sigma**2)
        weight = (log_square - 2 * self.log_density(y, sigma)[:, None]).exp()
        apart = means - self.mean(y, sigma)[:, None]
        inside = variance * weight.sum(1)[:, None, None] * torch.eye(self.dim, dtype=torch.float64)
        return torch.einsum("bk,bki,bkj->bij", weight, apart, apart) + inside

    def _given(self, y: Tensor, noise: float) -> tuple[Float[Tensor, "B 2 D"], float]:
        """Means and variance of x given y and the sphere."""
        share = self.variance / (self.variance + noise)
        return (1 - share) * self.means + share * y[:, None], share * noise

    def _shares(self, y: Tensor, sigma: float) -> Float[Tensor, "B 2"]:
        return self._log_sides(y, self.variance + sigma**2).softmax(1)

    def _log_sides(self, y: Tensor, variance: float) -> Float[Tensor, "B 2"]:
        """log of 1/2 N(y; mean, variance) of both."""
        square = (y[:, None] - self.means).square().sum(2)
        return -square / (2 * variance) - self.dim / 2 * math.log(2 * math.pi * variance) - math.log(2)

    def _line(
        self, sigma: float, reach: float = 10.0
    ) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"], Float[Tensor, "A"]]:
        """a along the line between the means, for an x from the first sphere; logarithms of its weights; and what is
        shared in l, which is this and (a^2 - eps^2) / 2 summed over coordinates."""
        a = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        s = (self.variance + sigma**2) ** 0.5
        length = self.offset * self.dim**0.5
        other = torch.nn.functional.softplus(-2 * length * (length + s * a) / s**2)  # the second sphere's part of p(y)
        log_weight = -a.square() / 2 + math.log(2 * reach / 400) - math.log(2 * math.pi) / 2
        return a, log_weight, self.dim * math.log(s / sigma) + math.log(2) - other

    def _power(self, sigma: float, power: int) -> Tensor:
        """E exp(power l), power 1 or 2: across the line in closed form, and along it given y."""
        kappa = self.variance / (self.variance + sigma**2)  # squared
        width = (1 - power * (power + 1) * kappa / (1 + power * kappa)) ** -0.5  # of a, so weighted
        a, log_weight, log_shared = self._line(sigma, 10 * width)
        across = -(self.dim - 1) / 2 * math.log(1 - power**2 * kappa)
        # E exp(-p eps^2 / 2), eps ~ N(rho a, kappa^2)
        noise = -power * (1 - kappa) * a.square() / (2 * (1 + power * kappa)) - math.log(1 + power * kappa) / 2
        return torch.exp(log_weight + power * (log_shared + a.square() / 2) + across + noise).sum()

    def _over_ratio(self, of: Callable[[Tensor], Tensor], sigma: float) -> Tensor:
        """The mean over l of a function that does not grow exponentially; to 1e-9 from 8 dimensions on, 1e-4 in 4."""
        a, log_weight, log_shared = self._line(sigma)
        kappa = (self.variance / (self.variance + sigma**2)) ** 0.5
        rho = (1 - kappa**2) ** 0.5
        z, along = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
        shared = log_shared[:, None] + (a[:, None].square() - (rho * a[:, None] + kappa * z).square()) / 2
        x, across = _products(self.dim - 1)
        found = torch.stack([of(row[:, None] + kappa * x) @ across for row in shared])
        return (log_weight.exp()[:, None] * found * along).sum() / math.sqrt(2 * math.pi)

    def _over_sides(self, of: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """The mean of a symmetric function of the posterior's share of one sphere.

        Along the line between the means y is one-dimensional, and by symmetry it may be taken to come from the first.
        The rule of trapezes is exact to rounding for functions as smooth as this.
        """
        z = torch.linspace(-12, 12, 9601, dtype=torch.float64)
        length, spread = self.offset * self.dim**0.5, (self.variance + sigma**2).sqrt()[:, None]
        share = torch.sigmoid(2 * length * (length + spread * z) / spread**2)
        return (of(share) * torch.exp(-z.square() / 2)).sum(1) * (z[1] - z[0]) / math.sqrt(2 * math.pi)


def _products(n: int) -> tuple[Float[Tensor, "X"], Float[Tensor, "X"]]:
    """Points and weights for the sum of n products of two independent normals.

    |x|^m K_m(|x|) / (sqrt(pi) 2^m Gamma(n / 2)), m = (n - 1) / 2: the density of half the difference of two chi^2_n.
    """
    from scipy.special import gammaln, kve

    x = torch.arange(-400, 400, dtype=torch.float64) / 5 + 0.1
    m, size = (n - 1) / 2, x.abs().numpy()
    log_density = m * np.log(size / 2) + np.log(kve(m, size)) - size - gammaln(n / 2) - math.log(math.pi) / 2
    return x, torch.from_numpy(np.exp(log_density)) / 5


@dataclass(frozen=True, eq=False)
class Study:
    """Estimates beside closed forms, at some noise levels; variances in units of x squared.

    Attributes:
        sigma: the levels.
        dsm, dsm_closed: V_DSM.
        information, information_closed: mean KL of the posterior from the prior, in nats.
        divergence, divergence_closed: the paper's D(t). Below sigma^2 = 15 v its estimate has no finite variance, and
            its standard error says too little.
        limit: the mean trace of A, to which (n - 1) V_STF should tend.
        stable: V_STF of each size.
        bias: squared bias of each size: 0.
    """

    sigma: Float[Tensor, "L"]
    dsm: Estimate
    dsm_closed: Float[Tensor, "L"]
    information: Estimate
    information_closed: Float[Tensor, "L"]
    divergence: Estimate
    divergence_closed: Float[Tensor, "L"]
    limit: Estimate
    stable: Mapping[int, Estimate]
    bias: Mapping[int, Estimate]


def study_gaussians(
    population: TwoGaussians,
    sigma: Float[Tensor, "L"],
    *,
    sizes: Sequence[int] = (16, 64, 256, 1024),
    rows: int = 256,
    draws: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> Study:
    """Targets from fresh draws of the population, against the exact E[x | y].

    Args:
        population: where x and references come from.
        sigma: the noise levels.
        sizes: members of a reference batch, the source counted.
        rows: y at each level.
        draws: reference batches for each size, each with a source drawn anew from the posterior.
        seed: decides all draws.
        progress: told of levels done.
    """
    found = []
    for done, level in enumerate(sigma.tolist()):
        found.append(_at(population, level, sizes, rows, draws, generator(seed, "gaussians", done)))
        progress(done + 1, len(sigma))
    numbers = {name: Estimate.over_rows(torch.stack([each[name] for each, _ in found])) for name in found[0][0]}
    products = {n: torch.stack([each[n] for _, each in found]) for n in sizes}
    return Study(
        sigma,
        dsm_closed=population.dsm(sigma),
        information_closed=population.information(sigma),
        divergence_closed=population.divergence(sigma),
        stable={n: squared_error(each.diagonal(dim1=2, dim2=3)) for n, each in products.items()},
        bias={n: squared_bias(each) for n, each in products.items()},
        **numbers,
    )


def normal_errors(
    population: TwoGaussians, y: Float[Tensor, "1 D"], sigma: float, n: int, draws: int, g: torch.Generator
) -> Float[Tensor, "draws"]:
    """sqrt(n) <u, T_n - E[x | y]> / sqrt(u A u), u from mean to mean: at one y, from independent reference batches."""
    u = torch.nn.functional.normalize(population.means[:1], dim=1)
    scale = torch.einsum("bi,bij,bj->", u, population.limit(y, sigma), u).sqrt()
    parts = [_targets(population, y.expand(part, -1), sigma, n, g) for part in _parts(draws)]
    return n**0.5 * ((torch.cat(parts) - population.mean(y, sigma)) * u).sum(1) / scale


def _parts(total: int, most: int = 100) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _targets(
    population: TwoGaussians, y: Float[Tensor, "B D"], sigma: float, n: int, g: torch.Generator
) -> Float[Tensor, "B D"]:
    """A target for each y, from a reference batch of its own and a source from the posterior."""
    support = population.draw(len(y) * (n - 1), g).unflatten(0, (len(y), n - 1))
    return posterior(y, support, sigma=sigma, source=population.draw_source(y, sigma, g)).mean


def _at(
    population: TwoGaussians, sigma: float, sizes: Sequence[int], rows: int, draws: int, g: torch.Generator
) -> tuple[dict[str, Tensor], dict[int, Float[Tensor, "B R R"]]]:
    """One level: numbers of each row, and for each size the products of its errors."""
    y = _noisy(population.draw(rows, g), sigma, g)
    mean = population.mean(y, sigma)
    sources = torch.stack([population.draw_source(y, sigma, g) for _ in range(draws)], 1)
    products = {}
    for n in sizes:
        targets = [
            posterior(y, population.draw(n - 1, g), sigma=sigma, source=sources[:, r]).mean for r in range(draws)
        ]
        errors = torch.stack(targets, 1) - mean[:, None]
        products[n] = errors @ errors.mT
    limit = population.limit(y, sigma).diagonal(dim1=1, dim2=2).sum(1)
    return {**_single(population, sigma, g), "limit": limit}, products


def _single(population: TwoGaussians, sigma: float, g: torch.Generator) -> dict[str, Float[Tensor, "S"]]:
    """What a single sample shows, of many: its squared error, log p(y | x) / p(y), and the f of D(t)."""
    x = population.draw(SINGLE, g)
    y = _noisy(x, sigma, g)
    log_given = -(y - x).square().sum(1) / (2 * sigma**2) - population.dim / 2 * math.log(2 * math.pi * sigma**2)
    squares = (x - population.mean(y, sigma)).square().sum(1)
    log_ratio = log_given - population.log_density(y, sigma)
    return {"dsm": squares, "information": log_ratio, "divergence": far(log_ratio)}


def far(log_ratio: Float[Tensor, "S"]) -> Float[Tensor, "S"]:
    """The paper's f(r) of r = exp(-log_ratio), but for 8 r / 27 - 8 / 27, which is 0 on average.

    On average only: where the spheres are apart half of E r = 1 is due to x from the one and y from the other, which no
    draw ever sees.
    """
    r = (-log_ratio).exp()
    return 8 / 27 + torch.where(r < 1.5, (log_ratio.exp() - 1).square() - 8 * r / 27, -1 / 3)


def _noisy(x: Float[Tensor, "B D"], sigma: float, g: torch.Generator) -> Float[Tensor, "B D"]:
    return x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
