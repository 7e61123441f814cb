"""Where a sampler stops on its way from noise to data: t_0 > t_1 > ... > t_steps = 0."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.process import Process


class Grid(ABC):
    """A rule for the times of a sampler."""

    @abstractmethod
    def __call__(self, process: Process, steps: int) -> Float[Tensor, "steps+1"]:
        """Decreasing times, float64, on the CPU; the last is 0."""


@dataclass(frozen=True)
class EDMGrid(Grid):
    """Evenly spaced in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    def __call__(self, process: Process, steps: int) -> Tensor:
        root = 1 / self.rho
        spread = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (self.sigma_max**root + spread * (self.sigma_min**root - self.sigma_max**root)) ** self.rho
        return torch.cat([process.time(levels), torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Evenly spaced in t, from `start` (by default the process's last time) to 0."""

    start: float | None = None

    def __call__(self, process: Process, steps: int) -> Tensor:
        start = process.limit if self.start is None else self.start
        if not 0 < start <= process.limit or start == float("inf"):
            raise ValueError(f"a uniform grid for {process} needs a start in (0, {process.limit}), not {start}")
        return torch.linspace(start, 0, steps + 1, dtype=torch.float64)
