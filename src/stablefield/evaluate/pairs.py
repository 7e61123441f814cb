"""Scores that compare all pairs of features: the kernel distance, and precision and recall.

The products are in float32, the sums in float64. The kernel distance is a sum of moments in float64 and of squares and
cubes of the products of centred features, which are small. The rounding of ||x||^2 - 2xy + ||y||^2 may exceed the
distance between near neighbours, so precision and recall compute distances again in float64 where it could change a
comparison: their counts are those of float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from stablefield.kernel.matmul import full_precision, prepared_for_linear
from stablefield.kernel.nearest import k_nearest, rounding, squared_distances
from stablefield.pool import draw_without_replacement
from stablefield.seeding import generator

_BLOCK = 1024
_SPARE = 5  # candidates beyond the k nearest
_PART = 64  # rows that fit the cache


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

    centre = (_mean(x) + _mean(y)) / 2

    def subset(z: Tensor) -> _Centred:
        return _centred(z, draw_without_replacement(len(z), size, draws).to(z.device), centre)

    values = torch.tensor([_discrepancy(subset(x), subset(y)) for _ in range(subsets)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(
    samples: Float[Tensor, "n F"], reference: Float[Tensor, "m F"], *, k: int = 3
) -> tuple[float, float]:
    """Precision and recall of samples (Kynkaanniemi et al. 2019).

    Precision is the fraction of samples that lie in the manifold of the reference, recall the fraction of the reference
    that lies in the manifold of the samples. The manifold of a set is the union of balls around its points, each with
    the distance to the point's k-th nearest neighbour in the set as its radius.

    The memory beyond the features is a copy of them in float32 and some blocks of 1,024 x max(n, m) numbers.

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
    centre = reference.mean(0)
    x, y = ((side - centre).float() for side in (samples, reference))
    norms = [side.square().sum(1) for side in (x, y)]
    margin = rounding(x.shape[1], max(float(norm.max()) for norm in norms))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squares = squared_distances(prepared_for_linear(-2 * x[rows]), norms[0][rows], y, norms[1])
        hits[0][rows] |= _hits(squares, radii[1], margin, samples[rows], reference, hits[0][rows])
        hits[1] |= _hits(squares.T, radii[0][rows], margin, reference, samples[rows], hits[1])
    precision, recall = (float(found.double().mean()) for found in hits)
    return precision, recall


def _radii(x: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n"]:
    """Distance of each point to its k-th nearest other point, in float64.

    One product of two blocks serves both. Points that rounding may have confused with the k-th are compared in float64.
    """
    centred = (x - x.mean(0)).float()
    norms = centred.square().sum(1)
    margin = 2 * rounding(x.shape[1], float(norms.max()))
    best = torch.full((len(x), k + _SPARE), torch.inf, device=x.device)
    index = torch.zeros(best.shape, dtype=torch.int64, device=x.device)
    starts = range(0, len(x), _BLOCK)
    for first, second in ((a, b) for a in starts for b in starts if a <= b):
        one, two = slice(first, first + _BLOCK), slice(second, second + _BLOCK)
        squares = squared_distances(prepared_for_linear(-2 * centred[one]), norms[one], centred[two], norms[two])
        if first == second:
            squares.fill_diagonal_(torch.inf)
        else:
            _keep_smallest(best[two], index[two], squares.T, first)
        _keep_smallest(best[one], index[one], squares, second)
    limit = best[:, k - 1 : k].clone()
    near = (best - limit).abs() <= margin
    exact = torch.where(best < limit, -torch.inf, torch.inf).double()
    for row, column in (part.unbind(1) for part in near.nonzero().split(_BLOCK)):
        exact[row, column] = (x[row].double() - x[index[row, column]].double()).norm(dim=1)
    radii = exact.sort(1).values[:, k - 1]
    for start in range(0, len(unsure := near[:, -1].nonzero().squeeze(1)), _BLOCK):  # more may be as near as the last
        rows = unsure[start : start + _BLOCK]
        found, _ = k_nearest(
            x[rows], lambda size, _: x.split(size), lambda at: x[at], k, exclude=rows, dtype=torch.float64
        )
        radii[rows] = found[:, -1]
    return radii


def _keep_smallest(
    best: Float[Tensor, "n k"], index: Int[Tensor, "n k"], squares: Float[Tensor, "n m"], start: int
) -> None:
    """Replace the smallest values of each row, and their columns, by the smallest of these and of a block of columns.

    Args:
        best: the smallest values so far, ascending; changed in place, as is `index`.
        index: their columns.
        squares: the block.
        start: its first column.
    """
    found, at = squares.topk(min(best.shape[1], squares.shape[1]), largest=False)
    found, kept = torch.cat([best, found], 1).topk(best.shape[1], largest=False)
    index.copy_(torch.cat([index, at + start], 1).gather(1, kept))
    best.copy_(found)


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


class _Centred(NamedTuple):
    """Vectors z = u + c around a centre c.

    Attributes:
        u: the differences, in float32 if the vectors are.
        offset: (u . c + c . c / 2) / F + 1/2 of each, in float64.
        norm: u . u / F of each, in float64.
    """

    u: Float[Tensor, "n F"]
    offset: Float[Tensor, "n"]
    norm: Float[Tensor, "n"]

    def moments(self) -> Float[Tensor, "3 F"]:
        """Sum of offset^k u, for k = 0, 1 and 2."""
        powers = torch.stack([self.offset**k for k in range(3)])
        moments = powers.new_zeros(3, self.u.shape[1])
        for part, weights in zip(self.u.split(_PART), powers.split(_PART, 1), strict=True):
            moments.addmm_(weights, part.double())
        return moments


def _mean(z: Float[Tensor, "n F"]) -> Float[Tensor, "F"]:
    """Mean of vectors in float64. Differences from a mean in float32 would often be ties, and round alike."""
    return torch.stack([part.sum(0).double() for part in z.split(_PART)]).sum(0) / len(z)


def _centred(z: Float[Tensor, "m F"], index: Int[Tensor, "n"], centre: Float[Tensor, "F"]) -> _Centred:
    """Some of the vectors around a centre."""
    features = z.shape[1]
    u, offset, norm = z.new_empty(len(index), features, dtype=torch.promote_types(z.dtype, torch.float32)), [], []
    for part, rounded in zip(index.split(_PART), u.split(_PART), strict=True):
        difference = z[part] - centre
        rounded.copy_(difference)
        offset.append((difference @ centre + centre @ centre / 2) / features + 0.5)
        norm.append(torch.linalg.vector_norm(difference, dim=1).square() / features)
    return _Centred(u, torch.cat(offset), torch.cat(norm))


@full_precision()
def _discrepancy(x: _Centred, y: _Centred) -> float:
    n = len(x.norm)
    moments = x.moments(), y.moments()
    within = sum(_kernel_sum(side, side, own, own) for side, own in zip((x, y), moments, strict=True))
    return within / (n * (n - 1)) - 2 * _kernel_sum(x, y, *moments) / n**2


def _kernel_sum(x: _Centred, y: _Centred, x_moments: Tensor, y_moments: Tensor) -> float:
    """Sum of (x . y / F + 1)^3 over all pairs, without pairs of a vector with itself.

    Around the centre, x . y / F + 1 = s + p, where s is the sum of both offsets and p = u . v / F. Of (s + p)^3, s^3 +
    3 s^2 p sums to products of moments, in float64. Only 3 s p^2 + p^3 needs p of each pair, in float32: where sets
    are alike, these terms are small, and so is their rounding.
    """
    a, b, features = x.offset, y.offset, x.u.shape[1]
    one, two = ([offset.pow(k).sum() for k in range(4)] for offset in (a, b))
    total: Tensor = torch.stack([c * one[k] * two[3 - k] for k, c in enumerate((1, 3, 3, 1))]).sum()
    total += 3 / features * sum(c * (x_moments[k] @ y_moments[2 - k]) for k, c in enumerate((1, 2, 1)))
    products = linear(prepared_for_linear(x.u), y.u).to_dense()
    if x is y:
        products.fill_diagonal_(0)
        total -= (8 * a**3 + 12 * a**2 * x.norm).sum()
    largest = float(torch.maximum(x.norm.max(), y.norm.max())) or 1.0  # of p; cubes of large features would overflow
    for part, offset in zip(products.split(_PART), a.split(_PART), strict=True):
        p = part.div_(features * largest)
        square = p.square()
        total += 3 * largest**2 * (square.sum(1).double() @ offset + square.sum(0).double() @ b)
        total += largest**3 * torch.dot(square.flatten(), p.flatten()).double()
    return float(total)
