"""What is minimised: the weighted squared error of the denoiser against a target.

    loss = mean over rows of weight(t) ||D(x_t, t) - target||^2 / dim,      x -> t -> x_t -> target

The target decides what is taught (a single sample, a reference batch, all data); the denoiser, the weight and the
loop never ask which.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.target import TargetEstimator
from stablefield.times import Times


class Weight(ABC):
    """How much an error in x counts at a noise level."""

    @abstractmethod
    def __call__(self, alpha: Float[Tensor, "B"], sigma: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The factor on the squared error of E[x | x_t]."""


@dataclass(frozen=True)
class EDMWeight(Weight):
    """1 / c_out^2 of EDM's scalings: errors of the network itself count alike (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / self.sigma_data**2 + (alpha / sigma) ** 2


@dataclass(frozen=True)
class NoiseWeight(Weight):
    """(alpha / sigma)^2: errors of the predicted noise count alike (Ho et al. 2020, eq. 14)."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / sigma) ** 2


@dataclass(frozen=True)
class VelocityWeight(Weight):
    """1 / sigma^2: errors of rectified flow's velocity, noise - x, count alike (Lipman et al. 2023, eq. 23)."""

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma**-2


@dataclass(frozen=True, eq=False)
class LossReport:
    """One batch's loss, and what there is to see in it.

    Attributes:
        loss: mean over the batch, with its gradient.
        each: loss of each row, weighted.
        t: time of each row.
        ess: effective number of members in each row's target.
    """

    loss: Float[Tensor, ""]
    each: Float[Tensor, "B"]
    t: Float[Tensor, "B"]
    ess: Float[Tensor, "B"]


@dataclass(frozen=True)
class Objective:
    """x -> t -> x_t -> target -> loss, for the process of the denoiser it is asked about.

    Attributes:
        times: density of t.
        target: what the denoiser should answer.
        weight: how much its error counts.
    """

    times: Times
    target: TargetEstimator
    weight: Weight

    def __call__(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "B *D"],
        *,
        index: Int[Tensor, "B"] | None = None,
        label: Int[Tensor, "B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossReport:
        """The loss of a batch.

        Args:
            x: clean data.
            index: which members of the data set the rows are (targets with references need it).
            label: what the denoiser is told of each row; confines the references too.
            generator: source of t, noise and references, in this order: the first two do not depend on the target.
                On the CPU, so that a step is the same step on every device.
        """
        t = self.times.draw(len(x), generator).to(x)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        noisy = denoiser.process.perturb(x, t, noise, label=label, index=index)
        target = self.target(noisy, generator=generator)
        error = (denoiser(noisy.x_t, t, label) - target.mean).square().flatten(1).mean(1)
        each = self.weight(noisy.alpha, noisy.sigma).to(error.dtype) * error
        return LossReport(each.mean(), each, t, target.ess)
