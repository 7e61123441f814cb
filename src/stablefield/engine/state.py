"""Everything that changes during training and must be saved to resume a run.

No random state is saved: the draws of a step follow from the seed and the number of images seen.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.engine.adaptation import Adaptation
from stablefield.schedule import EMA, average_names


class TrainState:
    """State of training: the model, its averages, the optimizer, the loss scale and the number of images seen.

    Args:
        denoiser: the model, trained in place.
        optimizer: optimizer of the model's parameters; by default Adam with betas (0.9, 0.999).
        emas: moving averages of the weights to keep; samples are drawn from the first.
        precision: dtype of matrix products and convolutions; weights, averages and sums stay float32.
        adaptation: the noise distribution, if it adapts to the run.

    Attributes:
        emas: the moving averages by name (see `schedule.average_names`).
        averages: a copy of the model with averaged weights for each of them, in evaluation mode.
        weights: the parameters of the model.
        scaler: scale of the loss, which changes only in float16.
        images: images seen, over all ranks.
        skipped: steps that were skipped because their gradient was not finite.
        skipped_in_a_row: skipped steps since the last step that was taken.
        complete: False from the optimizer's update to the end of a step, while weights, averages and counts disagree.

    Raises:
        ValueError: there is no average, or two have the same half-life.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        emas: Sequence[EMA] = (EMA(),),
        precision: torch.dtype = torch.float32,
        adaptation: Adaptation | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.emas = dict(zip(average_names([ema.half_life for ema in emas]), emas, strict=True))
        self.averages = {name: copy.deepcopy(denoiser).eval().requires_grad_(False) for name in self.emas}
        # the modules are searched for them once, and not at every step
        self.weights: list[Tensor] = list(denoiser.parameters())
        self._buffers = list(denoiser.buffers())
        self._averaged: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            name: (list(each.parameters()), list(each.buffers())) for name, each in self.averages.items()
        }
        self.optimizer = optimizer or torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
        self.precision, self.adaptation = precision, adaptation
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.images = self.skipped = self.skipped_in_a_row = 0
        self.complete = True

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights[0].device

    @property
    def average(self) -> Denoiser:
        """The model with the weights of the first average."""
        return self.averages["average"]

    def end_step(self, batch_size: int, step_taken: bool) -> None:
        """Update the averages and the counts at the end of a step.

        Args:
            batch_size: images of the step, over all ranks.
            step_taken: True if the weights have changed; the averages do not move otherwise.
        """
        if step_taken:
            for name, ema in self.emas.items():
                averages, buffers = self._averaged[name]
                ema.update(averages, self.weights, self.images, batch_size)
                for averaged, new in zip(buffers, self._buffers, strict=True):
                    averaged.copy_(new)
        self.images += batch_size
        self.skipped += not step_taken
        self.skipped_in_a_row = 0 if step_taken else self.skipped_in_a_row + 1
        self.complete = True

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, without `images`, which a checkpoint stores beside them."""
        named = {f"model.{name}": value for name, value in self.denoiser.state_dict().items()}
        for name, average in self.averages.items():
            named |= {f"{name}.{key}": value for key, value in average.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        scaler = self.scaler.state_dict()
        named |= {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in scaler.items()}
        if self.adaptation is not None:
            named |= {f"times.{name}": value for name, value in self.adaptation.tensors().items()}
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return named | {f"steps.{name}": torch.tensor(count) for name, count in counts.items()}

    def restore(self, tensors: dict[str, Tensor], images: int) -> None:
        """Replace this state by a saved one.

        Args:
            tensors: the saved state, as `tensors` returned it.
            images: images that the saved state has seen.

        Raises:
            ValueError: the tensors are of another network or of other averages.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = value
        try:
            for name, module in {"model": self.denoiser, **self.averages}.items():
                module.load_state_dict(groups.get(name, {}))
        except RuntimeError as error:
            raise ValueError(f"the saved weights are of another network: {error}") from None
        self._restore_optimizer(groups.get("optimizer", {}))
        if self.scaler.is_enabled() and "scaler" in groups:
            before = self.scaler.state_dict()
            self.scaler.load_state_dict({k: type(before[k])(v.item()) for k, v in groups["scaler"].items()})
        if self.adaptation is not None and "times" in groups:
            self.adaptation.restore(groups["times"])
        counts = groups.get("steps", {})
        self.skipped, self.skipped_in_a_row = (int(counts.get(name, 0)) for name in ("skipped", "skipped_in_a_row"))
        self.images = images

    def _restore_optimizer(self, saved: dict[str, Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            number, _, slot = name.partition(".")
            if not (number.isdecimal() and len(number) < 10 and int(number) < len(parameters) and slot):
                raise ValueError(f"the saved state of the optimizer has an unknown entry {name!r}")
            if value.ndim and value.shape != parameters[int(number)].shape:
                raise ValueError(f"the saved state of the optimizer has {name!r} of shape {tuple(value.shape)}")
            slots.setdefault(int(number), {})[slot] = _in_memory_order_of(parameters[int(number)], value)
        if len({frozenset(named) for named in slots.values()}) > 1:
            raise ValueError("the saved state of the optimizer is incomplete: not all parameters have the same entries")
        try:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        except KeyError as error:
            raise ValueError(f"the saved state of the optimizer is incomplete: {error} is missing") from None


def _in_memory_order_of(parameter: Tensor, value: Tensor) -> Tensor:
    """The value in the memory order of a parameter, which may be channels last: fused optimizers need both alike."""
    same_shape = value.shape == parameter.shape
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if same_shape else value
