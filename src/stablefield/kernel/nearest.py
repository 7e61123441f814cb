"""The k nearest data points, streamed: candidates from a float32 product, distances from float64 differences.

The product ||x||^2 - 2xy + ||y||^2 around the mean of x rounds by at most `rounding`. A query is searched again in
float64 if a data point that was passed over could be nearer than its k-th candidate, so the result is that of float64.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.matmul import full_precision

__all__ = ["k_nearest", "rounding"]

_SPARE = 5  # candidates beyond the k nearest


def rounding(features: int, largest: float) -> float:
    """Bound of the rounding of a squared distance that is computed from a float32 product.

    Args:
        features: dimension of the vectors, D.
        largest: largest squared norm of the vectors.
    """
    return 4 * (features + 8) * 2.0**-24 * largest


@full_precision()
def k_nearest(
    x: Float[Tensor, "n D"],
    blocks: Callable[[], Iterable[Float[Tensor, "m D"]]],
    take: Callable[[Int[Tensor, "i"]], Float[Tensor, "i D"]],
    k: int,
    *,
    exclude: Int[Tensor, "n"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k nearest data points of each query, and their distances.

    Memory is that of x and of (n, m) distances for blocks of m data points.

    Args:
        x: the queries.
        blocks: returns an iterator over the data, (m, D) each.
        take: returns the data points of some indices.
        k: number of neighbours; the data must have as many, besides the excluded ones.
        exclude: index of a data point that is left out for each query.
        dtype: precision in which candidates are searched.

    Returns:
        Euclidean distances, ascending, in float64, and the indices of the data points, on the device of x.
    """
    centre = x.double().mean(0).float()  # exact in any precision, so that subtracting it rounds the difference only

    def centred(z: Tensor) -> Tensor:
        return (z.to(torch.promote_types(z.dtype, dtype)) - centre).to(dtype)

    queries = centred(x)
    norm = queries.square().sum(1)
    best, index = queries.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    largest, start = float(norm.max()), 0
    for block in blocks():
        y = centred(block.to(x.device))
        norms = y.square().sum(1)
        largest = max(largest, float(norms.max()))
        squares = torch.addmm(norm[:, None] + norms, queries, y.T, alpha=-2)
        if exclude is not None:
            inside = ((exclude >= start) & (exclude < start + len(y))).to(x.device)
            squares[inside, exclude.to(x.device)[inside] - start] = torch.inf
        found, at = squares.topk(min(k + _SPARE, len(y)), largest=False)
        both = torch.cat([best, found], 1)
        best, kept = both.topk(min(k + _SPARE, both.shape[1]), largest=False)
        index = torch.cat([index, at + start], 1).gather(1, kept)
        start += len(y)
    candidates = take(index.flatten().cpu()).to(x.device).double().unflatten(0, index.shape)
    exact = (candidates - x.double()[:, None]).norm(dim=2).masked_fill(best.isinf(), torch.inf)
    distance, order = exact.sort(1)
    distance, index = distance[:, :k], index.gather(1, order)[:, :k]
    if dtype == torch.float32 and best.shape[1] < start:
        margin = 2 * rounding(x.shape[1], largest)
        unsure = best[:, -1].double() - margin < distance[:, -1].square()
        if unsure.any():
            left_out = None if exclude is None else exclude[unsure.to(exclude.device)]
            again = k_nearest(x[unsure], blocks, take, k, exclude=left_out, dtype=torch.float64)
            distance[unsure], index[unsure] = again
    return distance, index
