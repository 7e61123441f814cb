"""Distributions of t (noise distributions) for training, each given by its quantile function.

    t = Q(u),      u ~ U(0, 1)

The quantile function is all that is needed: `TimeDistribution.draw` applies it to independent uniform numbers,
`Stratified` to evenly spaced ones, and the share of training above a noise level can be read off.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.process import VP


class TimeDistribution(ABC):
    """Base class of distributions of t."""

    @abstractmethod
    def quantile(self, u: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The t below which a share u of the distribution lies.

        Args:
            u: numbers in (0, 1).
        """

    def draw(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n"]:
        """Draw the times of a batch (float64, on the CPU).

        Args:
            n: number of times.
            generator: source of randomness; by default torch's global one.
        """
        return self.quantile(self.uniform(n, generator).clamp(min=2.0**-54))  # u = 0 is drawn once in 2^53

    def uniform(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n"]:
        """Draw the uniform numbers to which `draw` applies the quantile function (float64, on the CPU).

        Args:
            n: number of times.
            generator: source of randomness; None is torch's global one.
        """
        return torch.rand(n, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class LogNormal(TimeDistribution):
    """ln t ~ N(mean, std^2). The defaults are EDM's noise levels for images (Karras et al. 2022, table 1).

    Attributes:
        mean: mean of ln t, P_mean.
        std: standard deviation of ln t, P_std.

    Raises:
        ValueError: the mean is not finite or std is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_normal(self)

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform(TimeDistribution):
    """ln t uniform between two bounds. The defaults are the VE noise levels of Song et al. 2021 in EDM's form.

    Attributes:
        low: the smallest t.
        high: the largest t.

    Raises:
        ValueError: not 0 < low < high, or high / low is not finite.
    """

    low: float = 0.02
    high: float = 100.0

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf and self.high / self.low < math.inf):
            raise ValueError(f"log-uniform times need 0 < low < high, not low={self.low}, high={self.high}")

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return self.low * (u * math.log(self.high / self.low)).exp()


@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """t uniform between two bounds. The defaults are VP's; at t = 0 epsilon and the score have no target.

    Attributes:
        low: the smallest t.
        high: the largest t.

    Raises:
        ValueError: not 0 <= low < high.
    """

    low: float = 1e-5
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"uniform times need 0 <= low < high, not low={self.low}, high={self.high}")

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class VPLevels(TimeDistribution):
    """The noise levels sigma / alpha of a VP process at uniform times, as times of VE (Karras et al. 2022, table 1).

    Attributes:
        beta_d: growth of beta over the VP process.
        beta_min: beta at its start.
        low: the earliest of the uniform times; the latest is 1.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    low: float = 1e-5

    def __post_init__(self) -> None:
        VP(self.beta_min, self.beta_d)  # it checks them
        if not 0 < self.low < 1:
            raise ValueError(f"low must be between 0 and 1, not {self.low}")

    @override
    def quantile(self, u: Tensor) -> Tensor:
        alpha, sigma = VP(self.beta_min, self.beta_d).scales(self.low + (1 - self.low) * u)
        return sigma / alpha


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """logit t ~ N(mean, std^2): flow matching with more weight on the middle (Esser et al. 2024, section 3.1).

    Attributes:
        mean: mean of logit t.
        std: standard deviation of logit t.

    Raises:
        ValueError: the mean is not finite or std is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal(self)

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Stratified(TimeDistribution):
    """Another distribution with a stratified draw: u_i = (i / n + shift) mod 1, with one random shift per batch.

    Each time has the distribution of `times`; together the n times of a batch cover it more evenly (Kingma et al.
    2021, appendix I.1).

    Attributes:
        times: the distribution to draw from.
    """

    times: TimeDistribution

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return self.times.quantile(u)

    @override
    def uniform(self, n: int, generator: torch.Generator | None) -> Tensor:
        shift = torch.rand(1, dtype=torch.float64, generator=generator)
        return (shift + torch.arange(n, dtype=torch.float64) / n) % 1


@dataclass(frozen=True)
class Adaptive(TimeDistribution):
    """A base distribution that a run adapts to its network (see `stablefield.engine.adaptation`); by itself, the base.

    Attributes:
        base: kind of the base distribution: "lognormal", "loguniform", "uniform" or "logitnormal".
        parameters: its two parameters, in the order of its class; by default its own defaults.
        reweight: True to multiply losses by importance weights, so that the objective stays that of the base
            distribution and the variance of the gradient falls; False to train more where the excess is large.
        every: images with one distribution, at least those of a batch and of the steps whose targets are computed
            together.

    Raises:
        ValueError: an unknown base, parameters that it refuses, or `every` below 1.
    """

    base: Literal["lognormal", "loguniform", "uniform", "logitnormal"] = "lognormal"
    parameters: tuple[float, float] | None = None
    reweight: bool = True
    every: int = 16_384

    def __post_init__(self) -> None:
        if self.base not in _BASES:
            raise ValueError(f"base must be one of {', '.join(_BASES)}, not {self.base!r}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 image, not {self.every}")
        self.base_times  # noqa: B018 (it checks the parameters)

    @property
    def base_times(self) -> TimeDistribution:
        """The base distribution."""
        return _BASES[self.base](*(self.parameters or ()))

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return self.base_times.quantile(u)


_BASES: dict[str, Callable[..., TimeDistribution]] = {
    "lognormal": LogNormal,
    "loguniform": LogUniform,
    "uniform": Uniform,
    "logitnormal": LogitNormal,
}


def _check_normal(times: LogNormal | LogitNormal) -> None:
    if not (times.std > 0 and abs(times.mean) + 6 * times.std <= 80):  # exp(80) is finite in float32
        raise ValueError(
            f"{type(times).__name__} needs std > 0 and |mean| + 6 std of at most 80, not {times.mean} and {times.std}"
        )
