"""Noisy examples as the exact target multiplies them: around a centre, in units of stored values.

A stored value b stands for x = scale b + shift. With the norms ||x - c||^2 / scale^2 known beforehand, energies differ
from those of x_t and x by what is the same for all candidates of an example. So bytes are multiplied as they are, and
what float32 rounds is the noise times a candidate, not the brightness of all images.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator
from stablefield.kernel.matmul import MAX_INT32_TERMS, FloatMatmul, Int8Matmul, has_int8_matmul
from stablefield.pool import Pool
from stablefield.process import NoisyBatch

__all__ = ["Query", "uses_int8"]


@dataclass(frozen=True, eq=False)
class Query:
    """Examples of a batch around alpha times a centre c, in units of stored values.

    Attributes:
        x_t: (x_t - alpha c) / scale, (B, D), float64.
        sigma: sigma / scale, (B,), float64.
        alpha: scale of the data in x_t, (B,), float64.
        like: the x_t of the batch.
        source: the x of the batch.
        centre: c, (D,), float64.
        scale: of stored values.
        shift: of stored values.
    """

    x_t: Float[Tensor, "B D"]
    sigma: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    like: Float[Tensor, "B *D"]
    source: Float[Tensor, "B *D"]
    centre: Float[Tensor, "D"]
    scale: float
    shift: float

    @classmethod
    def of(cls, noisy: NoisyBatch, affine: tuple[float, float], centre: Float[Tensor, "D"]) -> "Query":
        """The examples of a batch.

        Args:
            noisy: the batch.
            affine: (scale, shift) such that a value that is multiplied stands for scale * value + shift.
            centre: point c that is subtracted, (D,).
        """
        (scale, shift), centre, alpha = affine, centre.double(), noisy.alpha.double()
        x_t = (noisy.x_t.flatten(1).double() - alpha[:, None] * centre) / scale
        return cls(x_t, noisy.sigma.double() / scale, alpha, noisy.x_t, noisy.x, centre, scale, shift)

    def select(self, index: Int[Tensor, "b"]) -> "Query":
        """Some of the examples.

        Args:
            index: which ones.
        """
        some = {name: getattr(self, name)[index] for name in ("x_t", "sigma", "alpha", "like", "source")}
        return replace(self, **some)

    @property
    def narrow(self) -> torch.dtype:
        """The narrowest type that anything is computed in: float32, or x_t's own where that is wider."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def accumulator(self, energies: torch.dtype = torch.float64) -> PosteriorAccumulator:
        """Empty sums over candidates in floating point.

        Args:
            energies: the type of the inner products.
        """
        matmul = partial(FloatMatmul, types=(energies, self.narrow))
        return PosteriorAccumulator(self.x_t, self.sigma, self.alpha, matmul)

    def int8_accumulator(self, square: Float[Tensor, "m"]) -> PosteriorAccumulator:
        """Empty sums over bytes, multiplied in integers; weights are relative to the source at first.

        Where the sums begin changes nothing but how soon most candidates of a block need not be summed.

        Args:
            square: squared distances of the candidates from the centre.
        """
        matmul = partial(Int8Matmul, digits=self.digits(square))
        sums = PosteriorAccumulator(self.x_t, self.sigma, self.alpha, matmul)
        stored = ((self.source.flatten(1).double() - self.shift) / self.scale).round()
        norm = (stored * self.scale + self.shift - self.centre).square().sum(1) / self.scale**2
        energy = self.alpha * (self.alpha * norm - 2 * (self.x_t * stored).sum(1))
        sums.lowest = energy + 1 / sums.sharpness  # not below what rounding may make of the source
        return sums

    def digits(self, square: Float[Tensor, "m"]) -> int:
        """Number of int8 digits of x_t that leave log weights as they are, to about 1e-6.

        k digits round an entry of x_t to at most about 256^-k of the largest, evenly; so the product with a candidate
        at distance r from the centre is off by a third of that times r, and what all candidates share does not count.

        Args:
            square: squared distances of the candidates from the centre.
        """
        entry = self.x_t.abs().amax(1) * square.max().sqrt() / self.scale / 3
        finest = (1e-6 * self.sigma**2 / (self.alpha * entry).clamp(min=1e-300)).min()
        return min(7, max(2, math.ceil(-math.log(max(float(finest), 1e-300)) / math.log(256))))

    def posterior(self, sums: PosteriorAccumulator) -> Posterior:
        """The posterior of x from sums over stored values with norms around the centre.

        Args:
            sums: over all candidates.
        """
        mean = self.scale * (sums.weighted / sums.total[:, None]) + self.shift
        spread = self.scale**2 * sums.moment / sums.total - (mean - self.centre).square().sum(1)
        return Posterior(mean.reshape(self.like.shape), sums.total.square() / sums.squares, spread.clamp(min=0))

    def rounding(self, square: Float[Tensor, "m"]) -> Float[Tensor, "B"]:
        """Typical change of log weights by float32 products; in practice at most ten times as much.

        An entry of the product with a candidate b is rounded by about 2^-24 of ||x_t|| ||b|| / sqrt D, because the
        terms of the sum have both signs; log w has it times alpha / sigma^2.

        Args:
            square: squared distances of the candidates from the centre.
        """
        radius = (square.max().sqrt() + (self.centre - self.shift).norm()) / self.scale
        entry = 2.0**-24 * self.x_t.norm(dim=1) * radius / len(self.centre) ** 0.5
        return entry * self.alpha / self.sigma**2


def uses_int8(pool: Pool, device: torch.device) -> bool:
    """True if the data points of a pool are multiplied as int8 on a device.

    Args:
        pool: the data.
        device: where to multiply.
    """
    return pool.data.dtype == torch.uint8 and math.prod(pool.shape) <= MAX_INT32_TERMS and has_int8_matmul(device)
