"""Preconditioning: the scalings around a network F that make it a denoiser.

    D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)

The published scalings (EDM's, and those that the VP, VE and iDDPM networks were trained with) are written for
x + level noise. Here they are applied to x_t / alpha, which is just that with level = sigma / alpha, and multiplied
out: so every preconditioning works with every process, wherever alpha > 0. `NoPreconditioning` is for networks that
predict x0, epsilon, score, velocity or v themselves.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.prediction import canonical_prediction_type, coefficients
from stablefield.process import VP, Process

NoiseRange = tuple[float, float]  # the lowest and the highest noise level sigma / alpha
Scalings = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise


class Preconditioning(ABC):
    """Base class of preconditionings: how a network's input is scaled, and how its output becomes E[x | x_t]."""

    @abstractmethod
    def __call__(self, process: Process, t: Float[Tensor, "*S"]) -> Scalings:
        """The scalings (c_skip, c_out, c_in, c_noise), each shaped like t.

        Args:
            process: the process that made x_t.
            t: times, of any shape.
        """

    @property
    def noise_range(self) -> NoiseRange:
        """The lowest and highest noise level sigma / alpha at which the denoiser is defined and was trained."""
        return 0.0, inf

    def nearest_level(self, level: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The nearest noise levels that the network was trained on; `level` itself by default.

        Args:
            level: noise levels sigma / alpha, of any shape.
        """
        return level


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM's scalings (Karras et al. 2022, table 1).

    The input and the training target of the network have unit variance at every t if the data have variance
    sigma_data^2. The scalings are finite at alpha = 0 too.

    Attributes:
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: sigma_data is not between 1e-9 and 1e9.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)

    @override
    def __call__(self, process: Process, t: Tensor) -> Scalings:
        alpha, sigma = process.scales(t)
        variance = sigma**2 + (alpha * self.sigma_data) ** 2
        return (
            alpha * self.sigma_data**2 / variance,
            sigma * self.sigma_data / variance.sqrt(),
            variance.rsqrt(),
            _log_level(alpha, sigma),
        )


@dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """The scalings of VP networks such as DDPM++ (Song et al. 2021; Karras et al. 2022, table 1).

    The network predicts epsilon. Its c_noise is 999 t of the VP process it was trained on, whatever the process it is
    used with.

    Attributes:
        beta_d: growth of beta over the process that the network was trained on.
        beta_min: beta at its start.
        steps: number of time steps M that the network was made for; c_noise is (M - 1) t.
        t_min: the earliest time that it was trained on.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        VP(self.beta_min, self.beta_d)  # it checks them
        if not (2 <= self.steps <= 2**24 and 0 < self.t_min < 1):
            raise ValueError(f"need 2 <= steps <= 2^24 and 0 < t_min < 1, not {self.steps} and {self.t_min}")

    @override
    def __call__(self, process: Process, t: Tensor) -> Scalings:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        return 1 / alpha, -level, _unit_input(alpha, sigma), (self.steps - 1) * self._trained_on.time(level)

    @property
    @override
    def noise_range(self) -> NoiseRange:
        alpha, sigma = self._trained_on.scales(torch.tensor([self.t_min, 1.0], dtype=torch.float64))
        low, high = (sigma / alpha).tolist()
        return low, high

    @property
    def _trained_on(self) -> VP:
        return VP(self.beta_min, self.beta_d)


@dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """The scalings of VE networks such as NCSN++ (Song et al. 2021; Karras et al. 2022, table 1).

    The network predicts -epsilon; its c_noise is ln(level / 2).

    Attributes:
        sigma_min: the lowest noise level that the network was trained on.
        sigma_max: the highest.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    @override
    def __call__(self, process: Process, t: Tensor) -> Scalings:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        return 1 / alpha, level, 1 / alpha, (level / 2).log()

    @property
    @override
    def noise_range(self) -> NoiseRange:
        return self.sigma_min, self.sigma_max


@dataclass(frozen=True)
class IDDPMPreconditioning(Preconditioning):
    """The scalings of improved-DDPM networks such as ADM (Nichol & Dhariwal 2021; Karras et al. 2022, table 1).

    The network predicts epsilon; its c_noise is the position of the noise level in a table. Variances that it may
    predict beside epsilon are ignored by `Preconditioned`.

    Attributes:
        table: the noise levels u_0 > u_1 > ... > u_M = 0. Give a checkpoint's own table if it holds one: the recursion
            that computes the default loses digits, and was run in float32 when the published networks were trained.
    """

    table: tuple[float, ...] = field(default_factory=lambda: iddpm_noise_levels(), repr=False)

    def __post_init__(self) -> None:
        table = (inf, *self.table)
        if not 3 <= len(table) - 1 <= 100_001 or table[-1] != 0 or any(not a > b for a, b in pairwise(table)):
            raise ValueError("the table must hold 3 to 100,001 noise levels that decrease to 0")

    @override
    def __call__(self, process: Process, t: Tensor) -> Scalings:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        c_noise = len(self.table) - 2 - self._position(level).to(level.dtype)
        return 1 / alpha, -level, _unit_input(alpha, sigma), c_noise

    @property
    @override
    def noise_range(self) -> NoiseRange:
        return self.table[-2], self.table[0]

    @override
    def nearest_level(self, level: Tensor) -> Tensor:
        return _tensor(self.table, level.dtype, level.device)[self._position(level)]

    def _position(self, level: Tensor) -> Tensor:
        return (level.unsqueeze(-1) - _tensor(self.table, level.dtype, level.device)).abs().argmin(-1)


@dataclass(frozen=True)
class NoPreconditioning(Preconditioning):
    """A network that predicts a quantity of `stablefield.prediction` itself: x0 = (a F - b x_t) / c.

    Its input is scaled to unit variance, and its c_noise is EDM's. Trained with `PredictionWeight(prediction_type)`,
    the loss is the squared error of the network's own prediction.

    Epsilon and the score do not determine x0 where alpha = 0; close to there x0 is the difference of large numbers.
    So with these two `noise_range` ends at 1000, and training beyond it sees a finite number (of no weight).

    Attributes:
        prediction_type: what the network predicts; diffusers' names are replaced by those of `PREDICTION_TYPES`.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: the prediction type is unknown, or sigma_data is not between 1e-9 and 1e9.
    """

    prediction_type: str
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)
        object.__setattr__(self, "prediction_type", canonical_prediction_type(self.prediction_type))

    @override
    def __call__(self, process: Process, t: Tensor) -> Scalings:
        alpha, sigma = process.scales(t)
        a, b, c = coefficients(self.prediction_type, process, t)
        c = torch.where(c.abs() < 1e-6, torch.full_like(c, 1e-6).copysign(c), c)
        return -b / c, a / c, _unit_input(alpha * self.sigma_data, sigma), _log_level(alpha, sigma)

    @property
    @override
    def noise_range(self) -> NoiseRange:
        return (0.0, 1e3) if self.prediction_type in ("epsilon", "score") else (0.0, inf)


def iddpm_noise_levels(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008) -> tuple[float, ...]:
    """The noise levels u_0 > ... > u_steps = 0 of improved DDPM (Karras et al. 2022, table 1).

    They follow from alpha_bar(j) = sin^2(pi j / (2 steps (c_2 + 1))):

        u_(j-1) = sqrt((u_j^2 + 1) / max(alpha_bar(j-1) / alpha_bar(j), c_1) - 1)

    Args:
        steps: number of noise levels above 0, M.
        c_1: least ratio alpha_bar(j-1) / alpha_bar(j) of a step.
        c_2: offset of the cosine schedule.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = (torch.pi / 2 * j / (steps * (c_2 + 1))).sin().square()
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=c_1)
    # 1 + u_(j-1)^2 is the product of 1 / ratio from j to the end
    return (*(1 / ratio.flip(0).cumprod(0).flip(0) - 1).sqrt().tolist(), 0.0)


def _log_level(alpha: Tensor, sigma: Tensor) -> Tensor:
    """EDM's c_noise, ln(level) / 4, kept finite at alpha = 0 and at sigma = 0."""
    return (sigma / alpha).clamp(1e-6, 1e6).log() / 4


def _unit_input(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 + sigma**2).rsqrt()


@lru_cache
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # cached, because copying it to a GPU at every evaluation would make the host wait
    return torch.tensor(values, dtype=dtype, device=device)


def check_sigma_data(sigma_data: float) -> None:
    """Refuse a standard deviation whose square, or the inverse of it, is too large or too small in float32.

    Args:
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: it is not between 1e-9 and 1e9.
    """
    if not 1e-9 <= sigma_data <= 1e9:
        raise ValueError(f"sigma_data must be between 1e-9 and 1e9, not {sigma_data}; rescale the data")
