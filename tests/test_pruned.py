"""Laws of the pruned data set: its cells are legal, what they leave out is as little as it says, and it is the exact
target to rounding wherever it claims to be.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stablefield.neighbours
import stablefield.pruned
from stablefield import VE, VP, Flow, FullDataset, Perturbed, Pool, Process, PrunedDataset
from stablefield.neighbours import isolation, nearest
from stablefield.posterior import Sums
from stablefield.pruned import Query, _heaviest
from stablefield.reference import ALL
from stablefield.screen import likely
from stablefield.shards import Shards

SIX = torch.tensor([[0.0, 0.0], [0.3, 0.1], [1.0, 0.2], [1.1, 1.0], [-0.8, 0.5], [0.1, -0.9]], dtype=torch.float64)
QUERIES = torch.tensor([[0.2, 0.1], [0.7, 0.4], [-0.3, -0.2], [2.0, 2.0]], dtype=torch.float64)
CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pruned(pool: Pool, **how: float) -> PrunedDataset:
    """With the distances of the data themselves."""
    return PrunedDataset(pool, lambda label: nearest(pool, label, block=64), **how)


def rows(x_t: Tensor, data: Tensor, index: Tensor, sigma: float, label: Tensor | None = None) -> Perturbed:
    """The record of a batch that came to lie at x_t, whatever its sources."""
    level = torch.full((len(x_t),), sigma, dtype=x_t.dtype)
    x = data[index]
    return Perturbed(x, (x_t - x) / sigma, level, torch.ones_like(level), level, x_t, label, index)


def batch(pool: Pool, t: Tensor, process: Process | None = None, seed: int = 0, told: bool = False) -> Perturbed:
    """Members of a pool on their way."""
    g = seeded(seed)
    index = torch.randint(len(pool), (len(t),), generator=g)
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
    label = pool.label(index) if told else None
    return (process or VE()).perturb(x, t.to(x), noise, index=index, label=label)


def by_differences(noisy: Perturbed, data: Tensor, labels: Tensor | None = None) -> Tensor:
    """E[x | x_t] in float64, from all differences at once."""
    x_t, members = noisy.x_t.double().flatten(1), data.double().flatten(1)
    alpha, sigma = noisy.alpha.double()[:, None], noisy.sigma.double()[:, None]
    energy = torch.stack([(row - a * members).square().sum(1) for row, a in zip(x_t, alpha, strict=True)])
    if labels is not None and noisy.label is not None:
        energy[(noisy.label[:, None] != labels) & (noisy.label >= 0)[:, None]] = math.inf
    return (torch.softmax(-energy / (2 * sigma**2), 1) @ members).reshape(noisy.x_t.shape)


def images(n: int = 300, seed: int = 0, side: int = 8, classes: int = 3) -> Pool:
    """Bytes that vary along a few directions, with labels."""
    g = seeded(seed)
    waves = torch.randn(5, side * side, generator=g)
    x = (128 + 30 * torch.randn(n, 5, generator=g) @ waves / 2 + 4 * torch.randn(n, side * side, generator=g)).round()
    labels = torch.randint(classes, (n,), generator=g)
    return Pool(x.clamp(0, 255).to(torch.uint8).view(n, 1, side, side), labels)


# ---- the cells are legal, counted out


@pytest.mark.parametrize("sigma", [0.2, 0.4, 0.7, 3.0])
@pytest.mark.parametrize("lost", [0.9, 0.5, 0.1, 1e-8])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_target_is_exactly_unbiased_however_much_is_pruned(sigma: float, lost: float, dims: int) -> None:
    energy = (QUERIES[:, None] - SIX).square().sum(2) / (2 * sigma**2)
    w = torch.softmax(-energy, 1)
    exact = w @ SIX
    target = pruned(Pool(SIX), lost=lost, dims=dims)
    found = torch.stack([target(rows(QUERIES, SIX, torch.full((4,), k), sigma)).mean for k in range(6)], 1)
    torch.testing.assert_close((w[:, :, None] * found).sum(1), exact, rtol=0, atol=1e-10)
    spread = (w * (found - exact[:, None]).square().sum(2)).sum(1)
    single = (w * (SIX - exact[:, None]).square().sum(2)).sum(1)
    assert (spread <= single * (1 + 1e-9) + 1e-15).all()


def test_much_is_pruned_in_those_cases() -> None:
    # so that the test above does not only count out the full data set
    known = pruned(Pool(SIX), lost=0.5, dims=1).known(ALL, CPU)
    assert [int((known.level <= sigma).sum()) for sigma in (0.1, 0.2, 0.4)] == [0, 2, 6]
    inside = known.survivors(rows(QUERIES, SIX, torch.arange(4), 0.4), Shards(), 0.5 / 3)[1]
    assert inside.sum(1).tolist() == [5, 4, 4, 1]


# ---- what the cells leave out


def test_up_to_its_level_of_isolation_a_source_loses_no_more_than_that_of_the_posterior() -> None:
    g, lost = seeded(0), 0.05
    data = torch.randn(60, 3, generator=g, dtype=torch.float64)
    level = isolation(nearest(Pool(data)), 59, lost)
    for source in range(0, 60, 6):
        for share, holds in ((1.0, True), (4.0, False)):
            sigma = share * float(level[source])
            x_t = data[source] + sigma * torch.randn(4000, 3, generator=g, dtype=torch.float64)
            w = torch.softmax(-torch.cdist(x_t, data).square() / (2 * sigma**2), 1)
            outside = 1 - w[:, source]
            error = 4 * float(outside.std()) / 4000**0.5
            assert (float(outside.mean()) <= lost + error) == holds


def test_isolation_sums_the_acceptance_probabilities_of_all_others() -> None:
    distances = torch.tensor([[1.0, 2.0, 2.5], [0.0, 1.0, 1.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    level = isolation(distances, 10, 1e-4)
    assert level[1] == 0  # a duplicate is never told apart
    for row in (0, 2):
        mass = torch.erfc(distances[row] / (8**0.5 * level[row]))
        assert float((mass * torch.tensor([1, 1, 8])).sum()) == pytest.approx(1e-4, rel=1e-6)
    assert torch.isinf(isolation(torch.zeros(1, 0, dtype=torch.float64), 0, 1e-4)).all()


@pytest.mark.parametrize("dims", [1, 3, 8])
def test_seen_through_a_projection_the_posterior_left_out_is_on_average_what_it_seems(dims: int) -> None:
    # the tower property: E[sum of w outside S | P x_t] = sum of q outside S, for any S that P x_t decides
    g, lost, sigma = seeded(1), 0.3, 1.0
    data = torch.randn(200, 8, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 1, 0.5, 0.5, 0.5])
    known = PrunedDataset(Pool(data), dims=dims).known(ALL, CPU)
    screen = known.screen
    source = torch.randint(200, (4000,), generator=g)
    x_t = data[source] + sigma * torch.randn(4000, 8, generator=g, dtype=torch.float64)
    inside = screen.as_stored(known.survivors(rows(x_t, data, source, sigma), Shards(), lost)[1])
    w = torch.softmax(-torch.cdist(x_t, data).square() / (2 * sigma**2), 1)
    q = torch.softmax(-torch.cdist(screen.projection(x_t), screen.projection(data)).square() / (2 * sigma**2), 1)
    actual, seeming = ((weight * ~inside).sum(1).double() for weight in (w, q))
    difference = actual - seeming
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 4000**0.5 + 1e-6
    assert float(seeming.max()) <= lost
    assert 1 < float(inside.sum(1).double().mean()) < 150
    missed = (~inside.gather(1, source[:, None])).double()
    assert float(missed.mean()) <= lost


def test_the_rows_that_miss_more_than_p_of_the_mass_are_at_most_a_share_of_lost_over_p() -> None:
    pool, lost = images(), 1e-3
    data = pool.take(torch.arange(len(pool))).double().flatten(1)
    for sigma in (0.1, 0.3, 1.0, 3.0):
        noisy = batch(pool, torch.full((400,), sigma), seed=3)
        found = pruned(pool, lost=lost, dims=4)(noisy).mean.double()
        error = (found - by_differences(noisy, data.view(-1, 1, 8, 8))).flatten(1).norm(dim=1)
        diameter = float(torch.cdist(data, data).max())
        for p in (0.01, 0.1):
            assert float((error > p * diameter).double().mean()) <= lost / p


# ---- it is the exact target


@pytest.mark.parametrize("process", [VE(), VP(), Flow()], ids=repr)
@pytest.mark.parametrize("told", [False, True])
def test_it_is_the_exact_target_at_every_noise_level(process: Process, told: bool) -> None:
    pool = images()
    data = pool.take(torch.arange(len(pool)))
    level = torch.logspace(-3, 2, 60, dtype=torch.float64)
    noisy = batch(pool, process.time(level), process, told=told)
    found, exact = pruned(pool)(noisy), FullDataset(pool)(noisy)
    rms = float(data.square().flatten(1).sum(1).mean().sqrt())
    error = (found.mean.double() - by_differences(noisy, data, pool.labels)).flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5 * rms
    torch.testing.assert_close(found.ess, exact.ess, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.variance, exact.variance, rtol=1e-3, atol=1e-4 * rms**2)


@pytest.mark.parametrize("dims", [2, 64])
def test_mirror_images_are_members_and_neighbours(dims: int) -> None:
    pool = images(150)
    both = pool.mirrored()
    copied = Pool(torch.cat([pool.data, pool.data.flip(-1)]), pool.labels.repeat(2))
    torch.testing.assert_close(nearest(both, block=70), nearest(copied, block=70), rtol=0, atol=1e-4)
    noisy = batch(both, torch.logspace(-2, 1.5, 40), told=True)
    found, exact = pruned(both, dims=dims)(noisy), FullDataset(copied)(noisy)
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=1e-5)


def test_without_distances_the_answers_are_the_same() -> None:
    pool = images()
    noisy = batch(pool, torch.logspace(-2, 1.5, 64))
    torch.testing.assert_close(PrunedDataset(pool)(noisy).mean, pruned(pool)(noisy).mean, rtol=0, atol=1e-5)


def test_what_a_row_is_taught_depends_on_no_other_row() -> None:
    pool, target = images(), pruned(images())
    noisy = batch(pool, torch.logspace(-2, 1.5, 48))
    whole = target(noisy)
    for part in (slice(0, 1), slice(20, 48), slice(47, 48)):
        torch.testing.assert_close(target(noisy.rows(part)).mean, whole.mean[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("few", [0, 2**22])
@pytest.mark.parametrize("heaviest", [1, 40, 512])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 30.0])
def test_the_precision_is_chosen_such_that_it_does_not_matter(
    sigma: float, heaviest: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.pruned, "FEW", few)
    monkeypatch.setattr(stablefield.pruned, "HEAVIEST", heaviest)
    pool = images(400, side=16)
    noisy = batch(pool, torch.full((16,), sigma))
    exact = by_differences(noisy, pool.take(torch.arange(400)))
    torch.testing.assert_close(PrunedDataset(pool)(noisy).mean.double(), exact, rtol=0, atol=1e-5)


def test_where_sigma_is_large_float32_serves_and_where_it_is_small_float64_is_needed() -> None:
    energy = torch.tensor([[3.0, 1.0, math.inf, 2.0]] * 2)
    wanted = [[False] * 4, [True, True, False, True]]
    assert _heaviest(energy, energy < math.inf, torch.tensor([1e-7, 1e-4])).tolist() == wanted
    data = torch.randn(50, 3072, generator=seeded(0))
    pool, square = Pool(data), data.double().square().sum(1)
    for sigma, low, high in ((0.01, 1e-5, math.inf), (30.0, 0.0, 1e-6)):
        query = Query.of(batch(pool, torch.full((4,), sigma)), pool.affine, torch.zeros(3072))
        assert ((low < query.rounding(square)) & (query.rounding(square) < high)).all()


# ---- shared out among ranks


def in_turn(total: int, ask: Callable[[Shards], object]) -> list[object]:
    """What `total` ranks answer, each in a thread of its own, when they gather what all of them say."""
    barrier, said = threading.Barrier(total), [torch.empty(0)] * total

    def gather(rank: int, value: Tensor) -> Tensor:
        barrier.wait(60)
        said[rank] = value
        barrier.wait(60)
        found = torch.cat(list(said))
        barrier.wait(60)
        return found

    with ThreadPoolExecutor(total) as pool:
        return list(pool.map(lambda rank: ask(Shards(rank, total, partial(gather, rank))), range(total)))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("total", [2, 3, 5])
def test_shared_out_among_ranks_the_answers_are_the_same(total: int, told: bool) -> None:
    pool = images(301)
    pool.labels[0] = 3  # a class of one: most ranks hold nothing of it
    noisy = batch(pool, torch.logspace(-2, 1.5, 30), told=told)
    noisy.index[0], noisy.x[0] = 0, pool.take(torch.zeros(1, dtype=torch.int64))[0]
    if told:
        noisy.label[0] = 3
    alone = pruned(pool)(noisy)

    def ask(shards: Shards) -> tuple[PrunedDataset, Tensor]:
        target = PrunedDataset(pool, lambda label: nearest(pool, label), shards=shards)
        return target, target(noisy.rows(shards.mine(30))).mean

    answers = in_turn(total, ask)
    torch.testing.assert_close(torch.cat([mean for _, mean in answers]), alone.mean, rtol=0, atol=1e-6)
    for target, _ in answers:  # each holds its part
        assert len(target.own) <= 301 // total + 1


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("total", [1, 2])
def test_rows_are_screened_a_few_at_a_time_and_answered_together(
    total: int, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, asked = images(), list[int]()
    passed = stablefield.pruned._passed

    def counted(query: Query, inside: Tensor, *known: Any) -> Sums:
        asked.append(len(inside))
        return passed(query, inside, *known)

    monkeypatch.setattr(stablefield.pruned, "_passed", counted)
    monkeypatch.setattr(stablefield.pruned, "multiplies_bytes", lambda device: integers)

    def answers() -> Tensor:
        def ask(shards: Shards) -> Tensor:
            target = PrunedDataset(pool, lambda label: nearest(pool, label), shards=shards)
            return target(noisy.rows(shards.mine(32))).mean

        return torch.cat(in_turn(total, ask))

    # of small sigma first: so the first rows are screened among fewer members than the last
    noisy = batch(pool, torch.logspace(-1, 1.5, 32))
    whole = answers()
    once = len(asked) // (1 if integers else 2)  # with floating numbers in two ways
    assert once == total
    uncertain = asked[0]
    for screened, answered, passes in (
        (1, 32, 1),
        (3, 32, 1),
        (100, 5, -(-uncertain // 5)),
        (2, 4, -(-uncertain // 4)),
    ):
        asked.clear()
        monkeypatch.setattr(stablefield.pruned, "SCREENED", screened * 300)
        monkeypatch.setattr(stablefield.pruned, "ANSWERED", answered * 300)
        torch.testing.assert_close(answers(), whole, rtol=0, atol=1e-5)
        assert len(asked) == total * passes * (1 if integers else 2)


def test_each_member_is_held_by_one_rank() -> None:
    pool = images(31)
    parts = [Shards(rank, 4).own(pool) for rank in range(4)]
    assert sum(map(len, parts)) == 31
    for rank, part in enumerate(parts):
        place = Shards(rank, 4).place(torch.arange(31))
        held = place >= 0
        assert torch.equal(part.take(place[held]), pool.take(torch.arange(31)[held]))
    with pytest.raises(ValueError, match="rank 4 is none of 4"):
        Shards(4, 4)


# ---- data of all kinds


@st.composite
def data_sets(draw: st.DrawFn) -> Tensor:
    """Clusters, outliers, duplicates, lines, constants: (N, D) in float64."""
    n, d, seed = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    g = seeded(seed)
    kind = draw(st.sampled_from(["cloud", "clusters", "outlier", "duplicates", "near-duplicates", "constant", "line"]))
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    match kind:
        case "clusters":
            x = 0.01 * x + 5 * torch.randn(3, d, generator=g, dtype=torch.float64)[torch.randint(3, (n,), generator=g)]
        case "outlier":
            x[0] += 1000
        case "duplicates":
            x = x[torch.randint(max(1, n // 3), (n,), generator=g)]
        case "near-duplicates":
            x = x[:1] + 1e-3 * x
        case "constant":
            x = torch.zeros_like(x)
        case "line":
            x = x[:, :1] * torch.ones(d, dtype=torch.float64)
    return x


@given(data_sets(), st.floats(1e-3, 1e3), st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_any_data_have_their_exact_target(data: Tensor, sigma: float, dims: int, seed: int) -> None:
    pool = Pool(data)
    noisy = batch(pool, torch.full((7,), sigma), seed=seed)
    found = pruned(pool, lost=1e-12, dims=dims)(noisy)
    scale = float(data.norm(dim=1).max()) + 1e-9
    assert float((found.mean - by_differences(noisy, data)).norm(dim=1).max()) < 1e-5 * scale
    assert torch.isfinite(found.mean).all()
    assert ((found.ess >= 1 - 1e-9) & (found.ess <= len(data) + 1e-9)).all()


@given(data_sets(), st.floats(1e-3, 30), st.floats(1e-6, 0.9), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_any_data_labels_and_losses_make_legal_cells(data: Tensor, sigma: float, lost: float, seed: int) -> None:
    g = seeded(seed)
    labels = torch.randint(int(torch.randint(1, 5, (), generator=g)), (len(data),), generator=g)
    target = pruned(Pool(data, labels), lost=lost, dims=1)
    label = int(labels[0])
    members = (labels == label).nonzero().flatten()
    x_t = data[members[:1]] + sigma * torch.randn(1, data.shape[1], generator=g, dtype=torch.float64)
    energy = (x_t - data[members]).square().sum(1) / (2 * sigma**2)
    w = torch.softmax(-energy, 0)
    told = torch.full((len(members),), label)
    found = target(rows(x_t.expand(len(members), -1), data, members, sigma, told)).mean
    scale = float(data.norm(dim=1).max()) + 1e-9
    torch.testing.assert_close(w @ found, w @ data[members], rtol=0, atol=1e-7 * scale)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(0, 1000), st.floats(0.05, 20))
@settings(max_examples=40, deadline=None)
def test_rows_of_any_classes_and_of_none_have_the_exact_target_of_theirs(
    told: list[int], seed: int, sigma: float
) -> None:
    # one class of one member, one that is common, and labels that no row tells; -1 rows may be anything
    g = seeded(seed)
    labels = torch.cat([torch.tensor([0, 1, 1, 2, 3]), torch.full((30,), 3)])[torch.randperm(35, generator=g)]
    pool = Pool(images(35, seed).data, labels)
    index = torch.stack(
        [(pool.members(label))[torch.randint(len(pool.members(label)), (), generator=g)] for label in told]
    )
    x = pool.take(index)
    noise = torch.randn(x.shape, generator=g)
    noisy = VE().perturb(x, torch.full((len(told),), sigma), noise, index=index, label=torch.tensor(told))
    found = pruned(pool)(noisy).mean.double()
    wanted = by_differences(noisy, pool.take(torch.arange(35)), labels)
    assert float((found - wanted).abs().max()) < 1e-5


# ---- distances


@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("k", [1, 5, 99, 500])
def test_the_nearest_are_those_of_all_differences(block: int, k: int) -> None:
    data = torch.randn(100, 6, generator=seeded(0), dtype=torch.float64)
    data[7], data[8] = data[3], data[3] + 1e-7
    wanted = (
        torch.cdist(data, data, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf).sort(1).values
    )
    found = nearest(Pool(data), k=k, block=block)
    k = min(k, 99)
    assert found.shape == (100, k)
    exact = k if k == 99 else k - 1  # the last is a bound
    # of three that are all but equally far float32 may have taken any, but what it took is measured exactly
    torch.testing.assert_close(found[:, :exact], wanted[:, :exact], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[[3, 7, 8], :exact][:, :1], wanted[[3, 7, 8], :exact][:, :1], rtol=1e-6, atol=0)
    assert (found[:, -1] <= wanted[:, k - 1] + 1e-12).all()
    assert (found[:, -1] >= wanted[:, k - 1] - 1e-3).all()


@pytest.mark.parametrize("integers", [False, True])
def test_the_nearest_of_bytes_are_those_of_all_differences(integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stablefield.neighbours, "multiplies_bytes", lambda device: integers)
    pool = images(120)
    pool.data[5] = pool.data[9]
    pool.data[7], pool.data[8] = 0, 255  # as far from each other as bytes can be
    x = pool.take(torch.arange(120)).flatten(1).double()
    wanted = (x[:, None] - x).norm(dim=2).fill_diagonal_(math.inf).sort(1).values[:, :10]
    found = nearest(pool, k=10, block=50)
    torch.testing.assert_close(found[:, :9], wanted[:, :9], rtol=0, atol=1e-9)
    assert (found[:, 9] <= wanted[:, 9] + 1e-12).all()
    assert (found[:, 9] >= wanted[:, 9] * (1 - (1e-6 if integers else 1e-2))).all()


def test_distances_of_a_class_are_within_it_and_watched() -> None:
    pool, seen = images(90), []
    of_class = pool.members(1)
    found = nearest(pool, 1, k=3, block=10, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(found, nearest(Pool(pool.data[of_class]), k=3), rtol=0, atol=1e-4)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    alone = Pool(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert nearest(alone, 1).shape == (1, 0)


# ---- what a user is told


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda pool: PrunedDataset(pool, lost=0.0), "between 0 and 1, and not 0.0"),
        (lambda pool: PrunedDataset(pool, lost=1.5), "not 1.5"),
        (lambda pool: PrunedDataset(pool, dims=0), "at least 1, not 0"),
        (lambda pool: PrunedDataset(pool, lambda label: torch.zeros(3, 2)), r"300 members.*\(3, 2\)"),
    ],
)
def test_what_makes_no_target_is_said(make: Callable[[Pool], PrunedDataset], told: str) -> None:
    pool = images()
    with pytest.raises(ValueError, match=told):
        make(pool)(batch(pool, torch.ones(2)))


def test_rows_that_cannot_be_answered_are_refused() -> None:
    pool = images()
    noisy = batch(pool, torch.ones(3), told=True)
    told_wrong = Perturbed(**(vars(noisy) | {"label": (noisy.label + 1) % 3}))
    with pytest.raises(ValueError, match="does not carry the label"):
        pruned(pool)(told_wrong)
    with pytest.raises(ValueError, match="give it an index"):
        pruned(pool)(Perturbed(**(vars(noisy) | {"index": None})))
    broken = noisy.x_t.clone()
    broken[1] = math.nan
    with pytest.raises(ValueError, match="x_t is not finite in row 1"):
        pruned(pool)(Perturbed(**(vars(noisy) | {"x_t": broken, "label": None})))


@pytest.mark.parametrize("total", [1, 3])
@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.5])
def test_about_the_fewest_members_are_kept_that_leave_no_more_than_may_be_lost(sigma: float, total: int) -> None:
    lost, energy = 1e-3, 20 * torch.rand(50, 999, generator=seeded(2), dtype=torch.float64)

    def ask(shards: Shards) -> Tensor:
        part = energy[:, shards.rank :: shards.total].float()
        return likely(part, torch.full((50,), sigma), torch.full((50,), 1e-6), lost, 999, shards)

    inside = torch.zeros(50, 999, dtype=torch.bool)
    for rank, found in enumerate(in_turn(total, ask)):
        inside[:, rank::total] = found
    q = torch.softmax(-energy / (2 * sigma**2), 1)
    assert float((q * ~inside).sum(1).max()) <= lost
    fewest = (q.sort(1).values.cumsum(1) > lost).sum(1)
    least_likely = energy.sort(1).values.gather(1, fewest[:, None] - 1)
    half_a_nat = sigma**2
    assert (inside.sum(1) <= (energy <= least_likely + half_a_nat).sum(1)).all()
    assert (inside.sum(1) < 999 / 4).all()


def test_however_many_members_there_are_no_more_is_lost() -> None:
    # a sum of a million equal numbers in float32, one after the other, is off by some thousandths
    near, far, beyond = torch.zeros(1, 1000), torch.full((1, 10**6), 7.3), torch.full((1, 2 * 10**6), 60.0)
    energy, sigma = torch.cat([near, far, beyond], 1), torch.full((1,), 0.5**0.5)
    weight = torch.exp(-energy.double())
    share = float(weight[:, 1000:].sum() / weight.sum())
    for lost, kept in ((0.999 * share, len(energy[0]) - 2 * 10**6), (1.001 * share, 1000)):
        inside = likely(energy, sigma, torch.zeros(1), lost, energy.shape[1], Shards())
        assert int(inside.sum()) == kept


def test_what_rounding_may_hide_is_kept() -> None:
    energy = torch.rand(8, 640, generator=seeded(3)) * 30
    sigma, none = torch.full((8,), 0.5), torch.zeros(8)
    kept = [int(likely(energy, sigma, none + off, 1e-4, 640, Shards()).sum()) for off in (0.0, 0.1, 1.0, 10.0, 100.0)]
    assert kept == sorted(kept)
    assert kept[0] < kept[2] < kept[-1] == energy.numel()


# ---- the caller's precision


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_what_others_want_of_float32_changes_no_target(
    precision: str, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablefield.pruned, "multiplies_bytes", lambda device: integers)
    pool = images(400, side=16)
    noisy = batch(pool, torch.logspace(-1.5, 1.5, 24))
    alone = pruned(pool)(noisy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = pruned(pool)(noisy)
            assert (noisy.x_t.flatten(1) @ noisy.x_t.flatten(1).T).dtype == torch.bfloat16  # as the caller had it
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for name in ("mean", "ess", "variance"):
        assert torch.equal(getattr(found, name), getattr(alone, name))
