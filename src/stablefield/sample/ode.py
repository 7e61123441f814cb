"""Samplers that follow the probability-flow ODE.

    dx = x0 d_alpha + noise d_sigma,      x0 = E[x | x_t],  noise = (x_t - alpha x0) / sigma

Written in (alpha, sigma) instead of t, one rule serves every process. Holding x0 and noise fixed over a step gives
Euler: DDIM for VP, the plain Euler step for VE and flow. Averaging them over both ends gives Heun: EDM's for VE.
Holding x0 fixed at what two steps say of its middle gives DPM-Solver++.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.sample.base import Draw, Question, Sampler


@dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation a step: x_s = alpha_s x0 + sigma_s noise (DDIM; Song, Meng & Ermon 2021, eq. 12)."""

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        alpha, sigma = ask.process.scales(s)
        x0, noise = ask.both(x, t)
        return alpha * x0 + sigma * noise


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, two evaluations a step and one in the last (Karras et al. 2022, algorithm 2).

    Attributes:
        churn: noise added before each step, S_churn; 0 makes the sampler deterministic.
        churn_min: noise level sigma / alpha below which none is added, S_min.
        churn_max: the same above, S_max.
        churn_noise: standard deviation of the added noise, S_noise.
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

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        if self.churn > 0:
            x, t = self._churned(ask, x, t, draw)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ask.process.scales(t), ask.process.scales(s)
        x0, noise = ask.both(x, t)
        ahead = alpha_s * x0 + sigma_s * noise
        if sigma_s == 0:  # no noise is left to ask about
            return ahead
        x0_ahead, noise_ahead = ask.both(ahead, s)
        return x + (alpha_s - alpha_t) * (x0 + x0_ahead) / 2 + (sigma_s - sigma_t) * (noise + noise_ahead) / 2

    def _churned(self, ask: Question, x: Tensor, t: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Back to a higher noise level, by fresh noise. The noise is drawn whether or not it is used."""
        alpha, sigma = ask.process.scales(t)
        level, fresh = sigma / alpha, draw()
        if not self.churn_min <= level <= self.churn_max or alpha == 0:  # nothing is noisier than alpha = 0
            return x, t
        raised = level * (1 + min(self.churn / self.steps, 2**0.5 - 1))
        earlier = ask.denoiser.nearest(ask.process.time(raised))
        alpha_earlier, sigma_earlier = ask.process.scales(earlier)
        added = ((sigma_earlier / alpha_earlier) ** 2 - level**2).clamp(min=0).sqrt() * self.churn_noise
        return alpha_earlier * (x / alpha + added * fresh), earlier


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M): second order, one evaluation a step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Euler's step with x0 extrapolated to its middle, in log(alpha / sigma), from this answer and the last one. The
    first step has no last answer, and the last no middle: they are Euler's.
    """

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ask.process.scales(t), ask.process.scales(s)
        before = ask.last
        x0 = ask(x, t)
        if before is not None:
            x0 = x0 + _ahead(ask, before[0], t, s) * (x0 - before[1])
        return alpha_s * x0 + sigma_s / sigma_t * (x - alpha_t * x0)


def _ahead(ask: Question, earlier: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Half the step from t to s, over the step from `earlier` to t, in log(alpha / sigma); 0 if either has no end."""
    alpha, sigma = ask.process.scales(torch.stack([earlier, t, s]))
    passed, coming = (alpha / sigma).log().diff()
    share = coming / (2 * passed)
    return torch.where(torch.isfinite(share), share, 0.0)
