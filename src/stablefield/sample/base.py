"""What all samplers share: a seed an image, a grid of times, a step from each to the next.

The state is float64 and the denoiser is asked in its own precision. Every image has its own generator, from which
come, in this order, its latent (float32), its class if one is to be drawn, and the sampler's noise (float64): so an
image depends on its seed alone, not on the batch it was made in.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.process import Process
from stablefield.sample.grids import EDMGrid, Grid

Draw = Callable[[], Tensor]  # standard normal noise shaped like the state, each row from its own generator


@dataclass(frozen=True, eq=False)
class Samples:
    """What a sampler made.

    Attributes:
        x: the samples, in the data's range (float64).
        label: the class each was made for, or None.
        evaluations: how often the denoiser was asked, for each image.
    """

    x: Float[Tensor, "B *D"]
    label: Int[Tensor, "B"] | None
    evaluations: int


class Question:
    """A denoiser asked about one batch: labels bound, answers in the state's precision, questions counted.

    Attributes:
        evaluations: how often it was asked.
        last: the time of the latest question and its answer, for samplers that look back.
    """

    def __init__(self, denoiser: Denoiser, label: Tensor | None) -> None:
        self.denoiser, self.label, self.evaluations = denoiser, label, 0
        self.last: tuple[Tensor, Tensor] | None = None

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x | x_t = x] at one time for all rows."""
        # filled in, not copied over: a copy to a GPU would make the host wait
        times = torch.full((len(x),), float(t), dtype=x.dtype, device=x.device)
        x0 = self.denoiser(x, times, self.label).to(x.dtype)
        self.evaluations += 1
        self.last = t, x0
        return x0

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_t = x] and E[noise | x_t = x], which is -sigma times the score."""
        alpha, sigma = self.process.scales(t)
        x0 = self(x, t)
        return x0, (x - alpha * x0) / sigma


@dataclass(frozen=True)
class Sampler(ABC):
    """A rule to get from noise to data.

    Attributes:
        steps: how many steps to make.
        grid: the times between them.
    """

    steps: int = 18
    grid: Grid = field(default_factory=EDMGrid)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {self.steps}")

    @abstractmethod
    def step(self, ask: Question, x: Tensor, t: Tensor, s: Tensor, draw: Draw) -> Tensor:
        """From x at time t to time s < t (both without dimensions, float64, on the CPU)."""

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        *,
        seeds: Sequence[int],
        label: int | Int[Tensor, "B"] | None = None,
    ) -> Samples:
        """One sample a seed.

        Args:
            denoiser: what to sample with; its parameters say on which device.
            shape: of one sample.
            seeds: one for each sample; they count modulo 2^32, as is the custom of the field.
            label: the class, for all or for each; None draws one from each seed if the denoiser knows classes.

        Raises:
            ValueError: no seed, a label that the denoiser does not know, or labels that do not match the seeds.
        """
        if not seeds:
            raise ValueError("sampling needs at least one seed")
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        generators = [torch.Generator(device).manual_seed(seed % 2**32) for seed in seeds]
        latents = torch.stack([torch.randn(*shape, generator=g, device=device) for g in generators])
        ask = Question(denoiser, _labels(label, denoiser, generators, device))
        x = deque(self.path(ask, latents, generators), maxlen=1).pop()
        return Samples(x, ask.label, ask.evaluations)

    def times(self, denoiser: Denoiser) -> Float[Tensor, "{self.steps}+1"]:
        """Where this sampler stops on the way: its grid, as far as the denoiser's range allows."""
        return denoiser.nearest(self.grid.within(denoiser.process, self.steps, denoiser.levels))

    def path(
        self, ask: Question, latents: Float[Tensor, "B *D"], generators: Sequence[torch.Generator]
    ) -> Iterator[Float[Tensor, "B *D"]]:
        """The state after every step, from standard normal latents and each row's source of noise."""
        times = self.times(ask.denoiser)
        # MPS has no float64
        x = latents.to(torch.float32 if latents.device.type == "mps" else torch.float64)
        x = ask.process.scales(times[0])[1] * x

        def draw() -> Tensor:
            return torch.stack(
                [torch.randn(x[0].shape, generator=g, dtype=x.dtype, device=x.device) for g in generators]
            )

        for t, s in pairwise(times):
            x = self.step(ask, x, t, s, draw)
            yield x


def _labels(
    label: int | Tensor | None, denoiser: Denoiser, generators: list[torch.Generator], device: torch.device
) -> Tensor | None:
    classes = denoiser.label_dim
    if label is None and classes:
        drawn = [torch.randint(classes, (1,), generator=g, device=device) for g in generators]
        return torch.cat(drawn)
    if label is None:
        return None
    told = torch.as_tensor(label, device=device)
    if told.shape not in ((), (len(generators),)):
        raise ValueError(f"{len(generators)} seeds need one label, or one each, not {tuple(told.shape)}")
    told = told.expand(len(generators))
    if (unknown := (told < -1) | (told >= classes)).any():
        raise ValueError(f"no class {told[unknown][0].item()}: this denoiser knows {classes} classes, from 0")
    return told
