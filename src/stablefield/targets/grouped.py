"""Posteriors over references that differ by label, for all labels of a batch together.

Each label of a batch has an ordered draw r_1 .. r_n. All examples of a label share r_1 .. r_(n-1); the last candidate
of an example is its own: r_n if its source is among the shared ones, else its source.

The examples are sorted by label into tiles of equally many, each with the references of one label, and the products of
many tiles are one batched product. Tiles are about as large as the average label, so that at most half of their places
are empty: the arithmetic is at most twice that of the pairs of example and reference that share a label.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import Posterior, chunk_size
from stablefield.kernel.gaussian import Block, stream
from stablefield.process import NoisyBatch, move, per_example

Take = Callable[[Tensor, torch.device], Tensor]  # data points by their indices, as floating data on a device


def mean_over(
    noisy: NoisyBatch, index: Int[Tensor, "B"], group: Int[Tensor, "B"], drawn: Int[Tensor, "G n"], take: Take
) -> Posterior:
    """Posterior over the draw of each example's group and its source.

    Args:
        noisy: the examples.
        index: their data points, on the CPU.
        group: their rows of `drawn`, on the CPU.
        drawn: ordered draws of distinct data points on the CPU, filled up with -1.
        take: looks up data points.
    """
    if len(drawn) == 1:
        return _over_one_draw(noisy, index, drawn[0], take)
    count = ((drawn >= 0).sum(1) - 1).clamp(min=0)  # of the shared references
    last = drawn.gather(1, count[:, None]).squeeze(1).clamp(min=0)
    shared = drawn[:, :-1].where(torch.arange(drawn.shape[1] - 1) < count[:, None], -1)
    is_shared = (shared[group] == index[:, None]).any(1)
    own = _own_candidate(noisy, is_shared, take(last, noisy.x.device)[move(group, noisy.x.device)])
    return _by_tiles(noisy, own, group, shared, count, take)


def _over_one_draw(noisy: NoisyBatch, index: Int[Tensor, "B"], drawn: Int[Tensor, "n"], take: Take) -> Posterior:
    count = max(1, int((drawn >= 0).sum()))
    shared, last = drawn[: count - 1], drawn[count - 1 : count].clamp(min=0)
    own = _own_candidate(noisy, _among(index, shared), take(last, noisy.x.device))
    blocks = ((take(part, noisy.x.device), None) for part in shared.split(chunk_size(noisy.x_t)))
    return stream(noisy.x_t, blocks, sigma=noisy.sigma, alpha=noisy.alpha, source=own)


def _among(index: Int[Tensor, "B"], some: Int[Tensor, "m"]) -> Bool[Tensor, "B"]:
    """The result of `torch.isin(index, some)`, several times faster."""
    if len(some) == 0:
        return torch.zeros(index.shape, dtype=torch.bool)
    ordered = some.sort().values
    return ordered[torch.searchsorted(ordered, index.contiguous()).clamp(max=len(some) - 1)] == index


def _own_candidate(
    noisy: NoisyBatch, is_shared: Bool[Tensor, "B"], last: Float[Tensor, "_ *D"]
) -> Float[Tensor, "B *D"]:
    """The candidate of each example that its group does not share: r_n, or its source."""
    return torch.where(per_example(move(is_shared, noisy.x.device), noisy.x), last.to(noisy.x.dtype), noisy.x)


def _by_tiles(
    noisy: NoisyBatch,
    own: Float[Tensor, "B *D"],
    group: Int[Tensor, "B"],
    shared: Int[Tensor, "G n"],
    count: Int[Tensor, "G"],
    take: Take,
) -> Posterior:
    size = max(1, len(group) // len(shared))
    by_count = count.argsort(stable=True)  # tiles of few references come first, and share products
    example, of_tile, place = _tiles(by_count.argsort()[group], len(shared), size)
    of_tile = by_count[of_tile]
    device = noisy.x.device
    on_device = move(example, device)
    x_t, sigma, alpha, own = (values[on_device] for values in (noisy.x_t, noisy.sigma, noisy.alpha, own))
    at_once = max(1, chunk_size(noisy.x_t[:1]) // max(1, shared.shape[1]))

    def blocks(tiles: Int[Tensor, "t"]) -> Iterator[Block]:
        most = count[tiles]
        references = shared[tiles, : int(most.max())]
        step = chunk_size(x_t[: len(tiles) * size], len(tiles))
        allowed = None if (most == references.shape[1]).all() else move(most, device).repeat_interleave(size)[:, None]
        for start in range(0, references.shape[1], step):
            part = references[:, start : start + step]
            block = take(part.clamp(min=0).flatten(), device).view(len(part), -1, *noisy.x.shape[1:])
            position = torch.arange(start, start + part.shape[1], device=device)
            yield block, None if allowed is None else position < allowed

    found = []
    for tiles in torch.arange(len(of_tile)).split(at_once):
        some = slice(int(tiles[0]) * size, (int(tiles[-1]) + 1) * size)
        found.append(stream(x_t[some], blocks(of_tile[tiles]), sigma=sigma[some], alpha=alpha[some], source=own[some]))
    return Posterior.concatenate(found).select(place)


def _tiles(
    group: Int[Tensor, "B"], groups: int, size: int
) -> tuple[Int[Tensor, "P"], Int[Tensor, "t"], Int[Tensor, "B"]]:
    """The example at each place of the tiles, the group of each tile, and the place of each example.

    Empty places repeat an example, whose results there are not used.
    """
    order = group.argsort(stable=True)
    examples = group.bincount(minlength=groups)
    tiles = (examples + size - 1) // size
    number = torch.arange(len(group)) - (examples.cumsum(0) - examples)[group[order]]  # within the group
    place = torch.empty_like(order)
    place[order] = (tiles.cumsum(0) - tiles)[group[order]] * size + number
    example = torch.zeros(int(tiles.sum()) * size, dtype=torch.int64)
    example[place] = torch.arange(len(group))
    return example, torch.arange(groups).repeat_interleave(tiles), place
