"""Small data sets, noisy batches made from them, and posteriors written out: shared by tests of kernel and targets."""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from stablefield import VE, ExactTarget, NoisyBatch, Pool, Posterior
from stablefield.process import Process
from stablefield.targets import Shard

Result = TypeVar("Result")
CPU = torch.device("cpu")
SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
QUERIES = torch.tensor([[0.2, 0.1], [0.7, 0.4], [-0.3, -0.2], [2.0, 2.0]], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 300, seed: int = 0, side: int = 8, classes: int = 3) -> Pool:
    """Labelled uint8 images that vary along a few directions."""
    g = seeded(seed)
    waves = torch.randn(5, side * side, generator=g)
    x = (128 + 30 * torch.randn(n, 5, generator=g) @ waves / 2 + 4 * torch.randn(n, side * side, generator=g)).round()
    labels = torch.randint(classes, (n,), generator=g)
    return Pool(x.clamp(0, 255).to(torch.uint8).view(n, 1, side, side), labels)


def noisy_batch(
    pool: Pool, t: Tensor, process: Process | None = None, seed: int = 0, labelled: bool = False
) -> NoisyBatch:
    """Noisy examples of a pool, one for each t; labelled ones may use data points of their class only."""
    g = seeded(seed)
    index = torch.randint(len(pool), (len(t),), generator=g)
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
    label = pool.label(index) if labelled else None
    return (process or VE()).perturb(x, t.to(x), noise, index=index, label=label)


def batch_at(x_t: Tensor, data: Tensor, index: Tensor, sigma: float, label: Tensor | None = None) -> NoisyBatch:
    """Examples whose x_t is given, with any data points as their sources."""
    level = torch.full((len(x_t),), sigma, dtype=x_t.dtype)
    x = data[index]
    return NoisyBatch(x, (x_t - x) / sigma, level, torch.ones_like(level), level, x_t, label, index)


def streamed(pool: Pool) -> ExactTarget:
    """The exact target over all data, without isolation and screening."""
    return ExactTarget(pool, missing_mass=0)


def screened(pool: Pool) -> ExactTarget:
    """The exact target with the missing mass that is the default."""
    return ExactTarget(pool)


class Drawn(Pool):
    """A pool whose next draw is given."""

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Tensor:
        draw: Tensor = self.__dict__["next"]
        assert len(draw) == min(n, len(self.indices(label)))
        return draw

    def draw_by_class(self, n: int, labels: Tensor, seed: int) -> Tensor:
        return torch.stack([self.draw(n, label, None) for label in labels.tolist()])


def with_draw(pool: Pool, draw: Iterable[int]) -> Pool:
    """The pool with a given next draw."""
    pool = Drawn(pool.data, pool.labels, pool.num_levels, pool.view_index)
    object.__setattr__(pool, "next", torch.tensor(list(draw)))
    return pool


def mean_by_differences(noisy: NoisyBatch, data: Tensor, labels: Tensor | None = None) -> Tensor:
    """E[x | x_t] in float64, from all differences at once."""
    x_t, candidates = noisy.x_t.double().flatten(1), data.double().flatten(1)
    alpha, sigma = noisy.alpha.double()[:, None], noisy.sigma.double()[:, None]
    energy = torch.stack([(query - a * candidates).square().sum(1) for query, a in zip(x_t, alpha, strict=True)])
    if labels is not None and noisy.label is not None:
        energy[(noisy.label[:, None] != labels) & (noisy.label >= 0)[:, None]] = math.inf
    return (torch.softmax(-energy / (2 * sigma**2), 1) @ candidates).reshape(noisy.x_t.shape)


def assert_equal_posteriors(a: Posterior, b: Posterior, tolerance: float = 1e-9) -> None:
    """Mean, ESS and variance are equal to a tolerance, relative and absolute."""
    for name in ("mean", "ess", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def on_ranks(total: int, compute: Callable[[Shard], Result]) -> list[Result]:
    """Results of `total` ranks, each in a thread of its own, which gather one another's tensors."""
    barrier, sent = threading.Barrier(total), [torch.empty(0)] * total

    def gather(rank: int, value: Tensor) -> Tensor:
        barrier.wait(60)
        sent[rank] = value
        barrier.wait(60)
        found = torch.cat(list(sent))
        barrier.wait(60)
        return found

    with ThreadPoolExecutor(total) as pool:
        return list(pool.map(lambda rank: compute(Shard(rank, total, partial(gather, rank))), range(total)))


def own_part(shard: Shard, noisy: NoisyBatch) -> NoisyBatch:
    """The examples of a batch that one of several ranks has."""
    each = len(noisy) // shard.total
    return noisy.select(slice(each * shard.rank, each * (shard.rank + 1)))
