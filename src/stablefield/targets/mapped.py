"""Posteriors over references that are seen through the augmentation map of each example.

A network that is given the map A as a condition learns E[A x | x_t, A], so the support of an example is {A r_1, ..,
A r_(n-1), A x}. For a map that does not permute pixels, distances between images change, and each reference has to be
transformed for each example. The draw is that of `grouped.mean_over`, and so is the proof that the mean is unbiased.
(Two maps may have the same augmentation label. Given both label and map the target is unbiased, so it is given the
label alone.)
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.augmentation import flip, warp, warp_all
from stablefield.kernel.accumulator import Posterior
from stablefield.kernel.gaussian import Block, stream
from stablefield.process import NoisyBatch, move, per_example
from stablefield.targets.grouped import Take

_EXAMPLES = 256  # examples whose references are transformed together


def mean_through_maps(
    noisy: NoisyBatch, index: Int[Tensor, "B"], group: Int[Tensor, "B"], drawn: Int[Tensor, "G n"], take: Take
) -> Posterior:
    """Posterior over the draw of each example's group and its source, all seen through the example's map.

    Args:
        noisy: the examples, with their augmentation labels and maps.
        index: their data points, on the CPU.
        group: their rows of `drawn`, on the CPU.
        drawn: ordered draws of distinct data points on the CPU, filled up with -1.
        take: looks up data points.
    """
    assert noisy.augment_label is not None
    # examples that differ only by their affine maps share the fine grids of their references
    flips = noisy.augment_label[:, :2].cpu().long()
    _, alike = torch.stack([group, *flips.unbind(1)], 1).unique(dim=0, return_inverse=True)
    parts = [part for key in alike.unique() for part in (alike == key).nonzero().flatten().split(_EXAMPLES)]
    found = [_mean_of_part(noisy.select(part), index[part], drawn[group[part[0]]], take) for part in parts]
    return Posterior.concatenate(found).select(torch.cat(parts).argsort())


def _mean_of_part(noisy: NoisyBatch, index: Int[Tensor, "B"], drawn: Int[Tensor, "n"], take: Take) -> Posterior:
    """Posterior of examples with the same draw and the same flips."""
    assert noisy.augment_label is not None
    assert noisy.augment_map is not None
    device, shared = noisy.x.device, drawn[: max(0, int((drawn >= 0).sum()) - 1)]
    maps, flips = move(noisy.augment_map, device), noisy.augment_label[:1]

    def flipped(part: Int[Tensor, "m"]) -> Float[Tensor, "m C H W"]:
        return flip(take(part, device).to(noisy.x.dtype), flips.expand(len(part), -1))

    def blocks() -> Iterator[Block]:
        for part in shared.split(_references_at_once(noisy.x)):
            yield warp_all(flipped(part), maps), None

    own, is_shared = noisy.x, (shared == index[:, None]).any(1)
    if is_shared.any():  # r_n takes the place of a source that is among the others
        last = warp(flipped(drawn[len(shared) : len(shared) + 1]).expand_as(own), maps)
        own = torch.where(per_example(move(is_shared, device), own), last, own)
    return stream(noisy.x_t, blocks(), sigma=noisy.sigma, alpha=noisy.alpha, source=own)


def _references_at_once(x: Float[Tensor, "B C H W"]) -> int:
    """Number of references that are transformed together, such that their fine grids take about 64 MB (GPU: 1 GB)."""
    memory = 2**30 if x.device.type == "cuda" else 2**26
    return max(1, memory // (4 * x.nbytes))
