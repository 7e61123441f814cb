"""Noisy examples in the coordinates of the exact target's inner products: centred, in units of stored values.

A stored value b stands for x = scale b + shift. The norms ||x - c||^2 / scale^2 are computed beforehand.
The energies then differ from those of x_t and x by a constant per example, which cancels in the posterior. So stored
bytes are multiplied without conversion, and the inner products that float32 rounds do not contain the part that all
data points have in common.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator
from stablefield.kernel.matmul import (
    MAX_INT32_TERMS,
    FloatMatmul,
    Int8Matmul,
    Matmul,
    accurate_matmul,
    has_int8_matmul,
)
from stablefield.pool import Pool
from stablefield.process import BatchRecord, NoisyBatch, move


@dataclass(frozen=True, eq=False)
class Examples(BatchRecord):
    """Noisy examples of one class whose posterior means are computed.

    Attributes:
        x_t: noisy data.
        sigma: scale of the noise.
        alpha: scale of the data in x_t.
        level: noise level sigma / alpha in float64, on the CPU.
        x: the sources; None if they are not known.
        position: where the sources are in this process's part of the data, on the CPU; -1 for those that it does not
            hold, None if the sources are not known.
    """

    x_t: Float[Tensor, "B *D"]
    sigma: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    level: Float[Tensor, "B"]
    x: Float[Tensor, "B *D"] | None = None
    position: Int[Tensor, "B"] | None = None


@dataclass(frozen=True, eq=False)
class Query:
    """Examples of a batch, centred at alpha c and in units of stored values.

    Attributes:
        x_t: (x_t - alpha c) / scale, (B, D), float64.
        sigma: sigma / scale, (B,), float64.
        alpha: scale of the data in x_t, (B,), float64.
        like: the x_t of the batch.
        source: the x of the batch; None if it is not known.
        centre: c, (D,), float64.
        scale: factor from stored values to x.
        shift: x of the stored value 0.
    """

    x_t: Float[Tensor, "B D"]
    sigma: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    like: Float[Tensor, "B *D"]
    source: Float[Tensor, "B *D"] | None
    centre: Float[Tensor, "D"]
    scale: float
    shift: float

    @classmethod
    def of(cls, noisy: NoisyBatch | Examples, affine: tuple[float, float], centre: Float[Tensor, "D"]) -> "Query":
        """The examples of a batch.

        Args:
            noisy: the batch.
            affine: (scale, shift), with x = scale * stored value + shift.
            centre: the centre c, (D,).
        """
        (scale, shift), centre, alpha = affine, centre.double(), noisy.alpha.double()
        x_t = (noisy.x_t.flatten(1).double() - alpha[:, None] * centre) / scale
        return cls(x_t, noisy.sigma.double() / scale, alpha, noisy.x_t, noisy.x, centre, scale, shift)

    def select(self, index: Int[Tensor, "b"]) -> "Query":
        """Some of the examples.

        Args:
            index: which ones.
        """
        index = move(index, self.x_t.device)
        some = {name: getattr(self, name)[index] for name in ("x_t", "sigma", "alpha", "like")}
        return replace(self, **some, source=None if self.source is None else self.source[index])

    @property
    def narrow(self) -> torch.dtype:
        """Lowest precision of any computation: float32, or the data type of x_t if that is wider."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def accumulator(self, energies: torch.dtype = torch.float64) -> PosteriorAccumulator:
        """An empty accumulator for candidates of any type.

        Args:
            energies: data type of the inner products.
        """
        matmul: Callable[[Tensor], Matmul] = partial(FloatMatmul, types=(energies, self.narrow))
        if energies == torch.float64:
            matmul = partial(accurate_matmul, narrow=self.narrow)
        return PosteriorAccumulator(self.x_t, self.sigma, self.alpha, matmul)

    def int8_accumulator(self, digits: int) -> PosteriorAccumulator:
        """An empty accumulator for candidates stored as bytes, whose inner products are exact integer matmuls.

        Its reference energy starts at the source's, if that is known, so that candidates of negligible weight can be
        skipped from the first block. Where it starts does not change the result, only the speed.

        Args:
            digits: number of base-256 digits of x_t.
        """
        sums = PosteriorAccumulator(self.x_t, self.sigma, self.alpha, partial(Int8Matmul, digits=digits))
        if self.source is not None:
            stored = ((self.source.flatten(1).double() - self.shift) / self.scale).round()
            norm = (stored * self.scale + self.shift - self.centre).square().sum(1) / self.scale**2
            energy = self.alpha * (self.alpha * norm - 2 * (self.x_t * stored).sum(1))
            sums.lowest = energy + 1 / sums.sharpness  # not below what rounding may make of the source
        return sums

    def digits(self, square: Float[Tensor, "m"]) -> Int[Tensor, "B"]:
        """Number of base-256 digits of each x_t for which the error of the log weights is about 1e-6; 2 to 7.

        With k digits, the error of an entry of x_t is uniform and at most about 256^-k times the largest entry. So the
        error of the inner product with a candidate at distance r from the centre is about a third of that times r;
        errors that all candidates have in common cancel.

        Args:
            square: squared distances of the candidates from the centre.
        """
        entry = self.x_t.abs().amax(1) * square.max().sqrt() / self.scale / 3
        finest = (1e-6 * self.sigma**2 / (self.alpha * entry).clamp(min=1e-300)).clamp(min=1e-300)
        return (finest.log() / -math.log(256)).ceil().clamp(2, 7).long()

    def squared_distance(self, sums: PosteriorAccumulator) -> Float[Tensor, "B"]:
        """Squared distances of x_t from alpha times the nearest candidate, in units of sigma squared.

        Args:
            sums: over all candidates.
        """
        constant = 2 * self.alpha * (self.x_t @ (self.centre - self.shift)) / self.scale
        return (sums.lowest + constant + self.x_t.square().sum(1)) / self.sigma.square()

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
