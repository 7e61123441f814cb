"""Processes that interpolate a table of noise levels, such as the `alphas_cumprod` of a diffusers scheduler."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.process.base import Process


class _Table(Process):
    """Base class of processes with a table of noise levels tan(phi_i) = sigma_i / alpha_i at t_i = i / N, i = 1 .. N.

    Between the steps, the angle phi is linear in t, from 0 at t = 0 (data) to phi_N at t = 1. Unlike the logarithm of
    the noise level it is finite at both ends, also if the table ends at alpha = 0.
    """

    @property
    @abstractmethod
    def _levels(self) -> tuple[float, ...]:
        """The noise levels sigma / alpha of the steps."""

    def _sine_and_cosine(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sin(phi) and cos(phi) at t."""
        angles = _angles(self._levels, t.dtype, t.device)
        steps = angles.shape[1] - 1
        start = (t.detach() * steps).floor().clamp(0, steps - 1)
        # both angles are interpolated from the end of the process at which they are small, where they need all digits
        from_data, from_noise = t * steps - start, (1 - t) * steps - (steps - 1 - start)
        (low, high), (low_rest, high_rest) = ((row[start.long()], row[start.long() + 1]) for row in angles)
        sine, cosine = low + from_data * (high - low), high_rest + from_noise * (low_rest - high_rest)
        return sine.sin(), cosine.sin()

    @override
    def time(self, ratio: Tensor) -> Tensor:
        angles = _angles(self._levels, ratio.dtype, ratio.device)
        steps = angles.shape[1] - 1
        angle, rest = torch.atan(ratio), torch.atan(1 / ratio)
        # searched and interpolated by the smaller of the two angles, which has more digits
        from_data = torch.searchsorted(angles[0], angle, right=True)
        from_noise = steps + 1 - torch.searchsorted(angles[1].flip(0).contiguous(), rest)
        start = torch.where(ratio < 1, from_data, from_noise).clamp(1, steps) - 1
        (low, high), (low_rest, high_rest) = ((row[start], row[start + 1]) for row in angles)
        weight = torch.where(ratio < 1, (angle - low) / (high - low), (low_rest - rest) / (low_rest - high_rest))
        return (start + weight.clamp(0, 1)) / steps


@lru_cache(maxsize=16)
def _angles(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "2 _"]:
    """Phi and pi/2 - phi at t = 0 and at each step, both with all their digits."""
    both = [[math.atan2(level, 1.0) for level in (0.0, *levels)], [math.atan2(1.0, level) for level in (0.0, *levels)]]
    with torch.inference_mode(False):
        return torch.tensor(both, dtype=dtype, device=device)


@dataclass(frozen=True)
class Tabulated(_Table):
    """A variance-preserving process given by a table, as diffusers' schedulers have it: alpha^2 + sigma^2 = 1.

    alpha(i / N)^2 is the i-th entry of the table, for i = 1 .. N, and t = 0 is the data. In between, the angle
    phi = arctan(sigma / alpha) is linear in t; so a table of `Cosine` gives `Cosine`.

    Attributes:
        alphas_cumprod: alpha^2 of each step, decreasing, between 0 and 1; the last may be 0.

    Raises:
        ValueError: the table is empty, does not decrease, or has values that are not between 0 and 1.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        table = (1.0, *self.alphas_cumprod)
        if len(table) < 2 or table[-1] < 0 or not all(later < earlier for earlier, later in pairwise(table)):
            raise ValueError("alphas_cumprod must decrease, from below 1 to 0 or more")

    def __repr__(self) -> str:
        return f"Tabulated(alphas_cumprod={_abbreviate(self.alphas_cumprod)})"

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, alpha = self._sine_and_cosine(t)
        return alpha, sigma

    @property
    @override
    def _levels(self) -> tuple[float, ...]:
        return tuple(math.sqrt((1 - entry) / entry) if entry else math.inf for entry in self.alphas_cumprod)


@dataclass(frozen=True)
class TabulatedVE(_Table):
    """A variance-exploding process given by a table of noise levels: x_t = x + sigma(t) noise, with t from 0 to 1.

    sigma(i / N) is the i-th entry of the table, for i = 1 .. N, and sigma(0) = 0. In between, arctan(sigma) is linear.

    Attributes:
        sigmas: standard deviation of the noise at each step, increasing.

    Raises:
        ValueError: the table is empty, does not increase, or has values that are not positive and finite.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        table = (0.0, *self.sigmas)
        if len(table) < 2 or table[-1] == math.inf or not all(later > earlier for earlier, later in pairwise(table)):
            raise ValueError("sigmas must increase, from above 0 to a finite number")

    def __repr__(self) -> str:
        return f"TabulatedVE(sigmas={_abbreviate(self.sigmas)})"

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sine, cosine = self._sine_and_cosine(t)
        return torch.ones_like(t), sine / cosine

    @property
    @override
    def _levels(self) -> tuple[float, ...]:
        return self.sigmas


def _abbreviate(table: Sequence[float]) -> str:
    """The ends of a table and its length."""
    return f"({table[0]:g}, ..., {table[-1]:g}: {len(table)} steps)"
