"""Training is a generator: it yields after every step, and the caller saves, logs and samples.

One clock, the number of images seen, says all: which batch comes next, which noise, which learning rate. A step's
randomness (noise, references, dropout) comes from (seed, images seen), so a run that continues from a saved
`TrainState` goes on bit for bit as if it had never stopped.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.data import Batch
from stablefield.denoise import Denoiser
from stablefield.engine.ema import EMA
from stablefield.objective import LossReport, Objective
from stablefield.seeding import derive, generator


@dataclass(frozen=True)
class LearningRate:
    """A linear ramp, then constant.

    Attributes:
        peak: the rate after the ramp.
        ramp: images it takes to get there.
    """

    peak: float = 1e-3
    ramp: int = 0

    def __call__(self, images: int) -> float:
        """The rate after so many images."""
        return self.peak * min(1.0, images / self.ramp) if self.ramp else self.peak


class TrainState:
    """Everything that must survive: the model, its average, the optimiser, and how many images they have seen.

    Args:
        denoiser: trained in place.
        optimizer: made from its parameters; Adam with beta = (0.9, 0.999) if not given.
    """

    def __init__(self, denoiser: Denoiser, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.denoiser = denoiser
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.optimizer = optimizer or torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
        self.images = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors; `images` is the one number beside them."""
        named = {f"model.{name}": value for name, value in self.denoiser.state_dict().items()}
        named |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        return named

    def restore(self, tensors: dict[str, Tensor], images: int) -> None:
        """Become the state that `tensors` and `images` describe.

        Raises:
            ValueError: tensors of another network.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        try:
            self.denoiser.load_state_dict(parts["model"])
            self.average.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise ValueError(f"the saved weights are of another network: {error}") from None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            number, _, slot = name.partition(".")
            slots.setdefault(int(number), {})[slot] = _laid_out(value, parameters[int(number)])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.images = images


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    # a fused optimiser reads its averages in the memory order of the weights, which may be channels last
    return torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value


@dataclass(frozen=True, eq=False)
class StepReport:
    """What a step did.

    Attributes:
        images: seen so far, this step's included.
        report: the loss, and what there is to see in it.
        rate: the learning rate used.
        gradient_norm: of all gradients together.
    """

    images: int
    report: LossReport
    rate: float
    gradient_norm: Tensor


def train(
    state: TrainState,
    objective: Objective,
    batches: Callable[[int], Batch],
    *,
    images: int,
    seed: int = 0,
    rate: LearningRate | None = None,
    ema: EMA | None = None,
) -> Iterator[StepReport]:
    """Train until so many images have been seen, yielding after every step.

    Args:
        state: trained in place; a restored one goes on where it stopped.
        objective: what is minimised.
        batches: the batch that follows after so many images, such as `data.Shuffled`.
        images: when to stop.
        seed: decides noise, references and dropout.
        rate: learning rate against images seen.
        ema: how the average follows.

    Raises:
        FloatingPointError: the loss is not finite; the weights are as they were before this step.
    """
    rate, ema = rate or LearningRate(), ema or EMA()
    device = next(state.denoiser.parameters()).device
    state.denoiser.train()
    while state.images < images:
        batch = batches(state.images)
        now = rate(state.images + len(batch.x))
        report = _loss(state, objective, batch, seed, device)
        norm = _descend(state, report, now)
        ema.update(state.average, state.denoiser, state.images, len(batch.x))
        state.images += len(batch.x)
        yield StepReport(state.images, report, now, norm)


def _loss(state: TrainState, objective: Objective, batch: Batch, seed: int, device: torch.device) -> LossReport:
    label = None if batch.label is None else batch.label.to(device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(derive(seed, "dropout", state.images))  # modules know no other source of randomness
        return objective(
            state.denoiser,
            batch.x.to(device),
            index=batch.index,
            label=label,
            augmentation=batch.augmentation,
            generator=generator(seed, "step", state.images),
        )


def _descend(state: TrainState, report: LossReport, rate: float) -> Tensor:
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    report.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.denoiser.parameters() if p.grad is not None])
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient is not finite after {state.images} images (loss {report.loss.item():g}): "
            "lower the learning rate, or look for outliers in the data"
        )
    state.optimizer.step()
    return norm
