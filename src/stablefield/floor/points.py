"""Noisy examples at which a loss is examined, and their exact posteriors.

Noise levels are stratified: K ranges that the loss visits equally often, with m times spread evenly over each. The
sources of a range are spread evenly over the data in the order of their labels. Everything follows from a seed, and
each example from its own number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.floor.loss import SquaredError
from stablefield.floor.weights import EnergyRecorder, Sources, draw_sources, stable_means
from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator, chunk_size, float64_device
from stablefield.pool import NULL_LABEL, Pool, draw_without_replacement
from stablefield.process import NoisyBatch, draw_noise
from stablefield.seeding import generator

__all__ = ["MAX_ELEMENTS", "Exact", "Progress", "draw_points", "exact_posteriors", "noise_levels_of_bins"]

MAX_ELEMENTS = 2**26  # float64 numbers per tensor; about two such tensors are held at once (1 GB)

Progress = Callable[[int, int], object]


def noise_levels_of_bins(loss: SquaredError, bins: int) -> Float[Tensor, "ends"]:
    """Noise levels sigma / alpha at the ends of ranges that a loss visits equally often, (bins + 1,).

    Args:
        loss: the loss.
        bins: number of ranges.
    """
    alpha, sigma = loss.process.scales(loss.quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)))
    return sigma / alpha


def draw_points(
    pool: Pool,
    loss: SquaredError,
    *,
    bins: int,
    per_bin: int,
    seed: int = 0,
    label_dropout: float = 0.0,
    only: Int[Tensor, "b"] | None = None,
) -> NoisyBatch:
    """Noisy examples, those of a range of the noise level after one another; their numbers are `image_number`.

    Args:
        pool: the data that sources are drawn from.
        loss: the loss, for its process and noise levels.
        bins: number K of ranges.
        per_bin: number m of examples of each range.
        seed: seed of all draws.
        label_dropout: probability that an example has no label.
        only: numbers of the examples to return, between 0 and K m; all by default.
    """
    count = bins * per_bin
    only = torch.arange(count) if only is None else only
    draws = generator(seed, "floor", "points", bins, per_bin)
    spread = torch.rand(4, count, generator=draws, dtype=torch.float64)
    u = (torch.arange(count) + spread[0].clamp(min=2.0**-40)) / count
    place = spread[1].reshape(bins, per_bin).argsort(1)  # so that sources are independent of the noise levels
    share = (place + spread[2].reshape(bins, per_bin)).flatten() / per_bin
    order = torch.arange(len(pool)) if pool.labels is None else pool.labels.cpu().argsort(stable=True)
    index = order[(share * len(pool)).long().clamp(max=len(pool) - 1)][only]
    x, label = pool.take(index).cpu(), pool.label(index)
    if label is not None:
        label = torch.where(spread[3][only] < label_dropout, NULL_LABEL, label.cpu())
    noise = draw_noise(x, (generator(seed, "floor", "noise", n) for n in only.tolist()))
    t = loss.quantile(u)[only].to(x.dtype)
    return loss.process.perturb(x, t, noise, label=label, index=index, image_number=only)


@dataclass(frozen=True, eq=False)
class Exact:
    """Exact posteriors at noisy examples, and variances of targets given x_t, in units of x squared (float64).

    Attributes:
        mean: E[x | x_t], (B, *D).
        dsm: variance of the DSM target, Tr Cov[x | x_t], (B,).
        stf: squared error of stable targets by the size of their support, for every draw of references, (B, R).
    """

    mean: Float[Tensor, "B *D"]
    dsm: Float[Tensor, "B"]
    stf: dict[int, Float[Tensor, "B R"]]


def exact_posteriors(
    pool: Pool,
    noisy: NoisyBatch,
    *,
    sizes: Sequence[int] = (),
    draws: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Exact:
    """The exact posteriors of noisy examples over all data, or over those of their label; one pass over the data.

    Args:
        pool: the data.
        noisy: the examples, as `draw_points` returns them.
        sizes: sizes of the support for which the variance of stable targets is measured too.
        draws: number of reference batches for it.
        seed: seed of these draws.
        device: device of the computation; that of the data by default.
        progress: called with (done, total).
    """
    device = float64_device(torch.device(device) if device is not None else pool.data.device)
    parts = [
        (label, part)
        for label, index in _by_label(noisy)
        for part in index.split(_part_size(pool, label, sizes, draws))
    ]
    done, total = 0, sum(len(pool.indices(label)) for label, _ in parts)

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total)

    found = [_exact_of_part(pool, noisy.select(i), label, sizes, draws, seed, device, advance) for label, i in parts]
    order = torch.cat([part for _, part in parts]).argsort()
    return Exact(
        torch.cat([each.mean for each in found])[order],
        torch.cat([each.dsm for each in found])[order],
        {size: torch.cat([each.stf[size] for each in found])[order] for size in sizes},
    )


def _by_label(noisy: NoisyBatch) -> Iterator[tuple[int, Int[Tensor, "b"]]]:
    label = torch.full((len(noisy),), NULL_LABEL) if noisy.label is None else noisy.label.cpu()
    return ((value, (label == value).nonzero().flatten()) for value in label.unique().tolist())


def _part_size(pool: Pool, label: int, sizes: Sequence[int], draws: int) -> int:
    """Number of examples whose weights fit into memory."""
    dim = math.prod(pool.shape)
    return max(1, MAX_ELEMENTS // max(len(pool.indices(label)) if sizes else 1, 4 * dim, draws))


def _exact_of_part(
    pool: Pool,
    noisy: NoisyBatch,
    label: int,
    sizes: Sequence[int],
    draws: int,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> Exact:
    """The exact posteriors of examples with one label."""
    index = pool.indices(label)
    x_t, sigma, alpha = (value.to(device, torch.float64) for value in (noisy.x_t, noisy.sigma, noisy.alpha))
    sums = EnergyRecorder(x_t, sigma, alpha, len(index)) if sizes else PosteriorAccumulator(x_t, sigma, alpha)
    for block in pool.blocks(label, chunk_size(x_t)):
        sums.add(block.to(device))
        advance(len(block))
    posterior = sums.finish()
    stf = {}
    if isinstance(sums, EnergyRecorder):
        assert noisy.image_number is not None
        generators = (generator(seed, "floor", "sources", number) for number in noisy.image_number.tolist())
        uniform = torch.stack([torch.rand(draws, generator=g, dtype=torch.float64) for g in generators]).to(device)
        log_w = sums.log_weights()
        sources = _sources(log_w, uniform)
        stf = {size: _stf_errors(pool, index, label, posterior, log_w, sources, size, draws, seed) for size in sizes}
    return Exact(posterior.mean.cpu(), posterior.variance.cpu(), stf)


def _sources(log_w: Float[Tensor, "B N"], uniform: Float[Tensor, "B R"]) -> Sources:
    """Possible sources of each example; 16 examples at a time to save memory."""
    found = [draw_sources(part.exp(), u) for part, u in zip(log_w.split(16), uniform.split(16), strict=True)]
    return Sources(
        *(torch.cat([getattr(each, name) for each in found]) for name in ("first", "others", "other_weight"))
    )


def _stf_errors(
    pool: Pool,
    index: Int[Tensor, "N"],
    label: int,
    posterior: Posterior,
    log_w: Float[Tensor, "B N"],
    sources: Sources,
    size: int,
    draws: int,
    seed: int,
) -> Float[Tensor, "B R"]:
    """Squared errors of stable targets for every draw of references, on average over the source."""
    mean, device = posterior.mean.flatten(1), log_w.device
    errors = mean.new_zeros(len(mean), draws)
    if size >= len(index):
        return errors.cpu()

    def take(chosen: Tensor) -> Tensor:
        return pool.take(index[chosen.cpu()]).to(device, torch.float64).flatten(1)

    first = (sources.first, take(sources.first))
    for r in range(draws):
        drawn = draw_without_replacement(len(index), size, generator(seed, "floor", "references", label, size, r))
        other = sources.others[:, r]
        pair = (first, (other, take(other)))
        of_first, of_other, _ = stable_means(log_w, take(drawn), drawn.to(device), pair)
        squares = [(each - mean).square().sum(1) for each in (of_first, of_other)]
        errors[:, r] = torch.lerp(squares[0], squares[1], sources.other_weight)
    return errors.cpu()
