"""Samplers that follow the probability-flow ODE.

    dx = x0 d_alpha + noise d_sigma,      x0 = E[x | x_t],  noise = (x_t - alpha x0) / sigma

Written in (alpha, sigma) instead of t, one rule serves every process. Holding x0 and noise fixed over a step gives
Euler: DDIM for VP, the plain Euler step for VE and flow. Averaging them over both ends gives Heun: EDM's for VE.
"""

from dataclasses import dataclass

from torch import Tensor

from stablefield.sample.base import Draw, Question, Sampler


@dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation a step: x_s = alpha_s x0 + sigma_s noise (DDIM; Song, Meng & Ermon 2021, eq. 12)."""

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        alpha, sigma = ask.process.scales(s)
        x0, noise = _both(ask, x, t)
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

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        if self.churn > 0:
            x, t = self._churned(ask, x, t, draw)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ask.process.scales(t), ask.process.scales(s)
        x0, noise = _both(ask, x, t)
        ahead = alpha_s * x0 + sigma_s * noise
        if sigma_s == 0:  # no noise is left to ask about
            return ahead
        x0_ahead, noise_ahead = _both(ask, ahead, s)
        return x + (alpha_s - alpha_t) * (x0 + x0_ahead) / 2 + (sigma_s - sigma_t) * (noise + noise_ahead) / 2

    def _churned(self, ask: Question, x: Tensor, t: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Back to a higher noise level, by fresh noise. The noise is drawn whether or not it is used."""
        alpha, sigma = ask.process.scales(t)
        level, fresh = sigma / alpha, draw()
        if not self.churn_min <= level <= self.churn_max:
            return x, t
        raised = level * (1 + min(self.churn / self.steps, 2**0.5 - 1))
        earlier = ask.process.time(raised)
        alpha_earlier = ask.process.scales(earlier)[0]
        added = (raised**2 - level**2).sqrt() * self.churn_noise * fresh
        return alpha_earlier * (x / alpha + added), earlier


def _both(ask: Question, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, noise) at time t."""
    alpha, sigma = ask.process.scales(t)
    x0 = ask(x, t)
    return x0, (x - alpha * x0) / sigma
