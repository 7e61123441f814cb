"""The best linear denoiser of a data set: an upper bound on the loss of a network that generalizes.

In an orthonormal basis in which the data have variances v_i, shrinking each coefficient by v_i / (v_i + sigma^2) leaves

    E ||x - D(x_t)||^2 = sum_i v_i sigma^2 / (v_i + sigma^2)

(the Wiener filter). It generalizes, so the best denoiser of *new* data has a smaller error than this. The posterior
mean over the N data points of a training set has a smaller error too, but it does not generalize: at small sigma it
simply recalls the one image. The basis consists of cosines along every axis but the first, and of the principal axes of
the first (the channels, or the coordinates of a short vector).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.pool import Pool

MAX_ELEMENTS = 2**24  # numbers of the data that are read, but those of no less than 256 data points


@dataclass(frozen=True, eq=False)
class LinearDenoiser:
    """Wiener filter of a data set, which shrinks each coefficient of x_t in a fixed basis.

    Attributes:
        variances: variance of each coefficient around its mean, (D,), in units of x squared.
    """

    variances: Float[Tensor, "D"]

    @classmethod
    def from_pool(cls, pool: Pool) -> "LinearDenoiser":
        """The linear denoiser of data points spread evenly over a data set.

        Args:
            pool: the data.
        """
        x = pool.take(pool.evenly_spaced(max(256, MAX_ELEMENTS // math.prod(pool.shape))))
        n, x = len(x), x - x.mean(0)
        for _ in range(2, x.ndim):
            x = torch.tensordot(x, _cosines(x.shape[2]).to(x), ([2], [1]))  # moves the transformed axis to the end
        if 4 * x.shape[1] <= n:
            x = torch.tensordot(x, _principal_axes(x), ([1], [0]))
        return cls(x.flatten(1).double().square().mean(0).cpu())

    def squared_error(self, noise_level: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """E ||x - D(x_t)||^2, in units of x squared, summed over the dimensions.

        Args:
            noise_level: sigma / alpha, (L,).
        """
        square = noise_level.double().square()
        return torch.stack([(self.variances * s / (self.variances + s)).sum() for s in square.flatten()])

    def noise_level_explaining(self, share: float) -> float:
        """Noise level at which x_t explains a share of the variance of the data: sum v^2 / (v + sigma^2) / sum v.

        Args:
            share: the share, between 0 and 1.
        """
        low, high = (self.variances.max().clamp(min=1e-300).log() / 2 + end for end in (-20.0, 20.0))
        for _ in range(60):  # bisection in ln sigma
            middle = (low + high) / 2
            explained = (self.variances.square() / (self.variances + (2 * middle).exp())).sum() / self.variances.sum()
            low, high = (middle, high) if explained > share else (low, middle)
        return float(low.exp())

    def learnable_share(self, noise_level: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """Share of the initial loss that the linear denoiser removes, between 0 and 1.

        The initial loss is that of a network with output 0 in EDM's preconditioning.

        Args:
            noise_level: sigma / alpha, (L,).
        """
        return 1 - self.share_of_initial_loss(self.squared_error(noise_level), noise_level)

    def share_of_initial_loss(
        self, variance: Float[Tensor, "L"], noise_level: Float[Tensor, "L"]
    ) -> Float[Tensor, "L"]:
        """Ratio of a variance to the squared error of a network with output 0 in EDM's preconditioning.

        Args:
            variance: in units of x squared, summed over the dimensions, (L,).
            noise_level: sigma / alpha of each, (L,).
        """
        mean = self.variances.mean()
        return variance * (mean + noise_level.square()) / (len(self.variances) * mean * noise_level.square())


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal cosine transform (DCT-II); each row is a frequency."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def _principal_axes(x: Float[Tensor, "N C *D"]) -> Float[Tensor, "C C"]:
    """Eigenvectors of the covariance of the channels, in columns."""
    flat = x.movedim(1, -1).flatten(0, -2).double()
    return torch.linalg.eigh(flat.T @ flat)[1].to(x)
