"""Forward processes: how data x turn into noise.

    x_t = alpha_t x + sigma_t noise,      noise ~ N(0, I)

A `Process` is the pair (alpha, sigma) as functions of t, and the inverse of their ratio. Posterior weights, the
preconditioning of a network and the steps of a sampler follow from these two numbers. A process with alpha > 0 is
the variance-exploding one rescaled: x_t / alpha is x plus noise of level sigma / alpha.

| process  | alpha                                   | sigma             | source                               |
|----------|-----------------------------------------|-------------------|--------------------------------------|
| `VE`     | 1                                       | t                 | Song et al. 2021; Karras et al. 2022 |
| `VP`     | exp(-(beta_d t^2 / 2 + beta_min t) / 2) | sqrt(1 - alpha^2) | Ho et al. 2020; Song et al. 2021     |
| `SubVP`  | as VP                                   | 1 - alpha^2       | Song et al. 2021                     |
| `Cosine` | cos(pi t / 2)                           | sin(pi t / 2)     | Nichol & Dhariwal 2021               |
| `Flow`   | 1 - t                                   | t                 | Liu et al. 2022; Lipman et al. 2023  |

t runs from 0 (data) to 1; VE's t has no upper bound.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from typing_extensions import override

__all__ = ["VE", "VP", "BatchRecord", "Cosine", "Flow", "NoisyBatch", "Process", "SubVP", "per_example", "pick"]


def per_example(value: Shaped[Tensor, "B"], like: Float[Tensor, "B *D"]) -> Tensor:
    """One value per example, reshaped from (B,) to (B, 1, ..., 1) so that it broadcasts against `like`.

    Args:
        value: numbers or booleans, one per example.
        like: the tensor to broadcast against; numbers are cast to its type.
    """
    value = value if value.dtype == torch.bool else value.to(like.dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1))


Record = TypeVar("Record", bound="BatchRecord")


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """Base class of records whose fields are tensors with one entry per example, or None."""

    def map(self: Record, function: Callable[[Tensor], Tensor]) -> Record:
        """A copy of the record with a function applied to every field that is not None.

        Args:
            function: maps a tensor (B, ...) to the tensor that replaces it.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})

    def select(self: Record, index: Int[Tensor, "b"] | slice) -> Record:
        """The record of some of the examples.

        Args:
            index: positions in the batch, on any device, or a slice of them.
        """
        return self.map(lambda value: pick(value, index))

    @classmethod
    def concatenate(cls: type[Record], records: Sequence[Record]) -> Record:
        """One record of the examples of several.

        Args:
            records: at least one; a field that is None in one of them must be None in all.

        Raises:
            ValueError: a field is None in some of them only.
        """
        if len(records) == 1:
            return records[0]
        joined: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values = [getattr(record, name) for record in records]
            missing = [value is None for value in values]
            if any(missing) and not all(missing):
                raise ValueError(
                    f"cannot concatenate batches with and without {name}: {sum(missing)} of {len(records)} have none; "
                    f"give {name} to all of them or to none"
                )
            joined[name] = None if all(missing) else torch.cat(values)
        return cls(**joined)


@dataclass(frozen=True, eq=False)
class NoisyBatch(BatchRecord):
    """A noisy batch: the data, the noise that was added, the result, and what each example is conditioned on.

    Attributes:
        x: clean data, the sources.
        noise: standard normal noise.
        t: time of each example.
        alpha: scale of the data at t.
        sigma: scale of the noise at t.
        x_t: alpha x + sigma noise.
        label: class of each example; -1 (`NULL_LABEL`) is trained without label. None if the data have no labels.
        index: position of each source in the pool, on the CPU, where references are drawn. Targets with references
            need it.
        augment_label: the augmentation of each example, as the network is conditioned on it; None without one.
        image_number: number of each example among the images of the run, from 0. Targets whose references are recent
            batches need it.
    """

    x: Float[Tensor, "B *D"]
    noise: Float[Tensor, "B *D"]
    t: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    sigma: Float[Tensor, "B"]
    x_t: Float[Tensor, "B *D"]
    label: Int[Tensor, "B"] | None = None
    index: Int[Tensor, "B"] | None = None
    augment_label: Float[Tensor, "B A"] | None = None
    image_number: Int[Tensor, "B"] | None = None

    def __len__(self) -> int:
        return len(self.x)


def pick(values: Shaped[Tensor, "B *D"], index: Int[Tensor, "b"] | slice) -> Tensor:
    """`values[index]`, where the two may be on different devices.

    Args:
        values: one entry per example.
        index: positions in `values`, or a slice of them.
    """
    return values[index if isinstance(index, slice) else index.to(values.device)]


class Process(ABC):
    """Base class of forward processes: the pair (alpha, sigma) as functions of t.

    Attributes:
        t_max: the largest time.
    """

    t_max: ClassVar[float] = 1.0

    @abstractmethod
    def scales(self, t: Float[Tensor, "*S"]) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
        """(alpha, sigma) at t.

        Args:
            t: times, of any shape.
        """

    @abstractmethod
    def time(self, ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The time at which sigma / alpha has a given value; it maps noise levels from one process to another.

        Args:
            ratio: noise levels sigma / alpha, of any shape.
        """

    def rates(self, t: Float[Tensor, "*S"]) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
        """(d alpha / dt, d sigma / dt) at t, by forward-mode differentiation of `scales`.

        Args:
            t: times, of any shape.
        """
        return torch.func.jvp(self.scales, (t,), (torch.ones_like(t),))[1]

    def perturb(
        self,
        x: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        noise: Float[Tensor, "B *D"],
        *,
        label: Int[Tensor, "B"] | None = None,
        index: Int[Tensor, "B"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
        image_number: Int[Tensor, "B"] | None = None,
    ) -> NoisyBatch:
        """The noisy batch x_t = alpha_t x + sigma_t noise.

        Args:
            x: clean data.
            t: time of each example.
            noise: standard normal noise.
            label: class of each example, as in `NoisyBatch`.
            index: position of each example in the pool, as in `NoisyBatch`.
            augment_label: augmentation of each example, as in `NoisyBatch`.
            image_number: number of each example among the images of the run, as in `NoisyBatch`.
        """
        alpha, sigma = self.scales(t)
        x_t = per_example(alpha, x) * x + per_example(sigma, x) * noise
        return NoisyBatch(x, noise, t, alpha, sigma, x_t, label, index, augment_label, image_number)


@dataclass(frozen=True)
class VE(Process):
    """The variance-exploding process: x_t = x + t noise. EDM uses this process, with t = sigma."""

    t_max: ClassVar[float] = math.inf

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class VP(Process):
    """The variance-preserving process: alpha^2 + sigma^2 = 1, with beta(t) = beta_min + beta_d t.

    This is DDPM's linear schedule in continuous time (Song et al. 2021, eq. 33).

    Attributes:
        beta_min: beta at t = 0.
        beta_d: growth of beta from t = 0 to t = 1.
    """

    beta_min: float = 0.1
    beta_d: float = 19.9

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()  # expm1: sigma keeps its digits near t = 0

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of(-0.5 * torch.log1p(ratio**2))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * self.beta_d * t**2 - 0.5 * self.beta_min * t

    def _time_of(self, log_alpha: Tensor) -> Tensor:
        """The root of beta_d t^2 / 2 + beta_min t + 2 log_alpha = 0, written without cancellation near t = 0."""
        integral = -2 * log_alpha  # of beta, from 0 to t
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * integral).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP process: VP's alpha with the smaller noise sigma = 1 - alpha^2 (Song et al. 2021, eq. 29).

    Attributes:
        beta_min: beta at t = 0.
        beta_d: growth of beta from t = 0 to t = 1.
    """

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    @override
    def time(self, ratio: Tensor) -> Tensor:
        # alpha^2 + ratio alpha - 1 = 0 means 1 / alpha - alpha = ratio, so -log alpha = asinh(ratio / 2)
        return self._time_of(-torch.asinh(ratio / 2))


@dataclass(frozen=True)
class Cosine(Process):
    """The cosine process: alpha = cos(pi t / 2), sigma = sin(pi t / 2); variance preserving."""

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2
        return torch.sin((1 - t) * quarter), torch.sin(t * quarter)  # cos(pi t / 2) would lose its digits near t = 1

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: the straight line x_t = (1 - t) x + t noise."""

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    @override
    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # right at both ends: 0 gives 0, infinity gives 1
