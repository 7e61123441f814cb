"""Scores that compare all pairs of features: the kernel distance, and precision and recall.

Both are computed in float64. In float32 the rounding of ||x||^2 - 2xy + ||y||^2 exceeds the distance between near
neighbours, which precision and recall depend on.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stablefield.pool import draw_without_replacement
from stablefield.seeding import generator

__all__ = ["check_finite", "kernel_distance", "precision_recall", "squared_distances"]

_BLOCK = 1024


def check_finite(name: str, *tensors: Tensor) -> None:
    """Refuse NaN and infinite values, which comparisons of distances would silently count as near or as far.

    Args:
        name: what the values are, in the plural; the error begins with it.
        tensors: the values.

    Raises:
        ValueError: some values are NaN or infinite.
    """
    if bad := sum(int((~tensor.isfinite()).sum()) for tensor in tensors):
        raise ValueError(f"{name} must be finite, but {bad:,} of these numbers are not")


def squared_distances(x: Float[Tensor, "n F"], y: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    """Squared Euclidean distances ||x - y||^2 of all pairs, set to zero where they are zero up to rounding.

    Args:
        x: feature vectors, (n, F), float64; precise if their mean is near zero.
        y: feature vectors, (m, F), float64.
    """
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = scale - 2 * x @ y.T
    return squares.masked_fill(squares <= 1e-14 * scale, 0.0)  # NaN stays NaN


def kernel_distance(
    x: Float[Tensor, "n F"], y: Float[Tensor, "m F"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel (x . y / F + 1)^3; with Inception features, KID.

    The estimate may be negative (Binkowski et al. 2018).

    Args:
        x: features of one set, (n, F).
        y: features of the other, (m, F).
        subsets: number of random subsets to average over; one if a subset would hold everything.
        size: number of features from each set in a subset, at most n and m.
        seed: seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: there are fewer than two features in a set, or some are not finite.
    """
    check_finite("features", x, y)
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 features on each side, not {len(x)} and {len(y)}")
    draws = generator(seed, "kernel distance")
    if size == len(x) == len(y):
        subsets = 1

    def subset(features: Tensor) -> Tensor:
        return features[draw_without_replacement(len(features), size, draws).to(features.device)].double()

    values = torch.tensor([_discrepancy(subset(x), subset(y)) for _ in range(subsets)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(
    samples: Float[Tensor, "n F"], reference: Float[Tensor, "m F"], *, k: int = 3
) -> tuple[float, float]:
    """Precision and recall of samples (Kynkaanniemi et al. 2019).

    Precision is the fraction of samples that lie in the manifold of the reference, recall the fraction of the reference
    that lies in the manifold of the samples. The manifold of a set is the union of balls around its points, each with
    the distance to the point's k-th nearest neighbour in the set as its radius.

    Args:
        samples: features of the samples, (n, F).
        reference: features of the reference, (m, F).
        k: number of the neighbour that decides the radii.

    Raises:
        ValueError: a set has k features or fewer, or some are not finite.
    """
    check_finite("features", samples, reference)
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} features on a side: {len(samples)}, {len(reference)}")
    centre = reference.double().mean(0)
    samples, reference = samples.double() - centre, reference.double() - centre
    precision = _in_manifold(samples, reference, _squared_radii(reference, k))
    recall = _in_manifold(reference, samples, _squared_radii(samples, k))
    return float(precision.double().mean()), float(recall.double().mean())


def _squared_radii(x: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n"]:
    """Squared distance of each point to its k-th nearest other point."""
    radii = []
    for start in range(0, len(x), _BLOCK):
        squares = squared_distances(x[start : start + _BLOCK], x)
        own = torch.arange(len(squares), device=x.device)
        squares[own, own + start] = torch.inf
        radii.append(squares.kthvalue(k, 1).values)
    return torch.cat(radii)


def _in_manifold(x: Float[Tensor, "n F"], points: Float[Tensor, "m F"], radii: Float[Tensor, "m"]) -> Bool[Tensor, "n"]:
    """True for each x in the ball of at least one point, whose squared radii are given."""
    return torch.cat([(squared_distances(block, points) <= radii).any(1) for block in x.split(_BLOCK)])


def _discrepancy(x: Float[Tensor, "n F"], y: Float[Tensor, "n F"]) -> float:
    n = len(x)
    within = sum(_kernel(z, z).sum() - _kernel_diagonal(z).sum() for z in (x, y)) / (n * (n - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x: Tensor) -> Float[Tensor, "n"]:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
