"""What a network is told decides who may be a reference, counted out: for labels, dropped labels, mirror images, flips
and other maps that are told, and for references that are the members seen last.

A network that is told c learns E[x | x_t, c]. Given x_t and c, the clean image is one of finitely many, each with
probability in proportion to p(x, c) exp(-||x_t - x||^2 / (2 sigma^2)). A target is unbiased if its mean over these, and
over the draws of its references, is their mean.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, permutations, product

import pytest
import torch
from torch import Tensor

from stablefield import VE, FullDataset, NearestNeighbours, Perturbed, Pool, ReferenceBatch, SingleSample, posterior
from stablefield.augmentation import DIM, flip, permutes
from stablefield.data import EDMAugmentation, Rolling, Shuffled
from stablefield.posterior import Posterior
from stablefield.reference import ALL
from stablefield.seeding import generator

SIGMA = 0.6
FOUR = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
CLASSES = torch.tensor([0, 1, 0, 0])
QUERIES = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 2
PLAIN = Pool(FOUR, CLASSES)


@dataclass(frozen=True)
class Case:
    """One thing that training may show: an image, which member it came from, what is told, and how often."""

    x: Tensor
    index: int
    label: int
    told: tuple[float, ...]
    share: float


# ---- kinds of training


def class_conditional(pool: Pool) -> list[Case]:
    return [Case(x, k, int(pool.labels[k]), (), 1) for k, x in enumerate(pool.take(torch.arange(len(pool))))]


def sometimes_untold(pool: Pool) -> list[Case]:
    return [
        Case(case.x, case.index, label, (), share)
        for case in class_conditional(pool)
        for label, share in ((case.label, 0.8), (ALL, 0.2))
    ]


def untold(pool: Pool) -> list[Case]:
    return [Case(case.x, case.index, ALL, (), 1) for case in class_conditional(pool)]


def flips_told(pool: Pool, cases: Callable[[Pool], list[Case]] = untold) -> list[Case]:
    shares = {(0, 0): 0.47, (1, 0): 0.47, (0, 1): 0.03, (1, 1): 0.03}
    labels = [(torch.tensor([[*flips, *[0.0] * (DIM - 2)]], dtype=torch.float64), s) for flips, s in shares.items()]
    return [
        Case(flip(case.x[None], label)[0], case.index, case.label, tuple(label[0].tolist()), case.share * share)
        for case in cases(pool)
        for label, share in labels
    ]


def flips_and_classes_told(pool: Pool) -> list[Case]:
    return flips_told(pool, sometimes_untold)


def maps_told(pool: Pool) -> list[Case]:
    """Every image under each of a few maps as they are drawn, most of which permute no pixels."""
    cases = []
    for number in range(4, 8):
        for case in sometimes_untold(pool):
            x, label = EDMAugmentation(p=0.3)(case.x[None], [generator(1, number)])
            cases.append(Case(x[0], case.index, case.label, tuple(label[0].tolist()), case.share))
    return cases


TRAININGS = {
    "class-conditional": (PLAIN, class_conditional),
    "labels dropped": (PLAIN, sometimes_untold),
    "mirrored": (PLAIN.subset(torch.tensor([0, 1, 3])).mirrored(), untold),
    "mirrored, class-conditional": (PLAIN.subset(torch.tensor([0, 1, 2])).mirrored(), class_conditional),
    "flips told": (PLAIN, flips_told),
    "flips and classes told": (PLAIN, flips_and_classes_told),
    "maps told": (PLAIN, maps_told),
}
every_training = pytest.mark.parametrize("training", TRAININGS)


# ---- estimators, with all their draws


class Drawn(Pool):
    """A pool whose next draw is known."""

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Tensor:
        draw: Tensor = self.__dict__["next"]
        assert len(draw) == min(n, len(self.members(label)))
        return draw


def reference_batches(n: int) -> Callable[[Pool, int], Iterator]:
    def every_draw(pool: Pool, label: int) -> Iterator:
        members = pool.members(label).tolist()
        for draw in permutations(members, min(n, len(members))):
            drawn = Drawn(pool.data, pool.labels, pool.levels, pool.places)
            object.__setattr__(drawn, "next", torch.tensor(draw))
            yield ReferenceBatch(drawn, n)

    return every_draw


ESTIMATORS: dict[str, Callable[[Pool, int], Iterator]] = {
    "single": lambda pool, label: iter([SingleSample()]),
    "full": lambda pool, label: iter([FullDataset(pool)]),
    "neighbours": lambda pool, label: iter([NearestNeighbours(pool, 2)]),
    "2 references": reference_batches(2),
    "3 references": reference_batches(3),
}


def averages(cases: list[Case], answer: Callable[[Perturbed], Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each thing that may be told, and each query: the mean target, the exact mean, the variances of target and
    source."""
    groups = defaultdict(list)
    for case in cases:
        groups[case.label, case.told].append(case)
    for (label, told), group in groups.items():
        x, share = torch.stack([case.x for case in group]), torch.tensor([case.share for case in group])
        n, queries = len(group), len(QUERIES)
        distance = (QUERIES[:, None] - x).square().flatten(2).sum(2)
        w = torch.softmax(share.double().log() - distance / (2 * SIGMA**2), 1)[:, :, None, None, None]
        index = torch.tensor([case.index for case in group]).repeat(queries)
        noisy = rows(
            x.repeat(queries, 1, 1, 1),
            QUERIES.repeat_interleave(n, 0),
            index,
            None if label == ALL else torch.full_like(index, label),
            torch.tensor([told] * len(index), dtype=torch.float64) if told else None,
        )
        target, exact = answer(noisy).unflatten(0, (queries, n)), (w * x).sum(1)
        spread, dsm = ((w * (found - exact[:, None]).square()).flatten(1).sum(1) for found in (target, x))
        yield (w * target).sum(1), exact, spread, dsm


def rows(x: Tensor, x_t: Tensor, index: Tensor, label: Tensor | None = None, told: Tensor | None = None) -> Perturbed:
    """The record of images that came to lie at x_t."""
    level = torch.full((len(x),), SIGMA, dtype=torch.float64)
    return Perturbed(x, (x_t - x) / SIGMA, level, torch.ones_like(level), level, x_t, label, index, told)


@every_training
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_target_is_exactly_unbiased_for_what_the_network_is_told(training: str, kind: str) -> None:
    pool, cases_of = TRAININGS[training]

    def answer(noisy: Perturbed) -> Tensor:
        label = ALL if noisy.label is None else int(noisy.label[0])
        found = [target(noisy).mean for target in ESTIMATORS[kind](pool, label)]
        return torch.stack(found).mean(0)

    for mean, exact, spread, dsm in averages(cases_of(pool), answer):
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
        assert (spread <= dsm * (1 + 1e-9)).all()


def test_flips_share_references_and_other_maps_keep_their_source() -> None:
    cases = maps_told(PLAIN)
    told = torch.tensor([case.told for case in cases], dtype=torch.float64)
    assert permutes(told).any()
    assert not permutes(told).all()
    x = torch.stack([case.x for case in cases])
    index, label = torch.tensor([case.index for case in cases]), torch.tensor([case.label for case in cases])
    x_t = torch.zeros_like(x)
    noisy = rows(x, x_t, index, label, told)
    found = FullDataset(PLAIN)(noisy)
    alone = ~permutes(told)
    assert torch.equal(found.mean[alone], x[alone])
    assert (found.ess[alone] == 1).all()
    assert (found.ess[~alone] > 1).any()  # (of one class there is but one)
    # by hand: references that are flipped as the row is
    for row in (~alone).nonzero().flatten().tolist():
        members = PLAIN.members(int(label[row]))
        seen = flip(PLAIN.take(members), told[row].expand(len(members), -1))
        by_hand = posterior(x_t[row : row + 1], seen, sigma=SIGMA)
        torch.testing.assert_close(found.mean[row], by_hand.mean[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.variance[row], by_hand.variance[0], rtol=0, atol=1e-12)


# ---- what goes wrong otherwise


def references(noisy: Perturbed, support: Tensor) -> Posterior:
    """An exact target from these members and, where it is not one of them, the source."""
    each = [
        posterior(
            noisy.x_t[row : row + 1],
            support,
            sigma=SIGMA,
            source=None if any(torch.equal(noisy.x[row], member) for member in support) else noisy.x[row : row + 1],
        )
        for row in range(len(noisy))
    ]
    return torch.cat([found.mean for found in each])


def other_classes_too(noisy: Perturbed) -> Tensor:
    return references(noisy, FOUR)


def plain_references(noisy: Perturbed) -> Tensor:
    return references(noisy, FOUR)


def both_ways_round(noisy: Perturbed) -> Tensor:
    return references(noisy, torch.cat([FOUR, FOUR.flip(-1)]))


@pytest.mark.parametrize(
    ("training", "mistake", "least"),
    [
        ("class-conditional", other_classes_too, 0.15),
        ("labels dropped", other_classes_too, 0.15),
        ("mirrored", plain_references, 0.03),
        ("flips told", plain_references, 0.1),
        ("flips told", both_ways_round, 0.1),
        ("maps told", plain_references, 0.1),
    ],
)
def test_references_that_the_network_is_told_to_exclude_make_a_bias(
    training: str, mistake: Callable[[Perturbed], Tensor], least: float
) -> None:
    pool, cases_of = TRAININGS[training]
    biases = [
        float((mean - exact).flatten(1).norm(dim=1).max()) for mean, exact, *_ in averages(cases_of(pool), mistake)
    ]
    assert max(biases) > least


@pytest.mark.parametrize("kind", ["full", "neighbours", "2 references"])
def test_rows_that_are_not_the_members_they_are_said_to_be_are_refused(kind: str) -> None:
    def answer(noisy: Perturbed) -> Tensor:
        return next(ESTIMATORS[kind](PLAIN, ALL))(noisy).mean

    silent = [Case(case.x, case.index, ALL, (), 1) for case in flips_told(PLAIN) if case.told[0]]
    with pytest.raises(ValueError, match=r"is not the member .* SingleSample"):
        list(averages(silent, answer))


@pytest.mark.usefixtures("unchecked")
def test_labels_of_another_kind_of_augmentation_are_refused_but_by_single_samples() -> None:
    x, index, told = FOUR[:2], torch.arange(2), torch.zeros(2, 4)
    noisy = rows(x, x, index, None, told)
    assert torch.equal(SingleSample()(noisy).mean, x)
    with pytest.raises(ValueError, match=r"have 9 numbers .*not 4"):
        FullDataset(PLAIN)(noisy)
    flat = rows(x.flatten(1), x.flatten(1), index, None, torch.ones(2, DIM))
    with pytest.raises(ValueError, match="only images"):
        FullDataset(Pool(FOUR.flatten(1)))(flat)


# ---- the members seen last


class Known(Shuffled):
    """An order of which some epochs are known: the one before the first image, the first, and perhaps more."""

    def order(self, number: Tensor) -> Tensor:
        epochs: Tensor = self.__dict__["epochs"]
        return epochs[(number + len(self.pool)).clamp(min=0)]  # what is further back is not needed


def rolling(pool: Pool, epochs: Iterable[tuple[int, ...]], step: int, n: int) -> Rolling:
    order = Known(pool, step)
    object.__setattr__(order, "epochs", torch.tensor(list(chain(*epochs))))
    return Rolling(order, n)


def seen_last(pool: Pool, step: int, n: int, told: bool) -> None:
    """The mean target of a row at each position of its epoch, over all orders of that epoch and the one before."""
    x_t, members = QUERIES[:1], len(pool)
    w = torch.exp(-(x_t - pool.data).square().flatten(1).sum(1) / (2 * SIGMA**2))[:, None, None, None]
    for position in range(members):
        total, weighted = defaultdict(float), defaultdict(float)
        for before, now in product(permutations(range(members)), repeat=2):
            source = torch.tensor([now[position]])
            noisy = rows(pool.take(source), x_t, source, pool.label(source) if told else None)
            noisy = replace(noisy, number=torch.tensor([position]))
            label = int(pool.label(source)) if told else ALL
            total[label] += w[source]
            weighted[label] += w[source] * rolling(pool, (before, now), step, n)(noisy).mean
        for label, sum_ in weighted.items():
            of_class = pool.members(label)
            exact = (w[of_class] * pool.data[of_class]).sum(0) / w[of_class].sum()
            torch.testing.assert_close((sum_ / total[label])[0], exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_the_members_seen_last_are_exactly_unbiased_over_all_orders(n: int, step: int, told: bool) -> None:
    seen_last(Pool(FOUR[:3], torch.tensor([0, 1, 0])), step, n, told)


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_so_they_are_over_all_orders_of_four(n: int, told: bool) -> None:
    seen_last(PLAIN, 3, n, told)


def many(n: int = 30) -> Pool:
    g = torch.Generator().manual_seed(n)
    return Pool(torch.randint(256, (n, 1, 2, 3), generator=g, dtype=torch.uint8), torch.arange(n) % 4)


def passing(order: Shuffled, images: int) -> Perturbed:
    """A batch of a run on its way."""
    batch = order(images)
    noise = torch.randn(batch.x.shape, generator=generator(0, images))
    t = torch.full((len(batch),), 0.7)
    return VE().perturb(batch.x, t, noise, label=batch.label, index=batch.index, number=batch.number)


@pytest.mark.parametrize("size", [1, 7, 29, 30])
def test_the_bank_holds_the_last_distinct_members_before_the_step(size: int) -> None:
    order = Shuffled(many(), 8, seed=1)
    bank = Rolling(order, size)
    for images in range(0, 240, 8):
        backwards = [int(order.order(torch.tensor([number]))) for number in range(images - 1, images - 61, -1)]
        assert bank.recent(images).tolist() == list(dict.fromkeys(backwards))[:size]


@pytest.mark.parametrize("told", [False, True])
def test_a_row_has_the_members_seen_last_and_its_source(told: bool) -> None:
    pool = many() if told else replace(many(), labels=None)
    order = Shuffled(pool, 8, seed=1)
    target = Rolling(order, 12)
    alone = 0
    for images in range(0, 120, 8):  # one bank all the way, across several epochs
        noisy = passing(order, images)
        found, recent = target(noisy), target.recent(images).tolist()
        for row, source in enumerate(noisy.index.tolist()):
            seen = [k for k in recent if not told or pool.labels[k] == noisy.label[row]]
            support = torch.tensor(sorted(set(seen if source in seen[:-1] else [*seen[:-1], source])))
            alone += len(support) == 1
            by_hand = posterior(noisy.x_t[row : row + 1], pool.take(support), sigma=0.7).mean[0]
            torch.testing.assert_close(found.mean[row], by_hand)
    assert not told or alone


def test_as_many_as_there_are_is_the_exact_target_and_one_is_the_source() -> None:
    order = Shuffled(many(), 8, seed=1)
    for images in (0, 24, 80):
        noisy = passing(order, images)
        torch.testing.assert_close(Rolling(order, 30)(noisy).mean, FullDataset(order.pool)(noisy).mean)
        assert torch.equal(Rolling(order, 1)(noisy).mean, noisy.x)


def test_a_bank_needs_no_memory_of_the_past_and_is_the_same_for_all_ranks() -> None:
    order = Shuffled(many(), 8, seed=1)
    old = Rolling(order, 12)
    for images in range(0, 96, 8):
        noisy = passing(order, images)
        found = old(noisy).mean
        assert torch.equal(Rolling(order, 12)(noisy).mean, found)
        for rank in range(2):
            share = slice(4 * rank, 4 * rank + 4)
            theirs = Rolling(Shuffled(many(), 8, 1, rank, 2), 12)(noisy.rows(share)).mean
            torch.testing.assert_close(theirs, found[share])


class Counted(Pool):
    """A pool that counts what is read of it."""

    def stored(self, index: Tensor) -> Tensor:
        self.__dict__.setdefault("read", []).extend(index.tolist())
        return super().stored(index)


def test_a_step_reads_no_more_than_a_step_s_images() -> None:
    order = Shuffled(many(100), 8, seed=1)
    counted = Counted(order.pool.data, order.pool.labels)
    target = Rolling(Shuffled(counted, 8, seed=1), 40)
    for images in range(0, 240, 8):
        noisy = passing(order, images)
        counted.__dict__["read"] = []
        target(noisy)
        new = [k for k in counted.__dict__["read"] if k not in noisy.index]  # a row a class is looked at, too
        assert len(new) <= (40 if images == 0 else 8)


def test_a_bank_says_what_it_needs() -> None:
    order = Shuffled(many(), 8)
    noisy = passing(order, 0)
    with pytest.raises(ValueError, match="give them a number"):
        Rolling(order, 4)(replace(noisy, number=None))
    with pytest.raises(ValueError, match="belong to 2 steps of 8 images"):
        Rolling(order, 4)(replace(noisy, number=noisy.number + 4, label=None))
    for size in (0, 31):
        with pytest.raises(ValueError, match=f"between 1 and the pool's 30 members, not {size}"):
            Rolling(order, size)
