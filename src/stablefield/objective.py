"""What is minimised: the weighted squared error of the denoiser against a target.

    loss = mean over rows of weight(t) ||D(x_t, t) - target||^2 / dim,      x -> t -> x_t -> target

The target decides what is taught (a single sample, a reference batch, all data); the denoiser, the weight and the
loop never ask which.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.parametrize import HEADS, coefficients
from stablefield.posterior import Posterior
from stablefield.process import Perturbed, Process
from stablefield.target import TargetEstimator
from stablefield.times import Times

Answer = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class Weight(ABC):
    """How much an error in x counts at a time of a process."""

    @abstractmethod
    def __call__(self, process: Process, t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The factor on the squared error of E[x | x_t]."""


@dataclass(frozen=True)
class EDMWeight(Weight):
    """1 / c_out^2 of EDM's scalings: errors of the network itself count alike (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return 1 / self.sigma_data**2 + _signal_to_noise(process, t)


@dataclass(frozen=True)
class NoiseWeight(Weight):
    """(alpha / sigma)^2: errors of the predicted noise count alike (Ho et al. 2020, eq. 14)."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return _signal_to_noise(process, t)


@dataclass(frozen=True)
class VelocityWeight(Weight):
    """1 / sigma^2: errors of rectified flow's velocity, noise - x, count alike (Lipman et al. 2023, eq. 23)."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return process.scales(t)[1] ** -2


@dataclass(frozen=True)
class HeadWeight(Weight):
    """(c / a)^2 of `parametrize`: errors of one head count alike, for any process.

    The usual weighting of a network that `Predicts` this head: 1 for x0, `NoiseWeight` for noise, `VelocityWeight`
    for the velocity of a flow, and for v in VP the SNR + 1 of Salimans & Ho 2022, section 4.

    Raises:
        ValueError: there is no such head.
    """

    head: str

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"no head is called {self.head!r}; there are {', '.join(HEADS)}")

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        a, _, c = coefficients(self.head, process, t)
        return (c / a) ** 2


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(SNR, gamma), SNR = (alpha / sigma)^2: low noise is not worth more than gamma (Hang et al. 2023, eq. 8)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, not {self.gamma}")

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return _signal_to_noise(process, t).clamp(max=self.gamma)


@dataclass(frozen=True)
class LikelihoodWeight(Weight):
    """g(t)^2 on the error of the score: with t uniform, a bound on the likelihood (Song, Durkan et al. 2021, th. 1).

    g^2 = 2 sigma (sigma' - sigma alpha' / alpha) is the noise rate of the process. On errors in x that makes
    -d SNR / dt (Kingma et al. 2021, eq. 17), which stays finite where alpha = 0 and g does not.
    """

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = process.scales(t), process.rates(t)
        return 2 * alpha * (alpha * d_sigma - sigma * d_alpha) / sigma**3


def _signal_to_noise(process: Process, t: Tensor) -> Tensor:
    alpha, sigma = process.scales(t)
    return (alpha / sigma) ** 2


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
        augmentation: Float[Tensor, "B A"] | None = None,
        number: Int[Tensor, "B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossReport:
        """The loss of a batch, all of it in one call.

        Args:
            x: clean data.
            index: which members of the data set the rows are (targets with references need it).
            label: what the denoiser is told of each row (-1: nothing); confines the references too.
            augmentation: how the rows were transformed, where the denoiser is told.
            number: which images of the run the rows are (targets from a rolling bank need it).
            generator: source of t, noise and references, in this order: the first two do not depend on the target.
                On the CPU, so that a step is the same step on every device.
        """
        t = self.times.draw(len(x), generator).to(x)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        noisy = denoiser.process.perturb(
            x, t, noise, label=label, index=index, augmentation=augmentation, number=number
        )
        return self.loss(denoiser, denoiser.process, noisy, self.target(noisy, generator=generator))

    def loss(self, denoiser: Answer, process: Process, noisy: Perturbed, target: Posterior) -> LossReport:
        """The loss of rows whose noise and target are known.

        Args:
            denoiser: called as one; a `Denoiser`, or what a distributed or compiled one is wrapped in.
            process: what made x_t of x.
        """
        answer = denoiser(noisy.x_t, noisy.t, noisy.label, noisy.augmentation)
        error = (answer - target.mean).square().flatten(1).mean(1)
        each = self.weight(process, noisy.t).to(error.dtype) * error
        return LossReport(each.mean(), each, noisy.t, target.ess)
