"""Samplers that follow the reverse SDE.

    dx = [f x - g^2 score] dt + g dW,      f = alpha' / alpha,  g^2 = (sigma^2)' - 2 f sigma^2      (t running down)

Over a whole step from t down to s the same process is x_t = a x_s + sqrt(v) noise, with

    a = alpha_t / alpha_s,      v = sigma_t^2 - a^2 sigma_s^2

f and g are infinite where alpha = 0 (the start of a flow, or of the cosine process); a and v are not. So all rules
here are written in (alpha, sigma) at both ends of a step, and serve every process from its very start. The last step,
to where no noise is left, adds none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.process import Process, per_row
from stablefield.sample.base import Draw, Question, Sampler


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Draws x_s from its posterior given x_t and x0 (DDPM; Ho et al. 2020, eqs. 6-7).

    Attributes:
        eta: share of the posterior's standard deviation that is drawn; what is left out stays as predicted noise. 0
            is DDIM (Song, Meng & Ermon 2021, eqs. 12 and 16).
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, not {self.eta}")

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        _, v = transition(ask.process, t, s)
        (_, sigma_t), (alpha_s, sigma_s) = ask.process.scales(t), ask.process.scales(s)
        x0, noise = ask.both(x, t)
        fresh = self.eta * v.sqrt() * sigma_s / sigma_t
        return alpha_s * x0 + (sigma_s**2 - fresh**2).clamp(min=0).sqrt() * noise + fresh * draw()


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """The probability-flow step, with noise removed and as much added (Song et al. 2021, eq. 6).

    Any rate of exchange w^2 leaves the same distribution at every time:

        dx = x0 d_alpha + noise d_sigma - w^2 score dt / 2 + w dW,      w = g the reverse SDE

    where g^2 dt = 2 sigma (d_sigma - sigma d_alpha / alpha). It is g as far as a step can resolve it; where a step
    would exchange more than all of the noise (near alpha = 0, or in a long step), it is sigma^2 a step.
    """

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ask.process.scales(t), ask.process.scales(s)
        x0, noise = ask.both(x, t)
        ahead = alpha_s * x0 + sigma_s * noise
        if sigma_s == 0:
            return ahead
        removed = sigma_t - sigma_s + sigma_t * (alpha_s - alpha_t) / alpha_t
        exchanged = (2 * sigma_t * removed).clamp(max=sigma_t**2)
        return ahead - exchanged / (2 * sigma_t) * noise + exchanged.sqrt() * draw()


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """The reverse SDE discretised as the forward one is: x_s = (2 - a) x + v score + sqrt(v) noise.

    Source: Song et al. 2021, eq. 46; algorithms 2 and 3 for VE and VP.
    """

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        return _reverse_diffusion(ask, x, t, s, draw)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Langevin corrections at each time, then reverse diffusion to the next (Song et al. 2021, algorithms 4 and 5).

        x + e score + sqrt(2 e) z,      e = 2 a^2 (snr ||z|| / ||score||)^2

    A correction exchanges noise at a fixed time; its size e follows from the norms of each image (not of the batch),
    so an image depends on its seed alone. They are meant for data of many dimensions, where norms are nearly constant:
    the variance they hold is too large by about 4 / dim, beside the snr^2 of every Langevin step.
    Each correction costs one evaluation: N = 1000 steps with one are 2000.

    Attributes:
        snr: norm of a correction's step along the score, over that of the noise it adds.
        corrections: how many at each time.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.snr > 0 and self.corrections >= 0):
            raise ValueError(f"need snr > 0 and corrections >= 0, not {self.snr} and {self.corrections}")

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        a, _ = transition(ask.process, t, s)
        for _ in range(self.corrections):
            x = self._corrected(ask, x, t, a, draw)
        return _reverse_diffusion(ask, x, t, s, draw)

    def _corrected(self, ask: Question, x: Tensor, t: Tensor, a: Tensor, draw: Draw) -> Tensor:
        _, noise = ask.both(x, t)
        sigma, fresh = ask.process.scales(t)[1], draw()
        ratio = per_row(_norm(fresh) / _norm(noise).clamp(min=1e-12), x)
        root = a * self.snr * ratio  # of e / (2 sigma^2): the score is -noise / sigma
        return x + sigma * (2 * root * fresh - 2 * root**2 * noise)


def transition(process: Process, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(a, v) of the forward process from s to t: x_t = a x_s + sqrt(v) noise."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(t), process.scales(s)
    a = alpha_t / alpha_s
    return a, (sigma_t**2 - a**2 * sigma_s**2).clamp(min=0)


def _reverse_diffusion(ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
    a, v = transition(ask.process, t, s)
    (_, sigma_t), (_, sigma_s) = ask.process.scales(t), ask.process.scales(s)
    _, noise = ask.both(x, t)
    mean = (2 - a) * x - v / sigma_t * noise
    return mean if sigma_s == 0 else mean + v.sqrt() * draw()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
