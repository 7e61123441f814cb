"""Laws of reading ahead: the same items in the same order, the next while one is used, and no thread left behind."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pruned import by_differences

from stablefield import VE, FullDataset, NearestNeighbours, Perturbed, Pool, PrunedDataset
from stablefield.ahead import ahead
from stablefield.data import Store, write
from stablefield.data.contents import Contents
from stablefield.neighbours import nearest
from stablefield.reference import ALL


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    assert not threads()


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_the_items_are_the_same_in_the_same_order(n: int) -> None:
    assert list(ahead(iter(range(n)))) == list(range(n))
    assert list(ahead(iter([None] * n))) == [None] * n


def test_the_next_item_is_made_while_one_is_used_and_no_further_one() -> None:
    made, here = [], threading.current_thread()

    def items() -> Iterator[int]:
        for number in range(5):
            assert threading.current_thread() is not here
            made.append(number)
            yield number

    for number in ahead(items()):
        deadline = time.monotonic() + 10
        while len(made) < min(number + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(min(number + 2, 5)))


def test_what_goes_wrong_is_told_where_the_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    got = []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(ahead(items()))
    coming = ahead(items())
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_who_stops_early_leaves_no_thread() -> None:
    for number in ahead(iter(range(100))):
        if number == 3:
            break
    coming = ahead(iter(range(100)))
    next(coming)
    assert threads()
    coming.close()


def test_who_fails_leaves_no_thread() -> None:
    def used() -> None:
        for number in map(float, ahead(iter(range(100)))):
            assert number < 3

    with pytest.raises(AssertionError):
        used()


# ---- data on a disk


def stored(folder: Path, dtype: str, labels: bool = True) -> Pool:
    """A pool that is mapped, and said to be too large for memory."""
    g = torch.Generator().manual_seed(0)
    x = 40 * torch.randn(1000, 1, 6, 6, generator=g)
    data = (128 + x).clamp(0, 255).byte() if dtype == "uint8" else x / 80
    found = np.arange(1000) % 3 if labels else None
    contents = Contents(1000, lambda: iter(data.numpy().reshape(4, 250, 1, 6, 6)), found)
    return replace(write(folder / "store", contents, source="a test").load(), mapped=True)


def in_memory(pool: Pool) -> Pool:
    return Pool(pool.data.clone(), pool.labels, pool.levels, pool.places)


def batch(pool: Pool, told: bool) -> Perturbed:
    g = torch.Generator().manual_seed(1)
    index = torch.randint(len(pool), (12,), generator=g)
    x = pool.take(index)
    label = pool.label(index) if told else None
    return VE().perturb(x, torch.logspace(-1, 1.5, 12), torch.randn(x.shape, generator=g), index=index, label=label)


@pytest.fixture(params=["uint8", "float32"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    return stored(tmp_path, request.param)


@pytest.mark.parametrize("told", [False, True])
def test_targets_from_a_mapped_store_have_the_bits_of_those_from_memory(pool: Pool, told: bool) -> None:
    for mapped in (pool, pool.mirrored(), pool.subset(torch.arange(0, 1000, 3))):
        assert mapped.mapped
        here = in_memory(mapped)
        noisy = batch(here, told)
        for make in (FullDataset, lambda data: NearestNeighbours(data, 5), PrunedDataset):
            found, wanted = make(mapped)(noisy), make(here)(noisy)
            for name in ("mean", "ess", "variance"):
                assert torch.equal(getattr(found, name), getattr(wanted, name))
        torch.testing.assert_close(
            FullDataset(mapped)(noisy).mean.double(),
            by_differences(noisy, here.take(torch.arange(len(here))), here.labels),
            rtol=0,
            atol=1e-5,
        )


def test_so_have_distances_between_neighbours(pool: Pool) -> None:
    for label in (ALL, 1):
        assert torch.equal(nearest(pool, label, block=200), nearest(in_memory(pool), label, block=200))


@pytest.mark.parametrize("label", [ALL, 2])
def test_blocks_of_a_map_are_read_by_another_thread_into_memory_of_their_own(pool: Pool, label: int) -> None:
    for blocks in (pool.blocks(label, 64), pool.stored_blocks(label, 64)):
        for block in blocks:
            assert threads()
            assert block.untyped_storage().data_ptr() != pool.data.untyped_storage().data_ptr()
    for blocks in (in_memory(pool).blocks(label, 64), in_memory(pool).stored_blocks(label, 64)):
        next(iter(blocks))
        assert not threads()  # what is in memory pays nothing


def test_a_support_that_cannot_be_used_leaves_no_thread(pool: Pool) -> None:
    noisy = batch(pool, told=False)
    wrong = noisy.each(lambda values: values[..., :-1] if values.ndim > 1 else values)
    with pytest.raises(ValueError, match="do not fit"):
        FullDataset(pool)(Perturbed(**(vars(wrong) | {"index": None})))


def test_a_pool_moves_with_no_more_data_than_its_members_need(pool: Pool) -> None:
    some = pool.subset(torch.arange(1, 1000, 4))
    both = pool.mirrored()
    for view, members in ((pool, 1000), (some, 250), (some.mirrored(), 250), (both, 1000)):
        moved = view.to(torch.device("cpu"))
        everyone = torch.arange(len(view))
        assert not moved.mapped
        assert torch.equal(moved.stored(everyone), view.stored(everyone))
        assert torch.equal(moved.labels, view.labels)
        assert moved.data.nbytes == view.nbytes == members * pool.data[0].nbytes
    assert some.to(torch.device("cpu")).places is None


@pytest.mark.parametrize("large", [False, True])
def test_a_store_is_read_ahead_where_memory_cannot_hold_it(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path, "uint8", labels=False)
    monkeypatch.setattr("stablefield.data.store.IN_MEMORY", 0.0 if large else 0.5)
    pool = Store(tmp_path / "store").load()
    for view in (pool, pool.subset(torch.arange(5)), pool.mirrored()):
        assert view.mapped == large
