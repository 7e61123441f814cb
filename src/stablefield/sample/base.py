"""Base class of samplers: one seed per sample, a grid of times, and a step from each time to the next.

The state is float64; the denoiser is evaluated in its own precision. Every sample has its own generator, which draws,
in this order, its latent (float32), its class if none is given, and the sampler's noise (float64). So a sample depends
on its seed alone, not on the batch it was made in.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.pool import NULL_LABEL
from stablefield.process import Process
from stablefield.sample.grids import EDMGrid, TimeGrid, check_finite_fields

MOST_STEPS = 1_000_000  # memory is allocated for all of their times

DrawNoise = Callable[[], Tensor]  # standard normal noise shaped like the state, each sample's from its own generator
Callback = Callable[[int, Tensor, Tensor], None]  # called with (step, t, x_t) after every step


@dataclass(frozen=True, eq=False)
class Samples:
    """The result of a sampler.

    Attributes:
        x: the samples, in the range of the data (float64; float32 on MPS).
        label: class of each sample; None if the denoiser was not conditioned on classes.
        evaluations: number of denoiser evaluations per sample.
    """

    x: Float[Tensor, "B *D"]
    label: Int[Tensor, "B"] | None
    evaluations: int


class BoundDenoiser:
    """A denoiser bound to the labels of a batch, which counts its evaluations; this is what a sampler's steps call.

    Args:
        denoiser: the denoiser.
        label: class of each sample, or None.

    Attributes:
        denoiser: the denoiser.
        label: class of each sample, or None.
        evaluations: number of evaluations so far.
        last: time and result of the latest evaluation, for multistep samplers; None before the first.
    """

    def __init__(self, denoiser: Denoiser, label: Int[Tensor, "B"] | None = None) -> None:
        self.denoiser, self.label, self.evaluations = denoiser, label, 0
        self.last: tuple[Tensor, Tensor] | None = None

    @property
    def process(self) -> Process:
        """The process of the denoiser."""
        return self.denoiser.process

    def __call__(self, x: Float[Tensor, "B *D"], t: Float[Tensor, ""]) -> Float[Tensor, "B *D"]:
        """E[x | x_t = x], in the precision of the state.

        Args:
            x: the state.
            t: its time, the same for all samples.
        """
        # filled in instead of copied, because a copy to a GPU would make the host wait
        times = torch.full((len(x),), float(t), dtype=x.dtype, device=x.device)
        x0 = self.denoiser(x, times, self.label).to(x.dtype)
        self.evaluations += 1
        self.last = t, x0
        return x0

    def x0_and_noise(self, x: Float[Tensor, "B *D"], t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
        """E[x | x_t = x] and E[noise | x_t = x], which is -sigma times the score; each (B, *D).

        Args:
            x: the state.
            t: its time, the same for all samples.
        """
        alpha, sigma = self.process.scales(t)
        x0 = self(x, t)
        return x0, (x - alpha * x0) / sigma


@dataclass(frozen=True)
class Sampler(ABC):
    """Base class of samplers.

    Attributes:
        steps: number of steps.
        grid: rule for the times between them.

    Raises:
        ValueError: there is no step, or a number is not finite.
    """

    steps: int = 18
    grid: TimeGrid = field(default_factory=EDMGrid)

    def __post_init__(self) -> None:
        check_finite_fields(self, infinite=("churn_max",))
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"a sampler needs at least 1 step, not {self.steps}, and at most {MOST_STEPS:,}")

    @abstractmethod
    def step(self, denoiser: BoundDenoiser, x: Tensor, t: Tensor, s: Tensor, draw_noise: DrawNoise) -> Tensor:
        """The state at time s, one step after time t.

        Args:
            denoiser: the denoiser, with the labels of the batch.
            x: the state at time t, (B, *D).
            t: time at the start of the step (0-dimensional, float64, on the CPU).
            s: time at its end, s < t.
            draw_noise: draws standard normal noise shaped like x.
        """

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        label: int | Int[Tensor, "B"] | None = None,
        latents: Float[Tensor, "B *D"] | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Draw samples, one per seed or per latent.

        Args:
            denoiser: the denoiser; the samples are made on its device.
            shape: shape of one sample; may be left out if `latents` are given.
            seeds: seed of each sample, modulo 2^32. It decides the latent, the class and the sampler's noise.
            label: the class of all samples, or of each, -1 for no class; by default a conditional denoiser's classes
                are drawn from the seeds.
            latents: standard normal noise to start from, (B, *D), instead of the seeds' own. Samplers that add noise
                need seeds too, and add the same noise as from the seeds' own latents.
            callback: called as callback(step, t, x_t) after every step: its index from 0 to steps - 1, the time it
                arrived at (0-dimensional, on the CPU; 0 after the last) and the state (B, *D) at that time. It must
                not change the state in place; it may keep it.

        Raises:
            ValueError: there are neither seeds nor latents; their numbers, the shape or the labels do not match; a
                label is unknown to the denoiser; or seeds are missing that the sampler or the classes need.
        """
        device = denoiser.device
        generators = None if seeds is None else [torch.Generator(device).manual_seed(seed % 2**32) for seed in seeds]
        latents = _latents(latents, shape, generators, device)
        bound = BoundDenoiser(denoiser, _labels(label, denoiser, len(latents), generators, device))
        for step, (t, x) in enumerate(self.path(bound, latents, generators)):
            if callback is not None:
                callback(step, t, x)
        return Samples(x, bound.label, bound.evaluations)

    def times(self, denoiser: Denoiser) -> Float[Tensor, "{self.steps}+1"]:
        """The times of the grid that the denoiser supports, decreasing to 0.

        Args:
            denoiser: the denoiser.
        """
        return denoiser.nearest_time(self.grid.within(denoiser.process, self.steps, denoiser.noise_range))

    def path(
        self, denoiser: BoundDenoiser, latents: Float[Tensor, "B *D"], generators: Sequence[torch.Generator] | None
    ) -> Iterator[tuple[Float[Tensor, ""], Float[Tensor, "B *D"]]]:
        """The time and the state after every step.

        Args:
            denoiser: the denoiser, with the labels of the batch.
            latents: standard normal noise to start from.
            generators: source of each sample's noise; None if the sampler adds none.

        Raises:
            ValueError: the sampler adds noise, and there are no generators.
        """
        times = self.times(denoiser.denoiser)
        # MPS has no float64
        x = latents.to(torch.float32 if latents.device.type == "mps" else torch.float64)
        x = denoiser.process.scales(times[0])[1] * x

        def draw_noise() -> Tensor:
            if generators is None:
                raise ValueError(f"{type(self).__name__} adds noise: give seeds, one per latent")
            return torch.stack(
                [torch.randn(x[0].shape, generator=g, dtype=x.dtype, device=x.device) for g in generators]
            )

        for t, s in pairwise(times):
            x = self.step(denoiser, x, t, s, draw_noise)
            yield s, x


def _latents(
    given: Tensor | None,
    shape: Sequence[int] | None,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """The latents that are given, or those of the generators; the generators draw theirs in either case."""
    shape = given.shape[1:] if shape is None and given is not None else shape
    if shape is None or not (generators if given is None else len(given)):
        raise ValueError("sampling needs a shape and at least one seed, or at least one latent")
    drawn = [torch.randn(*shape, generator=g, device=device) for g in generators or ()]
    if given is None:
        return torch.stack(drawn)
    expected = (len(given) if generators is None else len(drawn), *shape)
    if given.shape != expected:
        raise ValueError(
            f"latents must have the shape (number of seeds, *shape) = {expected}, not {tuple(given.shape)}"
        )
    return given.to(device)


def _labels(
    label: int | Tensor | None,
    denoiser: Denoiser,
    count: int,
    generators: Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor | None:
    """The class of each sample, drawn from its generator if none is given."""
    num_classes = denoiser.num_classes
    if label is None and num_classes:
        if generators is None:
            raise ValueError(f"the denoiser has {num_classes} classes: give a label, or seeds to draw one from")
        return torch.cat([torch.randint(num_classes, (1,), generator=g, device=device) for g in generators])
    if label is None:
        return None
    labels = torch.as_tensor(label, device=device)
    if labels.shape not in ((), (count,)):
        raise ValueError(f"{count} samples need one label or one per sample, not labels of shape {tuple(labels.shape)}")
    labels = labels.expand(count)
    if (unknown := (labels < NULL_LABEL) | (labels >= num_classes)).any():
        raise ValueError(
            f"unknown class {labels[unknown][0].item()}: the denoiser has {num_classes} classes, counted from 0"
        )
    return labels
