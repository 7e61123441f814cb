"""Laws of data that several ranks hold: each has its part and no more, and together they are the whole."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pruned import CPU, batch, images, in_turn, seeded

from stablefield import FullDataset, Pool, Posterior, PrunedDataset
from stablefield.data import write
from stablefield.data.contents import Contents
from stablefield.run import resident
from stablefield.shards import Shards
from stablefield.target import SharedOut

KINDS = [FullDataset, PrunedDataset]


def stored(folder: Path, dtype: str, labels: bool = True) -> Pool:
    g = torch.Generator().manual_seed(0)
    x = 40 * torch.randn(1000, 1, 6, 6, generator=g)
    data = (128 + x).clamp(0, 255).byte() if dtype == "uint8" else x / 80
    found = np.arange(1000) % 3 if labels else None
    contents = Contents(1000, lambda: iter(data.numpy().reshape(4, 250, 1, 6, 6)), found)
    return write(folder / "store", contents, source="a test").load()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("total", [2, 3])
def test_each_rank_keeps_its_part_of_the_bytes_and_all_answer_as_one(
    kind: type[SharedOut], told: bool, total: int
) -> None:
    pool = images(300)
    pool.labels[0] = 3  # a class of one, of which most ranks hold nothing
    noisy = batch(pool, torch.logspace(-2, 1.5, 12), told=told)
    noisy.index[0], noisy.x[0] = 0, pool.take(torch.zeros(1, dtype=torch.int64))[0]
    if told:
        noisy.label[0] = 3
    alone = kind(pool)(noisy)

    def ask(shards: Shards) -> tuple[int, Posterior]:
        # as a rank with a GPU does, which brings its own part there and leaves the rest where it is
        target = kind(pool, shards=Shards(shards.rank, total, shards.gather, keep=lambda own: own.to(CPU)))
        return target.own.data.nbytes, target(noisy.rows(shards.mine(12)))

    for rank, (held, answer) in enumerate(in_turn(total, ask)):
        assert held == pool.data.nbytes // total
        wanted = alone.rows(Shards(rank, total).mine(12))
        torch.testing.assert_close(answer.mean, wanted.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(answer.ess, wanted.ess, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer.variance, wanted.variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_a_mapped_file_hold_nothing_of_it(kind: type[SharedOut], tmp_path: Path) -> None:
    pool = stored(tmp_path, "uint8")
    noisy = batch(pool, torch.logspace(-2, 1.5, 12))

    def ask(shards: Shards) -> tuple[SharedOut, torch.Tensor]:
        kept = Shards(shards.rank, 2, shards.gather, keep=partial(resident, device=CPU))
        target = kind(pool, shards=kept)
        return target, target(noisy.rows(shards.mine(12))).mean

    answers = in_turn(2, ask)
    for target, _ in answers:
        assert target.own.data.data_ptr() == pool.data.data_ptr()
        assert len(target.own) == len(pool) // 2
    torch.testing.assert_close(torch.cat([mean for _, mean in answers]), kind(pool)(noisy).mean, rtol=0, atol=1e-6)


def test_what_the_first_rank_found_counts_for_all() -> None:
    found = in_turn(3, lambda shards: shards.first(torch.full((4,), float(shards.rank))))
    assert all(torch.equal(values, torch.zeros(4)) for values in found)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_whose_last_digits_differ_answer_as_one(kind: type[SharedOut], monkeypatch: pytest.MonkeyPatch) -> None:
    # machines of other makes find other directions, and distances that are a digit off
    pool, total = images(200), 2
    noisy = batch(pool, torch.logspace(-3, 1.5, 24))
    exact = FullDataset(pool)(noisy).mean

    def ask(shards: Shards) -> torch.Tensor:
        g = seeded(shards.rank)
        off = {} if kind is FullDataset else {"distances": lambda label: torch.rand(200, 3, generator=g) / 10}
        return kind(pool, shards=shards, **off)(noisy.rows(shards.mine(24))).mean

    torch.testing.assert_close(torch.cat(in_turn(total, ask)), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_pool_moves_with_no_more_data_than_its_members_need(tmp_path: Path, dtype: str) -> None:
    pool = stored(tmp_path, dtype)
    some = pool.subset(torch.arange(1, 1000, 4))
    both = pool.mirrored()
    for view, members in ((pool, 1000), (some, 250), (some.mirrored(), 250), (both, 1000)):
        moved = view.to(torch.device("cpu"))
        everyone = torch.arange(len(view))
        assert torch.equal(moved.stored(everyone), view.stored(everyone))
        assert torch.equal(moved.labels, view.labels)
        assert moved.data.nbytes == view.nbytes == members * pool.data[0].nbytes
    assert some.to(torch.device("cpu")).places is None
