"""Scores that compare all pairs of features: the kernel distance, and precision and recall.

The products are in float32, the sums in float64. In float32 the rounding of ||x||^2 - 2xy + ||y||^2 may exceed the
distance between near neighbours, so precision and recall compute distances again in float64 where it could change a
comparison: their counts are those of float64.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stablefield.kernel.matmul import full_precision
from stablefield.kernel.nearest import k_nearest, rounding
from stablefield.pool import draw_without_replacement
from stablefield.seeding import generator

_BLOCK = 1024


def check_finite(name: str, *tensors: Tensor) -> None:
    """Refuse NaN and infinite values, which comparisons of distances would silently count as near or as far.

    Args:
        name: what the values are, in the plural; the error begins with it.
        tensors: the values.

    Raises:
        ValueError: some values are NaN or infinite.
    """
    if all(tensor.sum().isfinite() for tensor in tensors):
        return  # a sum with NaN or infinite terms is not finite either
    if bad := sum(int((~tensor.isfinite()).sum()) for tensor in tensors):
        raise ValueError(f"{name} must be finite, but {bad:,} of these numbers are not")


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
        return features[draw_without_replacement(len(features), size, draws).to(features.device)]

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
    radii = [_radii(x, k) for x in (samples, reference)]
    hits = [torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (samples, reference)]
    centre = reference.double().mean(0)
    x, y = ((side.double() - centre).float() for side in (samples, reference))
    norms = [side.square().sum(1) for side in (x, y)]
    margin = rounding(x.shape[1], max(float(norm.max()) for norm in norms))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squares = torch.addmm(norms[0][rows, None] + norms[1], x[rows], y.T, alpha=-2)
        hits[0][rows] |= _hits(squares, radii[1], margin, samples[rows], reference, hits[0][rows])
        hits[1] |= _hits(squares.T, radii[0][rows], margin, reference, samples[rows], hits[1])
    precision, recall = (float(found.double().mean()) for found in hits)
    return precision, recall


def _radii(x: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n"]:
    """Distance of each point to its k-th nearest other point."""
    index, parts = torch.arange(len(x)), []
    for rows in index.split(_BLOCK):
        found, _ = k_nearest(x[rows], lambda size, _: x.split(size), lambda at: x[at], k, exclude=rows)
        parts.append(found[:, -1])
    return torch.cat(parts)


def _hits(
    squares: Float[Tensor, "n m"],
    radii: Float[Tensor, "m"],
    margin: float,
    x: Float[Tensor, "n F"],
    centres: Float[Tensor, "m F"],
    known: Bool[Tensor, "n"],
) -> Bool[Tensor, "n"]:
    """True for each x in a ball; distances within the margin of a radius are computed again in float64."""
    limits = radii.square()
    inside = (squares <= (limits - margin).float()).any(1)
    rows = (~(inside | known)).nonzero().squeeze(1)
    near = squares[rows] <= (limits + 2 * margin).float()
    for i in near.any(1).nonzero().squeeze(1).tolist():
        row, some = rows[i], near[i]
        distance = (centres[some].double() - x[row].double()).norm(dim=1)
        inside[row] = bool((distance <= radii[some]).any())
    return inside


@full_precision()
def _discrepancy(x: Float[Tensor, "n F"], y: Float[Tensor, "n F"]) -> float:
    n = len(x)
    within = sum(_kernel_sum(_gram(z), z.shape[1]) - _kernel_sum(_squares(z), z.shape[1]) for z in (x, y))
    return within / (n * (n - 1)) - 2 * _kernel_sum(x @ y.T, x.shape[1]) / n**2


def _gram(x: Float[Tensor, "n F"]) -> Float[Tensor, "n n"]:
    """Inner products of all pairs; numpy computes half of them, and mirrors it."""
    return torch.from_numpy(x.numpy() @ x.numpy().T) if x.device.type == "cpu" else x @ x.T


def _squares(x: Float[Tensor, "n F"]) -> Float[Tensor, "n"]:
    return x.square().sum(1)


def _kernel_sum(products: Float[Tensor, "..."], features: int) -> float:
    """Sum of (product / F + 1)^3 in float64."""
    total = 0.0
    for part in products.flatten().split(2**16):  # parts that fit the processor's cache
        base = part.double().div_(features).add_(1)
        total += float(torch.dot(base.square(), base))
    return total
