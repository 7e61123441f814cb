"""Scores that compare all pairs of features: the kernel distance, and precision and recall.

The products are in float32, the sums in float64. For the kernel distance features are centred, so that products are
small, and the mean of the products is that of float64. The rounding of ||x||^2 - 2xy + ||y||^2 may exceed the distance
between near neighbours, so precision and recall compute distances again in float64 where it could change a comparison:
their counts are those of float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.kernel.matmul import full_precision
from stablefield.kernel.nearest import k_nearest, rounding
from stablefield.pool import draw_without_replacement
from stablefield.seeding import generator

_BLOCK = 1024
_SPARE = 5  # candidates beyond the k nearest


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

    centre = (x.mean(0) + y.mean(0)).double() / 2

    def subset(features: Tensor) -> _Centred:
        return _centred(features, draw_without_replacement(len(features), size, draws).to(features.device), centre)

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
        squares = torch.addmm(norms[0][rows, None] + norms[1], x[rows], y.T, alpha=-2)
        hits[0][rows] |= _hits(squares, radii[1], margin, samples[rows], reference, hits[0][rows])
        hits[1] |= _hits(squares.T, radii[0][rows], margin, reference, samples[rows], hits[1])
    precision, recall = (float(found.double().mean()) for found in hits)
    return precision, recall


@full_precision()
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
        squares = torch.addmm(norms[one, None] + norms[two], centred[one], centred[two].T, alpha=-2)
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
        difference: u, rounded to the type of z.
        total: sum of u.
        inner: u . c + c . c / 2 of each.
        norm: z . z of each.
    """

    difference: Float[Tensor, "n F"]
    total: Float[Tensor, "F"]
    inner: Float[Tensor, "n"]
    norm: Float[Tensor, "n"]


def _centred(z: Float[Tensor, "m F"], index: Int[Tensor, "n"], centre: Float[Tensor, "F"]) -> _Centred:
    """Some of the vectors around a centre."""
    difference, total, inner, norm = z.new_empty(len(index), z.shape[1]), torch.zeros_like(centre), [], []
    for part, rounded in zip(index.split(64), difference.split(64), strict=True):  # parts that fit the cache
        u = z[part].double().sub_(centre)
        rounded.copy_(u)
        total += u.sum(0)
        inner.append(u @ centre + centre @ centre / 2)
        norm.append(torch.linalg.vector_norm(u, dim=1).square() + 2 * inner[-1])
    return _Centred(difference, total, torch.cat(inner), torch.cat(norm))


@full_precision()
def _discrepancy(x: _Centred, y: _Centred) -> float:
    n, features = x.difference.shape
    own = sum(float((side.norm / features + 1).pow(3).sum()) for side in (x, y))
    return (_kernel_sum(x, x) + _kernel_sum(y, y) - own) / (n * (n - 1)) - 2 * _kernel_sum(x, y) / n**2


def _kernel_sum(x: _Centred, y: _Centred) -> float:
    """Sum of (x . y / F + 1)^3 over all pairs.

    With u = x - c and v = y - c around the centre c, x . y = u . v + u . c + c . v + c . c. Only u . v, which is small,
    is computed in the precision of the features; the mean of its rounding is known from the sums of u and v, and is
    subtracted. Without this, the rounding of float32 exceeds the distance of sets that are alike.
    """
    features = len(x.total)
    products = _gram(x.difference) if x is y else x.difference @ y.difference.T
    rounding = (products.sum(1).double().sum() - x.total @ y.total) / products.numel()
    rows, columns = x.inner / features, (y.inner - rounding) / features + 1
    total = 0.0
    for part, row in zip(products.split(64), rows[:, None].split(64), strict=True):
        base = part.double().div_(features).add_(row).add_(columns).flatten()
        total += float(torch.dot(base.square(), base))
    return total


def _gram(x: Float[Tensor, "n F"]) -> Float[Tensor, "n n"]:
    """Inner products of all pairs; numpy computes half of them, and mirrors it."""
    return torch.from_numpy(x.numpy() @ x.numpy().T) if x.device.type == "cpu" else x @ x.T
