"""The estimator of the published EDM-STF runs, whose references have augmentation maps of their own. It is biased."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, chunk_size
from stablefield.kernel.gaussian import stream
from stablefield.pool import NULL_LABEL, Pool
from stablefield.process import NoisyBatch
from stablefield.seeding import generator as generator_of
from stablefield.targets.base import TargetEstimator, indices_of, refuse_non_finite


@runtime_checkable
class ImageAugmentation(Protocol):
    """Random maps of images with augmentation labels, such as `stablefield.data.EDMAugmentation`.

    Attributes:
        augment_dim: length of the augmentation label.
    """

    augment_dim: Any

    def __call__(
        self, x: Float[Tensor, "B C H W"], generators: Iterable[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images under random maps; the labels and maps that are returned with them are not used.

        Args:
            x: the images.
            generators: one random generator per image.
        """


@dataclass(frozen=True)
class PublishedSTFTarget(TargetEstimator):
    """STF as in the published EDM-STF runs: references have random maps of their own, so the target is biased.

    This is what the code of Xu, Tong & Jaakkola 2023 does. The network is given the map of the example, but those of
    its references are ignored: the mean tends to E[x | x_t] over all maps, where the network should learn
    E[x | x_t, map]. It exists to test published results; `STFTarget` with `augmented_size` is the unbiased estimator.
    Only for data without class labels.

    Attributes:
        pool: the data.
        size: number of candidates in the support, including the source; at most the number of data points.
        augmentation: the random maps.

    Raises:
        ValueError: a size below 1, or no augmentation with labels.
    """

    pool: Pool
    size: int = 1024
    augmentation: ImageAugmentation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 (the source alone), not {self.size}")
        if self.augmentation is None:
            raise ValueError(
                "stf-published transforms each reference by a random map and needs augmentation.kind=edm; without "
                "augmentation use stf"
            )

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        if noisy.label is not None and (noisy.label != NULL_LABEL).any():
            raise ValueError("stf-published is defined without labels; set training.conditional=false, or use stf")
        indices_of(noisy, self.pool)  # refuses examples of another shape
        seed = int(torch.randint(2**62, (), generator=generator))
        drawn = self.pool.draw(max(0, min(self.size, len(self.pool)) - 1), NULL_LABEL, generator_of(seed, NULL_LABEL))
        blocks = (
            (self._augmented(part, seed, noisy.x), None) for part in filter(len, drawn.split(chunk_size(noisy.x_t)))
        )
        return stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha, source=noisy.x)

    @override
    def check(self, noisy: NoisyBatch) -> None:
        refuse_non_finite(noisy)

    def _augmented(self, index: Int[Tensor, "n"], seed: int, like: Tensor) -> Tensor:
        """Data points under the maps that this step has drawn for them."""
        assert self.augmentation is not None
        generators = (generator_of(seed, "augmentation", number) for number in index.tolist())
        return self.augmentation(self.pool.take(index, like.device).to(like.dtype), generators)[0]
