"""Training is a generator: it yields after every step, and the caller saves, logs and samples.

One clock, the number of images seen, says all: which batch comes next, which noise, which learning rate. What is drawn
for a row (its noise, its augmentation) is drawn for the number of its image, what all rows share (times, references)
for the step. So a run that continues from a saved `TrainState` goes on bit for bit as if it had never stopped, and
several ranks do together what one would do alone, but for the order of sums and for dropout.

What is taught depends on no weight. So a target for which all data pass answers several steps beforehand, and those
that do are the same steps wherever a run was stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stablefield.augmentation import permutes
from stablefield.data import Batches
from stablefield.engine.state import TrainState
from stablefield.objective import LossReport, Objective
from stablefield.posterior import Posterior
from stablefield.process import Perturbed
from stablefield.ranks import Ranks, apart
from stablefield.schedule import LearningRate
from stablefield.seeding import derive, generator
from stablefield.times import Times


@dataclass(frozen=True, eq=False)
class StepReport:
    """What a step did.

    Attributes:
        images: seen so far, this step's included, by all ranks.
        report: the loss of this rank's rows, and what there is to see in it (no gradient).
        rate: the learning rate used.
        gradient_norm: of all gradients together, before clipping; not finite if the step was not taken.
        taken: whether the gradient was finite, and the weights have moved.
        alone: share of this rank's rows whose target is their source alone, because the network is told of a
            transformation that references cannot be seen through; None if it is told of none.
    """

    images: int
    report: LossReport
    rate: float
    gradient_norm: Tensor
    taken: bool
    alone: Tensor | None = None


@dataclass(frozen=True)
class Descent:
    """How a gradient becomes a step.

    Attributes:
        rate: learning rate against images seen.
        clip: the norm that gradients are shortened to, if they are longer.
        micro_batch: rows of a rank that go through the network at once; all of them if not said. It changes memory
            and speed, and of the result nothing but rounding (and dropout).
        patience: how many steps in a row may be skipped because their gradient is not finite.
    """

    rate: LearningRate = field(default_factory=LearningRate)
    clip: float | None = None
    micro_batch: int | None = None
    patience: int = 25


def train(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    *,
    images: int,
    seed: int = 0,
    descent: Descent | None = None,
    ranks: Ranks | None = None,
) -> Iterator[StepReport]:
    """Train until so many images have been seen, yielding after every step.

    Args:
        state: trained in place; a restored one goes on where it stopped.
        objective: what is minimised.
        batches: the batch that follows after so many images, such as `data.Shuffled`.
        images: when to stop.
        seed: decides times, noise, references and dropout.
        descent: learning rate, clipping, and how much goes through the network at once.
        ranks: this process among those that train together.

    Raises:
        FloatingPointError: the gradient was not finite too many steps in a row; no such step has touched the weights.
    """
    descent, ranks = descent or Descent(), ranks or Ranks(state.device)
    model = ranks.wrap(state.denoiser)
    state.denoiser.train()
    lessons = _lessons(state, objective, batches, seed, objective.target.steps(batches.size // ranks.total))
    while state.images < images:
        noisy, target = next(lessons)
        report = _differentiate(state, model, objective, noisy, target, descent, derive(seed, "dropout", ranks.rank))
        now = descent.rate(state.images + batches.size)
        norm, taken = _descend(state, now, descent.clip)
        state.count(batches.size, taken)
        told = noisy.augmentation
        alone = None if told is None else (~permutes(told)).float().mean()
        yield StepReport(state.images, report, now, norm, taken, alone)
        if state.in_a_row > descent.patience:
            raise FloatingPointError(
                f"the gradient was not finite in {state.in_a_row} steps in a row, up to {state.images} images (loss "
                f"{report.loss.item():g}); none of them touched the weights: lower the learning rate, raise the "
                "precision, or look for outliers in the data"
            )


def _lessons(
    state: TrainState, objective: Objective, batches: Batches, seed: int, together: int
) -> Iterator[tuple[Perturbed, Posterior]]:
    """The rows of each step from now on, and what they are taught; so many steps are answered together.

    They are counted off from the first step of the run, so that it does not matter where one began to look.
    """

    def several(first: int) -> list[tuple[Perturbed, Posterior]]:
        steps = [first + step * batches.size for step in range(together)]
        noisy = [perturb(state, objective.times, batches, images, seed) for images in steps]
        # all ranks draw the same references, whichever rows they hold
        generators = [generator(seed, "references", images) for images in steps]
        return list(zip(noisy, objective.target.several(noisy, generators), strict=True))

    passed = state.images // batches.size % together
    first = state.images - passed * batches.size
    yield from several(first)[passed:]
    while True:
        first += together * batches.size
        yield from several(first)


def perturb(state: TrainState, times: Times, batches: Batches, images: int, seed: int) -> Perturbed:
    """The batch after so many images, on its way: times drawn for the step, noise for each image."""
    batch = batches(images).to(state.device)
    t = times.draw(batches.size, generator(seed, "times", images))[batch.number - images]
    shape, dtype = batch.x.shape[1:], batch.x.dtype
    noise = torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in batch.generators(seed, "noise")])
    return state.denoiser.process.perturb(
        batch.x,
        t.to(batch.x),
        noise.to(batch.x.device),
        label=batch.label,
        index=batch.index,
        augmentation=batch.augmentation,
        number=batch.number,
    )


def _differentiate(
    state: TrainState,
    model: nn.Module,
    objective: Objective,
    noisy: Perturbed,
    target: Posterior,
    descent: Descent,
    seed: int,
) -> LossReport:
    """The gradient of the mean loss over all rows, which go through the network a part at a time."""
    state.optimizer.zero_grad(set_to_none=True)
    size = descent.micro_batch or len(noisy)
    reports = []
    for start in range(0, len(noisy), size):
        rows, last = slice(start, start + size), start + size >= len(noisy)
        with nullcontext() if last else apart(model), _dropout(derive(seed, state.images, start), state.device):
            with torch.autocast(state.device.type, state.precision, enabled=state.precision != torch.float32):
                report = objective.loss(model, state.denoiser.process, noisy.rows(rows), target.rows(rows))
            state.scaler.scale(report.each.sum() / len(noisy)).backward()
        reports.append(report)
    each, t, ess = (torch.cat([getattr(r, name).detach() for r in reports]) for name in ("each", "t", "ess"))
    return LossReport(each.mean(), each, t, ess)


def _descend(state: TrainState, rate: float, clip: float | None) -> tuple[Tensor, bool]:
    """Take the step, unless its gradient is not finite; the gradient's norm, and whether it was taken."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.scaler.unscale_(state.optimizer)
    moved = [p for p in state.denoiser.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
    taken = bool(torch.isfinite(norm))
    state.whole = False  # until it is counted
    if taken:
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(moved, clip, norm)
        state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm, taken


@contextmanager
def _dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout that follows from a seed: modules know no other source of randomness than the global one."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield
