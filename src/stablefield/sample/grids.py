"""Time grids: the times t_0 > t_1 > ... > t_steps = 0 at which a sampler evaluates the denoiser.

Each rule was published for the noise levels of x + level noise; the times here are those at which the process has
sigma / alpha = level. `TimeGrid.within` adapts a grid to the noise range that a denoiser supports.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from math import inf, isfinite, isnan, log

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.preconditioning import NoiseRange, iddpm_noise_levels
from stablefield.process import VP, Process


class TimeGrid(ABC):
    """Base class of time grids.

    Raises:
        ValueError: a number is not finite.
    """

    def __post_init__(self) -> None:
        check_finite_fields(self)

    @abstractmethod
    def __call__(self, process: Process, steps: int) -> Float[Tensor, "{steps}+1"]:
        """The times of a sampler: decreasing, float64, on the CPU; the last is 0.

        Args:
            process: the process of the denoiser.
            steps: number of steps of the sampler.
        """

    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Float[Tensor, "{steps}+1"]:
        """The times inside a noise range, except for the last, which is 0. By default times outside are clamped.

        Args:
            process: the process of the denoiser.
            steps: number of steps of the sampler.
            noise_range: the lowest and highest noise level sigma / alpha that the denoiser supports.

        Raises:
            ValueError: the grid has no times inside the range.
        """
        times = self(process, steps)
        low, high = torch.tensor(noise_range, dtype=times.dtype)
        level = _levels(process, times)
        times = torch.where((level < low) & (times > 0), process.time(low), times)
        return torch.where(level > high, process.time(high), times)


class _BoundedGrid(TimeGrid):
    """Base class of grids with a noise range of their own, which is intersected with the denoiser's."""

    @override
    def __call__(self, process: Process, steps: int) -> Tensor:
        return self.within(process, steps, (0.0, inf))

    @abstractmethod
    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Float[Tensor, "{steps}+1"]: ...


@dataclass(frozen=True)
class EDMGrid(_BoundedGrid):
    """Evenly spaced in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5).

    Attributes:
        sigma_min: the lowest noise level before 0.
        sigma_max: the highest noise level.
        rho: exponent; larger values place more steps at low noise.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or rho is not positive, above 1,000 or too small.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        super().__post_init__()
        if not 0 < self.rho <= 1000:
            raise ValueError(f"rho must be positive, not {self.rho}, and at most 1,000")
        if max(abs(log(self.sigma_min)), abs(log(self.sigma_max))) > 600 * self.rho:
            raise ValueError(f"rho = {self.rho} is too small: sigma_max^(1 / rho) is not a finite number")

    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Tensor:
        low, high = _intersection(self.sigma_min, self.sigma_max, noise_range)
        root = 1 / self.rho
        return _times(process, (high**root + _progress(steps) * (low**root - high**root)) ** self.rho)


@dataclass(frozen=True)
class GeometricGrid(_BoundedGrid):
    """Evenly spaced in log(sigma / alpha), then 0: the grid of VE (Song et al. 2021; Karras et al. 2022, table 1).

    Attributes:
        sigma_min: the lowest noise level before 0.
        sigma_max: the highest noise level.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Tensor:
        low, high = _intersection(self.sigma_min, self.sigma_max, noise_range)
        return _times(process, high * (low / high) ** _progress(steps))


@dataclass(frozen=True)
class VPGrid(_BoundedGrid):
    """Evenly spaced in the time of a VP process, from 1 to `end`, then 0 (Karras et al. 2022, table 1).

    Attributes:
        beta_d: growth of beta over that process.
        beta_min: beta at its start.
        end: the last time before 0.

    Raises:
        ValueError: `end` is not between 0 and 1.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    end: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.end < 1:
            raise ValueError(f"a VP grid needs an end between 0 and 1, not {self.end}")
        VP(self.beta_min, self.beta_d)  # it checks them

    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Tensor:
        vp = VP(self.beta_min, self.beta_d)
        low, high = _levels(vp, torch.tensor([self.end, 1.0], dtype=torch.float64)).tolist()
        ends = torch.tensor(_intersection(low, high, noise_range), dtype=torch.float64)
        last, first = vp.time(ends).tolist()
        return _times(process, _levels(vp, first + _progress(steps) * (last - first)))


@dataclass(frozen=True)
class IDDPMGrid(_BoundedGrid):
    """Evenly spaced entries of improved DDPM's table of noise levels, then 0 (Karras et al. 2022, table 1).

    Attributes:
        skip: number of entries left out at the noisy end, j_0.
        table_steps: length of the table, M.
        c_1: least ratio alpha_bar(j-1) / alpha_bar(j) of a step of the table.
        c_2: offset of its cosine schedule.

    Raises:
        ValueError: the table is shorter than what is left out, or a constant is negative.
    """

    skip: int = 8
    table_steps: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.skip < self.table_steps <= 100_000:
            raise ValueError(
                f"need 0 <= skip < table_steps, not {self.skip} and {self.table_steps}, and at most 100,000 table_steps"
            )
        if not (self.c_1 > 0 and self.c_2 >= 0):
            raise ValueError(f"need c_1 > 0 and c_2 >= 0, not {self.c_1} and {self.c_2}")

    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Tensor:
        low, high = noise_range
        levels = iddpm_noise_levels(self.table_steps, self.c_1, self.c_2)[self.skip : -1]
        table = torch.tensor(levels, dtype=torch.float64)
        table = table[(low <= table) & (table <= high)]
        if len(table) == 0:
            raise ValueError(f"the iDDPM grid has no noise level between {low:g} and {high:g}")
        return _times(process, table[(_progress(steps) * (len(table) - 1) + 0.5).long()])


@dataclass(frozen=True)
class UniformGrid(_BoundedGrid):
    """Evenly spaced in t, from `start` to 0.

    Attributes:
        start: the first time; by default the largest of the process, which must be finite.
    """

    start: float | None = None

    @override
    def within(self, process: Process, steps: int, noise_range: NoiseRange) -> Tensor:
        chosen = process.t_max if self.start is None else self.start
        if not 0 < chosen <= process.t_max or chosen == inf:
            raise ValueError(f"a uniform grid for {process} needs a finite start in (0, {process.t_max}], not {chosen}")
        low, high = torch.tensor(noise_range, dtype=torch.float64)
        start = torch.tensor(chosen, dtype=torch.float64)
        first = start if _levels(process, start) <= high else process.time(high)
        last = torch.maximum(first / steps, process.time(low))
        if last > first:
            raise ValueError(f"the uniform grid starts at t = {first:g}, below the denoiser's lowest time {last:g}")
        return torch.cat([first + _progress(steps) * (last - first), torch.zeros(1, dtype=torch.float64)])


def check_finite_fields(part: object, infinite: Collection[str] = ()) -> None:
    """Refuse NaN and infinite numbers in the fields of a dataclass.

    Args:
        part: the dataclass.
        infinite: names of fields that may be infinite.

    Raises:
        ValueError: a number is not finite.
    """
    for each in fields(part):  # type: ignore[arg-type]  # any dataclass
        value = getattr(part, each.name)
        if isinstance(value, float) and not isfinite(value) and (each.name not in infinite or isnan(value)):
            raise ValueError(f"{each.name} must be finite, not {value}")


def _progress(steps: int) -> Tensor:
    """From 0 to 1, the position of each time of a grid but the last."""
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _times(process: Process, levels: Tensor) -> Tensor:
    """The times of decreasing noise levels, followed by 0."""
    times = process.time(levels)
    highest = _levels(process, torch.tensor(process.t_max, dtype=torch.float64))
    if levels[0] > 1.01 * highest:  # VP and sub-VP end at slightly different levels, and share their grids
        raise ValueError(f"the grid starts at noise level {levels[0]:g}, but {process} ends at {highest:g}")
    return torch.cat([times.clamp(max=process.t_max), torch.zeros(1, dtype=torch.float64)])


def _levels(process: Process, t: Tensor) -> Tensor:
    alpha, sigma = process.scales(t)
    return sigma / alpha


def _check_range(low: float, high: float) -> None:
    if not 0 < low < high < inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {low} and {high}")


def _intersection(low: float, high: float, noise_range: NoiseRange) -> NoiseRange:
    """The part of a grid's noise range that the denoiser supports."""
    inside = max(low, noise_range[0]), min(high, noise_range[1])
    if inside[0] >= inside[1]:
        supported = f"{noise_range[0]:g} to {noise_range[1]:g}"
        raise ValueError(
            f"the grid's noise levels, {low:g} to {high:g}, and the denoiser's, {supported}, do not overlap"
        )
    return inside
