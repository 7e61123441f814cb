"""What needs every pair of features: the kernel distance, and precision with recall.

Both are in float64. In float32 the distance of near neighbours drowns in the rounding of ||x||^2 - 2xy + ||y||^2, and
near neighbours are what these measures look at.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stablefield.reference import distinct
from stablefield.seeding import generator

BLOCK = 1024


def refuse_not_finite(what: str, *sides: Tensor) -> None:
    """Refuse numbers that comparisons would count as far apart, or as near.

    Raises:
        ValueError: some are nan or infinite.
    """
    if bad := sum(int((~side.isfinite()).sum()) for side in sides):
        raise ValueError(f"{what} must be finite, but {bad:,} of these numbers are not")


def squared_distances(x: Float[Tensor, "n F"], y: Float[Tensor, "m F"]) -> Float[Tensor, "n m"]:
    """||x - y||^2 between all rows, zero where it is zero to rounding; float64, best with a mean near zero."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = scale - 2 * x @ y.T
    return squares.masked_fill(squares <= 1e-14 * scale, 0.0)  # nan stays what it is


def kernel_distance(
    x: Float[Tensor, "n F"], y: Float[Tensor, "m F"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The squared maximum mean discrepancy under the kernel (x . y / F + 1)^3, unbiased; with Inception it is KID.

    The mean over subsets, and the standard deviation over them (Binkowski et al. 2018). It may be below zero.

    Args:
        subsets: how many to average over; one, if a subset would be all.
        size: of each, at most as many as there are.
        seed: decides the subsets.

    Raises:
        ValueError: fewer than two features on a side, or some that are not finite.
    """
    refuse_not_finite("features", x, y)
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 features on each side, not {len(x)} and {len(y)}")
    source = generator(seed, "kernel distance")
    if size == len(x) == len(y):
        subsets = 1

    def part(rows: Tensor) -> Tensor:
        return rows[distinct(len(rows), size, source).to(rows.device)].double()

    each = torch.tensor([_discrepancy(part(x), part(y)) for _ in range(subsets)], dtype=torch.float64)
    return float(each.mean()), float(each.std(correction=0))


def precision_recall(
    samples: Float[Tensor, "n F"], reference: Float[Tensor, "m F"], *, k: int = 3
) -> tuple[float, float]:
    """The share of samples among the reference, and of the reference among the samples (Kynkaanniemi et al. 2019).

    A point is among others if it is as near to one of them as that one's k-th nearest neighbour.

    Raises:
        ValueError: no more than k features on a side, or some that are not finite.
    """
    refuse_not_finite("features", samples, reference)
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} features on a side: {len(samples)}, {len(reference)}")
    centre = reference.double().mean(0)
    samples, reference = samples.double() - centre, reference.double() - centre
    precision = _among(samples, reference, _radii(reference, k))
    recall = _among(reference, samples, _radii(samples, k))
    return float(precision.double().mean()), float(recall.double().mean())


def _radii(x: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n"]:
    """Squared distance of each to its k-th nearest other."""
    radii = []
    for start in range(0, len(x), BLOCK):
        squares = squared_distances(x[start : start + BLOCK], x)
        own = torch.arange(len(squares), device=x.device)
        squares[own, own + start] = torch.inf
        radii.append(squares.kthvalue(k, 1).values)
    return torch.cat(radii)


def _among(x: Float[Tensor, "n F"], others: Float[Tensor, "m F"], radii: Float[Tensor, "m"]) -> Bool[Tensor, "n"]:
    return torch.cat([(squared_distances(part, others) <= radii).any(1) for part in x.split(BLOCK)])


def _discrepancy(x: Float[Tensor, "n F"], y: Float[Tensor, "n F"]) -> float:
    n = len(x)
    within = sum(_kernel(z, z).sum() - _kernel_of_each(z).sum() for z in (x, y)) / (n * (n - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_each(x: Tensor) -> Float[Tensor, "n"]:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
