"""Whether samples are copies: how near they are to the training data, against how near fresh data are.

The nearest training image of a sample is compared with that of images the model has not seen. Without any, training
images stand in, each with itself left out: an image against the N - 1 others has the same law as a fresh one against
N - 1 training images. A sample is counted as a copy if its nearest training image is nearer than a third of the way to
the second nearest (Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize").

A ratio of distances below one alone proves no copying: blurred images are near to everything. Read it with the share
of copies, and look at the pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.evaluate.pairs import refuse_not_finite, squared_distances
from stablefield.neighbours import keep_least
from stablefield.reference import ALL, Pool

COPY = 1 / 3
BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest two members of a pool, to each of some points.

    Attributes:
        distance: to both, the nearer first; Euclidean, in units of the data (bytes are [-1, 1]), float64.
        index: which they are.

    Raises:
        ValueError: a distance that is not finite.
    """

    distance: Float[Tensor, "n 2"]
    index: Int[Tensor, "n 2"]

    def __post_init__(self) -> None:
        refuse_not_finite("distances", self.distance)

    def copies(self) -> Bool[Tensor, "n"]:
        """Whether the first is at most a third as far as the second."""
        return self.distance[:, 0] <= COPY * self.distance[:, 1]


def nearest(x: Float[Tensor, "n *D"], pool: Pool, *, itself: Int[Tensor, "n"] | None = None) -> Nearest:
    """The nearest two members of a pool to each point.

    Candidates are found by matrix products in float64, block by block; their distances are then taken from
    differences, so that a copy is at distance zero.

    Args:
        x: the points.
        pool: the data, with members like the points.
        itself: which member each point is, if they are: it is left out.

    Raises:
        ValueError: a pool with too few members, or of another shape; points that are not finite.
    """
    refuse_not_finite("points", x)
    if len(pool) < 2 + (itself is not None) or pool.shape != tuple(x.shape[1:]):
        raise ValueError(f"points of shape {tuple(x.shape[1:])} have no two nearest in {pool}")
    centre = x.flatten(1).double().mean(0)
    rows, squares = x.flatten(1).double() - centre, x.new_empty(len(x), 0, dtype=torch.float64)
    index = squares.long()
    start = 0
    for block in pool.blocks(ALL, BLOCK):
        new = squared_distances(rows, block.to(rows).flatten(1) - centre)
        if itself is not None:
            here = (itself >= start) & (itself < start + len(block))
            new[here.to(x.device), (itself[here] - start).to(x.device)] = torch.inf
        squares, index = keep_least(squares, index, new, start, 2)
        start += len(block)
    members = pool.take(index.flatten().cpu()).to(rows).flatten(1).unflatten(0, (len(x), 2))
    distance, order = (x.flatten(1).double()[:, None] - members).norm(dim=2).sort(1)
    return Nearest(distance.cpu(), index.gather(1, order).cpu())


def together(parts: Iterable[Nearest]) -> Nearest:
    """One after the other."""
    return reduce(
        lambda a, b: Nearest(torch.cat([a.distance, b.distance]), torch.cat([a.index, b.index])),
        parts,
    )


def memorised(samples: Nearest, fresh: Nearest) -> dict[str, float]:
    """Medians of the distance to the nearest training image, their ratio, and shares of copies."""
    near, usual = (float(found.distance[:, 0].median()) for found in (samples, fresh))
    return {
        "nearest": near,
        "nearest_held_out": usual,
        **({"nearest_ratio": near / usual} if usual else {}),  # most of the data may be there twice
        "copies": float(samples.copies().double().mean()),
        "copies_held_out": float(fresh.copies().double().mean()),
    }
