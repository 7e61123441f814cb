"""Everything of a training run that must survive a stop, in one place.

Nothing random is here: what a step draws follows from the seed and the number of images seen.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.schedule import EMA, average_names


class TrainState:
    """The model, its averages, the optimiser and its loss scale, and how many images they have seen.

    Args:
        denoiser: trained in place.
        optimizer: made from its parameters; Adam with beta = (0.9, 0.999) if not given.
        emas: how each average follows, the one to be sampled from first.
        precision: what matrix products and convolutions are done in; weights and sums stay in float32.

    Attributes:
        images: seen so far, by all ranks.
        skipped: steps whose gradient was not finite, and which were not taken.
        in_a_row: how many of them were the last.
        whole: whether all of this belongs together; not so while a step is being taken.

    Raises:
        ValueError: no average, or two of the same half-life.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        emas: Sequence[EMA] = (EMA(),),
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.denoiser = denoiser
        self.emas = dict(zip(average_names([ema.half_life for ema in emas]), emas, strict=True))
        self.averages = {name: copy.deepcopy(denoiser).eval().requires_grad_(False) for name in self.emas}
        self.optimizer = optimizer or torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.images = self.skipped = self.in_a_row = 0
        self.whole = True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.parameters()).device

    @property
    def average(self) -> Denoiser:
        """The first average."""
        return self.averages["average"]

    def count(self, batch: int, taken: bool) -> None:
        """A step is over: its images have been seen, and the averages follow if the weights have moved."""
        if taken:
            for name, ema in self.emas.items():
                ema.update(self.averages[name], self.denoiser, self.images, batch)
        self.images += batch
        self.skipped += not taken
        self.in_a_row = 0 if taken else self.in_a_row + 1
        self.whole = True

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors; `images` is the one number beside them."""
        named = {f"model.{name}": value for name, value in self.denoiser.state_dict().items()}
        for name, average in self.averages.items():
            named |= {f"{name}.{rest}": value for rest, value in average.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        scaler = self.scaler.state_dict()
        named |= {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in scaler.items()}
        return named | {"steps.skipped": torch.tensor(self.skipped), "steps.in_a_row": torch.tensor(self.in_a_row)}

    def restore(self, tensors: dict[str, Tensor], images: int) -> None:
        """Become the state that `tensors` and `images` describe.

        Raises:
            ValueError: tensors of another network, or with other averages.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        try:
            for name, module in {"model": self.denoiser, **self.averages}.items():
                module.load_state_dict(parts.get(name, {}))
        except RuntimeError as error:
            raise ValueError(f"the saved weights are of another network: {error}") from None
        self._restore_optimizer(parts.get("optimizer", {}))
        if self.scaler.is_enabled() and "scaler" in parts:
            before = self.scaler.state_dict()
            self.scaler.load_state_dict({k: type(before[k])(v.item()) for k, v in parts["scaler"].items()})
        steps = parts.get("steps", {})
        self.skipped, self.in_a_row = (int(steps.get(name, 0)) for name in ("skipped", "in_a_row"))
        self.images = images

    def _restore_optimizer(self, saved: dict[str, Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            number, _, slot = name.partition(".")
            slots.setdefault(int(number), {})[slot] = _laid_out(value, parameters[int(number)])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    # a fused optimiser reads its averages in the memory order of the weights, which may be channels last
    return torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value
