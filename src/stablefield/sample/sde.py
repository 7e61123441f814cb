"""Samplers that integrate the reverse SDE.

    dx = [f x - g^2 score] dt + g dW,      f = alpha' / alpha,  g^2 = (sigma^2)' - 2 f sigma^2      (t decreasing)

Over a whole step from t down to s the same process is x_t = a x_s + sqrt(v) noise, with

    a = alpha_t / alpha_s,      v = sigma_t^2 - a^2 sigma_s^2

f and g are infinite where alpha = 0 (the start of a flow, or of the cosine process); a and v are not. So all rules
here are written in (alpha, sigma) at both ends of a step, and serve every process from its very start. The last step,
to sigma = 0, adds no noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.process import Process, per_example
from stablefield.sample.base import BoundDenoiser, DrawNoise, Sampler


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Draws x_s from its posterior given x_t and x0 (DDPM; Ho et al. 2020, eqs. 6-7).

    Attributes:
        eta: fraction of the posterior's standard deviation that is drawn; the rest stays as predicted noise. 0 is DDIM
            (Song, Meng & Ermon 2021, eqs. 12 and 16).

    Raises:
        ValueError: eta is not between 0 and 1.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        _, v = transition(denoiser.process, t, s)
        (_, sigma_t), (alpha_s, sigma_s) = denoiser.process.scales(t), denoiser.process.scales(s)
        x0, noise = denoiser.x0_and_noise(x, t)
        fresh = self.eta * v.sqrt() * sigma_s / sigma_t
        return alpha_s * x0 + (sigma_s**2 - fresh**2).clamp(min=0).sqrt() * noise + fresh * draw_noise()


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama: the probability-flow step, with noise removed and as much added (Song et al. 2021, eq. 6).

    Any exchange rate w^2 leaves the same distribution at every time:

        dx = x0 d_alpha + noise d_sigma - w^2 score dt / 2 + w dW,      w = g gives the reverse SDE

    where g^2 dt = 2 sigma (d_sigma - sigma d_alpha / alpha). The exchange is g^2 dt as long as that is less than all
    of the noise; where a step would exchange more (near alpha = 0, or in a long step) it is sigma^2.
    """

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.process.scales(t), denoiser.process.scales(s)
        x0, noise = denoiser.x0_and_noise(x, t)
        euler = alpha_s * x0 + sigma_s * noise
        if sigma_s == 0:
            return euler
        removed = sigma_t - sigma_s + sigma_t * (alpha_s - alpha_t) / alpha_t
        exchanged = (2 * sigma_t * removed).clamp(max=sigma_t**2)
        return euler - exchanged / (2 * sigma_t) * noise + exchanged.sqrt() * draw_noise()


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """Reverse diffusion, discretised as the forward process is: x_s = (2 - a) x + v score + sqrt(v) noise.

    Source: Song et al. 2021, eq. 46; algorithms 2 and 3 for VE and VP.
    """

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        return _reverse_diffusion(denoiser, x, t, s, draw_noise)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Langevin corrections at each time, then reverse diffusion to the next (Song et al. 2021, algorithms 4 and 5).

        x + e score + sqrt(2 e) z,      e = 2 a^2 (snr ||z|| / ||score||)^2

    A correction exchanges noise at a fixed time. Its size e follows from the norms of each sample (not of the batch),
    so a sample depends on its seed alone. Corrections are meant for data of many dimensions, where these norms are
    nearly constant: the variance of the result is too large by about 4 / dim, besides the snr^2 of every Langevin
    step. Each correction costs one evaluation: 1000 steps with one correction cost 2000.

    Attributes:
        snr: ratio of a correction's step along the score to the noise that it adds, in norms.
        corrections: number of corrections at each time.

    Raises:
        ValueError: snr is not positive, or corrections is negative.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.snr > 0 and 0 <= self.corrections <= 1000):
            raise ValueError(f"need snr > 0 and corrections from 0 to 1,000, not {self.snr} and {self.corrections}")

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        a, _ = transition(denoiser.process, t, s)
        for _ in range(self.corrections):
            x = self._corrected(denoiser, x, t, a, draw_noise)
        return _reverse_diffusion(denoiser, x, t, s, draw_noise)

    def _corrected(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, a: Tensor, draw_noise: DrawNoise) -> Tensor:
        """The state after one Langevin correction at time t."""
        _, noise = denoiser.x0_and_noise(x, t)
        sigma, fresh = denoiser.process.scales(t)[1], draw_noise()
        ratio = per_example(_norm(fresh) / _norm(noise).clamp(min=1e-12), x)
        root = a * self.snr * ratio  # of e / (2 sigma^2): the score is -noise / sigma
        return x + sigma * (2 * root * fresh - 2 * root**2 * noise)


def transition(
    process: Process, t: Float[Tensor, "*S"], s: Float[Tensor, "*S"]
) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
    """The pair (a, v) of the forward process from s to t: x_t = a x_s + sqrt(v) noise.

    Args:
        process: the process.
        t: the later time.
        s: the earlier time.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(t), process.scales(s)
    a = alpha_t / alpha_s
    return a, (sigma_t**2 - a**2 * sigma_s**2).clamp(min=0)


def _reverse_diffusion(denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
    a, v = transition(denoiser.process, t, s)
    (_, sigma_t), (_, sigma_s) = denoiser.process.scales(t), denoiser.process.scales(s)
    _, noise = denoiser.x0_and_noise(x, t)
    mean = (2 - a) * x - v / sigma_t * noise
    return mean if sigma_s == 0 else mean + v.sqrt() * draw_noise()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
