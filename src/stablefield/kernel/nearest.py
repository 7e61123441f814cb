"""The k nearest data points, streamed: candidates from a matrix product, distances from float64 differences.

A product ||x||^2 - 2xy + ||y||^2 in float32 around the mean of x rounds by at most `rounding`. A query is searched
again in float64 if a data point that was passed over could be nearer than its k-th candidate, so the result is that of
float64.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from stablefield.kernel.accumulator import chunk_size, float64_device
from stablefield.kernel.matmul import full_precision, prepared_for_linear

# (data points per block, device) -> blocks of the data, (m, *D)
Blocks = Callable[[int, torch.device], Iterable[Tensor]]

_SPARE = 5  # candidates beyond the k nearest


def rounding(features: int, largest: float) -> float:
    """Bound of the rounding of a squared distance that is computed from a float32 product.

    Args:
        features: dimension of the vectors, D.
        largest: largest squared norm of the vectors.
    """
    return 4 * (features + 8) * 2.0**-24 * largest


@full_precision()
def squared_distances(
    minus_2x: Tensor, norms: Float[Tensor, "n"], y: Float[Tensor, "m D"], y_norms: Float[Tensor, "m"]
) -> Float[Tensor, "n m"]:
    """Squared distances ||x||^2 - 2xy + ||y||^2 of all pairs, in the precision of the vectors.

    Args:
        minus_2x: -2 x, (n, D), as returned by `prepared_for_linear`.
        norms: squared norms of x.
        y: the other vectors.
        y_norms: their squared norms.
    """
    return linear(minus_2x, y, y_norms).to_dense().add_(norms[:, None])


@full_precision()
def nearest_candidates(
    x: Float[Tensor, "n *D"],
    blocks: Blocks,
    k: int,
    *,
    exclude: Int[Tensor, "n"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "n j"], Int[Tensor, "n j"], Float[Tensor, ""]]:
    """The k nearest data points of each query as products in some precision tell. The host never waits for a GPU.

    Args:
        x: the queries.
        blocks: returns blocks of the data, of a size and preferably on a device.
        k: number of candidates; all data where there are fewer.
        exclude: index of a data point that is left out for each query: at an infinite distance.
        dtype: precision of the products.

    Returns:
        Squared distances, ascending, the indices of the data points, and the largest squared norm that was rounded; on
        the device of x if that supports float64, else on the CPU.
    """
    x = x.to(float64_device(x.device)).flatten(1)
    centre = x.double().mean(0).float()  # exact in any precision, so that subtracting it rounds the difference only

    def centred(z: Tensor) -> Tensor:
        return (z.to(torch.promote_types(z.dtype, dtype)) - centre).to(dtype)

    queries = centred(x)
    norm, minus_2x = queries.square().sum(1), prepared_for_linear(-2 * queries)
    best, index = queries.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    largest, start = norm.max(), 0
    for block in blocks(chunk_size(x), x.device):
        y = centred(block.to(x.device).flatten(1))
        norms = y.square().sum(1)
        largest = torch.maximum(largest, norms.max())
        squares = squared_distances(minus_2x, norm, y, norms)
        if exclude is not None:
            position = exclude.to(x.device)[:, None] - start
            squares.masked_fill_(position == torch.arange(len(y), device=x.device), torch.inf)
        found, at = squares.topk(min(k, len(y)), largest=False)
        both = torch.cat([best, found], 1)
        best, kept = both.topk(min(k, both.shape[1]), largest=False)
        index = torch.cat([index, at + start], 1).gather(1, kept)
        start += len(y)
    return best, index, largest


def k_nearest(
    x: Float[Tensor, "n *D"],
    blocks: Blocks,
    take: Callable[[Int[Tensor, "i"]], Float[Tensor, "i *D"]],
    k: int,
    *,
    exclude: Int[Tensor, "n"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k nearest data points of each query, and their distances.

    Memory is that of x and of some blocks of the data.

    Args:
        x: the queries.
        blocks: returns blocks of the data, of a size and preferably on a device.
        take: returns the data points of some indices.
        k: number of neighbours; the data must have as many, besides the excluded ones.
        exclude: index of a data point that is left out for each query.
        dtype: precision in which candidates are searched.

    Returns:
        Euclidean distances, ascending, in float64, and the indices of the data points; where `nearest_candidates`
        returns them.
    """
    best, index, largest = nearest_candidates(x, blocks, k + _SPARE, exclude=exclude, dtype=dtype)
    x = x.to(index.device).flatten(1)
    parts = []
    for rows in torch.arange(len(x)).split(max(1, chunk_size(x) // index.shape[1])):
        candidates = take(index[rows].flatten().cpu()).to(x.device, torch.float64).flatten(1)
        parts.append((candidates.unflatten(0, (len(rows), -1)) - x[rows].double()[:, None]).norm(dim=2))
    distance, order = torch.cat(parts).masked_fill(best.isinf(), torch.inf).sort(1)
    distance, index = distance[:, :k], index.gather(1, order)[:, :k]
    if dtype == torch.float32 and best.shape[1] == k + _SPARE:
        margin = 2 * rounding(x.shape[1], float(largest))
        unsure = best[:, -1].double() - margin < distance[:, -1].square()
        if unsure.any():
            left_out = None if exclude is None else exclude[unsure.to(exclude.device)]
            again = k_nearest(x[unsure], blocks, take, k, exclude=left_out, dtype=torch.float64)
            distance[unsure], index[unsure] = again
    return distance, index
