"""The probability-flow ODE by a solver that chooses its own steps.

    dx / dt = alpha' x0 + sigma' noise

An explicit Runge-Kutta pair of orders 5 and 4 (Dormand & Prince 1980) compares its two answers, and takes the steps
that keep their difference within a tolerance. The number of evaluations depends on the batch. The worst row decides
on the steps, so that every image is as good as it would be alone: images of other batches agree within the tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.sample.base import Draw, Question, Sampler


@dataclass(frozen=True)
class RK45(Sampler):
    """Adaptive steps between the times of the grid, of which one is enough (Song et al. 2021, section 4.3).

    Attributes:
        steps: how many times the solver stops on its way, for somebody to look.
        tolerance: relative and absolute error allowed in a step.
        sigma_min: noise level at which the solver ends; the rest is one Euler step, since the noise cannot be asked
            for where there is none.
    """

    steps: int = 1
    tolerance: float = 1e-5
    sigma_min: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.tolerance > 0 and self.sigma_min > 0):
            raise ValueError(f"need tolerance and sigma_min > 0, not {self.tolerance} and {self.sigma_min}")

    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        level = torch.tensor(max(self.sigma_min, ask.denoiser.levels[0]), dtype=t.dtype)
        end = torch.maximum(s, ask.process.time(level).minimum(t))
        if end < t:
            x = integrate(lambda time, state: velocity(ask, state, time), x, t, end, self.tolerance)
        if end == s:
            return x
        x0, noise = ask.both(x, end)
        alpha, sigma = ask.process.scales(s)
        return alpha * x0 + sigma * noise


def velocity(ask: Question, x: Tensor, t: Tensor) -> Tensor:
    """dx / dt of the probability-flow ODE."""
    d_alpha, d_sigma = ask.process.rates(t)
    x0, noise = ask.both(x, t)
    return d_alpha * x0 + d_sigma * noise


def integrate(
    field: Callable[[Tensor, Tensor], Tensor], state: Tensor, start: Tensor, end: Tensor, tolerance: float
) -> Tensor:
    """The state, a row each, at time `end`, when d state / dt = field(t, state). It is never asked beyond the end."""
    from torchdiffeq import odeint  # here, because it brings scipy, for which few samplers should wait

    times = torch.stack([start, end]).to(state)

    def inside(t: Tensor, state: Tensor) -> Tensor:
        return field(t.clamp(times.min(), times.max()), state)  # a guess at the first step may reach beyond

    options = {"norm": _worst, "step_t": times[1:]}  # land on the end, instead of stepping over it and looking back
    return odeint(inside, state, times, rtol=tolerance, atol=tolerance, method="dopri5", options=options)[-1]


def _worst(error: Tensor) -> Tensor:
    """The root mean square of each row, and of these the largest."""
    return error.flatten(1).square().mean(1).sqrt().amax()
