"""The paper's two Gaussians, for which every quantity of a variance study is known (Xu et al. 2023, section 4).

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

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["TwoGaussians"]


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
    def means(self) -> Float[Tensor, "2 D"]:
        """The two means, (2, D)."""
        return torch.tensor([[self.offset], [-self.offset]], dtype=torch.float64).expand(2, self.dim)

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n D"]:
        """Draw n data points.

        Args:
            n: number of data points.
            generator: source of randomness.
        """
        side = torch.randint(2, (n,), generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.means[side] + self.variance**0.5 * noise

    def mean(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B D"]:
        """Posterior mean E[x | y].

        Args:
            y: noisy data, (B, D).
            sigma: noise level.
        """
        means, _ = self._given(y, sigma**2)
        return torch.einsum("bk,bkd->bd", self._mixture_weights(y, sigma), means)

    def draw_source(self, y: Float[Tensor, "B D"], sigma: float, generator: torch.Generator) -> Float[Tensor, "B D"]:
        """Draw one x from the posterior of each y.

        Args:
            y: noisy data, (B, D).
            sigma: noise level.
            generator: source of randomness.
        """
        means, variance = self._given(y, sigma**2)
        uniform = torch.rand(len(y), generator=generator, dtype=torch.float64)
        side = (uniform > self._mixture_weights(y, sigma)[:, 0]).long()
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        return means[torch.arange(len(y)), side] + variance**0.5 * noise

    def dsm(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """V_DSM, the mean trace of Cov[x | y], in units of x squared.

        It is the sum of the variance within a Gaussian and the variance due to the choice of the Gaussian.

        Args:
            sigma: noise levels, (L,).
        """
        within = self.dim * self.variance * sigma**2 / (self.variance + sigma**2)
        between = 4 * self.dim * self.offset**2 * (sigma**2 / (self.variance + sigma**2)) ** 2
        return within + between * self._mean_over_sides(lambda p: p * (1 - p), sigma)

    def kl(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """Mean KL divergence of the posterior from the prior, in nats: the mutual information of x and y.

        Args:
            sigma: noise levels, (L,).
        """
        within = self.dim / 2 * torch.log1p(self.variance / sigma**2)
        return (
            within
            + math.log(2)
            - self._mean_over_sides(lambda p: torch.special.entr(p) + torch.special.entr(1 - p), sigma)
        )

    def divergence(self, sigma: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """The paper's D(t), by quadrature; infinite where sigma^2 <= 3 v, because E exp(2 l) is.

        f is (exp(l) - 1)^2 plus 8 r / 27, whose means are known (E r = 1), minus a bounded function.

        Args:
            sigma: noise levels, (L,).

        Raises:
            ValueError: fewer than 4 dimensions, where the densities are not smooth enough for the quadrature.
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

    def log_density(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B"]:
        """Logarithm of the density p(y), (B,).

        Args:
            y: noisy data, (B, D).
            sigma: noise level.
        """
        return self._log_sides(y, self.variance + sigma**2).logsumexp(1)

    def limit(self, y: Float[Tensor, "B D"], sigma: float) -> Float[Tensor, "B D D"]:
        """Asymptotic covariance A(y) of sqrt(n) times the error of the STF target, in units of x squared.

        p(y | x)^2 is a Gaussian of half the variance, (4 pi sigma^2)^(-D/2) N(y; x, sigma^2 / 2), so that the mean over
        x is one over two Gaussians.

        Args:
            y: noisy data, (B, D).
            sigma: noise level.
        """
        means, variance = self._given(y, sigma**2 / 2)
        log_square = self._log_sides(y, self.variance + sigma**2 / 2) - self.dim / 2 * math.log(4 * math.pi * sigma**2)
        weight = (log_square - 2 * self.log_density(y, sigma)[:, None]).exp()
        centered = means - self.mean(y, sigma)[:, None]
        within = variance * weight.sum(1)[:, None, None] * torch.eye(self.dim, dtype=torch.float64)
        return torch.einsum("bk,bki,bkj->bij", weight, centered, centered) + within

    def _given(self, y: Tensor, noise_variance: float) -> tuple[Float[Tensor, "B 2 D"], float]:
        """Means and variance of x given y and the Gaussian that x is from."""
        share = self.variance / (self.variance + noise_variance)
        return (1 - share) * self.means + share * y[:, None], share * noise_variance

    def _mixture_weights(self, y: Tensor, sigma: float) -> Float[Tensor, "B 2"]:
        """Posterior probability of the two Gaussians."""
        return self._log_sides(y, self.variance + sigma**2).softmax(1)

    def _log_sides(self, y: Tensor, variance: float) -> Float[Tensor, "B 2"]:
        """Logarithm of 1/2 N(y; mean, variance) for both means."""
        square = (y[:, None] - self.means).square().sum(2)
        return -square / (2 * variance) - self.dim / 2 * math.log(2 * math.pi * variance) - math.log(2)

    def _line(
        self, sigma: float, reach: float = 10.0
    ) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"], Float[Tensor, "A"]]:
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


def _products(n: int) -> tuple[Float[Tensor, "X"], Float[Tensor, "X"]]:
    """Quadrature points and weights for the sum of n products of two independent standard normals.

    |x|^m K_m(|x|) / (sqrt(pi) 2^m Gamma(n / 2)), m = (n - 1) / 2: the density of half the difference of two chi^2_n.
    """
    from scipy.special import gammaln, kve

    x = torch.arange(-400, 400, dtype=torch.float64) / 5 + 0.1
    m, size = (n - 1) / 2, x.abs().numpy()
    log_density = m * np.log(size / 2) + np.log(kve(m, size)) - size - gammaln(n / 2) - math.log(math.pi) / 2
    return x, torch.from_numpy(np.exp(log_density)) / 5
