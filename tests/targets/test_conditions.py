"""Targets of conditional networks, enumerated: labels, dropped labels, mirror images, flips and other maps.

A network conditioned on c learns E[x | x_t, c]. Given x_t and c, the clean image is one of finitely many, each with
probability in proportion to p(x, c) exp(-||x_t - x||^2 / (2 sigma^2)). A target is unbiased if its mean over these, and
over the draws of its references, is their mean.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product

import pytest
import torch
from noisy_data import with_draw
from torch import Tensor

from stablefield import DSMTarget, ExactTarget, KNNTarget, NoisyBatch, Pool, STFTarget, posterior
from stablefield.augmentation import DIM, flip, permutes
from stablefield.data import EDMAugmentation
from stablefield.pool import NULL_LABEL
from stablefield.seeding import generator
from stablefield.targets import PublishedSTFTarget

SIGMA = 0.6
FOUR = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
CLASSES = torch.tensor([0, 1, 0, 0])
QUERIES = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 2
PLAIN = Pool(FOUR, CLASSES)


@dataclass(frozen=True)
class Case:
    """An example that training may have: an image, its data point, its conditions, and its relative frequency."""

    x: Tensor
    index: int
    label: int
    augment_label: tuple[float, ...]
    share: float
    augment_map: Tensor | None = None


# ---- kinds of conditional training


def class_conditional(pool: Pool) -> list[Case]:
    return [Case(x, k, int(pool.labels[k]), (), 1) for k, x in enumerate(pool.take(torch.arange(len(pool))))]


def labels_dropped(pool: Pool) -> list[Case]:
    return [
        Case(case.x, case.index, label, (), share)
        for case in class_conditional(pool)
        for label, share in ((case.label, 0.8), (NULL_LABEL, 0.2))
    ]


def unconditional(pool: Pool) -> list[Case]:
    return [Case(case.x, case.index, NULL_LABEL, (), 1) for case in class_conditional(pool)]


def conditioned_on_flips(pool: Pool, cases: Callable[[Pool], list[Case]] = unconditional) -> list[Case]:
    shares = {(0, 0): 0.47, (1, 0): 0.47, (0, 1): 0.03, (1, 1): 0.03}
    labels = [(torch.tensor([[*flips, *[0.0] * (DIM - 2)]], dtype=torch.float64), s) for flips, s in shares.items()]
    return [
        Case(flip(case.x[None], label)[0], case.index, case.label, tuple(label[0].tolist()), case.share * share)
        for case in cases(pool)
        for label, share in labels
    ]


def conditioned_on_flips_and_labels(pool: Pool) -> list[Case]:
    return conditioned_on_flips(pool, labels_dropped)


def conditioned_on_maps(
    pool: Pool, numbers: Iterable[int] = (4, 7), cases_of: Callable[[Pool], list[Case]] = labels_dropped
) -> list[Case]:
    """Every image under some of the maps that are drawn: number 7 permutes pixels, the others do not."""
    cases = []
    for number in numbers:
        for case in cases_of(pool):
            x, label, maps = EDMAugmentation(p=0.3)(case.x[None], [generator(1, number)])
            cases.append(Case(x[0], case.index, case.label, tuple(label[0].tolist()), case.share, maps[0]))
    return cases


TRAININGS = {
    "class-conditional": (PLAIN, class_conditional),
    "labels dropped": (PLAIN, labels_dropped),
    "mirrored": (PLAIN.subset(torch.tensor([0, 1, 3])).mirrored(), unconditional),
    "mirrored, class-conditional": (PLAIN.subset(torch.tensor([0, 1, 2])).mirrored(), class_conditional),
    "conditioned on flips": (PLAIN, conditioned_on_flips),
    "conditioned on flips and labels": (PLAIN, conditioned_on_flips_and_labels),
    "conditioned on maps": (PLAIN, conditioned_on_maps),
}
every_training = pytest.mark.parametrize("training", TRAININGS)


# ---- estimators, with all their draws


def stf_targets(n: int, augmented_size: int = 0) -> Callable[[Pool, int], Iterator]:
    def every_draw(pool: Pool, label: int) -> Iterator:
        candidates = pool.indices(label).tolist()
        for draw in permutations(candidates, min(n, len(candidates))):
            yield STFTarget(with_draw(pool, draw), n, augmented_size=augmented_size or n)

    return every_draw


ESTIMATORS: dict[str, Callable[[Pool, int], Iterator]] = {
    "dsm": lambda pool, label: iter([DSMTarget()]),
    "exact": lambda pool, label: iter([ExactTarget(pool)]),
    "exact, streamed": lambda pool, label: iter([ExactTarget(pool, missing_mass=0)]),
    "knn": lambda pool, label: iter([KNNTarget(pool, 2)]),
    "stf:2": stf_targets(2),
    "stf:3": stf_targets(3),
    "stf:3, others dsm": stf_targets(3, 1),
    "stf:4": stf_targets(4),
}


def averages(cases: list[Case], target_of: Callable[[NoisyBatch], Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The mean target, the exact mean, and the variances of target and source, for each condition and query."""
    groups = defaultdict(list)
    for case in cases:
        groups[case.label, case.augment_label].append(case)
    for (label, augment_label), group in groups.items():
        x, share = torch.stack([case.x for case in group]), torch.tensor([case.share for case in group])
        n, queries = len(group), len(QUERIES)
        distance = (QUERIES[:, None] - x).square().flatten(2).sum(2)
        w = torch.softmax(share.double().log() - distance / (2 * SIGMA**2), 1)[:, :, None, None, None]
        index = torch.tensor([case.index for case in group]).repeat(queries)
        noisy = batch_at(
            x.repeat(queries, 1, 1, 1),
            QUERIES.repeat_interleave(n, 0),
            index,
            None if label == NULL_LABEL else torch.full_like(index, label),
            torch.tensor([augment_label] * len(index), dtype=torch.float64) if augment_label else None,
            None if group[0].augment_map is None else group[0].augment_map.expand(len(index), -1, -1),
        )
        target, exact = target_of(noisy).unflatten(0, (queries, n)), (w * x).sum(1)
        spread, dsm = ((w * (found - exact[:, None]).square()).flatten(1).sum(1) for found in (target, x))
        yield (w * target).sum(1), exact, spread, dsm


def batch_at(
    x: Tensor,
    x_t: Tensor,
    index: Tensor,
    label: Tensor | None = None,
    augment_label: Tensor | None = None,
    augment_map: Tensor | None = None,
) -> NoisyBatch:
    """Examples whose x_t is given."""
    level = torch.full((len(x),), SIGMA, dtype=torch.float64)
    conditions = {"augment_label": augment_label, "augment_map": augment_map}
    return NoisyBatch(x, (x_t - x) / SIGMA, level, torch.ones_like(level), level, x_t, label, index, **conditions)


@every_training
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_target_is_unbiased_given_the_conditions_of_the_network(training: str, kind: str) -> None:
    pool, cases_of = TRAININGS[training]

    def target_of(noisy: NoisyBatch) -> Tensor:
        label = NULL_LABEL if noisy.label is None else int(noisy.label[0])
        found = [target(noisy).mean for target in ESTIMATORS[kind](pool, label)]
        return torch.stack(found).mean(0)

    for mean, exact, spread, dsm in averages(cases_of(pool), target_of):
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)
        assert (spread <= dsm * (1 + 1e-9)).all()


def test_flips_share_references_and_other_maps_keep_their_source() -> None:
    cases = conditioned_on_maps(PLAIN)
    augment_label = torch.tensor([case.augment_label for case in cases], dtype=torch.float64)
    assert permutes(augment_label).any()
    assert not permutes(augment_label).all()
    x = torch.stack([case.x for case in cases])
    index, label = torch.tensor([case.index for case in cases]), torch.tensor([case.label for case in cases])
    x_t = torch.zeros_like(x)
    noisy = batch_at(x, x_t, index, label, augment_label)
    found = ExactTarget(PLAIN, missing_mass=0)(noisy)
    keeps_source = ~permutes(augment_label)
    assert torch.equal(found.mean[keeps_source], x[keeps_source])
    assert (found.ess[keeps_source] == 1).all()
    assert (found.ess[~keeps_source] > 1).any()  # one class has a single data point
    # the same with references that are flipped as the example is
    for b in (~keeps_source).nonzero().flatten().tolist():
        candidates = PLAIN.indices(int(label[b]))
        flipped = flip(PLAIN.take(candidates), augment_label[b].expand(len(candidates), -1))
        wanted = posterior(x_t[b : b + 1], flipped, sigma=SIGMA)
        torch.testing.assert_close(found.mean[b], wanted.mean[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.variance[b], wanted.variance[0], rtol=0, atol=1e-12)


# ---- mistakes that are biased


class MapsOfThese:
    """An augmentation by the maps with these numbers, in `conditioned_on_maps`."""

    augment_dim = DIM

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers = numbers

    def __call__(self, x: Tensor, generators: Iterable[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        assert len(list(generators)) == len(x)
        each = [EDMAugmentation(p=0.3)(x[[k]], [generator(1, n)]) for k, n in enumerate(self.numbers[: len(x)])]
        images, labels, maps = (torch.cat(parts) for parts in zip(*each, strict=True))
        return images, labels, maps


def test_the_published_estimator_is_biased_by_references_under_other_maps() -> None:
    pool, numbers = Pool(FOUR), (4, 5)
    cases = conditioned_on_maps(PLAIN, numbers, unconditional)

    def published(size: int) -> Callable[[NoisyBatch], Tensor]:
        draws = list(product(permutations(range(4), size - 1), product(numbers, repeat=size - 1)))
        targets = [PublishedSTFTarget(with_draw(pool, draw), size, MapsOfThese(maps)) for draw, maps in draws]
        return lambda noisy: torch.stack([target(noisy).mean for target in targets]).mean(0)

    biases = {size: max((a - b).abs().max() for a, b, *_ in averages(cases, published(size))) for size in (1, 2, 3)}
    assert biases[1] < 1e-12  # the source alone
    assert 0.05 < biases[2] < biases[3]


def test_the_published_estimator_needs_an_augmentation_and_has_no_labels() -> None:
    with pytest.raises(ValueError, match=r"needs augmentation\.kind=edm"):
        PublishedSTFTarget(PLAIN, 2)
    noisy = batch_at(FOUR[:2], FOUR[:2], torch.arange(2), CLASSES[:2])
    with pytest.raises(ValueError, match="without labels"):
        PublishedSTFTarget(PLAIN, 2, EDMAugmentation())(noisy)


def mean_over(noisy: NoisyBatch, support: Tensor) -> Tensor:
    """Posterior means over this support and, where it is not in the support, the source."""
    each = [
        posterior(
            noisy.x_t[b : b + 1],
            support,
            sigma=SIGMA,
            source=None if any(torch.equal(noisy.x[b], x) for x in support) else noisy.x[b : b + 1],
        )
        for b in range(len(noisy))
    ]
    return torch.cat([found.mean for found in each])


def other_classes_too(noisy: NoisyBatch) -> Tensor:
    return mean_over(noisy, FOUR)


def plain_references(noisy: NoisyBatch) -> Tensor:
    return mean_over(noisy, FOUR)


def plain_and_mirrored_references(noisy: NoisyBatch) -> Tensor:
    return mean_over(noisy, torch.cat([FOUR, FOUR.flip(-1)]))


@pytest.mark.parametrize(
    ("training", "mistake", "least"),
    [
        ("class-conditional", other_classes_too, 0.15),
        ("labels dropped", other_classes_too, 0.15),
        ("mirrored", plain_references, 0.03),
        ("conditioned on flips", plain_references, 0.1),
        ("conditioned on flips", plain_and_mirrored_references, 0.1),
        ("conditioned on maps", plain_references, 0.1),
    ],
)
def test_references_that_do_not_meet_the_conditions_are_biased(
    training: str, mistake: Callable[[NoisyBatch], Tensor], least: float
) -> None:
    pool, cases_of = TRAININGS[training]
    biases = [
        float((mean - exact).flatten(1).norm(dim=1).max()) for mean, exact, *_ in averages(cases_of(pool), mistake)
    ]
    assert max(biases) > least


@pytest.mark.parametrize("kind", ["exact", "exact, streamed", "knn", "stf:2"])
def test_examples_that_are_not_the_data_points_of_their_index_are_refused(kind: str) -> None:
    def target_of(noisy: NoisyBatch) -> Tensor:
        return next(ESTIMATORS[kind](PLAIN, NULL_LABEL))(noisy).mean

    flipped = conditioned_on_flips(PLAIN)
    without_label = [Case(case.x, case.index, NULL_LABEL, (), 1) for case in flipped if case.augment_label[0]]
    with pytest.raises(ValueError, match=r"is not data point .* DSMTarget"):
        list(averages(without_label, target_of))


@pytest.mark.usefixtures("unchecked")
def test_augmentation_labels_of_another_kind_are_refused_except_by_dsm() -> None:
    x, index = FOUR[:2], torch.arange(2)
    noisy = batch_at(x, x, index, None, torch.zeros(2, 4))
    assert torch.equal(DSMTarget()(noisy).mean, x)
    with pytest.raises(ValueError, match=r"must have 9 columns .*not 4"):
        ExactTarget(PLAIN)(noisy)
    flat = batch_at(x.flatten(1), x.flatten(1), index, None, torch.zeros(2, DIM))
    with pytest.raises(ValueError, match="only images"):
        ExactTarget(Pool(FOUR.flatten(1)))(flat)
