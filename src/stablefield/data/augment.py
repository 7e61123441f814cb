"""More images than there are: transformations that training applies, and what the network is told of them.

*Untold* (`Mirror`): the data set becomes its images and their mirror images. The network learns E[x | x_t] of both, so
both are in the pool that references come from.

*Told* (`EDMAugmentation`): each image of the run is transformed by a map of its own, and nine numbers tell the network
which (`stablefield.augmentation`). The network learns E[x | x_t, the map], and is asked for no map in the end. The
pool stays plain: targets look at the numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from stablefield.augmentation import DIM, affine, flip, permutes, warp
from stablefield.data.batches import Batch, Batches
from stablefield.reference import ALL, Pool

Kind = Literal["xflip", "yflip", "scale", "rotation", "anisotropy", "translation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Augmentation(ABC):
    """What is done to images before the noise.

    Attributes:
        dim: how many numbers the network is told of it; 0 if none.
    """

    dim: ClassVar[int] = 0

    @abstractmethod
    def of_pool(self, pool: Pool) -> Pool:
        """The data set that is trained on, and that references come from.

        Raises:
            ValueError: data that cannot be augmented so.
        """

    def of_batches(self, batches: Batches, seed: int, device: torch.device | None = None) -> Batches:
        """The batches of a run of this seed, worked on on a device (by default, where they are)."""
        return batches


@dataclass(frozen=True)
class Plain(Augmentation):
    """The data as they are."""

    def of_pool(self, pool: Pool) -> Pool:
        return pool


@dataclass(frozen=True)
class Mirror(Augmentation):
    """The images and their mirror images, with nothing told: a data set of twice the size (EDM's --xflip)."""

    def of_pool(self, pool: Pool) -> Pool:
        return pool.mirrored()


@dataclass(frozen=True)
class EDMAugmentation(Augmentation):
    """The augmentation of Karras et al. 2022, appendix F.2, after that of their GANs.

    The x-flip is drawn for all images, 1 in 2. Each other kind befalls an image with probability p (and the y-flip
    then 1 in 2 of these), with w ~ N(0, 1) and angles uniform; half of the time the axis of the anisotropy is x.

    Attributes:
        p: probability of each kind but the x-flip.
        kinds: which of them.

    Raises:
        ValueError: no probability, or a kind that does not exist.
    """

    p: float = 0.12
    kinds: tuple[Kind, ...] = KINDS

    dim: ClassVar[int] = DIM

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is a probability, not {self.p}")
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")

    def of_pool(self, pool: Pool) -> Pool:
        if len(pool.shape) != 3:
            raise ValueError(f"only images (C, H, W) can be augmented; these data are {pool.shape}")
        return pool

    def of_batches(self, batches: Batches, seed: int, device: torch.device | None = None) -> Batches:
        return Augmented(batches, self, seed, device)

    def __call__(
        self, x: Float[Tensor, "B C H W"], generators: Iterable[torch.Generator]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 9"]]:
        """Each image under a map that its own generator draws, and the label of that map (on the CPU).

        Flips move pixels and change none; rows that nothing happens to stay as they are, bit for bit.
        """
        drawn = self.draw(generators)
        label = drawn.label().to(x.dtype)
        augmented = flip(x, label)
        if len(rows := (~permutes(label)).nonzero().flatten()):
            back = drawn.rows(rows).back((x.shape[2], x.shape[3])).to(x.device)
            rows = rows.to(x.device)
            augmented[rows] = warp(augmented[rows], back)
        return augmented, label

    def draw(self, generators: Iterable[torch.Generator]) -> "Drawn":
        """What happens to each of some images."""
        # every kind draws its numbers for every image, whether it is wanted or not: no kind's depend on another's
        pairs = [(_uniform(11, g), torch.randn(4, generator=g, dtype=torch.float64)) for g in generators]
        uniform, normal = (torch.stack(numbers) for numbers in zip(*pairs, strict=True))
        happens = uniform[:, :6] < torch.tensor([1.0 if kind == "xflip" else self.p for kind in KINDS])
        happens &= torch.tensor([kind in self.kinds for kind in KINDS])
        x, y, scale, rotation, anisotropy, translation = happens.T
        coin, angle = uniform[:, 6:9] < 0.5, (2 * uniform[:, 9:11] - 1) * torch.pi
        return Drawn(
            flips=(torch.stack([x, y], 1) & coin[:, :2]).double(),
            scale=normal[:, 0].where(scale, 0),
            angle=angle[:, 0].where(rotation, 0),
            stretch=normal[:, 1].where(anisotropy, 0),
            axis=angle[:, 1].where(anisotropy & coin[:, 2], 0),
            shift=normal[:, 2:].where(translation[:, None], 0),
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to images: the numbers of `augmentation.affine`, all 0 where nothing does."""

    flips: Float64[Tensor, "B 2"]
    scale: Float64[Tensor, "B"]
    angle: Float64[Tensor, "B"]
    stretch: Float64[Tensor, "B"]
    axis: Float64[Tensor, "B"]
    shift: Float64[Tensor, "B 2"]

    def label(self) -> Float64[Tensor, "B 9"]:
        """What the network is told."""
        numbers = (
            self.scale,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
        )
        return torch.cat([self.flips, torch.stack(numbers, 1), self.shift], 1)

    def rows(self, rows: Tensor) -> "Drawn":
        """Some of the images."""
        return Drawn(**{name: value[rows] for name, value in vars(self).items()})

    def back(self, size: tuple[int, int]) -> Float64[Tensor, "B 2 3"]:
        """The maps after the flips, for images of this height and width."""
        numbers = {name: value for name, value in vars(self).items() if name != "flips"}
        return affine(**numbers, size=size)


@dataclass(frozen=True)
class Augmented(Batches):
    """Batches whose images are transformed, each as its number in the run has it.

    Attributes:
        batches: the images as they are.
        augmentation: what happens to them.
        seed: decides it.
        device: where it is done; by default, where they are.
    """

    batches: Batches
    augmentation: EDMAugmentation
    seed: int
    device: torch.device | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.batches.size)

    def __call__(self, images: int) -> Batch:
        batch = self.batches(images)
        x, label = self.augmentation(batch.x.to(self.device), batch.generators(self.seed, "augmentation"))
        return replace(batch, x=x, augmentation=label)


@dataclass(frozen=True)
class LabelDropout(Batches):
    """Batches some of whose labels are not told (-1), so that the network learns to answer without one, too.

    Classifier-free guidance (Ho & Salimans 2022) leads answers with a label away from answers without.

    Attributes:
        batches: with their labels.
        probability: that a row is not told its label.
        seed: decides which.
    """

    batches: Batches
    probability: float
    seed: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.batches.size)

    def __call__(self, images: int) -> Batch:
        batch = self.batches(images)
        assert batch.label is not None
        kept = torch.cat([_uniform(1, g) for g in batch.generators(self.seed, "label dropout")]) >= self.probability
        return replace(batch, label=batch.label.where(kept.to(batch.label.device), ALL))


def _uniform(n: int, generator: torch.Generator) -> Float64[Tensor, "{n}"]:
    return torch.rand(n, generator=generator, dtype=torch.float64)
