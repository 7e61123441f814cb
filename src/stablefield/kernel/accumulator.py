"""Online softmax over a support that arrives in blocks.

    log w_k = -||x_t - alpha x_k||^2 / (2 sigma^2) + const

Only differences between the candidates of an example matter, so the energy alpha^2 ||x_k||^2 - 2 alpha <x_t, x_k>
stands in for the squared distance, and is a matrix product. The sums are relative to the smallest energy seen; sums of
parts merge, so that blocks, the source that joins a shared batch, and shards of a data set are one operation.

Precision: products and sums are float64. Near-duplicates at small sigma are why: at sigma = 0.002 and D = 3072 one
float32 rounding of ||x||^2 is worth 40 nats. Float64 products have no reduced mode, so neither TF32 nor autocast can
reach the weights, and on a CPU with its memory reused they cost about twice the float32 ones. GPUs on which float64 is
slow multiply digits in integers instead (`matmul.DigitsMatmul`). A caller who knows that
other products suffice (`matmul`: float32 where sigma is large, integers for bytes) can ask for those; the sums stay
float64.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.matmul import Matmul, accurate_matmul
from stablefield.process import BatchRecord

_HIGHEST = torch.finfo(torch.float64).max  # unlike infinity, it can be subtracted from infinity
_SMALLEST_LOG_WEIGHT = -700.0  # e^-700 = 1e-304 beside a weight of 1


@dataclass(frozen=True, eq=False)
class Posterior(BatchRecord):
    """Posterior over a support for each example of a batch.

    Attributes:
        mean: E[x | x_t], the stable target, (B, *D).
        ess: effective sample size 1 / sum_k w_k^2, (B,), between 1 and the size of the support.
        variance: trace of Cov[x | x_t], (B,): the variance of a single-sample target at this x_t (units of x squared,
            summed over the dimensions).
    """

    mean: Float[Tensor, "B *D"]
    ess: Float[Tensor, "B"]
    variance: Float[Tensor, "B"]


class PosteriorAccumulator:
    """Running statistics of an online softmax over a support, relative to the smallest energy seen.

    Weights are exp(-(energy - smallest) / (2 sigma^2)), so that the smallest energy has weight 1 and nothing overflows.

    Energies carry the rounding of ||x_t||^2, and smaller differences mean nothing. So a sigma below 2^-22 ||x_t||,
    zero included, is replaced by that; otherwise the order of a sum would choose between two copies of one image.

    Args:
        x_t: noisy data, (B, *D).
        sigma: noise level, a number or (B,).
        alpha: scale of the data in x_t, a number or (B,).
        matmul: how candidates are multiplied; as accurately as in float64 by default.
        own: one candidate for each example, such as its source, from which the sums start, (B, *D).

    Attributes:
        like: x_t as it was given.
        query: x_t in float64, (B, D).
        matmul: products of -2 alpha x_t with blocks of candidates.
        sigma: noise level, (B,), float64.
        alpha: scale of the data in x_t, (B,), float64.
        sharpness: 1 / (2 sigma^2), limited by rounding, (B,).
        lowest: smallest energy seen, (B,); the largest number where no candidate was added.
        total: sum of the weights, (B,).
        squares: sum of the squared weights, (B,).
        moment: weighted sum of squared norms, (B,).
        weighted: weighted sum of the candidates, (B, D).
    """

    def __init__(
        self,
        x_t: Float[Tensor, "B *D"],
        sigma: float | Tensor,
        alpha: float | Tensor = 1.0,
        matmul: Callable[[Float[Tensor, "B D"]], Matmul] = accurate_matmul,
        own: Float[Tensor, "B *D"] | None = None,
    ) -> None:
        self.like = x_t
        self.query = x_t.detach().to(float64_device(x_t.device), torch.float64).flatten(1)
        self.sigma = _per_example("sigma", sigma, self.query)
        self.alpha = _per_example("alpha", alpha, self.query)
        scaled = self.query * (-2 * self.alpha)[:, None]
        self.matmul = matmul(scaled)
        rounding = 2.0**-44 * self.query.square().sum(1)
        self.sharpness = (0.5 / torch.maximum(self.sigma.square(), rounding)).clamp(1e-300, 1e300)
        if own is None:
            self.lowest = torch.full_like(self.sigma, _HIGHEST)
            self.total, self.squares, self.moment = self.query.new_zeros(3, len(x_t))
            self.weighted = torch.zeros_like(self.query)
        else:
            assert own.shape == x_t.shape
            self.weighted = own.detach().to(self.query, copy=True).flatten(1)
            self.moment = self.weighted.square().sum(1)
            self.lowest = self.alpha.square() * self.moment + (scaled * self.weighted).sum(1)
            self.total, self.squares = torch.ones_like(self.lowest), torch.ones_like(self.lowest)

    def add(self, candidates: Tensor, mask: Tensor | None = None, square: Float[Tensor, "n"] | None = None) -> None:
        """Add a block of candidates.

        Args:
            candidates: (n, *D), shared by all examples, or (G, n, *D), shared by each of G equally large groups of
                consecutive examples; with G = B each example has its own.
            mask: which candidates each example may use, (B, n); all if None.
            square: squared norms of the candidates, (n,), if known already.
        """
        if 0 in candidates.shape:
            return
        y, norm, energy = self.compare(candidates, square)
        if mask is not None:
            # add zero or infinity, in float32: filling what is masked would take many times as long
            energy.add_(mask.to(energy.device, torch.float32).reciprocal_().sub_(1))
        shrink = self._lower(torch.minimum(self.lowest, energy.amin(1)))
        log_weight = energy.sub_(self.lowest[:, None]).mul_(-self.sharpness[:, None])
        if mask is None:  # exp takes six times as long where it underflows; what is masked needs the weight 0
            log_weight.clamp_(min=_SMALLEST_LOG_WEIGHT)
        weight = log_weight.exp_()
        self.total = weight.sum(1).addcmul_(self.total, shrink)
        self.squares = torch.linalg.vector_norm(weight, dim=1).square().addcmul_(self.squares, shrink.square())
        moment = weight @ norm if norm.ndim == 1 else (weight.unflatten(0, (len(norm), -1)) * norm[:, None]).sum(2)
        self.moment = moment.flatten().addcmul_(self.moment, shrink)
        self.weighted.mul_(shrink[:, None])
        self.matmul.add_weighted_sum(self.weighted, weight, y)

    def compare(self, candidates: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The flattened candidates, their squared norms, (n,) or (G, n), and the energies, (B, n).

        Args:
            candidates: (n, *D) or (G, n, *D).
            square: squared norms, if known already.

        Raises:
            ValueError: candidates of another shape than x_t.
        """
        if candidates.shape[candidates.ndim - self.like.ndim + 1 :] != self.like.shape[1:]:
            raise ValueError(
                f"candidates {tuple(candidates.shape)} do not have the shape of x_t {tuple(self.like.shape)}"
            )
        y = candidates.flatten(candidates.ndim - self.like.ndim + 1)
        norm = self.matmul.squared_norms(y) if square is None else square
        energy, square_alpha = self.matmul.inner(y).double(), self.alpha.square()
        if norm.ndim == 1:
            return y, norm, energy.addr_(square_alpha, norm)
        energy.unflatten(0, (len(norm), -1)).addcmul_(square_alpha.view(len(norm), -1, 1), norm[:, None])
        return y, norm, energy

    def merge(self, other: "PosteriorAccumulator") -> "PosteriorAccumulator":
        """Merge the statistics of another part of the support, for the same x_t, alpha and sigma.

        Args:
            other: statistics of the other part; unchanged.

        Returns:
            This accumulator, changed in place.
        """
        shrink = self._lower(torch.minimum(self.lowest, other.lowest))
        theirs = self._weight_of(other.lowest)
        self.total = self.total * shrink + other.total * theirs
        self.squares = self.squares * shrink**2 + other.squares * theirs**2
        self.moment = self.moment * shrink + other.moment * theirs
        self.weighted.mul_(shrink[:, None]).add_(other.weighted * theirs[:, None])
        return self

    def put(self, index: Int[Tensor, "b"], other: "PosteriorAccumulator") -> None:
        """Replace the statistics of some examples.

        Args:
            index: which examples.
            other: statistics of these examples.
        """
        for name in ("lowest", "total", "squares", "moment", "weighted"):
            getattr(self, name)[index] = getattr(other, name)

    def state(self) -> Float[Tensor, "B S"]:
        """The statistics as one matrix, to be sent to another process."""
        return torch.cat([torch.stack([self.lowest, self.total, self.squares, self.moment], 1), self.weighted], 1)

    def at(self, state: Float[Tensor, "B S"]) -> "PosteriorAccumulator":
        """An accumulator for the same examples with the statistics of another process.

        Args:
            state: as returned by `state`.
        """
        found = copy(self)
        found.lowest, found.total, found.squares, found.moment = state[:, :4].unbind(1)
        found.weighted = state[:, 4:].clone()
        return found

    def finish(self) -> Posterior:
        """The posterior over all candidates that were added (NaN for examples without any)."""
        mean = self.weighted / self.total[:, None]
        variance = (self.moment / self.total - mean.square().sum(1)).clamp(min=0)
        ess = self.total.square() / self.squares
        home, dtype = self.like.device, torch.promote_types(self.like.dtype, torch.float32)
        return Posterior(mean.reshape(self.like.shape).to(home, dtype), ess.to(home, dtype), variance.to(home, dtype))

    def _lower(self, lowest: Tensor) -> Tensor:
        """Set the reference energy; returns the factor by which the sums so far shrink."""
        before, self.lowest = self.lowest, lowest
        return self._weight_of(before)

    def _weight_of(self, energy: Tensor) -> Tensor:
        return torch.exp((self.lowest - energy) * self.sharpness)


def float64_device(device: torch.device) -> torch.device:
    """That device if it supports float64, else (MPS) the CPU.

    Args:
        device: where the data are.
    """
    return torch.device("cpu") if device.type == "mps" else device


def chunk_size(x_t: Tensor, per_example: int = 1, width: int = 8) -> int:
    """Number of candidates in a block such that it and its weights take about 6 MB each (256 MB on a GPU).

    Args:
        x_t: noisy data, (B, *D).
        per_example: B if every example has candidates of its own, else 1.
        width: bytes of a number as it is multiplied.
    """
    memory = 2**28 if x_t.device.type == "cuda" else 3 * 2**21
    return max(1, memory // max(math.prod(x_t.shape[1:]) * per_example * width, len(x_t) * 8, 1))


def _per_example(name: str, value: float | Tensor, query: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
    value = value if isinstance(value, Tensor) else query.new_full((), value)  # a copy would make the host wait
    if value.shape not in ((), (len(query),)):
        raise ValueError(f"{name} must be a number or have shape ({len(query)},), not {tuple(value.shape)}")
    return value.detach().to(query).expand(len(query))
