"""Laws of targets that noise chooses between: unbiased whatever the bands, and in each band the target it names."""

import math
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from torch import Tensor

from stablefield import (
    VE,
    VP,
    Banded,
    Flow,
    FullDataset,
    Perturbed,
    Pool,
    PrunedDataset,
    ReferenceBatch,
    SingleSample,
    TargetEstimator,
)
from stablefield.augmentation import DIM
from stablefield.neighbours import nearest
from stablefield.process import Process
from stablefield.reference import ALL

SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
KINDS = torch.tensor([0, 1, 0, 1, 0, 1])
QUERIES = torch.tensor([[0.2, 0.1], [0.7, 0.4], [-0.3, -0.2], [2.0, 2.0]], dtype=torch.float64)
BANDS = ((0.3, "single"), (0.6, "reference:3"), (1.0, "pruned"), (2.0, "reference:2"), (math.inf, "full"))
LEVELS = (0.2, 0.3, 0.45, 0.6, 0.8, 1.5, 7.0)  # two of them at an edge


class Drawn(Pool):
    """A pool whose next draw is known: the places of members within their class."""

    def draw(self, n: int, label: int, generator: torch.Generator | None) -> Tensor:
        order: Tensor = self.__dict__["next"]
        return self.members(label)[order[:n]]


def banded(pool: Pool, bands: tuple[tuple[float, str], ...] = BANDS) -> Banded:
    return Banded(pool, lambda label: nearest(pool, label), bands)


def in_every_order(data: Tensor, labels: Tensor | None) -> Iterator[Banded]:
    """With every draw of references there is."""
    for order in permutations(range(6 if labels is None else 3), 3):  # no band draws more than three
        pool = Drawn(data, labels)
        object.__setattr__(pool, "next", torch.tensor(order))
        yield banded(pool)


def batch(pool: Pool, level: Tensor, process: Process | None = None, told: bool = False) -> Perturbed:
    """Members of a pool on their way, at these noise levels."""
    g, process = torch.Generator().manual_seed(0), process or VE()
    index = torch.randint(len(pool), (len(level),), generator=g)
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
    return process.perturb(x, process.time(level).to(x), noise, index=index, label=pool.label(index) if told else None)


def cloud(n: int = 60) -> Pool:
    g = torch.Generator().manual_seed(1)
    return Pool(torch.randn(n, 1, 2, 2, generator=g), torch.randint(3, (n,), generator=g))


def same(one: object, other: object, tolerance: float = 1e-6) -> None:
    for name in ("mean", "ess", "variance"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("told", [False, True])
def test_the_target_is_exactly_unbiased_in_all_bands_at_once(told: bool) -> None:
    # every level, query and source is a row of one batch, so that rows of all bands share every draw
    rows = [(level, q, k) for level in LEVELS for q in range(4) for k in range(6)]
    level = torch.tensor([level for level, _, _ in rows], dtype=torch.float64)
    query, index = (torch.tensor([row[place] for row in rows]) for place in (1, 2))
    x_t, x = QUERIES[query], SIX[index]
    label = KINDS[index] if told else None
    noisy = Perturbed(x, (x_t - x) / level[:, None], level, torch.ones_like(level), level, x_t, label, index)
    w = torch.exp(-(x_t - x).square().sum(1) / (2 * level**2)).view(len(LEVELS), 4, 6, 1)
    if told:  # those of one class, and then those of the other, in which each is 3 of the 6
        mask = torch.tensor([[0], [1]]) == KINDS
        w = (w * mask[:, None, None, :, None]).reshape(-1, 4, 6, 1)
    w = w / w.sum(2, keepdim=True)
    exact = (w * SIX).sum(2)
    draws = list(in_every_order(SIX, KINDS if told else None))
    found = sum(target(noisy).mean for target in draws) / len(draws)
    found = found.view(len(LEVELS), 4, 6, 2).repeat(2 if told else 1, 1, 1, 1)
    torch.testing.assert_close((w * found).sum(2), exact, rtol=0, atol=1e-10)


def parts(pool: Pool) -> dict[str, TargetEstimator]:
    return {
        "single": SingleSample(),
        "reference:3": ReferenceBatch(pool, 3),
        "reference:2": ReferenceBatch(pool, 2),
        "pruned": PrunedDataset(pool, lambda label: nearest(pool, label)),
        "full": FullDataset(pool),
    }


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("process", [VE(), VP(), Flow()], ids=repr)
def test_in_its_band_a_target_answers_as_it_would_alone(process: Process, told: bool) -> None:
    pool = cloud()
    noisy = batch(pool, torch.logspace(-1.5, 1, 50, dtype=torch.float64), process, told)
    found = banded(pool)(noisy, generator=torch.Generator().manual_seed(3))
    level, low = noisy.sigma.double() / noisy.alpha.double(), 0.0
    for edge, choice in BANDS:
        here = ((level > low) & (level <= edge)).nonzero().flatten()
        assert len(here) > 2
        alone = parts(pool)[choice](noisy.rows(here), generator=torch.Generator().manual_seed(3))
        same(alone, found.rows(here))
        low = edge


def test_a_level_at_an_edge_belongs_below_it() -> None:
    pool = cloud()
    level = torch.tensor([0.25, 0.25 * (1 + 1e-6), 0.5, math.inf], dtype=torch.float32)
    noisy = batch(pool, level[:3])
    target = banded(pool, ((0.25, "single"), (0.5, "full"), (math.inf, "pruned")))
    assert {choice: rows.tolist() for choice, rows in target._rows(noisy).items()} == {"single": [0], "full": [1, 2]}


def test_where_no_data_are_left_all_noise_is_beyond_the_last_edge() -> None:
    pool = cloud()
    noisy = Flow().perturb(pool.take(torch.arange(2)), torch.tensor([0.5, 1.0]), torch.ones(2, 1, 2, 2))
    target = banded(pool, ((5.0, "single"), (math.inf, "full")))
    assert {choice: rows.tolist() for choice, rows in target._rows(noisy).items()} == {"single": [0], "full": [1]}
    assert torch.isfinite(target(noisy).mean).all()


def test_bands_of_one_target_are_answered_together() -> None:
    pool = cloud()
    noisy = batch(pool, torch.tensor([0.1, 0.4, 1.5, 9.0]))
    target = banded(pool, ((0.2, "full"), (1.0, "single"), (2.0, "full"), (math.inf, "single")))
    assert {choice: rows.tolist() for choice, rows in target._rows(noisy).items()} == {
        "full": [0, 2],
        "single": [1, 3],
    }
    same(target(noisy).rows(torch.tensor([0, 2])), FullDataset(pool)(noisy.rows(torch.tensor([0, 2]))))


def test_what_a_row_is_taught_depends_on_no_other_row() -> None:
    pool = cloud()
    noisy = batch(pool, torch.logspace(-1.5, 1, 40), told=True)
    noisy.label[::5] = ALL
    whole = banded(pool)(noisy, generator=torch.Generator().manual_seed(0))
    for part in (torch.tensor([39]), torch.arange(10, 30), torch.tensor([30, 2])):
        same(banded(pool)(noisy.rows(part), generator=torch.Generator().manual_seed(0)), whole.rows(part))


def test_several_steps_are_answered_as_each_would_be() -> None:
    pool = cloud()
    noisy = batch(pool, torch.logspace(-1.5, 1, 40)[torch.randperm(40)], told=True)
    # one of them without a row in most bands
    steps = [noisy.rows(slice(0, 25)), noisy.rows(slice(25, 26)), noisy.rows(slice(26, 40))]
    target = banded(pool)
    found = target.several(steps, [torch.Generator().manual_seed(step) for step in range(3)])
    for step, (rows, together) in enumerate(zip(steps, found, strict=True)):
        same(target(rows, generator=torch.Generator().manual_seed(step)), together)


def test_a_generator_moves_on_by_what_one_target_draws() -> None:
    pool = cloud()
    noisy = batch(pool, torch.logspace(-1.5, 1, 40))
    one, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    banded(pool)(noisy, generator=one)
    ReferenceBatch(pool, 3)(noisy, generator=other)
    assert torch.equal(one.get_state(), other.get_state())
    first, second = (banded(pool)(noisy, generator=one).mean for _ in range(2))
    assert not torch.equal(first, second)


def test_flips_are_undone_and_other_maps_keep_their_source() -> None:
    pool = cloud()
    plain = batch(pool, torch.logspace(-1.5, 1, 40))
    told = torch.zeros(40, DIM)
    told[::2, 0] = 1
    told[::7, 2] = 0.3
    known = {name: value.flip(-1) for name, value in (("x", plain.x), ("noise", plain.noise), ("x_t", plain.x_t))}
    flipped = Perturbed(**(vars(plain) | known | {"augmentation": told}))
    straight = torch.where((told[:, 0] == 1)[:, None, None, None], flipped.x_t, plain.x_t)
    rows = Perturbed(
        **(
            vars(flipped)
            | {"x_t": straight}
            | {n: torch.where((told[:, 0] == 1)[:, None, None, None], v, getattr(plain, n)) for n, v in known.items()}
        )
    )
    found = banded(pool)(rows, generator=torch.Generator().manual_seed(0)).mean
    wanted = banded(pool)(plain, generator=torch.Generator().manual_seed(0)).mean
    wanted = torch.where((told[:, 0] == 1)[:, None, None, None], wanted.flip(-1), wanted)
    wanted[::7] = rows.x[::7]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_it_says_its_bands() -> None:
    pool = cloud()
    said = "single up to 0.3, reference:3 up to 0.6, pruned up to 1, reference:2 up to 2, full beyond)"
    assert repr(banded(pool)) == f"Banded({pool!r}, {said}"
    assert repr(banded(pool, ((math.inf, "full"),))) == f"Banded({pool!r}, full everywhere)"
    assert repr(banded(pool, ())) == f"Banded({pool!r}, undecided)"


def test_what_was_found_out_about_the_data_is_kept_when_bands_change() -> None:
    pool = cloud()
    before = banded(pool, ((math.inf, "pruned"),))
    after = before.with_bands(((1.0, "single"), (math.inf, "pruned")))
    assert after.part("pruned") is before.part("pruned")
    assert after.bands == ((1.0, "single"), (math.inf, "pruned"))


@pytest.mark.parametrize(
    ("bands", "told"),
    [
        (((1.0, "single"), (0.5, "full"), (math.inf, "full")), r"ascend .* unlike \[1.0, 0.5, inf\]"),
        (((1.0, "single"), (1.0, "full"), (math.inf, "full")), "ascend"),
        (((1.0, "single"),), "end with inf"),
        (((0.0, "single"), (math.inf, "full")), "above 0"),
        (((math.nan, "single"), (math.inf, "full")), "ascend"),
        (((math.inf, "neighbours:3"),), "single, reference:NUMBER, pruned or full, not 'neighbours:3'"),
        (((math.inf, "reference"),), "not 'reference'"),
        (((math.inf, "reference:61"),), "between 1 and the pool's 60 members, not 61"),
        (((math.inf, "reference:0"),), "not 0"),
    ],
)
def test_bands_that_are_none_are_refused(bands: tuple[tuple[float, str], ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        banded(cloud(), bands)


def test_a_budget_is_a_share_and_nothing_is_answered_before_the_bands_are_decided() -> None:
    pool = cloud()
    for budget in (-0.1, math.nan):
        with pytest.raises(ValueError, match="budget is a share"):
            Banded(pool, budget=budget)
    with pytest.raises(ValueError, match="not decided"):
        Banded(pool)(batch(pool, torch.ones(2)))
