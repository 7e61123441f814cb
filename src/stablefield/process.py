"""How data turns into noise.

    x_t = alpha_t x + sigma_t noise,      noise ~ N(0, I)

A `Process` is the pair (alpha, sigma) as functions of t, and the inverse of their ratio. Nothing else is needed:
weights of a posterior, scalings of a network and the steps of a sampler follow from these two numbers. A process
with alpha > 0 is the variance-exploding one in disguise: x_t / alpha is data plus noise of level sigma / alpha.

| process  | alpha                                   | sigma             | source                               |
|----------|-----------------------------------------|-------------------|--------------------------------------|
| `VE`     | 1                                       | t                 | Song et al. 2021; Karras et al. 2022 |
| `VP`     | exp(-(beta_d t^2 / 2 + beta_min t) / 2) | sqrt(1 - alpha^2) | Ho et al. 2020; Song et al. 2021     |
| `SubVP`  | as VP                                   | 1 - alpha^2       | Song et al. 2021                     |
| `Cosine` | cos(pi t / 2)                           | sin(pi t / 2)     | Nichol & Dhariwal 2021               |
| `Flow`   | 1 - t                                   | t                 | Liu et al. 2022; Lipman et al. 2023  |

t runs from 0 (data) to 1, for VE without end.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def per_row(value: Shaped[Tensor, "B"], like: Float[Tensor, "B *D"]) -> Tensor:
    """A number or a truth a row, shaped to meet `like`: (B,) becomes (B, 1, ..., 1), numbers in its type."""
    value = value if value.dtype == torch.bool else value.to(like.dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1))


Record = TypeVar("Record", bound="Rows")


@dataclass(frozen=True, eq=False)
class Rows:
    """A record of what is known of some rows: tensors with a row each, or None."""

    def each(self: Record, change: Callable[[Tensor], Tensor]) -> Record:
        """The record with all that is known changed alike."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in known.items() if value is not None})

    def rows(self: Record, rows: Int[Tensor, "b"] | slice) -> Record:
        """Some of the rows."""
        return self.each(lambda value: pick(value, rows))

    @classmethod
    def joined(cls: type[Record], records: Sequence[Record]) -> Record:
        """The rows of some records as one record; in all of them the same must be known."""
        if len(records) == 1:
            return records[0]
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values = [getattr(record, name) for record in records]
            found[name] = None if all(value is None for value in values) else torch.cat(values)
        return cls(**found)


@dataclass(frozen=True, eq=False)
class Perturbed(Rows):
    """A batch on its way: what it was, what was added, what came out. The record that travels.

    `index` says which members of the data set the rows of `x` are (on the CPU, where references are drawn),
    `label` what the network is told of them (-1: nothing), `augmentation` how they were transformed, `number` which
    images of the run they are.
    """

    x: Float[Tensor, "B *D"]
    noise: Float[Tensor, "B *D"]
    t: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    sigma: Float[Tensor, "B"]
    x_t: Float[Tensor, "B *D"]
    label: Int[Tensor, "B"] | None = None
    index: Int[Tensor, "B"] | None = None
    augmentation: Float[Tensor, "B A"] | None = None
    number: Int[Tensor, "B"] | None = None

    def __len__(self) -> int:
        return len(self.x)


def pick(values: Shaped[Tensor, "B *D"], rows: Int[Tensor, "b"] | slice) -> Tensor:
    """Some of the rows, whatever devices both are on."""
    return values[rows if isinstance(rows, slice) else rows.to(values.device)]


class Process(ABC):
    """The pair (alpha, sigma) as functions of the time t: shape in, shape out."""

    limit: ClassVar[float] = 1.0  # the last t there is

    @abstractmethod
    def scales(self, t: Float[Tensor, "*S"]) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
        """(alpha, sigma) at t."""

    @abstractmethod
    def time(self, ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The t at which sigma / alpha equals `ratio`: the inverse that lets processes share noise levels."""

    def rates(self, t: Float[Tensor, "*S"]) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
        """(d alpha / dt, d sigma / dt) at t, by forward-mode differentiation of `scales`."""
        return torch.func.jvp(self.scales, (t,), (torch.ones_like(t),))[1]

    def perturb(
        self,
        x: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        noise: Float[Tensor, "B *D"],
        *,
        label: Int[Tensor, "B"] | None = None,
        index: Int[Tensor, "B"] | None = None,
        augmentation: Float[Tensor, "B A"] | None = None,
        number: Int[Tensor, "B"] | None = None,
    ) -> Perturbed:
        """x_t = alpha_t x + sigma_t noise, in a record that remembers all of it."""
        alpha, sigma = self.scales(t)
        x_t = per_row(alpha, x) * x + per_row(sigma, x) * noise
        return Perturbed(x, noise, t, alpha, sigma, x_t, label, index, augmentation, number)


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: the data stays, noise of level t is added. EDM is this process (t = sigma)."""

    limit: ClassVar[float] = math.inf

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def time(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving: alpha^2 + sigma^2 = 1, with beta(t) = beta_min + beta_d t (DDPM's linear schedule)."""

    beta_min: float = 0.1
    beta_d: float = 19.9

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()  # expm1: sigma keeps its digits near t = 0

    def time(self, ratio: Tensor) -> Tensor:
        return self._time_of(-0.5 * torch.log1p(ratio**2))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * self.beta_d * t**2 - 0.5 * self.beta_min * t

    def _time_of(self, log_alpha: Tensor) -> Tensor:
        # the root of beta_d t^2 / 2 + beta_min t + 2 log_alpha = 0, written without cancellation near t = 0
        spent = -2 * log_alpha
        return 2 * spent / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * spent).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP process: VP's alpha with the smaller noise sigma = 1 - alpha^2."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def time(self, ratio: Tensor) -> Tensor:
        # alpha^2 + ratio alpha - 1 = 0 means 1 / alpha - alpha = ratio, so -log alpha = asinh(ratio / 2)
        return self._time_of(-torch.asinh(ratio / 2))


@dataclass(frozen=True)
class Cosine(Process):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a quarter of the circle at constant speed."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2
        return torch.sin((1 - t) * quarter), torch.sin(t * quarter)  # cos(pi t / 2) would lose its digits near t = 1

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: the straight line x_t = (1 - t) x + t noise."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # right at both ends: 0 gives 0, infinity gives 1
