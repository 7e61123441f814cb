"""Laws of the wrappers: targets of several steps at once, and of several ranks, equal those of a single call."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_data import CPU, assert_equal_posteriors, images, noisy_batch, on_ranks, own_part, seeded

from stablefield import VP, ExactTarget, Pool, Posterior
from stablefield.build import resident
from stablefield.config import ConfigError, resolve
from stablefield.data import write_store
from stablefield.data.contents import Contents
from stablefield.targets import Prefetched, Shard, Sharded

EXACT: list[Callable[[Pool], ExactTarget]] = [ExactTarget, partial(ExactTarget, missing_mass=0)]
every_exact_target = pytest.mark.parametrize("exact", EXACT, ids=["missing mass 1e-8", "missing mass 0"])


def stored(folder: Path, dtype: str, labels: bool = True) -> Pool:
    g = torch.Generator().manual_seed(0)
    x = 40 * torch.randn(1000, 1, 6, 6, generator=g)
    data = (128 + x).clamp(0, 255).byte() if dtype == "uint8" else x / 80
    found = np.arange(1000) % 3 if labels else None
    contents = Contents(1000, lambda: iter(data.numpy().reshape(4, 250, 1, 6, 6)), found)
    return write_store(folder / "store", contents, source="a test").load()


# ---- several steps at once


@every_exact_target
@pytest.mark.parametrize("labelled", [False, True])
@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_prefetched_targets_equal_those_step_by_step_for_any_split(
    exact: Callable[[Pool], ExactTarget], labelled: bool, sizes: list[int]
) -> None:
    pool = images(200)
    target = exact(pool)
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, sum(sizes)), VP(), labelled=labelled)
    ends = np.cumsum(sizes)
    steps = [noisy.select(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    together = Prefetched(target, 1024).several(steps)
    assert [len(one.mean) for one in together] == sizes
    for step, found in zip(steps, together, strict=True):
        wanted = target(step)
        torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.ess, wanted.ess, rtol=1e-4, atol=1e-4)


@every_exact_target
def test_prefetched_targets_do_not_depend_on_the_generator(exact: Callable[[Pool], ExactTarget]) -> None:
    pool = images(100)
    noisy, target = noisy_batch(pool, torch.logspace(-1, 1, 8)), Prefetched(exact(pool), 8)
    assert_equal_posteriors(target(noisy, generator=seeded(0)), target(noisy, generator=seeded(1)), 0.0)
    assert_equal_posteriors(target.several([noisy], seeded(0))[0], target(noisy), 0.0)


def test_as_many_whole_steps_are_prefetched_as_hold_the_examples() -> None:
    target = ExactTarget(images(20))
    assert [Prefetched(target, 1024).steps(size) for size in (1, 64, 100, 1024, 2000)] == [1024, 16, 10, 1, 1]
    for examples in (0, -3):
        with pytest.raises(ValueError, match=f"examples must be at least 1, not {examples}"):
            Prefetched(target, examples)
    for examples in (0, -3, 10**6):
        with pytest.raises(ConfigError, match=f"target_prefetch must be between 1 and 65,536, not {examples}"):
            resolve({"training": {"target_prefetch": examples}})


@every_exact_target
def test_steps_with_and_without_labels_are_not_prefetched_together(exact: Callable[[Pool], ExactTarget]) -> None:
    pool = images(50)
    labelled = noisy_batch(pool, torch.ones(4), labelled=True)
    unlabelled = replace(labelled, label=None)
    for steps in ([labelled, unlabelled], [unlabelled, labelled]):
        with pytest.raises(ValueError, match="with and without label: 1 of 2 have none"):
            Prefetched(exact(pool), 8).several(steps)


# ---- several ranks


@every_exact_target
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_sharded_targets_equal_unsharded_ones_and_each_rank_keeps_its_part_of_the_data(
    exact: Callable[[Pool], ExactTarget], labelled: bool, total: int
) -> None:
    pool = images(300)
    pool.labels[0] = 3  # a class of one, of which most ranks hold no data point
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, 12), labelled=labelled)
    noisy.index[0], noisy.x[0] = 0, pool.take(torch.zeros(1, dtype=torch.int64))[0]
    if labelled:
        noisy.label[0] = 3
    unsharded = exact(pool)(noisy)

    def compute(shard: Shard) -> tuple[int, Posterior]:
        # as a rank with a GPU does, which moves its own part there and leaves the rest where it is
        shard = replace(shard, keep=lambda own: own.to(CPU))
        return shard.own(pool).data.nbytes, Sharded(exact(pool), shard)(own_part(shard, noisy))

    for rank, (held, found) in enumerate(on_ranks(total, compute)):
        assert held == pool.data.nbytes // total
        wanted = unsharded.select(slice(12 // total * rank, 12 // total * (rank + 1)))
        torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.ess, wanted.ess, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.variance, wanted.variance, rtol=1e-4, atol=1e-4)


@every_exact_target
def test_sharded_targets_of_several_steps_equal_those_of_one_rank(exact: Callable[[Pool], ExactTarget]) -> None:
    pool = images(120)
    steps = [noisy_batch(pool, torch.logspace(-1, 1.5, 8), seed=seed) for seed in range(3)]

    def compute(shard: Shard) -> list[torch.Tensor]:
        target = Prefetched(Sharded(exact(pool), shard), 12)
        return [found.mean for found in target.several([own_part(shard, noisy) for noisy in steps])]

    for step, parts in zip(steps, zip(*on_ranks(2, compute), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), exact(pool)(step).mean, rtol=0, atol=1e-5)


@every_exact_target
def test_ranks_with_unequal_numbers_of_examples_are_refused_on_every_rank(exact: Callable[[Pool], ExactTarget]) -> None:
    pool = images(30)
    noisy = noisy_batch(pool, torch.ones(6))

    def compute(shard: Shard) -> str:
        with pytest.raises(ValueError, match="equally many examples") as error:
            Sharded(exact(pool), shard)(noisy.select(slice(0, 3 + shard.rank)))
        return str(error.value)

    assert all(message.endswith("not [3, 4]") for message in on_ranks(2, compute))


@every_exact_target
def test_ranks_that_share_a_mapped_file_copy_none_of_it(exact: Callable[[Pool], ExactTarget], tmp_path: Path) -> None:
    pool = stored(tmp_path, "uint8")
    noisy = noisy_batch(pool, torch.logspace(-2, 1.5, 12))

    def compute(shard: Shard) -> tuple[ExactTarget, torch.Tensor]:
        shard = replace(shard, keep=partial(resident, device=CPU, share=0.1))
        target = exact(pool).over(shard)
        return target, Sharded(exact(pool), shard)(own_part(shard, noisy)).mean

    found = on_ranks(2, compute)
    for target, _ in found:
        assert target.own.data.data_ptr() == pool.data.data_ptr()
        assert len(target.own) == len(pool) // 2
    torch.testing.assert_close(torch.cat([mean for _, mean in found]), exact(pool)(noisy).mean, rtol=0, atol=1e-6)


def test_each_data_point_is_held_by_one_rank() -> None:
    pool = images(31)
    parts = [Shard(rank, 4).own(pool) for rank in range(4)]
    assert sum(map(len, parts)) == 31
    for rank, part in enumerate(parts):
        position = Shard(rank, 4).position(torch.arange(31))
        held = position >= 0
        assert torch.equal(part.take(position[held]), pool.take(torch.arange(31)[held]))
    for rank in (4, -1):
        with pytest.raises(ValueError, match=f"rank must be between 0 and 3, not {rank}"):
            Shard(rank, 4)
    with pytest.raises(ValueError, match="31 data points cannot be sharded over 32 ranks"):
        Shard(0, 32).own(pool)


def test_a_broadcast_has_the_values_of_the_first_rank_everywhere() -> None:
    found = on_ranks(3, lambda shard: shard.broadcast(torch.full((4,), float(shard.rank))))
    assert all(torch.equal(values, torch.zeros(4)) for values in found)


@every_exact_target
def test_ranks_whose_last_digits_differ_have_the_targets_of_one(exact: Callable[[Pool], ExactTarget]) -> None:
    # different machines find different directions, and distances that differ in the last digit
    pool = images(200)
    noisy = noisy_batch(pool, torch.logspace(-3, 1.5, 24))
    wanted = ExactTarget(pool, missing_mass=0)(noisy).mean

    def compute(shard: Shard) -> torch.Tensor:
        g = seeded(shard.rank)
        target = replace(exact(pool), distances=lambda label: torch.rand(200, 3, generator=g) / 10)
        return Sharded(target, shard)(own_part(shard, noisy)).mean

    torch.testing.assert_close(torch.cat(on_ranks(2, compute)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_moving_a_view_to_a_device_copies_only_the_data_it_needs(tmp_path: Path, dtype: str) -> None:
    pool = stored(tmp_path, dtype)
    some = pool.subset(torch.arange(1, 1000, 4))
    both = pool.mirrored()
    for view, copied in ((pool, 1000), (some, 250), (some.mirrored(), 250), (both, 1000)):
        moved = view.to(CPU)
        every = torch.arange(len(view))
        assert torch.equal(moved.stored(every), view.stored(every))
        assert torch.equal(moved.labels, view.labels)
        assert moved.data.nbytes == view.nbytes == copied * pool.data[0].nbytes
    assert some.to(CPU).view_index is None
