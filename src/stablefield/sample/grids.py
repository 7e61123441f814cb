"""Where a sampler stops on its way from noise to data: t_0 > t_1 > ... > t_steps = 0.

Each rule was published for the levels of x + level noise; the times are those at which the process at hand has
sigma / alpha = level. A denoiser may not know all levels: then it is asked `within` those it knows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.denoise import Range, iddpm_levels
from stablefield.process import VP, Process


class Grid(ABC):
    """A rule for the times of a sampler."""

    @abstractmethod
    def __call__(self, process: Process, steps: int) -> Float[Tensor, "{steps}+1"]:
        """Decreasing times, float64, on the CPU; the last is 0."""

    def within(self, process: Process, steps: int, levels: Range) -> Float[Tensor, "{steps}+1"]:
        """The same for a denoiser that knows only a range of noise levels. Times beyond go to its ends."""
        times = self(process, steps)
        low, high = torch.tensor(levels, dtype=times.dtype)
        level = _levels(process, times)
        times = torch.where((level < low) & (times > 0), process.time(low), times)
        return torch.where(level > high, process.time(high), times)


class Bounded(Grid):
    """A rule with ends of its own: they move inside the range of a denoiser, and what is between follows."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        return self.within(process, steps, (0.0, inf))

    @abstractmethod
    def within(self, process: Process, steps: int, levels: Range) -> Float[Tensor, "{steps}+1"]:
        """Decreasing times, the last 0, the others within a range of noise levels.

        Raises:
            ValueError: the rule has no times there.
        """


@dataclass(frozen=True)
class EDMGrid(Bounded):
    """Evenly spaced in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check(self.sigma_min, self.sigma_max)
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, not {self.rho}")

    def within(self, process: Process, steps: int, levels: Range) -> Tensor:
        low, high = _inside(self.sigma_min, self.sigma_max, levels)
        root = 1 / self.rho
        return _times(process, (high**root + _share(steps) * (low**root - high**root)) ** self.rho)


@dataclass(frozen=True)
class GeometricGrid(Bounded):
    """Evenly spaced in log(sigma / alpha), then 0: the grid of VE (Song et al. 2021; Karras et al. 2022, table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        _check(self.sigma_min, self.sigma_max)

    def within(self, process: Process, steps: int, levels: Range) -> Tensor:
        low, high = _inside(self.sigma_min, self.sigma_max, levels)
        return _times(process, high * (low / high) ** _share(steps))


@dataclass(frozen=True)
class VPGrid(Bounded):
    """Evenly spaced in the time of a VP process, from 1 to `end`, then 0 (Karras et al. 2022, table 1).

    Attributes:
        beta_d: growth of beta in that process.
        beta_min: beta at its start.
        end: the last time before 0.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    end: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.end < 1:
            raise ValueError(f"a VP grid needs an end between 0 and 1, not {self.end}")

    def within(self, process: Process, steps: int, levels: Range) -> Tensor:
        schedule = VP(self.beta_min, self.beta_d)
        last, first = _levels(schedule, torch.tensor([self.end, 1.0], dtype=torch.float64)).tolist()
        ends = torch.tensor(_inside(last, first, levels), dtype=torch.float64)
        last, first = schedule.time(ends).tolist()
        return _times(process, _levels(schedule, first + _share(steps) * (last - first)))


@dataclass(frozen=True)
class IDDPMGrid(Bounded):
    """Evenly spaced entries of improved DDPM's table of noise levels, then 0 (Karras et al. 2022, table 1).

    Attributes:
        skip: entries left out at the noisy end, j_0.
        table_steps: length of the table, M.
        c_1: least share of the signal that a step of it keeps.
        c_2: offset of its cosine.
    """

    skip: int = 8
    table_steps: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    def within(self, process: Process, steps: int, levels: Range) -> Tensor:
        low, high = levels
        table = torch.tensor(iddpm_levels(self.table_steps, self.c_1, self.c_2)[self.skip : -1], dtype=torch.float64)
        table = table[(low <= table) & (table <= high)]
        if len(table) == 0:
            raise ValueError(f"the table has no noise level between {low:g} and {high:g}")
        return _times(process, table[(_share(steps) * (len(table) - 1) + 0.5).long()])


@dataclass(frozen=True)
class UniformGrid(Bounded):
    """Evenly spaced in t, from `start` (by default the process's last time) to 0."""

    start: float | None = None

    def within(self, process: Process, steps: int, levels: Range) -> Tensor:
        chosen = process.limit if self.start is None else self.start
        if not 0 < chosen <= process.limit or chosen == inf:
            raise ValueError(f"a uniform grid for {process} needs a start in (0, {process.limit}), not {chosen}")
        low, high = torch.tensor(levels, dtype=torch.float64)
        start = torch.tensor(chosen, dtype=torch.float64)
        first = start if _levels(process, start) <= high else process.time(high)
        last = torch.maximum(first / steps, process.time(low))
        if last > first:
            raise ValueError(f"a uniform grid from t = {first:g} begins below the denoiser's first time, {last:g}")
        return torch.cat([first + _share(steps) * (last - first), torch.zeros(1, dtype=torch.float64)])


def _share(steps: int) -> Tensor:
    """How far on its way a sampler is before each step, without the step to 0: from 0 to 1."""
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _times(process: Process, levels: Tensor) -> Tensor:
    times = process.time(levels)
    ends = _levels(process, torch.tensor(process.limit, dtype=torch.float64))
    if levels[0] > 1.01 * ends:  # VP and sub-VP end a little apart, and share their grids
        raise ValueError(f"the grid begins at noise level {levels[0]:g}, but {process} ends at {ends:g}")
    return torch.cat([times.clamp(max=process.limit), torch.zeros(1, dtype=torch.float64)])


def _levels(process: Process, t: Tensor) -> Tensor:
    alpha, sigma = process.scales(t)
    return sigma / alpha


def _check(low: float, high: float) -> None:
    if not 0 < low < high < inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {low} and {high}")


def _inside(low: float, high: float, levels: Range) -> Range:
    """The part of a grid's range that a denoiser knows."""
    inside = max(low, levels[0]), min(high, levels[1])
    if inside[0] >= inside[1]:
        known = f"{levels[0]:g} to {levels[1]:g}"
        raise ValueError(f"the grid's noise levels, {low:g} to {high:g}, and the denoiser's, {known}, do not meet")
    return inside
