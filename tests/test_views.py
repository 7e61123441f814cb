"""Views of data (subsets, mirror images, what is held out) are the data they stand for, and copy none."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stablefield import VE, FullDataset, Ideal, NearestNeighbours, Pool, ReferenceBatch
from stablefield.cli import app
from stablefield.config import ConfigError, resolve
from stablefield.data import Digits, Shuffled, Summary, content_hash, split, write, write_npz
from stablefield.data.contents import Contents
from stablefield.evaluate import measure_field
from stablefield.reference import ALL
from stablefield.run import assemble


def images(n: int = 12, dtype: torch.dtype = torch.uint8) -> Pool:
    g = torch.Generator().manual_seed(n)
    data = torch.randint(17, (n, 2, 3, 4), generator=g).to(dtype)
    return Pool(data, torch.randint(3, (n,), generator=g), levels=17)


def copied(pool: Pool) -> Pool:
    """The same members, stored."""
    return Pool(torch.cat(list(pool.stored_blocks(ALL, 5))), pool.labels, pool.levels)


def some(pool: Pool) -> Pool:
    return pool.subset(torch.tensor([7, 2, 11, 0, 5, 4]))


VIEWS = {
    "mirrored": lambda p: p.mirrored(),
    "a subset": some,
    "a mirrored subset": lambda p: some(p).mirrored(),
    "a subset of the mirrored": lambda p: p.mirrored().subset(torch.tensor([20, 3, 15, 0, 23])),
    "a subset of a subset": lambda p: some(p).subset(torch.tensor([4, 1, 3])),
    "mirrored twice": lambda p: p.mirrored().mirrored(),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def test_the_mirrored_are_all_members_and_then_their_mirror_images():
    pool = images()
    data, labels = pool.data, pool.labels
    wanted = Pool(torch.cat([data, data.flip(-1)]), torch.cat([labels, labels]), levels=17)
    found = pool.mirrored()
    assert len(found) == 24
    assert torch.equal(found.take(torch.arange(24)), wanted.take(torch.arange(24)))
    assert torch.equal(found.labels, wanted.labels)
    assert found.data.data_ptr() == data.data_ptr()
    index = torch.tensor([7, 2])
    assert torch.equal(pool.subset(index).take(torch.tensor([1, 0])), pool.take(index.flip(0)))
    assert pool.subset(index).data.data_ptr() == data.data_ptr()


@every_view
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_view_is_the_data_it_stands_for(view, dtype, tmp_path):
    pool = view(images(dtype=dtype))
    copy = copied(pool)
    assert (len(pool), pool.shape, pool.classes, repr(pool)) == (len(copy), copy.shape, copy.classes, repr(copy))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool.take(order), copy.take(order))
    for label in (ALL, *range(pool.classes)):
        if label in (ALL, *pool.labels.tolist()):
            assert torch.equal(pool.members(label), copy.members(label))
            for size in (1, 4, 100):
                ours, theirs = (torch.cat(list(p.blocks(label, size))) for p in (pool, copy))
                assert torch.equal(ours, theirs)
    assert content_hash(pool) == content_hash(copy)
    assert Summary.of(pool) == Summary.of(copy)
    batch, other = (Shuffled(p, 5, seed=3)(10) for p in (pool, copy))
    assert torch.equal(batch.x, other.x)
    assert torch.equal(batch.label, other.label)
    store = write(tmp_path / "store", Contents.of(pool), source="a view")
    assert store.verify() == content_hash(copy)
    write_npz(tmp_path / "a.npz", Contents.of(pool))
    assert np.array_equal(np.load(tmp_path / "a.npz")["data"], copy.data.numpy())


@every_view
def test_whoever_looks_at_data_sees_those_of_the_view(view):
    pool = view(images())
    copy = copied(pool)
    index = torch.arange(len(pool))
    t = torch.linspace(0.1, 2, len(pool))
    noise = torch.randn(len(pool), 2, 3, 4, generator=torch.Generator().manual_seed(1))
    noisy = VE().perturb(pool.take(index), t, noise, index=index, label=pool.labels)
    for target in (FullDataset, lambda p: ReferenceBatch(p, 3), lambda p: NearestNeighbours(p, 3)):
        ours, theirs = (target(p)(noisy, generator=torch.Generator().manual_seed(0)).mean for p in (pool, copy))
        torch.testing.assert_close(ours, theirs)
    for told in (None, pool.labels):
        torch.testing.assert_close(Ideal(pool, VE())(noisy.x_t, t, told), Ideal(copy, VE())(noisy.x_t, t, told))
    ours, theirs = (measure_field(p, VE(), t[:2], sizes=(4,), rows=4, draws=3).dsm.value for p in (pool, copy))
    torch.testing.assert_close(ours, theirs)


def test_only_images_have_mirror_images():
    for shape in ((5, 3), (5, 3, 4), (5, 1, 2, 3, 4)):
        with pytest.raises(ValueError, match="only images"):
            Pool(torch.zeros(shape)).mirrored()


@pytest.mark.parametrize("holdout", [1, 5, 11])
def test_what_is_held_out_and_what_is_left_are_all_there_is(holdout):
    pool = images()
    trained, held_out = split(pool, holdout)
    assert (len(trained), len(held_out)) == (12 - holdout, holdout)
    places = torch.cat([trained.places, held_out.places])
    assert sorted(places.tolist()) == list(range(12))
    assert torch.equal(held_out.labels, pool.labels[held_out.places])
    assert torch.equal(trained.take(torch.arange(len(trained))), pool.take(trained.places))


def test_who_holds_out_more_holds_out_the_same_and_others():
    held_out = [set(split(images(), n)[1].places.tolist()) for n in range(1, 12)]
    assert all(fewer < more for fewer, more in pairwise(held_out))


@pytest.mark.parametrize("holdout", [-1, 12, 13])
def test_something_must_be_left_to_train_on(holdout):
    with pytest.raises(ValueError, match=f"12 members, and cannot be {holdout}"):
        split(images(), holdout)


def test_nothing_held_out_is_the_data_themselves():
    pool = images()
    assert split(pool, 0) == (pool, None)


def quick(**sections):
    return resolve({"network": {"channels": 8}, "target": {"kind": "full"}, **sections})


@pytest.mark.usefixtures("unchecked")
def test_a_run_never_sees_what_is_held_out():
    def parts(seed: int, conditional: bool = True):
        training = {"seed": seed, "conditional": conditional, "batch_size": 599}
        return assemble(quick(data={"kind": "digits", "holdout": 599}, training=training))

    one, other = parts(0), parts(1)
    assert torch.equal(one.held_out.places, other.held_out.places)  # whatever the seed of the training
    assert (len(one.data), len(one.pool), len(one.held_out)) == (1797, 1198, 599)
    assert one.held_out.classes == 10
    assert parts(0, conditional=False).held_out.labels is None
    seen = torch.cat([one.pool.places[one.batches(images).index] for images in (0, 599)])
    assert sorted(seen.tolist()) == one.pool.places.tolist()
    assert one.objective.target.pool is one.pool
    with pytest.raises(ConfigError, match="leave some of the 1797 members"):
        assemble(quick(data={"kind": "digits", "holdout": 1797}))


def test_what_is_held_out_changes_no_cache_and_no_name():
    assert repr(Digits(holdout=3)) == repr(Digits())
    assert resolve({"data": {"kind": "store", "path": "x", "holdout": 3}}).make("data").holdout == 3
    assert resolve({"data": {"kind": "store", "path": "x"}}).make("data").path == Path("x")


@pytest.mark.usefixtures("unchecked")
def test_data_that_are_looked_at_hold_nothing_out(tmp_path):
    result = CliRunner().invoke(app, ["data", "inspect", "digits", "--set", "data.holdout=5"])
    assert isinstance(result.exception, ConfigError)
    assert "held out by a training" in str(result.exception)
