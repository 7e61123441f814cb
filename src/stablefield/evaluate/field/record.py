"""What was measured, at some noise levels: estimates with their errors, and the units they are in."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from stablefield.evaluate.field.estimate import Estimate


@dataclass(frozen=True, eq=False)
class Stable:
    """A reference batch of one size, in units of x squared.

    Attributes:
        variance: mean squared distance to E[x | x_t], the source in the support: unbiased, so this is V_STF.
        bias: squared bias of the same; 0 but for chance.
        without: mean squared distance if the support is a draw that does not know the source.
        without_bias: squared bias of that, a part of it.
    """

    variance: Estimate
    bias: Estimate
    without: Estimate
    without_bias: Estimate


@dataclass(frozen=True, eq=False)
class Field:
    """What there is to know of the targets at some noise levels; the table of this module says the units.

    Attributes:
        t, alpha, sigma: the levels.
        members: N, how many there are in the data.
        dim: numbers in one of them.
        rows, draws: x_t a level, and reference batches for each.
    """

    t: Float[Tensor, "L"]
    alpha: Float[Tensor, "L"]
    sigma: Float[Tensor, "L"]
    members: int
    dim: int
    rows: int
    draws: int
    dsm: Estimate
    floor: Estimate
    ess_share: Estimate
    kl: Estimate
    divergence: Estimate
    one_point: Estimate
    stable: Mapping[int, Stable]

    @property
    def level(self) -> Float[Tensor, "L"]:
        """sigma / alpha: what processes have in common."""
        return self.sigma / self.alpha

    def in_noise(self, found: Estimate) -> Estimate:
        """From x squared to noise units, per dimension: a single sample's lies between 0 and 1."""
        return found.times((self.alpha / self.sigma).square() / self.dim)

    def in_score(self, found: Estimate) -> Estimate:
        """From x squared to score units, summed over the dimensions."""
        return found.times(self.alpha.square() / self.sigma**4)
