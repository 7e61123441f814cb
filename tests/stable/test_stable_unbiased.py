"""Targets of `StableTarget` are unbiased for every kind of references, and obvious shortcuts are not.

Enumerated, not sampled: given x_t, the source is data point k with probability w_k, so E[target | x_t] is a finite sum
over sources, batches and draws. Targets are in x, where they are the mean over the support.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations, product

import pytest
import torch
from noisy_data import QUERIES, SIX, on_ranks
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stablefield import Pool, StableTarget
from stablefield.stable import Bank, drawn
from stablefield.targets import Shard

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of calls, whose shapes other tests check
SIGMA = 0.6
LABELS = torch.tensor([0, 1, 0, 0, 1, 0])
THREE = SIX[2:5]
BOTH = torch.cat([THREE, THREE.flip(1)])  # every point of THREE and its mirror image


def weights(x_t: Tensor, data: Tensor) -> Tensor:
    return torch.softmax(-(x_t - data).square().sum(1) / (2 * SIGMA**2), 0)


def means(stable: StableTarget, x_t: Tensor, x: Tensor, index: Tensor | None, label: Tensor | None = None) -> Tensor:
    """The posterior mean of each example of a batch in which all examples have the same x_t."""
    return stable(x, x_t.expand(len(x), -1), x, alpha=1.0, sigma=SIGMA, index=index, label=label)


def targets_in_x(references: object = None, **options: object) -> StableTarget:
    return StableTarget(references, "x0", checks=0, **options)  # type: ignore[arg-type]


def with_draw(monkeypatch: pytest.MonkeyPatch, chosen: Sequence[int]) -> None:
    """The next draws of a pool without labels."""
    monkeypatch.setattr(drawn.Drawn, "_draw", lambda self, generator: torch.tensor(list(chosen)))


@pytest.mark.parametrize("x_t", QUERIES)
@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("indexed", [True, False])
def test_the_minibatch_as_references_is_unbiased(x_t: Tensor, size: int, indexed: bool) -> None:
    total, w = torch.zeros(2, dtype=torch.float64), weights(x_t, SIX)
    batches = [torch.tensor(batch) for batch in combinations(range(6), size)]
    share = len(batches) * size / 6  # of the batches hold a given data point
    for batch in batches:
        total += w[batch] @ means(targets_in_x(), x_t, SIX[batch], batch if indexed else None) / share
    torch.testing.assert_close(total, w @ SIX, rtol=0, atol=1e-10)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_minibatch_is_unbiased_with_data_points_that_occur_twice(indexed: bool) -> None:
    x_t, total = QUERIES[0], torch.zeros(2, dtype=torch.float64)
    w = weights(x_t, SIX)
    for chosen in product(range(6), repeat=3):
        batch = torch.tensor(chosen)
        total += w[batch[0]] / 36 * means(targets_in_x(), x_t, SIX[batch], batch if indexed else None)[0]
    torch.testing.assert_close(total, w @ SIX, rtol=0, atol=1e-10)


@pytest.mark.parametrize("indexed", [True, False])
def test_the_minibatch_is_unbiased_for_random_flips_with_versions_of_one_data_point_in_it(indexed: bool) -> None:
    x_t, total = QUERIES[1], torch.zeros(2, dtype=torch.float64)
    w = weights(x_t, BOTH)
    for chosen in product(range(6), repeat=3):
        batch = torch.tensor(chosen)
        found = means(targets_in_x(), x_t, BOTH[batch], batch % 3 if indexed else None)
        total += w[batch[0]] / 36 * found[0]
    torch.testing.assert_close(total, w @ BOTH, rtol=0, atol=1e-10)


def labelled_mean(x_t: Tensor, data: Tensor, labels: Tensor) -> Tensor:
    """E[x | x_t, label of the source], averaged over the sources."""
    w = weights(x_t, data)
    parts = [(labels == label) for label in labels.unique()]
    return torch.stack([w[part] @ data[part] for part in parts]).sum(0)


@pytest.mark.parametrize("null", [0, 1, 2, 3])
def test_labels_and_null_labels_keep_the_minibatch_unbiased(null: int) -> None:
    # bit b of `null` drops the label of example b, whatever its data point is
    x_t = QUERIES[0]
    w, total = weights(x_t, SIX), torch.zeros(2, dtype=torch.float64)
    by_class = torch.zeros(2, 2, dtype=torch.float64)
    for chosen in permutations(range(6), 3):
        batch = torch.tensor(chosen)
        label = torch.where(torch.tensor([bool(null & 1), bool(null & 2), False]), -1, LABELS[batch])
        found = means(targets_in_x(), x_t, SIX[batch], batch, label)[0]
        total += w[batch[0]] / 20 * found
        by_class[LABELS[batch[0]]] += w[batch[0]] / 20 * found
    torch.testing.assert_close(total, w @ SIX, rtol=0, atol=1e-10)
    if not null & 1:
        for label in (0, 1):  # for an example with its label, within the class too
            wanted = w[label == LABELS] @ SIX[label == LABELS]
            torch.testing.assert_close(by_class[label], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["tensor", "pool"])
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_draws_from_a_data_set_are_unbiased(kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the order of a draw matters in so far only as its first is the spare one
    draws = [(first, *rest) for rest in combinations(range(6), n - 1) for first in range(6) if first not in rest]
    stable = targets_in_x(SIX if kind == "tensor" else Pool(SIX), size=n)
    x_t, x, index = QUERIES.repeat_interleave(6, 0), SIX.repeat(4, 1), torch.arange(6).repeat(4)
    found = torch.zeros(24, 2, dtype=torch.float64)
    for draw in draws:
        with_draw(monkeypatch, draw)
        one = stable(x, x_t, x, alpha=1.0, sigma=SIGMA, index=index)
        found += one / len(draws)
        assert n > 1 or torch.equal(one, x)
    for query, targets in zip(QUERIES, found.view(4, 6, 2), strict=True):
        torch.testing.assert_close(weights(query, SIX) @ targets, weights(query, SIX) @ SIX, rtol=0, atol=1e-10)


def labelled_draws(n: int) -> Iterator[dict[int, Tensor]]:
    """Every ordered draw of n data points of each class."""
    of_class = [(label == LABELS).nonzero().flatten().tolist() for label in (0, 1)]
    for zero, one in product(permutations(of_class[0], n), permutations(of_class[1], min(n, 2))):
        yield {0: torch.tensor(zero), 1: torch.tensor(one)}


@pytest.mark.parametrize("group", [1, 100], ids=["class by class", "all examples at once"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_draws_within_classes_are_unbiased(n: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "GROUP", group)
    index, draws = torch.arange(6), list(labelled_draws(n))
    stable = targets_in_x(SIX, size=n, labels=LABELS)
    for x_t in QUERIES[:1]:
        found = torch.zeros(6, 2, dtype=torch.float64)
        for draw in draws:
            rows = pad_sequence([draw[0], draw[1]], batch_first=True, padding_value=-1)
            monkeypatch.setattr(
                drawn.Drawn, "_draw_by_class", lambda self, classes, generator, rows=rows: rows[classes]
            )
            found += means(stable, x_t, SIX, index, LABELS) / len(draws)
        w = weights(x_t, SIX)
        for label in (0, 1):
            mine = label == LABELS
            torch.testing.assert_close(w[mine] @ found[mine], w[mine] @ SIX[mine], rtol=0, atol=1e-10)


def flipped(versions: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(torch.tensor(versions).bool()[: len(x), None], x.flip(1), x)


@pytest.mark.parametrize("by", ["transform", "tensor of versions"])
def test_draws_are_unbiased_under_flips_if_the_references_are_flipped_at_random_too(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_t, index = QUERIES[1], torch.arange(6) % 3
    found, kept, cases = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64), 0
    for draw, versions in product(permutations(range(3), 2), product((0, 1), repeat=2)):
        with_draw(monkeypatch, draw)
        if by == "transform":
            stable = targets_in_x(THREE, size=2, transform=lambda x, v=versions: flipped(v[2 - len(x) :])(x))
        else:
            data = THREE.clone()
            data[list(draw)] = flipped(versions)(THREE[list(draw)])
            stable = targets_in_x(data, size=2)
        found += means(stable, x_t, BOTH, index)
        kept += means(targets_in_x(THREE, size=2), x_t, BOTH, index)
        cases += 1
    w = weights(x_t, BOTH)
    torch.testing.assert_close(w @ found / cases, w @ BOTH, rtol=0, atol=1e-10)
    assert (w @ kept / cases - w @ BOTH).abs().max() > 0.02  # plain references beside flipped examples


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_bank_is_unbiased_under_flips(size: int, labelled: bool) -> None:
    # two batches of one example before that of the source, so that old versions of its data point are replaced
    x_t, total, labels = QUERIES[1], torch.zeros(2, dtype=torch.float64), torch.tensor([0, 1, 0] * 2)
    w = weights(x_t, BOTH)
    for history in product(range(6), repeat=2):
        bank = Bank(size)
        for k in history:
            before = torch.tensor([k])
            means(targets_in_x(bank), x_t, BOTH[before], before % 3, labels[before] if labelled else None)
        state = bank.state_dict()
        state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        for source in range(6):
            bank.load_state_dict(state)
            now = torch.tensor([source])
            found = means(targets_in_x(bank), x_t, BOTH[now], now % 3, labels[now] if labelled else None)[0]
            total += w[source] / 36 * found
    torch.testing.assert_close(total, w @ BOTH, rtol=0, atol=1e-10)


def test_keeping_the_old_version_of_the_source_is_biased() -> None:
    # what a loop does that adds its example to a bank that holds another flip of the same data point
    x_t, total = QUERIES[1], torch.zeros(2, dtype=torch.float64)
    w = weights(x_t, BOTH)
    for source, old in product(range(6), repeat=2):
        pair = torch.tensor([source, old])
        kept = torch.tensor([old]) if source % 3 == old % 3 else pair
        total += w[source] / 6 * (torch.softmax(w[kept].log(), 0) @ BOTH[kept])
    assert (total - w @ BOTH).abs().max() > 0.02


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("bank", [False, True])
def test_two_ranks_that_gather_have_the_targets_of_one(bank: bool, indexed: bool) -> None:
    if bank and not indexed:
        return
    for chosen in combinations(range(6), 4):
        batch = torch.tensor(chosen)
        label = torch.where(batch == 5, -1, LABELS[batch])
        whole = means(targets_in_x(Bank(5) if bank else None), QUERIES[0], SIX[batch], batch, label)

        def on_rank(shard: Shard, batch: Tensor = batch, label: Tensor = label) -> Tensor:
            own = slice(2 * shard.rank, 2 * shard.rank + 2)
            stable = targets_in_x(Bank(5) if bank else None, gather=shard.gather)
            index = batch[own] if indexed else None
            return means(stable, QUERIES[0], SIX[batch[own]], index, label[own])

        torch.testing.assert_close(torch.cat(on_ranks(2, on_rank)), whole, rtol=0, atol=1e-14)


def test_equal_values_are_unbiased_without_duplicates_and_biased_with_them() -> None:
    # as the page says: an index sees two data points where the values show one
    twice = torch.cat([SIX[:3], SIX[:1]])
    for data, biased in ((SIX[:4], False), (twice, True)):
        x_t, total = QUERIES[1], torch.zeros(2, dtype=torch.float64)
        w = weights(x_t, data)
        for batch in map(torch.tensor, combinations(range(4), 3)):
            total += w[batch] @ means(targets_in_x(match="values"), x_t, data[batch], None) / 3
        assert bool((total - w @ data).abs().max() > 0.005) == biased
