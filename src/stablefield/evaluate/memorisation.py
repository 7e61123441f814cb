"""Memorisation: the distance of samples to their nearest training image, compared with that of held-out images.

Without held-out images, the training images take their place, each compared with all others: an image and the other
N - 1 have the same distribution as a held-out image and N - 1 training images. A sample counts as a copy if its nearest
training image is at most a third as far away as the second nearest (Yoon et al. 2023, "Diffusion Probabilistic Models
Generalize when They Fail to Memorize").

A ratio of distances below one does not prove copying: blurred images are near to everything. Read it together with the
fraction of copies, and look at the pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.evaluate.pairs import check_finite
from stablefield.kernel.nearest import k_nearest
from stablefield.pool import NULL_LABEL, Pool

_COPY_RATIO = 1 / 3


@dataclass(frozen=True, eq=False)
class NearestMatches:
    """The two nearest data points of a pool for each of n samples.

    Attributes:
        distance: Euclidean distances, (n, 2), ascending, in float64 and in units of the data (bytes are [-1, 1]).
        index: indices of these data points in the pool, (n, 2).

    Raises:
        ValueError: a distance is not finite.
    """

    distance: Float[Tensor, "n 2"]
    index: Int[Tensor, "n 2"]

    def __post_init__(self) -> None:
        check_finite("distances", self.distance)

    @classmethod
    def concatenate(cls, parts: Iterable["NearestMatches"]) -> "NearestMatches":
        """Neighbours of all samples of the parts, in order.

        Args:
            parts: at least one.
        """
        parts = list(parts)
        return cls(torch.cat([part.distance for part in parts]), torch.cat([part.index for part in parts]))

    def copies(self) -> Bool[Tensor, "n"]:
        """True for each sample whose nearest data point is at most a third as far away as the second nearest."""
        return self.distance[:, 0] <= _COPY_RATIO * self.distance[:, 1]


def find_nearest(x: Float[Tensor, "n *D"], pool: Pool, *, exclude: Int[Tensor, "n"] | None = None) -> NearestMatches:
    """The two nearest data points of a pool for each sample.

    Their distances are computed from differences in float64, so that a copy has distance zero.

    Args:
        x: the samples, (n, *D).
        pool: the data, of the same shape.
        exclude: index of a data point that is left out for each sample, which is the sample itself for samples from
            the pool.

    Raises:
        ValueError: the pool has too few data points or another shape, or samples are not finite.
    """
    check_finite("samples", x)
    if len(pool) < 2 + (exclude is not None) or pool.shape != tuple(x.shape[1:]):
        raise ValueError(f"there are no two nearest neighbours of samples {tuple(x.shape[1:])} in {pool}")
    distance, index = k_nearest(x, partial(pool.blocks, NULL_LABEL), pool.take, 2, exclude=exclude)
    return NearestMatches(distance.cpu(), index.cpu())


def memorisation_scores(samples: NearestMatches, held_out: NearestMatches) -> dict[str, float]:
    """Median distances to the nearest training image, their ratio, and fractions of copies.

    Args:
        samples: neighbours of samples among the training images.
        held_out: neighbours of held-out images, or of the training images themselves.

    Returns:
        "nearest_distance" and "nearest_distance_held_out": median distances; "nearest_ratio": their quotient, which is
        missing if the second is zero (most of the data are duplicates); "copies" and "copies_held_out": fractions of
        copies.
    """
    distance, distance_held_out = (float(found.distance[:, 0].median()) for found in (samples, held_out))
    return {
        "nearest_distance": distance,
        "nearest_distance_held_out": distance_held_out,
        **({"nearest_ratio": distance / distance_held_out} if distance_held_out else {}),
        "copies": float(samples.copies().double().mean()),
        "copies_held_out": float(held_out.copies().double().mean()),
    }
