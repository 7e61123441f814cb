"""Sampler that integrates the probability-flow ODE with adaptive steps.

    dx / dt = alpha' x0 + sigma' noise

An explicit Runge-Kutta pair of orders 5 and 4 (Dormand & Prince 1980) estimates its error from the difference of the
two, and chooses steps that keep it within a tolerance. The number of evaluations depends on the batch: the sample with
the largest error decides on the steps, so that in another batch a sample is the same within the tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.extras import how_to_install
from stablefield.sample.base import BoundDenoiser, DrawNoise, Sampler


@dataclass(frozen=True)
class RK45(Sampler):
    """Adaptive steps between the times of the grid (Song et al. 2021, section 4.3).

    One step of the grid is enough. More make the solver stop at its times, after each of which a callback is called;
    the steps that it chooses in between are not reported.

    Attributes:
        steps: number of grid steps.
        grid: rule for the times at which the solver stops.
        tolerance: relative and absolute error allowed in a step of the solver.
        sigma_min: noise level at which the solver ends. The rest is one Euler step, because the predicted noise is not
            defined at sigma = 0.

    Raises:
        ValueError: the tolerance or sigma_min is not positive.
    """

    steps: int = 1
    tolerance: float = 1e-5
    sigma_min: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.tolerance > 0 and self.sigma_min > 0):
            raise ValueError(f"need tolerance and sigma_min > 0, not {self.tolerance} and {self.sigma_min}")

    @override
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        level = torch.tensor(max(self.sigma_min, denoiser.denoiser.noise_range[0]), dtype=t.dtype)
        end = torch.maximum(s, denoiser.process.time(level).minimum(t))
        if end < t:
            x = integrate(lambda time, state: velocity(denoiser, state, time), x, t, end, self.tolerance)
        if end == s:
            return x
        x0, noise = denoiser.x0_and_noise(x, end)
        alpha, sigma = denoiser.process.scales(s)
        return alpha * x0 + sigma * noise


def velocity(denoiser: BoundDenoiser, x: Float[Tensor, "B *D"], t: Float[Tensor, ""]) -> Float[Tensor, "B *D"]:
    """The velocity dx / dt of the probability-flow ODE.

    Args:
        denoiser: the denoiser, with the labels of the batch.
        x: the state.
        t: its time.
    """
    d_alpha, d_sigma = denoiser.process.rates(t)
    x0, noise = denoiser.x0_and_noise(x, t)
    return d_alpha * x0 + d_sigma * noise


def integrate(
    field: Callable[[Tensor, Tensor], Tensor],
    state: Float[Tensor, "B *D"],
    start: Float[Tensor, ""],
    end: Float[Tensor, ""],
    tolerance: float,
) -> Float[Tensor, "B *D"]:
    """The solution at time `end` of d state / dt = field(t, state).

    Args:
        field: the right-hand side; it is never evaluated outside [start, end].
        state: the initial state, one row per sample.
        start: time of the initial state.
        end: time of the result, before or after `start`.
        tolerance: relative and absolute error allowed in a step.

    Raises:
        ModuleNotFoundError: torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint  # imported here, because no other sampler needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(how_to_install("the adaptive solver"), name=error.name) from error

    times = torch.stack([start, end]).to(state)

    def inside(t: Tensor, state: Tensor) -> Tensor:
        return field(t.clamp(times.min(), times.max()), state)  # the solver's initial trial step may go beyond the end

    options = {"norm": _worst, "step_t": times[1:]}  # end a step at `end`, instead of interpolating from beyond it
    return odeint(inside, state, times, rtol=tolerance, atol=tolerance, method="dopri5", options=options)[-1]


def _worst(error: Tensor) -> Tensor:
    """The largest root mean square error of a sample."""
    return error.flatten(1).square().mean(1).sqrt().amax()
