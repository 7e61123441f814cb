"""Laws of recent references (the data points that a run has seen last): unbiased over all orders of the run."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, permutations, product

import pytest
import torch
from noisy_data import seeded
from torch import Tensor

from stablefield import VE, ExactTarget, NoisyBatch, Pool, STFTarget, posterior
from stablefield.data import ShuffledBatches
from stablefield.pool import NULL_LABEL
from stablefield.seeding import generator

SIGMA = 0.6
FOUR = torch.randn(4, 1, 2, 3, generator=seeded(3), dtype=torch.float64) / 2
QUERY = torch.randn(1, 1, 2, 3, generator=seeded(4), dtype=torch.float64) / 2


def recent_target(order: ShuffledBatches, size: int) -> STFTarget:
    return STFTarget(order.pool, size, references="recent", order=order)


class GivenOrder(ShuffledBatches):
    """An order whose epochs are given: the one before the first image, the first, and perhaps more."""

    def order(self, number: Tensor) -> Tensor:
        epochs: Tensor = self.__dict__["epochs"]
        return epochs[(number + len(self.pool)).clamp(min=0)]  # nothing before these epochs is needed


def with_order(pool: Pool, epochs: Iterable[tuple[int, ...]], step: int, n: int) -> STFTarget:
    order = GivenOrder(pool, step)
    object.__setattr__(order, "epochs", torch.tensor(list(chain(*epochs))))
    return recent_target(order, n)


def enumerate_orders(pool: Pool, step: int, n: int, labelled: bool) -> None:
    """Check the mean target at each position of an epoch, over all orders of that epoch and the one before."""
    x_t, total_points = QUERY, len(pool)
    w = torch.exp(-(x_t - pool.data).square().flatten(1).sum(1) / (2 * SIGMA**2))[:, None, None, None]
    for position in range(total_points):
        total, weighted = defaultdict(float), defaultdict(float)
        for before, now in product(permutations(range(total_points)), repeat=2):
            source = torch.tensor([now[position]])
            x, level = pool.take(source), torch.full((1,), SIGMA, dtype=torch.float64)
            noisy = NoisyBatch(x, (x_t - x) / SIGMA, level, torch.ones_like(level), level, x_t, index=source)
            noisy = replace(
                noisy, image_number=torch.tensor([position]), label=pool.label(source) if labelled else None
            )
            label = int(pool.label(source)) if labelled else NULL_LABEL
            total[label] += w[source]
            weighted[label] += w[source] * with_order(pool, (before, now), step, n)(noisy).mean
        for label, sum_ in weighted.items():
            of_class = pool.indices(label)
            exact = (w[of_class] * pool.data[of_class]).sum(0) / w[of_class].sum()
            torch.testing.assert_close((sum_ / total[label])[0], exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_recent_references_are_unbiased_over_all_orders_of_three(n: int, step: int, labelled: bool) -> None:
    enumerate_orders(Pool(FOUR[:3], torch.tensor([0, 1, 0])), step, n, labelled)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_recent_references_are_unbiased_over_all_orders_of_four(n: int, labelled: bool) -> None:
    enumerate_orders(Pool(FOUR, torch.tensor([0, 1, 0, 0])), 3, n, labelled)


def many(n: int = 30) -> Pool:
    g = torch.Generator().manual_seed(n)
    return Pool(torch.randint(256, (n, 1, 2, 3), generator=g, dtype=torch.uint8), torch.arange(n) % 4)


def noisy_step(order: ShuffledBatches, images: int) -> NoisyBatch:
    """The noisy batch of a run's step."""
    batch = order(images)
    noise = torch.randn(batch.x.shape, generator=generator(0, images))
    t = torch.full((len(batch),), 0.7)
    return VE().perturb(batch.x, t, noise, label=batch.label, index=batch.index, image_number=batch.image_number)


@pytest.mark.parametrize("size", [1, 7, 29, 30])
def test_recent_references_are_the_last_distinct_images_before_the_step(size: int) -> None:
    order = ShuffledBatches(many(), 8, seed=1)
    target = recent_target(order, size)
    for images in range(0, 240, 8):
        backwards = [int(order.order(torch.tensor([number]))) for number in range(images - 1, images - 61, -1)]
        assert target.recent(images).tolist() == list(dict.fromkeys(backwards))[:size]


@pytest.mark.parametrize("labelled", [False, True])
def test_the_support_is_the_recent_images_and_the_source(labelled: bool) -> None:
    pool = many() if labelled else replace(many(), labels=None)
    order = ShuffledBatches(pool, 8, seed=1)
    target = recent_target(order, 12)
    supports_of_one = 0
    for images in range(0, 120, 8):  # one estimator for all steps, across several epochs
        noisy = noisy_step(order, images)
        found, recent = target(noisy), target.recent(images).tolist()
        for b, source in enumerate(noisy.index.tolist()):
            seen = [k for k in recent if not labelled or pool.labels[k] == noisy.label[b]]
            support = torch.tensor(sorted(set(seen if source in seen[:-1] else [*seen[:-1], source])))
            supports_of_one += len(support) == 1
            wanted = posterior(noisy.x_t[b : b + 1], pool.take(support), sigma=0.7).mean[0]
            torch.testing.assert_close(found.mean[b], wanted)
    assert not labelled or supports_of_one


def test_recent_references_of_all_data_are_exact_and_a_support_of_one_is_the_source() -> None:
    order = ShuffledBatches(many(), 8, seed=1)
    for images in (0, 24, 80):
        noisy = noisy_step(order, images)
        exact = ExactTarget(order.pool, missing_mass=0)(noisy).mean
        for size in (30, 31, 1000):  # a size beyond the pool is clamped to it
            torch.testing.assert_close(recent_target(order, size)(noisy).mean, exact)
        assert torch.equal(recent_target(order, 1)(noisy).mean, noisy.x)


def test_recent_references_resume_as_a_function_of_the_order_and_are_the_same_on_all_ranks() -> None:
    order = ShuffledBatches(many(), 8, seed=1)
    running = recent_target(order, 12)
    for images in range(0, 96, 8):
        noisy = noisy_step(order, images)
        found = running(noisy).mean
        assert torch.equal(recent_target(order, 12)(noisy).mean, found)  # a new estimator, as after resuming
        for rank in range(2):
            part = slice(4 * rank, 4 * rank + 4)
            of_rank = recent_target(ShuffledBatches(many(), 8, 1, rank, 2), 12)(noisy.select(part)).mean
            torch.testing.assert_close(of_rank, found[part])


class Counted(Pool):
    """A pool that records which data points are read."""

    def stored(self, index: Tensor) -> Tensor:
        self.__dict__.setdefault("read", []).extend(index.tolist())
        return super().stored(index)


def test_a_step_reads_no_more_new_data_points_than_a_step_has_images() -> None:
    order = ShuffledBatches(many(100), 8, seed=1)
    counted = Counted(order.pool.data, order.pool.labels)
    target = recent_target(ShuffledBatches(counted, 8, seed=1), 40)
    for images in range(0, 240, 8):
        noisy = noisy_step(order, images)
        counted.__dict__["read"] = []
        target(noisy)
        new = [k for k in counted.__dict__["read"] if k not in noisy.index]  # one example of each class is checked, too
        assert len(new) <= (40 if images == 0 else 8)


def test_unusable_recent_references_are_refused() -> None:
    order = ShuffledBatches(many(), 8)
    noisy = noisy_step(order, 0)
    with pytest.raises(ValueError, match="set image_number"):
        recent_target(order, 4)(replace(noisy, image_number=None))
    with pytest.raises(ValueError, match="belong to 2 steps of 8 images"):
        recent_target(order, 4)(replace(noisy, image_number=noisy.image_number + 4, label=None))
    with pytest.raises(ValueError, match=r"size must be at least 1.*not 0"):
        recent_target(order, 0)
    with pytest.raises(ValueError, match="pass order="):
        STFTarget(order.pool, 4, references="recent")


@pytest.mark.usefixtures("unchecked")
def test_unknown_references_are_refused() -> None:
    with pytest.raises(ValueError, match='"dataset" or "recent", not \'rolling\''):
        STFTarget(many(), 4, references="rolling")
