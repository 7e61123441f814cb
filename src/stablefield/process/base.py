"""The base class of processes, and the record of a noisy batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


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
        if isinstance(index, slice):
            return self.map(lambda value: value[index])
        there: dict[torch.device, Tensor] = {}  # the index moves to each device once

        def picked(value: Tensor) -> Tensor:
            if value.device not in there:
                there[value.device] = move(index, value.device)
            return value[there[value.device]]

        return self.map(picked)

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
        index: position of each source in the pool. Targets with references need it.
        augment_label: the augmentation of each example, as the network is conditioned on it; None without one.
        image_number: number of each example among the images of the run, from 0. Targets whose references are recent
            batches need it.
        augment_map: affine map of each example's augmentation, without its flips (`augmentation.affine`): references
            are seen through it. None without one.

    The last five decide which references an example has. On the CPU they do so without a wait for a GPU.
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
    augment_map: Float[Tensor, "B 2 3"] | None = None

    def __len__(self) -> int:
        return len(self.x)


def move(values: Shaped[Tensor, "*S"], device: torch.device) -> Shaped[Tensor, "*S"]:
    """Values on a device; the host does not wait for a copy to a GPU.

    Args:
        values: on any device.
        device: where they go.
    """
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def draw_noise(
    x: Float[Tensor, "B *D"], generators: torch.Generator | Iterable[torch.Generator] | None = None
) -> Float[Tensor, "B *D"]:
    """Standard normal noise for a batch. It is drawn on the CPU, so that it does not depend on the device.

    Args:
        x: clean data, for shape, type and device.
        generators: one generator per example, used one after the other, or one for the batch; by default torch's global
            one.
    """
    if generators is None or isinstance(generators, torch.Generator):
        noise = torch.randn(x.shape, generator=generators, dtype=x.dtype)
    else:
        noise = torch.empty(x.shape, dtype=x.dtype)
        for row, each in zip(noise.unbind(), generators, strict=True):
            row.normal_(generator=each)
    return move(noise, x.device)


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
        augment_map: Float[Tensor, "B 2 3"] | None = None,
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
            augment_map: affine map of each example's augmentation, as in `NoisyBatch`.
        """
        alpha, sigma = self.scales(t)
        x_t = per_example(alpha, x) * x + per_example(sigma, x) * noise
        return NoisyBatch(x, noise, t, alpha, sigma, x_t, label, index, augment_label, image_number, augment_map)
