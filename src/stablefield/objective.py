"""Training objective: the weighted squared error of the denoiser against a target.

    loss = mean over examples of weight(t) ||D(x_t, t) - target||^2 / dim,      x -> t -> x_t -> target

The target estimator decides the variance of the loss (DSM, STF, nearest neighbours, exact); the denoiser, the weight
and the training loop do not depend on it. Training calls the same two methods as `Objective` itself, `perturb` and
`loss`, with draws that are seeded for each image and with targets that are computed for several steps at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.denoise import Denoiser
from stablefield.kernel import Posterior
from stablefield.preconditioning import check_sigma_data
from stablefield.prediction import canonical_prediction_type, coefficients
from stablefield.process import NoisyBatch, Process, draw_noise, move
from stablefield.targets import TargetEstimator
from stablefield.times import TimeDistribution

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # as Denoiser.forward


class LossWeight(ABC):
    """Base class of loss weights."""

    @abstractmethod
    def __call__(self, process: Process, t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The weight of the squared error of E[x | x_t].

        Args:
            process: the process that made x_t.
            t: time of each example.
        """


@dataclass(frozen=True)
class EDMWeight(LossWeight):
    """EDM's weight 1 / c_out^2: a unit weight on the error of the network's own output (Karras et al. 2022, table 1).

    Attributes:
        sigma_data: standard deviation of the data, as in `EDMPreconditioning`.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return 1 / self.sigma_data**2 + _signal_to_noise(process, t)


@dataclass(frozen=True)
class SNRWeight(LossWeight):
    """The signal-to-noise ratio (alpha / sigma)^2: a unit weight on errors of epsilon (Ho et al. 2020, eq. 14)."""

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return _signal_to_noise(process, t)


@dataclass(frozen=True)
class VelocityWeight(LossWeight):
    """1 / sigma^2: a unit weight on errors of rectified flow's velocity noise - x (Lipman et al. 2023, eq. 23)."""

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return process.scales(t)[1] ** -2


@dataclass(frozen=True)
class PredictionWeight(LossWeight):
    """(c / a)^2 of `stablefield.prediction`: a unit weight on errors of one prediction type, for any process.

    The usual weight of a network with `NoPreconditioning(prediction_type)`: 1 for x0, `SNRWeight` for epsilon,
    `VelocityWeight` for the velocity of a flow, and for v in VP the SNR + 1 of Salimans & Ho 2022, section 4.

    Attributes:
        prediction_type: the type; diffusers' names are replaced by those of `PREDICTION_TYPES`.

    Raises:
        ValueError: the prediction type is unknown.
    """

    prediction_type: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction_type", canonical_prediction_type(self.prediction_type))

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        a, _, c = coefficients(self.prediction_type, process, t)
        return (c / a) ** 2


@dataclass(frozen=True)
class MinSNRWeight(LossWeight):
    """min(SNR, gamma) with SNR = (alpha / sigma)^2: bounds the weight of low noise (Hang et al. 2023, eq. 8).

    Attributes:
        gamma: the largest weight.

    Raises:
        ValueError: gamma is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, not {self.gamma}")

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return _signal_to_noise(process, t).clamp(max=self.gamma)


@dataclass(frozen=True)
class LikelihoodWeight(LossWeight):
    """g(t)^2 on the error of the score: with t uniform, a bound on the likelihood (Song, Durkan et al. 2021, th. 1).

    g^2 = 2 sigma (sigma' - sigma alpha' / alpha) is the squared diffusion coefficient of the process. On errors of x
    the weight is -d SNR / dt (Kingma et al. 2021, eq. 17), which is finite where alpha = 0 although g is not.
    """

    @override
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = process.scales(t), process.rates(t)
        return 2 * alpha * (alpha * d_sigma - sigma * d_alpha) / sigma**3


def _signal_to_noise(process: Process, t: Tensor) -> Tensor:
    alpha, sigma = process.scales(t)
    return (alpha / sigma) ** 2


@dataclass(frozen=True, eq=False)
class LossReport:
    """The loss of a batch and its per-example values.

    Attributes:
        loss: mean over the batch, with gradient.
        losses: weighted loss of each example, with gradient.
        t: time of each example.
        ess: effective sample size of each example's target.
    """

    loss: Float[Tensor, ""]
    losses: Float[Tensor, "B"]
    t: Float[Tensor, "B"]
    ess: Float[Tensor, "B"]


@dataclass(frozen=True)
class Objective:
    """The training objective x -> t -> x_t -> target -> loss, for the process of the denoiser.

    Attributes:
        times: distribution of t (noise distribution).
        target: estimator of the target E[x | x_t].
        weight: weight of the squared error at each time.
    """

    times: TimeDistribution
    target: TargetEstimator
    weight: LossWeight

    def __call__(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "B *D"],
        *,
        index: Int[Tensor, "B"] | None = None,
        label: Int[Tensor, "B"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
        image_number: Int[Tensor, "B"] | None = None,
        augment_map: Float[Tensor, "B 2 3"] | None = None,
        generator: torch.Generator | None = None,
    ) -> LossReport:
        """The loss of a batch of clean data.

        Args:
            denoiser: the denoiser to train.
            x: clean data.
            index: position of each example in the pool; targets with references need it.
            label: class that the denoiser is conditioned on, -1 for none; references have the same class.
            augment_label: augmentation that the denoiser is conditioned on; references are seen through the same map.
            image_number: number of each example among the images of the run; targets whose references are recent
                batches need it.
            augment_map: affine map of each example's augmentation, as in `NoisyBatch`.
            generator: CPU generator of t, noise and references, in this order, so that the first two do not depend on
                the target and none on the device. By default torch's global one.
        """
        noisy = self.perturb(
            denoiser.process,
            x,
            generators=generator,
            label=label,
            index=index,
            augment_label=augment_label,
            image_number=image_number,
            augment_map=augment_map,
        )
        return self.loss(denoiser, denoiser.process, noisy, self.target(noisy, generator=generator))

    def perturb(
        self,
        process: Process,
        x: Float[Tensor, "B *D"],
        *,
        t: Float[Tensor, "B"] | None = None,
        generators: torch.Generator | Iterable[torch.Generator] | None = None,
        **record: Tensor | None,
    ) -> NoisyBatch:
        """The noisy batch of clean data, at times of this objective and with noise drawn on the CPU.

        Args:
            process: the process that makes the batch.
            x: clean data.
            t: time of each example; drawn before the noise by default.
            generators: one generator per example, with `t`, or one for the batch; by default torch's global one.
            **record: label, index and whatever else the examples have, as for `Process.perturb`.

        Raises:
            ValueError: there is a generator per example, but no `t`.
        """
        if t is None:
            if not (generators is None or isinstance(generators, torch.Generator)):
                raise ValueError("times are drawn for the batch: give t beside one generator per example")
            t = self.times.draw(len(x), generators)
        return process.perturb(x, move(t.to(x.dtype), x.device), draw_noise(x, generators), **record)

    def loss(self, denoiser: DenoiserFunction, process: Process, noisy: NoisyBatch, target: Posterior) -> LossReport:
        """The loss of a noisy batch whose target is given.

        Args:
            denoiser: a `Denoiser`, or a module that wraps one (distributed, compiled) and is called the same way.
            process: the process that made the batch.
            noisy: the batch.
            target: the target of each example.
        """
        output = denoiser(noisy.x_t, noisy.t, noisy.label, noisy.augment_label)
        error = (output - target.mean).square().flatten(1).mean(1)
        losses = self.weight(process, noisy.t).to(error.dtype) * error
        return LossReport(losses.mean(), losses, noisy.t, target.ess)
