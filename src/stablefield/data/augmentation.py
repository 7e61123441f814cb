"""Augmentation of the training data, with or without an augmentation label for the network.

*Without a label* (`Mirror`): the data set becomes its images and their mirror images. The network learns E[x | x_t]
over both, so both are in the pool that references come from.

*With a label* (`EDMAugmentation`): each image of the run is transformed by a random map, and nine numbers, the
augmentation label, condition the network on it (`stablefield.augmentation`). The network learns E[x | x_t, map], and
samples are drawn with the label of no map. The pool is not transformed: targets use the label and the map.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from typing_extensions import override

from stablefield.augmentation import DIM, affine, flip, permutes, warp
from stablefield.data.batches import Batch, BatchSource
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import move

Kind = Literal["xflip", "yflip", "scale", "rotation", "anisotropy", "translation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Augmentation(ABC):
    """Base class of augmentations, which transform images before noise is added.

    Attributes:
        augment_dim: length of the augmentation label; 0 if the network gets none.
    """

    augment_dim: ClassVar[int] = 0

    @abstractmethod
    def augment_pool(self, pool: Pool) -> Pool:
        """The data set that is trained on, and that references come from.

        Args:
            pool: the data as they are.

        Raises:
            ValueError: data of this shape cannot be augmented.
        """

    def augment_batches(self, batches: BatchSource, seed: int, device: torch.device | None = None) -> BatchSource:
        """The batches of a run with their images transformed.

        Args:
            batches: batches of images as they are.
            seed: seed of the run.
            device: device that the images are transformed on; by default the one that they are on.
        """
        return batches


@dataclass(frozen=True)
class NoAugmentation(Augmentation):
    """No augmentation: the data as they are."""

    @override
    def augment_pool(self, pool: Pool) -> Pool:
        return pool


@dataclass(frozen=True)
class Mirror(Augmentation):
    """Data set of twice the size, of all images and their mirror images, without a label (EDM's --xflip)."""

    @override
    def augment_pool(self, pool: Pool) -> Pool:
        return pool.mirrored()


@dataclass(frozen=True)
class EDMAugmentation(Augmentation):
    """Random geometric augmentation with labels (Karras et al. 2022, appendix F.2).

    Half of all images are flipped in x. Each other kind is applied to an image with probability p (the y-flip with
    p / 2), with w ~ N(0, 1) and uniform angles; with probability 1/2 the axis of the anisotropy is x.

    Attributes:
        p: probability of each kind except the x-flip.
        kinds: kinds of transformations that are applied; by default all of `KINDS`.
        augment_dim: length of the augmentation label, 9.

    Raises:
        ValueError: p is not a probability, or a kind does not exist.
    """

    p: float = 0.12
    kinds: tuple[Kind, ...] = KINDS

    augment_dim: ClassVar[int] = DIM

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is a probability between 0 and 1, not {self.p}")
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"unknown kinds {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")

    @override
    def augment_pool(self, pool: Pool) -> Pool:
        if len(pool.shape) != 3:
            raise ValueError(f"only images (C, H, W) can be augmented, not data of shape {pool.shape}")
        return pool

    @override
    def augment_batches(self, batches: BatchSource, seed: int, device: torch.device | None = None) -> BatchSource:
        return AugmentedBatches(batches, self, seed, device)

    def __call__(
        self, x: Float[Tensor, "B C H W"], generators: Iterable[torch.Generator]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 9"], Float[Tensor, "B 2 3"]]:
        """Images under random maps, their augmentation labels, and their maps without flips (both on the CPU).

        Flips only permute pixels; images with the identity map stay as they are, bit for bit.

        Args:
            x: the images.
            generators: one random generator per image.
        """
        parameters = self._draw(generators)
        label, maps = parameters.augment_label().to(x.dtype), parameters.inverse_maps((x.shape[2], x.shape[3]))
        augmented = flip(x, label)
        if len(index := (~permutes(label)).nonzero().flatten()):
            maps_of_these, index = move(maps[index], x.device), move(index, x.device)
            augmented[index] = warp(augmented[index], maps_of_these)
        return augmented, label, maps

    def _draw(self, generators: Iterable[torch.Generator]) -> "_Parameters":
        """Random parameters of the transformations, from one random generator per image."""
        # every kind draws its numbers for every image, so that the draws do not depend on which kinds are applied
        pairs = [(_uniform(11, g), torch.randn(4, generator=g, dtype=torch.float64)) for g in generators]
        uniform, normal = (torch.stack(numbers) for numbers in zip(*pairs, strict=True))
        applied = uniform[:, :6] < torch.tensor([1.0 if kind == "xflip" else self.p for kind in KINDS])
        applied &= torch.tensor([kind in self.kinds for kind in KINDS])
        x, y, scale, rotation, anisotropy, translation = applied.T
        coin, angle = uniform[:, 6:9] < 0.5, (2 * uniform[:, 9:11] - 1) * torch.pi
        return _Parameters(
            flips=(torch.stack([x, y], 1) & coin[:, :2]).double(),
            scale=normal[:, 0].where(scale, 0),
            angle=angle[:, 0].where(rotation, 0),
            stretch=normal[:, 1].where(anisotropy, 0),
            axis=angle[:, 1].where(anisotropy & coin[:, 2], 0),
            shift=normal[:, 2:].where(translation[:, None], 0),
        )


@dataclass(frozen=True, eq=False)
class _Parameters:
    """Parameters of the transformations of B images (see `stablefield.augmentation`); 0 where a kind is not applied."""

    flips: Float64[Tensor, "B 2"]  # 1 for a flip in x and y
    scale: Float64[Tensor, "B"]  # w of the scaling by 2^(0.2 w)
    angle: Float64[Tensor, "B"]  # of the rotation, in radians
    stretch: Float64[Tensor, "B"]  # w of the scaling by 2^(0.2 w) along an axis and 2^(-0.2 w) across it
    axis: Float64[Tensor, "B"]  # angle of that axis
    shift: Float64[Tensor, "B 2"]  # (w_x, w_y) of the translation by 0.125 w of the width and height

    def augment_label(self) -> Float64[Tensor, "B 9"]:
        """Augmentation labels, by which the network is conditioned on the transformations."""
        numbers = (
            self.scale,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
        )
        return torch.cat([self.flips, torch.stack(numbers, 1), self.shift], 1)

    def inverse_maps(self, size: tuple[int, int]) -> Float64[Tensor, "B 2 3"]:
        """Affine maps from points of the result to points of the (flipped) image of a size, without the flips."""
        numbers = {name: value for name, value in vars(self).items() if name != "flips"}
        return affine(**numbers, size=size)


@dataclass(frozen=True)
class _ChangedBatches(BatchSource):
    """Base class of batches that are changed after they are drawn; they have the size of those that are drawn."""

    batches: BatchSource

    @property
    def size(self) -> int:  # type: ignore[override]
        """Batch size, in examples per step over all ranks."""
        return self.batches.size


@dataclass(frozen=True)
class AugmentedBatches(_ChangedBatches):
    """Batches with transformed images; the transformation of an image depends only on its number in the run.

    Attributes:
        batches: batches of images as they are.
        augmentation: the random transformations.
        seed: seed of the transformations.
        device: device that the images are transformed on; by default the one that they are on.
    """

    augmentation: EDMAugmentation
    seed: int
    device: torch.device | None = None

    @override
    def __call__(self, images: int) -> Batch:
        batch = self.batches(images)
        x = move(batch.x, self.device or batch.x.device)
        x, label, maps = self.augmentation(x, batch.generators(self.seed, "augmentation"))
        return replace(batch, x=x, augment_label=label, augment_map=maps)


@dataclass(frozen=True)
class LabelDropout(_ChangedBatches):
    """Batches in which some labels are replaced by the null label, as classifier-free guidance needs.

    The network then learns predictions with and without a label (Ho & Salimans 2022).

    Attributes:
        batches: batches with labels.
        probability: probability that an example gets the null label.
        seed: seed of these draws.
    """

    probability: float
    seed: int

    @override
    def __call__(self, images: int) -> Batch:
        batch = self.batches(images)
        assert batch.label is not None
        kept = torch.cat([_uniform(1, g) for g in batch.generators(self.seed, "label dropout")]) >= self.probability
        return replace(batch, label=batch.label.where(kept.to(batch.label.device), NULL_LABEL))


def _uniform(n: int, generator: torch.Generator) -> Float64[Tensor, "{n}"]:
    return torch.rand(n, generator=generator, dtype=torch.float64)
