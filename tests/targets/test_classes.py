"""Class-conditional reference batches: the draws of all classes together, and the means over them."""

from itertools import permutations

import pytest
import torch
from noisy_data import QUERIES, SIX, batch_at, images, mean_by_differences, noisy_batch
from torch import Tensor

import stablefield.pool
from stablefield import KNNTarget, Pool, STFTarget, posterior
from stablefield.pool import NULL_LABEL
from stablefield.targets import TargetEstimator

LABELS = torch.tensor([1, 0, 1, 1, 0, 1])


def test_every_ordered_draw_of_a_class_is_equally_likely() -> None:
    pool, counts = Pool(SIX, LABELS), dict.fromkeys(permutations([0, 2, 3, 5], 3), 0)
    draws = 2000
    for seed in range(draws):
        small, large = pool.draw_by_class(3, torch.tensor([0, 1]), seed).tolist()
        assert small == [1, 4, -1]  # a class of at most n is drawn completely
        counts[tuple(large)] += 1
    chi_squared = sum((count - draws / 24) ** 2 / (draws / 24) for count in counts.values())
    assert chi_squared < 23 + 5 * 46**0.5  # mean and five standard deviations with 23 degrees of freedom


@pytest.mark.parametrize("size", [5, 17, 64, 100, 1000])
def test_draws_hold_distinct_data_points_of_their_class_and_do_not_depend_on_other_classes(size: int) -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([900, 40, 300]))[torch.randperm(1240)]
    pool = Pool(torch.zeros(1240, 1), labels)
    drawn = pool.draw_by_class(size, torch.tensor([0, 1, 2]), 5)
    for label, row in enumerate(drawn):
        found = row[row >= 0]
        assert len(found.unique()) == len(found) == min(size, int((labels == label).sum()))
        assert (labels[found] == label).all()
        alone = pool.draw_by_class(size, torch.tensor([label]), 5)[0]
        assert torch.equal(alone[alone >= 0], found)


def test_class_conditional_means_are_unbiased_over_all_random_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, sigma = Pool(SIX, LABELS), 0.7
    of_class = pool.indices(1)
    index = of_class.repeat(len(QUERIES))
    noisy = batch_at(QUERIES.repeat_interleave(4, 0), SIX, index, sigma, torch.ones_like(index))
    weights = torch.softmax(-(QUERIES[:, None] - SIX[of_class]).square().sum(2) / (2 * sigma**2), 1)
    for size in (2, 3):
        means = []
        for order in permutations(range(4)):
            monkeypatch.setattr(
                stablefield.pool, "draw_without_replacement", lambda total, n, g, order=order: torch.tensor(order)
            )
            means.append(STFTarget(pool, size)(noisy).mean.view(len(QUERIES), 4, 2))
        mean = (weights[:, :, None] * torch.stack(means).mean(0)).sum(1)
        torch.testing.assert_close(mean, weights @ SIX[of_class], rtol=0, atol=1e-12)


def mixed_batch(examples: int = 60) -> tuple[Pool, Tensor]:
    pool = images(400, classes=7)
    label = pool.label(torch.randint(400, (examples,), generator=torch.Generator().manual_seed(0)))
    assert label is not None
    return pool, label


@pytest.mark.parametrize("make", [lambda pool: STFTarget(pool, 32), lambda pool: KNNTarget(pool, 8)])
def test_a_target_does_not_depend_on_the_other_examples_of_the_batch(make) -> None:
    pool, _ = mixed_batch()
    target: TargetEstimator = make(pool)
    noisy = noisy_batch(pool, torch.linspace(0.1, 5, 60), labelled=True)
    assert noisy.label is not None
    noisy.label[::5] = NULL_LABEL

    def found(index: Tensor) -> Tensor:
        return target(noisy.select(index), generator=torch.Generator().manual_seed(1)).mean

    whole = found(torch.arange(60))
    for some in torch.randperm(60, generator=torch.Generator().manual_seed(2)).split(7):
        torch.testing.assert_close(found(some), whole[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("examples", [3, 40, 150])
def test_references_for_whole_classes_give_the_mean_over_the_class(examples: int) -> None:
    pool, _ = mixed_batch()
    noisy = noisy_batch(pool, torch.full((examples,), 1.0), labelled=True)
    found = STFTarget(pool, 400)(noisy)
    wanted = mean_by_differences(noisy, pool.take(torch.arange(400)), pool.labels)
    torch.testing.assert_close(found.mean.double(), wanted, rtol=0, atol=1e-5)
    assert pool.labels is not None
    assert noisy.label is not None
    alike = noisy.label[:, None] == pool.labels
    exact = posterior(noisy.x_t, pool.take(torch.arange(400)), sigma=1.0, allowed=alike)
    torch.testing.assert_close(found.ess, exact.ess, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.variance, exact.variance, rtol=1e-4, atol=1e-6)


def test_one_reference_leaves_every_example_its_source() -> None:
    pool, _ = mixed_batch()
    noisy = noisy_batch(pool, torch.full((50,), 2.0), labelled=True)
    assert torch.equal(STFTarget(pool, 1)(noisy).mean, noisy.x)
