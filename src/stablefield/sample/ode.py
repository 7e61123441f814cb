"""Samplers that integrate the probability-flow ODE with fixed steps.

    dx = x0 d_alpha + noise d_sigma,      x0 = E[x | x_t],  noise = (x_t - alpha x0) / sigma

Written in (alpha, sigma) instead of t, one rule serves every process. Holding x0 and noise fixed over a step gives
Euler: DDIM for VP, the plain Euler step for VE and flow. Averaging them over both ends gives Heun: EDM's for VE.
Holding x0 fixed at its value extrapolated to the middle of the step gives DPM-Solver++.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from stablefield.sample.base import BoundDenoiser, DrawNoise, Sampler


@dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation per step: x_s = alpha_s x0 + sigma_s noise (DDIM for VP).

    Source: Song, Meng & Ermon 2021, eq. 12.
    """

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        alpha, sigma = denoiser.process.scales(s)
        x0, noise = denoiser.x0_and_noise(x, t)
        return alpha * x0 + sigma * noise


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, two evaluations per step and one in the last (Karras et al. 2022, algorithm 2).

    Attributes:
        churn: amount of noise added before each step, S_churn; 0 makes the sampler deterministic.
        churn_min: noise level sigma / alpha below which no noise is added, S_min.
        churn_max: noise level sigma / alpha above which no noise is added, S_max.
        churn_noise: standard deviation of the added noise, S_noise.

    Raises:
        ValueError: a value of churn is negative, or churn_min is above churn_max.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = float("inf")
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.churn >= 0 and self.churn_noise >= 0 and 0 <= self.churn_min <= self.churn_max):
            raise ValueError(
                f"need churn and churn_noise >= 0 and 0 <= churn_min <= churn_max, not {self.churn}, "
                f"{self.churn_noise}, {self.churn_min} and {self.churn_max}"
            )

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        if self.churn > 0:
            x, t = self._churned(denoiser, x, t, draw_noise)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.process.scales(t), denoiser.process.scales(s)
        x0, noise = denoiser.x0_and_noise(x, t)
        euler = alpha_s * x0 + sigma_s * noise
        if sigma_s == 0:  # the predicted noise is not defined there
            return euler
        x0_s, noise_s = denoiser.x0_and_noise(euler, s)
        return x + (alpha_s - alpha_t) * (x0 + x0_s) / 2 + (sigma_s - sigma_t) * (noise + noise_s) / 2

    def _churned(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, draw_noise: DrawNoise) -> tuple[Tensor, Tensor]:
        """The state after noise is added, and its earlier time. The noise is drawn whether or not it is used."""
        alpha, sigma = denoiser.process.scales(t)
        level, fresh = sigma / alpha, draw_noise()
        if not self.churn_min <= level <= self.churn_max or alpha == 0:  # alpha = 0 is the highest noise level
            return x, t
        raised = level * (1 + min(self.churn / self.steps, 2**0.5 - 1))
        earlier = denoiser.denoiser.nearest_time(denoiser.process.time(raised))
        alpha_earlier, sigma_earlier = denoiser.process.scales(earlier)
        added = ((sigma_earlier / alpha_earlier) ** 2 - level**2).clamp(min=0).sqrt() * self.churn_noise
        return alpha_earlier * (x / alpha + added * fresh), earlier


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M): second order, one evaluation per step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    An Euler step with x0 extrapolated to the middle of the step, in log(alpha / sigma), from this evaluation and the
    previous one. The first step has no previous evaluation, and the last has no middle: they are Euler steps.
    """

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.process.scales(t), denoiser.process.scales(s)
        previous = denoiser.last
        x0 = denoiser(x, t)
        if previous is not None:
            x0 = x0 + _extrapolation(denoiser, previous[0], t, s) * (x0 - previous[1])
        return alpha_s * x0 + sigma_s / sigma_t * (x - alpha_t * x0)


def _extrapolation(denoiser: BoundDenoiser, previous: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Half the step from t to s, divided by that from `previous` to t, in log(alpha / sigma); 0 if one is infinite."""
    alpha, sigma = denoiser.process.scales(torch.stack([previous, t, s]))
    last_step, this_step = (alpha / sigma).log().diff()
    ratio = this_step / (2 * last_step)
    return torch.where(torch.isfinite(ratio), ratio, 0.0)
