"""When to train: densities of t, each given by its quantile.

    t = Q(u),      u ~ U(0, 1)

One function a density is all that is needed: `draw` feeds it uniform numbers, `Stratified` feeds it evenly spread
ones, and the share of training above some noise level can be read off.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.process import VP


class Times(ABC):
    """A density of t, by its quantile function."""

    @abstractmethod
    def quantile(self, u: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The t below which a share u of the density lies, u in (0, 1)."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n"]:
        """n independent times (float64, on the CPU)."""
        return self.quantile(self.levels(n, generator).clamp(min=2.0**-54))  # u = 0 is drawn once in 2^53

    def levels(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n"]:
        """The uniform numbers that `draw` hands to the quantile."""
        return torch.rand(n, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class LogNormal(Times):
    """ln t ~ N(mean, std^2). The defaults are EDM's noise levels for images (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_spread(self)

    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform(Times):
    """ln t uniform between two bounds. The defaults are the VE noise levels of Song et al. 2021 in EDM's form."""

    low: float = 0.02
    high: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"log-uniform times need 0 < low < high, not low={self.low}, high={self.high}")

    def quantile(self, u: Tensor) -> Tensor:
        return self.low * (u * math.log(self.high / self.low)).exp()


@dataclass(frozen=True)
class Uniform(Times):
    """t uniform between two bounds. The defaults are VP's (t = 0 has no noise, hence no noise target)."""

    low: float = 1e-5
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"uniform times need 0 <= low < high, not low={self.low}, high={self.high}")

    def quantile(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class VPLevels(Times):
    """The noise levels sigma / alpha of a VP process at uniform times, as times of VE (Karras et al. 2022, table 1).

    Attributes:
        beta_d: growth of beta in that process.
        beta_min: beta at its start.
        low: its earliest time.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    low: float = 1e-5

    def quantile(self, u: Tensor) -> Tensor:
        alpha, sigma = VP(self.beta_min, self.beta_d).scales(self.low + (1 - self.low) * u)
        return sigma / alpha


@dataclass(frozen=True)
class LogitNormal(Times):
    """logit t ~ N(mean, std^2): flow matching's preference for the middle (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_spread(self)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Stratified(Times):
    """Another density, drawn evenly: row i of n gets its u from ((i - 1)/n, i/n), shifted by one number for all.

    Each time alone still has the density of `times`; the batch covers it better (Kingma et al. 2021, appendix I.1).
    """

    times: Times

    def quantile(self, u: Tensor) -> Tensor:
        return self.times.quantile(u)

    def levels(self, n: int, generator: torch.Generator | None) -> Tensor:
        shift = torch.rand(1, dtype=torch.float64, generator=generator)
        return (shift + torch.arange(n, dtype=torch.float64) / n) % 1


def _check_spread(times: LogNormal | LogitNormal) -> None:
    if not (math.isfinite(times.mean) and 0 < times.std < math.inf):
        raise ValueError(f"{type(times).__name__} needs a finite mean and 0 < std, not {times.mean} and {times.std}")
