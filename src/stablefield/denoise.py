"""Denoisers: models of E[x | x_t], the mean of the clean data given the noisy data.

`Preconditioned` wraps a network in a `Preconditioning`. `IdealDenoiser` computes the mean exactly from a finite data
set, without a network. `Guided` extrapolates from a weaker denoiser (classifier-free guidance, autoguidance):

    D(x_t, t) = D_weak(x_t, t) + guidance_scale (D_strong(x_t, t) - D_weak(x_t, t))
"""

from abc import ABC, abstractmethod
from itertools import chain
from math import inf, nan

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from stablefield.augmentation import flip, permutes
from stablefield.pool import NULL_LABEL, Pool
from stablefield.preconditioning import NoiseRange, Preconditioning
from stablefield.process import Process, move, per_example
from stablefield.targets.exact import ExactTarget


class Denoiser(nn.Module, ABC):
    """Base class of denoisers.

    Attributes:
        process: the process that made x_t.
        num_classes: number of classes it can be conditioned on; 0 for an unconditional denoiser.
        noise_range: the lowest and highest noise level sigma / alpha it supports; samplers stay between them.
    """

    process: Process
    num_classes: int = 0
    noise_range: NoiseRange = (0.0, inf)

    @property
    def device(self) -> torch.device:
        """Device of the parameters and buffers, where samples are made."""
        return next((x.device for x in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        label: Int[Tensor, "B"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        """E[x | x_t], given the label and the augmentation.

        Args:
            x_t: noisy data.
            t: time of each example.
            label: class of each example; -1 (`NULL_LABEL`) for no class. None means no class for all.
            augment_label: augmentation of each example; None means not augmented.
        """

    def nearest_time(self, t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The nearest times that the denoiser supports: t itself, unless it was trained on a table of noise levels.

        Args:
            t: times, of any shape.
        """
        return t


class Preconditioned(Denoiser):
    """A network with preconditioning: D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise).

    Args:
        network: called as network(x, c_noise), with `label_one_hot` (zeros for no class) if num_classes > 0, and with
            `augment_label` if it is given. Output channels beyond those of x are ignored.
        process: the process that made x_t.
        preconditioning: the scalings around the network.
        num_classes: number of classes of the network; 0 for an unconditional network.
    """

    def __init__(
        self, network: nn.Module, process: Process, preconditioning: Preconditioning, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.network, self.process, self.preconditioning = network, process, preconditioning
        self.num_classes, self.noise_range = num_classes, preconditioning.noise_range

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        x = x_t.to(next(self.parameters()).dtype)
        c_skip, c_out, c_in, c_noise = self.preconditioning(self.process, t)
        conditions: dict[str, Tensor] = {}
        if self.num_classes:
            conditions["label_one_hot"] = one_hot(label, self.num_classes, x)
        if augment_label is not None:
            conditions["augment_label"] = move(augment_label.to(x.dtype), x.device)
        output = self.network(per_example(c_in, x) * x, c_noise.to(x.dtype), **conditions)
        output = output[:, : x.shape[1]].to(x.dtype)  # further channels are predicted variances, which are not used
        return per_example(c_skip, x) * x + per_example(c_out, x) * output

    @override
    def nearest_time(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.scales(t)
        level = self.preconditioning.nearest_level(sigma / alpha)
        return torch.where(level == sigma / alpha, t, self.process.time(level))

    @override
    def extra_repr(self) -> str:
        return f"process={self.process}, preconditioning={self.preconditioning}, num_classes={self.num_classes}"


class IdealDenoiser(Denoiser):
    """The exact E[x | x_t] for data drawn uniformly from a pool: the minimiser of every unbiased training loss.

    Moved to a device as any module, it takes the data there when it is called, and samplers sample there.

    Args:
        pool: the data set; with labels the mean is that of the class.
        process: the process that made x_t.
        missing_mass: posterior mass that may be dropped, on average over x_t of the process
            (`ExactTarget.posterior`). 0 compares every x_t with all data.
    """

    place: Tensor  # empty; on the device that the module was moved to

    def __init__(self, pool: Pool, process: Process, missing_mass: float = 1e-8) -> None:
        super().__init__()
        self.process, self.num_classes = process, pool.num_classes
        self.target = ExactTarget(pool, missing_mass=missing_mass)
        self.register_buffer("place", pool.data.new_empty(0), persistent=False)

    @override
    @torch.no_grad()
    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        if self.place.device != self.target.pool.data.device:
            pool = self.target.pool.to(self.place.device)
            self.target = ExactTarget(pool, missing_mass=self.target.missing_mass)
        if augment_label is not None:
            if not permutes(augment_label).all():
                raise ValueError("IdealDenoiser supports flips only: columns 2 to 8 of augment_label must be 0")
            return flip(self(flip(x_t, augment_label), t, label), augment_label)
        alpha, sigma = self.process.scales(t)
        label = torch.full((len(x_t),), NULL_LABEL) if label is None else label.cpu()
        return self.target.posterior(x_t, sigma, alpha, label).mean


class Guided(Denoiser):
    """A denoiser extrapolated from a weaker one: weak + guidance_scale (strong - weak).

    Without `guide` it is classifier-free guidance: the weaker denoiser is the same one without label (Ho & Salimans
    2022, eq. 6, with guidance_scale = 1 + w). A smaller or less trained `guide` makes it autoguidance (Karras et al.
    2024, eq. 5); an unconditional one makes it classifier-free guidance by a separate network. Each evaluation costs
    two network evaluations.

    Args:
        denoiser: the stronger denoiser.
        guidance_scale: 1 leaves the stronger denoiser as it is, 0 gives the weaker one.
        guide: the weaker denoiser; by default `denoiser` without label.
        interval: guidance is applied where low < sigma / alpha <= high (Kynkäänniemi et al. 2024).

    Raises:
        ValueError: there is no guide for an unconditional denoiser, or the guide was made for another process.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance_scale: float,
        guide: Denoiser | None = None,
        interval: NoiseRange = (0.0, inf),
    ) -> None:
        super().__init__()
        if guide is None and not denoiser.num_classes:
            raise ValueError("classifier-free guidance needs a denoiser with classes: give a weaker denoiser as guide")
        if guide is not None and guide.process != denoiser.process:
            raise ValueError(f"the guide must have the denoiser's process {denoiser.process}, not {guide.process}")
        self.denoiser, self.guidance_scale, self.guide, self.interval = denoiser, guidance_scale, guide, interval
        self.process, self.num_classes = denoiser.process, denoiser.num_classes
        ranges = [each.noise_range for each in (denoiser, guide) if each is not None]
        self.noise_range = max(low for low, _ in ranges), min(high for _, high in ranges)

    @override
    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        alpha, sigma = self.process.scales(t)
        level, (low, high) = sigma / alpha, self.interval
        extra = torch.where((low < level) & (level <= high), self.guidance_scale - 1.0, 0.0)
        strong = self.denoiser(x_t, t, label, augment_label)
        return strong + per_example(extra, strong) * (strong - self._weak(x_t, t, label, augment_label))

    @override
    def nearest_time(self, t: Tensor) -> Tensor:
        return self.denoiser.nearest_time(t)

    @override
    def extra_repr(self) -> str:
        return f"guidance_scale={self.guidance_scale}, interval={self.interval}"

    def _weak(self, x_t: Tensor, t: Tensor, label: Tensor | None, augment_label: Tensor | None) -> Tensor:
        if self.guide is None:
            return self.denoiser(x_t, t, None, augment_label)
        return self.guide(x_t, t, label if self.guide.num_classes else None, augment_label)


def one_hot(label: Int[Tensor, "B"] | None, num_classes: int, like: Float[Tensor, "B *D"]) -> Float[Tensor, "B L"]:
    """One-hot encoding of labels, with zeros for the null label.

    Args:
        label: class of each example, or -1 (`NULL_LABEL`) for no class; None means no class for all.
        num_classes: number of columns.
        like: a tensor with an entry for each example, whose type and device the encoding gets.

    Raises:
        ValueError: a label on the CPU is below -1, or not below `num_classes`. To look at labels on a GPU, the host
            would have to wait: there such a label becomes NaN.
    """
    if label is None:
        return torch.zeros(like.shape[0], num_classes, dtype=like.dtype, device=like.device)
    unknown = (label < NULL_LABEL) | (label >= num_classes)
    if label.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.any():
        raise ValueError(f"unknown class {label[unknown][0].item()}: there are {num_classes} classes, counted from 0")
    found = (label[:, None] == torch.arange(num_classes, device=label.device)).to(like.dtype)
    return move(found.masked_fill(unknown[:, None], nan), like.device)
