"""Description of a training loss, as far as its floor depends on it.

    loss = E_t weight(t) ||prediction - target||^2 / dim,      x_t = alpha_t x + sigma_t noise

What a network predicts is y = (b x_t + c x0) / a (`stablefield.prediction`). So an error of E[x | x_t] is an error of y
times c / a, and the loss of every prediction type is a weighted loss of E[x | x_t].
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.objective import EDMWeight, Objective
from stablefield.prediction import canonical_prediction_type, coefficients
from stablefield.process import VE, Process
from stablefield.times import LogNormal, TimeDistribution, Uniform

Weight = Callable[[Process, Tensor], Tensor]
"""Weight of the squared error at each time, such as a `LossWeight`."""


@dataclass(frozen=True, eq=False)
class Levels(Process):
    """The process of a table of noise levels, as the schedulers of diffusers have it; t is the number of a level.

    Attributes:
        alpha: scale of the data at every level, (T,).
        sigma: scale of the noise at every level, (T,).

    Raises:
        ValueError: the two are not vectors of one length, or a level is negative or not finite.
    """

    alpha: Tensor = field(repr=False)
    sigma: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().double())
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) == 0:
            raise ValueError(
                f"alpha and sigma must be vectors with one number for each noise level, not of shape "
                f"{tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            )
        if not all((torch.isfinite(each) & (each >= 0)).all() for each in (self.alpha, self.sigma)):
            raise ValueError("alpha and sigma must be finite and not negative")

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.long().clamp(0, len(self.alpha) - 1)
        dtype = t.dtype if t.is_floating_point() else torch.float64
        return self.alpha.to(t.device)[index].to(dtype), self.sigma.to(t.device)[index].to(dtype)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        distance = (torch.log(self.sigma / self.alpha).to(ratio.device) - ratio.double().log()[..., None]).abs()
        return distance.nan_to_num(torch.inf).argmin(-1).to(ratio.dtype)

    @override
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if (self.alpha + self.sigma - 1).abs().max() > 1e-4:
            raise ValueError(
                "velocity needs the derivatives of alpha and sigma, which a table of levels has for alpha + sigma = 1 "
                "only: use a Process such as Flow(), or another prediction type"
            )
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class Steps(TimeDistribution):
    """Steps 0 to count - 1 of a table of noise levels, all equally likely.

    Attributes:
        count: number of steps.
    """

    count: int

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return (u * self.count).floor().clamp(max=self.count - 1)


@dataclass(frozen=True)
class _TimesOfLevels(TimeDistribution):
    """The times of a process at which sigma / alpha has a given distribution."""

    levels: TimeDistribution
    process: Process

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return self.process.time(self.levels.quantile(u))


@dataclass(frozen=True, eq=False)
class SquaredError:
    """A training loss: the weighted squared error of a prediction, at noise levels that are drawn from a distribution.

    Attributes:
        process: the process that makes x_t; `Levels(alpha, sigma)` for a table of noise levels.
        times: distribution of t. By default EDM's for `VE`, every level equally often for `Levels`, and uniform
            otherwise.
        prediction_type: quantity whose error is squared: "x0", "epsilon", "score", "velocity" or "v", or a name of
            diffusers.
        weight: weight of its squared error, a function of process and t; None for 1. Weights of this package are for
            errors of x0.
        reduction: "mean" over the dimensions of an example (as `torch.nn.functional.mse_loss`), or their "sum".

    Raises:
        ValueError: an unknown prediction type or reduction.
    """

    process: Process = field(default_factory=VE)
    times: TimeDistribution | None = None
    prediction_type: str = "x0"
    weight: Weight | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction_type", canonical_prediction_type(self.prediction_type))
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", not {self.reduction!r}')
        if self.times is None:
            object.__setattr__(self, "times", _default_times(self.process))

    @classmethod
    def of_objective(cls, objective: Objective, process: Process) -> "SquaredError":
        """The loss of an objective of this package: a weighted error of x0.

        Args:
            objective: the objective.
            process: the process of its denoiser.
        """
        return cls(process, objective.times, weight=objective.weight)

    def quantile(self, u: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The t below which a share u of the examples lies.

        Args:
            u: numbers between 0 and 1.
        """
        assert self.times is not None
        return self.times.quantile(u)

    def factor(self, t: Float[Tensor, "n"], dim: int) -> Float[Tensor, "n"]:
        """Factor from squared errors of the prediction, summed over the dimensions, to the loss.

        Args:
            t: time of each example.
            dim: number of dimensions of an example.
        """
        weight = torch.ones_like(t) if self.weight is None else self.weight(self.process, t)
        return weight / dim if self.reduction == "mean" else weight

    def factor_of_x0(self, t: Float[Tensor, "n"], dim: int) -> Float[Tensor, "n"]:
        """Factor from squared errors of E[x | x_t], summed over the dimensions, to the loss.

        Args:
            t: time of each example.
            dim: number of dimensions of an example.
        """
        a, _, c = coefficients(self.prediction_type, self.process, t)
        return self.factor(t, dim) * (c / a).square()


def edm_loss(process: Process) -> SquaredError:
    """EDM's loss with its default noise distribution and weight, for x_t of any process.

    It does not depend on the settings of a run, so that runs on the same data can be compared by it.

    Args:
        process: the process that makes x_t.
    """
    return SquaredError(process, _TimesOfLevels(LogNormal(), process), weight=EDMWeight())


def _default_times(process: Process) -> TimeDistribution:
    if isinstance(process, Levels):
        return Steps(len(process.alpha))
    return LogNormal() if isinstance(process, VE) else Uniform()
