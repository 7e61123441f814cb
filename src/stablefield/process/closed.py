"""Processes with a closed form."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from stablefield.process.base import Process


@dataclass(frozen=True)
class VE(Process):
    """The variance-exploding process: x_t = x + t noise. EDM uses this process, with t = sigma."""

    t_max: ClassVar[float] = math.inf

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class VP(Process):
    """The variance-preserving process: alpha^2 + sigma^2 = 1, with beta(t) = beta_min + beta_d t.

    This is DDPM's linear schedule in continuous time (Song et al. 2021, eq. 33).

    Attributes:
        beta_min: beta at t = 0.
        beta_d: growth of beta from t = 0 to t = 1.
    """

    beta_min: float = 0.1
    beta_d: float = 19.9

    def __post_init__(self) -> None:
        # beyond 1,000 the signal at t = 1 is 0 in float64
        if not (self.beta_min >= 0 and self.beta_d >= 0 and 0 < self.beta_min + self.beta_d / 2 <= 1000):
            raise ValueError(
                "a VP process needs beta_min >= 0, beta_d >= 0 and beta_min + beta_d / 2 between 0 and 1,000, not "
                f"{self.beta_min} and {self.beta_d}"
            )

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()  # expm1: sigma keeps its digits near t = 0

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of(-0.5 * torch.log1p(ratio**2))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * self.beta_d * t**2 - 0.5 * self.beta_min * t

    def _time_of(self, log_alpha: Tensor) -> Tensor:
        """The root of beta_d t^2 / 2 + beta_min t + 2 log_alpha = 0, written without cancellation near t = 0."""
        integral = -2 * log_alpha  # of beta, from 0 to t
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * integral).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP process: VP's alpha with the smaller noise sigma = 1 - alpha^2 (Song et al. 2021, eq. 29)."""

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        # alpha^2 + ratio alpha - 1 = 0 means 1 / alpha - alpha = ratio, so -log alpha = asinh(ratio / 2)
        return self._time_of(-torch.asinh(ratio / 2))


@dataclass(frozen=True)
class Cosine(Process):
    """The cosine process: alpha = cos(pi t / 2), sigma = sin(pi t / 2); variance preserving."""

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2
        return torch.sin((1 - t) * quarter), torch.sin(t * quarter)  # cos(pi t / 2) would lose its digits near t = 1

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: the straight line x_t = (1 - t) x + t noise."""

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # right at both ends: 0 gives 0, infinity gives 1
