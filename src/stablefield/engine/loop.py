"""The training loop: a generator that yields after every step, so that the caller saves, logs and samples.

There is one clock, the number of images seen. It determines the next batch, its noise and the learning rate. Draws for
an example (its noise, its augmentation) are seeded by its image number, draws shared by the batch (times, references)
by the step. So a run that continues from a saved `TrainState` resumes bit for bit, and several ranks compute together
what one would compute, except for the order of summation and for dropout.

Targets do not depend on the weights. So `Prefetched` targets of several steps are computed in one call, and the groups
of steps are the same wherever a run was stopped. On a CPU, small batches with other targets are prepared for up to 16
steps in advance, one after the other, because its caches stay warm.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stablefield.data import BatchSource
from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks, no_sync
from stablefield.engine.state import TrainState
from stablefield.kernel.accumulator import Posterior
from stablefield.objective import LossReport, Objective
from stablefield.process import NoisyBatch
from stablefield.schedule import LearningRate
from stablefield.seeding import derive, generator
from stablefield.targets import Prefetched

TrainingBatch = tuple[NoisyBatch, Posterior]
"""The noisy batch of a training step, and the target of each example."""

Prepare = Callable[[Callable[[], TrainingBatch]], TrainingBatch | None]
"""Calls the function that makes the batch of a step; its result, or None to end training."""


@dataclass(frozen=True, eq=False)
class StepReport:
    """Result of a training step.

    Attributes:
        images: images seen at the end of the step, over all ranks.
        report: loss, times and effective sample sizes of this rank's examples, without gradient.
        learning_rate: the learning rate of the step.
        gradient_norm: norm of the whole gradient before clipping; not finite if the step was skipped.
        step_taken: True if the gradient was finite and the weights were updated.
        fraction_dsm: share of this rank's examples that keep their own x as target, such as those whose references are
            not seen through their augmentation; None if the network is not conditioned on augmentations.
        importance: importance weight of each of this rank's examples, which is not in their losses; None without.
    """

    images: int
    report: LossReport
    learning_rate: float
    gradient_norm: Float[Tensor, ""]
    step_taken: bool
    fraction_dsm: Float[Tensor, ""] | None = None
    importance: Float[Tensor, "B"] | None = None


@dataclass(frozen=True)
class Optimization:
    """Hyperparameters of the update of the weights.

    Attributes:
        learning_rate: schedule of the learning rate.
        gradient_clip: norm above which gradients are scaled down to it; None turns clipping off.
        micro_batch_size: examples of a rank that pass through the network at once, to save memory; all by default. It
            changes results only by rounding and by dropout.
        patience: number of consecutive steps that may be skipped because their gradient is not finite.
    """

    learning_rate: LearningRate = field(default_factory=LearningRate)
    gradient_clip: float | None = None
    micro_batch_size: int | None = None
    patience: int = 25


def train(
    state: TrainState,
    objective: Objective,
    batches: BatchSource,
    *,
    images: int,
    seed: int = 0,
    optimization: Optimization | None = None,
    ranks: Ranks | None = None,
    prepare: Prepare | None = None,
) -> Iterator[StepReport]:
    """Train until a number of images has been seen.

    Args:
        state: the state, trained in place; a restored one resumes where it was saved.
        objective: the training objective.
        batches: the batches of the run, such as `data.ShuffledBatches`; asked for up to 16 steps in advance.
        images: images to see in the whole run, over all ranks; training ends with the first step that reaches them.
        seed: seed of times, noise, references and dropout.
        optimization: learning rate, clipping and micro-batches; `Optimization()` by default.
        ranks: this process and those it trains with; a single process by default.
        prepare: called with the function that makes the noisy batch and the targets of a step, while a GPU computes the
            gradient of the step before. It returns the result of the function, or None to end training.

    Yields:
        A report after every step.

    Raises:
        ValueError: there is no target for a batch, as `TargetEstimator.check` says, or there are several ranks, and
            parameters that the loss does not depend on.
        FloatingPointError: the gradient was not finite in more than `patience` consecutive steps. None of them has
            changed the weights.
    """
    optimization, ranks = optimization or Optimization(), ranks or Ranks(state.device)
    prepare = prepare or (lambda make: make())
    training_batches = _training_batches(state, objective, batches, seed, ranks, images)
    adaptation = state.adaptation
    batch = prepare(training_batches.__next__) if state.images < images else None
    if batch is not None and ranks.world_size > 1:
        refuse_unused_parameters(state.denoiser, objective, batch)
    model = ranks.wrap(state.denoiser)
    state.denoiser.train()
    while batch is not None:
        noisy, target = batch
        importance = adaptation.importance(noisy.t, state.images) if adaptation else None
        dropout_seed = derive(seed, "dropout", ranks.rank)
        report = _compute_gradient(
            state, model, objective, noisy, target, importance, optimization.micro_batch_size, dropout_seed
        )
        learning_rate = optimization.learning_rate(state.images)
        # the host waits for the gradient below, and prepares the next step before
        batch = prepare(training_batches.__next__) if state.images + batches.size < images else None
        gradient_norm, step_taken = _update_weights(state, learning_rate, optimization.gradient_clip)
        if adaptation:
            process = state.denoiser.process
            adaptation.add(report, process, objective.weight, state.denoiser, state.images, batches.size, ranks)
        state.end_step(batches.size, step_taken)
        if not step_taken:
            objective.target.check(noisy)
        fraction_dsm = None if noisy.augment_label is None else objective.target.keeps_source(noisy).float().mean()
        yield StepReport(state.images, report, learning_rate, gradient_norm, step_taken, fraction_dsm, importance)
        if state.skipped_in_a_row > optimization.patience:
            raise FloatingPointError(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to {state.images} images "
                f"(loss {report.loss.item():g}); none of them changed the weights: lower the learning rate, raise the "
                "precision, or look for outliers in the data"
            )


def refuse_unused_parameters(denoiser: Denoiser, objective: Objective, batch: TrainingBatch) -> None:
    """Refuse parameters that have no gradient: several ranks would wait for it in vain.

    Args:
        denoiser: the denoiser; its gradients are removed.
        objective: the training objective.
        batch: a noisy batch and its targets, of which one example is used.

    Raises:
        ValueError: there are such parameters; it names them.
    """
    noisy, target = batch[0].select(slice(0, 1)), batch[1].select(slice(0, 1))
    objective.loss(denoiser.eval(), denoiser.process, noisy, target).loss.backward()
    unused = [name for name, p in denoiser.named_parameters() if p.requires_grad and p.grad is None]
    denoiser.zero_grad(set_to_none=True)
    if unused:
        raise ValueError(
            f"{len(unused)} parameters have no gradient, which training on several ranks needs: {', '.join(unused[:8])}"
            f"{', ...' if len(unused) > 8 else ''}; use them, remove them, or freeze them with requires_grad_(False)"
        )


def _training_batches(
    state: TrainState, objective: Objective, batches: BatchSource, seed: int, ranks: Ranks, images: int
) -> Iterator[TrainingBatch]:
    """The noisy batch of each step from now on, and its targets."""
    target, size = objective.target, batches.size
    every = state.adaptation.adaptive.every if state.adaptation else sys.maxsize
    in_one_call = target.steps(size // ranks.world_size) if isinstance(target, Prefetched) else 1
    if every < in_one_call * size:
        raise ValueError(
            f"times.every = {every} is below the {in_one_call * size} images of the {in_one_call} steps whose targets "
            "are computed together; raise it, or lower training.target_prefetch"
        )

    def noisy_batch(first: int) -> NoisyBatch:
        return perturb(state, objective, batches, first, seed)

    def draws(first: int) -> torch.Generator:
        return generator(seed, "references", first)  # all ranks draw the same references, whichever examples they hold

    def in_groups(target: Prefetched) -> Iterator[TrainingBatch]:
        """Groups are counted from the first step of the run, so that it does not matter where a run was stopped."""
        done = state.images // size % in_one_call
        first = state.images - done * size
        while True:
            noisy = [noisy_batch(first + step * size) for step in range(in_one_call)]
            yield from list(zip(noisy, target.several(noisy, draws(first)), strict=True))[done:]
            first, done = first + in_one_call * size, 0

    def in_advance() -> Iterator[TrainingBatch]:
        """An error is raised when its step comes."""
        first, ahead = state.images, 1
        while True:
            made, failure = list[TrainingBatch](), None
            for number in range(first, first + ahead * size, size):
                try:
                    noisy = noisy_batch(number)
                    made.append((noisy, target(noisy, generator=draws(number))))
                except Exception as error:
                    failure = error
                    break
            yield from made
            if failure is not None:
                raise failure
            first += ahead * size
            ahead = max(1, min(_steps_in_cache(made[0][0].x), every // size, -((first - images) // size)))

    return in_groups(target) if isinstance(target, Prefetched) else in_advance()


def _steps_in_cache(x: Float[Tensor, "B *D"]) -> int:
    """Number of steps whose small batches a CPU prepares in a row.

    A step of the network evicts the code of the targets from the CPU's caches; in a row, they take half the time. A GPU
    computes meanwhile, so each step is prepared during the one before.
    """
    return max(1, min(16, 2**18 // max(1, x.numel()))) if x.device.type == "cpu" else 1


def perturb(state: TrainState, objective: Objective, batches: BatchSource, images: int, seed: int) -> NoisyBatch:
    """The noisy batch of a training step, with times drawn for the step and noise drawn for each image.

    Args:
        state: the state, for the process and the device of its model.
        objective: the objective, whose times are used unless those of the state adapt.
        batches: the batches of the run.
        images: images seen before the step, over all ranks.
        seed: seed of times and noise.
    """
    batch = batches(images).to(state.device)
    times = state.adaptation.times(images, state.images) if state.adaptation else objective.times
    t = times.draw(batches.size, generator(seed, "times", images))[batch.image_number - images]
    return objective.perturb(
        state.denoiser.process,
        batch.x,
        t=t,
        generators=batch.generators(seed, "noise"),
        label=batch.label,
        index=batch.index,
        augment_label=batch.augment_label,
        image_number=batch.image_number,
        augment_map=batch.augment_map,
    )


def _compute_gradient(
    state: TrainState,
    model: nn.Module,
    objective: Objective,
    noisy: NoisyBatch,
    target: Posterior,
    importance: Float[Tensor, "B"] | None,
    micro_batch_size: int | None,
    dropout_seed: int,
) -> LossReport:
    """Compute the gradient of the mean loss, one micro-batch at a time; the losses of all examples."""
    others = (parameter for group in state.optimizer.param_groups for parameter in group["params"])
    for parameter in (*state.weights, *others):  # `Optimizer.zero_grad` takes many times as long for small networks
        parameter.grad = None
    size = micro_batch_size or len(noisy)
    reports = []
    for start in range(0, len(noisy), size):
        part, last = slice(start, start + size), start + size >= len(noisy)
        with (
            nullcontext() if last else no_sync(model),
            _seeded_dropout(derive(dropout_seed, state.images, start), state.device),
        ):
            with torch.autocast(state.device.type, state.precision, enabled=state.precision != torch.float32):
                examples = (noisy, target) if size >= len(noisy) else (noisy.select(part), target.select(part))
                report = objective.loss(model, state.denoiser.process, *examples)
            losses = report.losses if importance is None else importance[part] * report.losses
            state.scaler.scale(losses.sum() / len(noisy)).backward()
        reports.append(report)
    losses, t, ess = (torch.cat([getattr(r, name).detach() for r in reports]) for name in ("losses", "t", "ess"))
    return LossReport(losses.mean(), losses, t, ess)


def _update_weights(state: TrainState, learning_rate: float, clip: float | None) -> tuple[Tensor, bool]:
    """Update the weights, unless the gradient is not finite; the norm of the gradient, and if the step was taken."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.weights if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    step_taken = bool(torch.isfinite(norm))
    state.complete = False  # until `end_step`
    if step_taken:
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm, step_taken


@contextmanager
def _seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which dropout follows from a seed: modules can only draw from the global generator."""
    is_cpu = device.type == "cpu"  # torch.manual_seed would record a stack trace for each kind of GPU, every time
    with torch.random.fork_rng([] if is_cpu else [device]):
        (torch.default_generator.manual_seed if is_cpu else torch.manual_seed)(seed)
        yield
