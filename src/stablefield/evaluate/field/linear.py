"""What a linear denoiser can learn of data: a bound on what is left of the loss, where the posterior tells nothing.

In an orthonormal basis in which the data have variances v_i, shrinking each coefficient by v_i / (v_i + sigma^2) leaves

    E ||x - D(x_t)||^2 = sum_i v_i sigma^2 / (v_i + sigma^2)

the Wiener filter. It generalises, so the best denoiser of *new* data leaves less than this; and it leaves more than the
mean of the posterior over the N members at hand, which at small sigma knows the one image and has nothing to learn. The
basis are cosines along every axis but the first, and principal axes of that (the channels; or a vector, if short).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.reference import Pool


@dataclass(frozen=True, eq=False)
class Linear:
    """A denoiser that shrinks the coefficients of data.

    Attributes:
        variances: of each coefficient around its mean, in units of x squared.
    """

    variances: Float[Tensor, "D"]

    @classmethod
    def of(cls, pool: Pool, numbers: int = 2**24) -> "Linear":
        """The spectrum of members spread evenly over the data, as many as make so many numbers (at least 256)."""
        n = min(len(pool), max(256, numbers // math.prod(pool.shape)))
        x = pool.take(torch.arange(n) * len(pool) // n)
        x = x - x.mean(0)
        for _ in range(2, x.ndim):
            x = torch.tensordot(x, _cosines(x.shape[2]).to(x), ([2], [1]))  # what is done goes to the end
        if 4 * x.shape[1] <= n:
            x = torch.tensordot(x, _principal_axes(x), ([1], [0]))
        return cls(x.flatten(1).double().square().mean(0).cpu())

    def variance(self, level: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """What is left of ||x - D(x_t)||^2 at these sigma / alpha, in units of x squared, summed."""
        square = level.double().square()
        return torch.stack([(self.variances * s / (self.variances + s)).sum() for s in square.flatten()])

    def learnable(self, level: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """The share of the loss that it removes, of a network in EDM's scalings that answers 0."""
        return 1 - self.share_of_loss(self.variance(level), level)

    def share_of_loss(self, variance: Float[Tensor, "L"], level: Float[Tensor, "L"]) -> Float[Tensor, "L"]:
        """A variance, in units of x squared, summed, as a share of the loss with which such a network starts."""
        mean = self.variances.mean()
        return variance * (mean + level.square()) / (len(self.variances) * mean * level.square())


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal cosine transform (DCT-II), a row each frequency."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def _principal_axes(x: Float[Tensor, "N C *D"]) -> Float[Tensor, "C C"]:
    flat = x.movedim(1, -1).flatten(0, -2).double()
    return torch.linalg.eigh(flat.T @ flat)[1].to(x)
