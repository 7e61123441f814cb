"""Views of a pool (subsets, mirror images, held-out data) equal copies of the data they refer to, and copy nothing."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stablefield import VE, ExactTarget, IdealDenoiser, KNNTarget, Pool, STFTarget
from stablefield.build import build
from stablefield.cli import app
from stablefield.config import ConfigError, resolve
from stablefield.data import DataSummary, Digits, ShuffledBatches, content_hash, split, write_npz, write_store
from stablefield.data.contents import Contents
from stablefield.pool import NULL_LABEL
from stablefield.studies.field import measure


def images(n: int = 12, dtype: torch.dtype = torch.uint8) -> Pool:
    g = torch.Generator().manual_seed(n)
    data = torch.randint(17, (n, 2, 3, 4), generator=g).to(dtype)
    return Pool(data, torch.randint(3, (n,), generator=g), num_levels=17)


def copied(pool: Pool) -> Pool:
    """The same data points, stored one after the other."""
    return Pool(torch.cat(list(pool.stored_blocks(NULL_LABEL, 5))), pool.labels, pool.num_levels)


def subset(pool: Pool) -> Pool:
    return pool.subset(torch.tensor([7, 2, 11, 0, 5, 4]))


VIEWS = {
    "mirrored": lambda p: p.mirrored(),
    "a subset": subset,
    "a mirrored subset": lambda p: subset(p).mirrored(),
    "a subset of the mirrored": lambda p: p.mirrored().subset(torch.tensor([20, 3, 15, 0, 23])),
    "a subset of a subset": lambda p: subset(p).subset(torch.tensor([4, 1, 3])),
    "mirrored twice": lambda p: p.mirrored().mirrored(),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def test_a_mirrored_pool_is_all_data_points_followed_by_their_mirror_images():
    pool = images()
    data, labels = pool.data, pool.labels
    expected = Pool(torch.cat([data, data.flip(-1)]), torch.cat([labels, labels]), num_levels=17)
    mirrored = pool.mirrored()
    assert len(mirrored) == 24
    assert torch.equal(mirrored.take(torch.arange(24)), expected.take(torch.arange(24)))
    assert torch.equal(mirrored.labels, expected.labels)
    assert mirrored.data.data_ptr() == data.data_ptr()
    index = torch.tensor([7, 2])
    assert torch.equal(pool.subset(index).take(torch.tensor([1, 0])), pool.take(index.flip(0)))
    assert pool.subset(index).data.data_ptr() == data.data_ptr()


@every_view
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_view_equals_a_copy_of_its_data(view, dtype, tmp_path):
    pool = view(images(dtype=dtype))
    copy = copied(pool)
    assert (len(pool), pool.shape, pool.num_classes, repr(pool)) == (
        len(copy),
        copy.shape,
        copy.num_classes,
        repr(copy),
    )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool.take(order), copy.take(order))
    for label in (NULL_LABEL, *range(pool.num_classes)):
        if label in (NULL_LABEL, *pool.labels.tolist()):
            assert torch.equal(pool.indices(label), copy.indices(label))
            for size in (1, 4, 100):
                of_view, of_copy = (torch.cat(list(p.blocks(label, size))) for p in (pool, copy))
                assert torch.equal(of_view, of_copy)
    assert content_hash(pool) == content_hash(copy)
    assert DataSummary.from_pool(pool) == DataSummary.from_pool(copy)
    batch, other = (ShuffledBatches(p, 5, seed=3)(10) for p in (pool, copy))
    assert torch.equal(batch.x, other.x)
    assert torch.equal(batch.label, other.label)
    store = write_store(tmp_path / "store", Contents.from_pool(pool), source="a view")
    assert store.verify() == content_hash(copy)
    write_npz(tmp_path / "a.npz", Contents.from_pool(pool))
    assert np.array_equal(np.load(tmp_path / "a.npz")["data"], copy.data.numpy())


@every_view
def test_targets_and_denoisers_use_the_data_of_the_view(view):
    pool = view(images())
    copy = copied(pool)
    index = torch.arange(len(pool))
    t = torch.linspace(0.1, 2, len(pool))
    noise = torch.randn(len(pool), 2, 3, 4, generator=torch.Generator().manual_seed(1))
    noisy = VE().perturb(pool.take(index), t, noise, index=index, label=pool.labels)
    streamed = partial(ExactTarget, missing_mass=0)
    for target in (ExactTarget, streamed, lambda p: STFTarget(p, 3), lambda p: KNNTarget(p, 3)):
        of_view, of_copy = (target(p)(noisy, generator=torch.Generator().manual_seed(0)).mean for p in (pool, copy))
        tolerance = {"rtol": 0, "atol": 1e-5} if target is ExactTarget else {}
        torch.testing.assert_close(of_view, of_copy, **tolerance)
    for label in (None, pool.labels):
        torch.testing.assert_close(
            IdealDenoiser(pool, VE())(noisy.x_t, t, label), IdealDenoiser(copy, VE())(noisy.x_t, t, label)
        )
    of_view, of_copy = (
        measure(p, VE(), noise_levels=t[:2], sizes=(4,), examples=4, draws=3).dsm.by_bin for p in (pool, copy)
    )
    torch.testing.assert_close(of_view, of_copy)


def test_only_images_can_be_mirrored():
    for shape in ((5, 3), (5, 3, 4), (5, 1, 2, 3, 4)):
        with pytest.raises(ValueError, match="only images"):
            Pool(torch.zeros(shape)).mirrored()


@pytest.mark.parametrize("holdout", [1, 5, 11])
def test_training_and_held_out_data_are_disjoint_and_complete(holdout):
    pool = images()
    trained, held_out = split(pool, holdout)
    assert (len(trained), len(held_out)) == (12 - holdout, holdout)
    view_index = torch.cat([trained.view_index, held_out.view_index])
    assert sorted(view_index.tolist()) == list(range(12))
    assert torch.equal(held_out.labels, pool.labels[held_out.view_index])
    assert torch.equal(trained.take(torch.arange(len(trained))), pool.take(trained.view_index))


def test_a_larger_held_out_set_contains_every_smaller_one():
    held_out = [set(split(images(), n)[1].view_index.tolist()) for n in range(1, 12)]
    assert all(smaller < larger for smaller, larger in pairwise(held_out))


@pytest.mark.parametrize("holdout", [-1, 12, 13])
def test_some_data_must_be_left_to_train_on(holdout):
    with pytest.raises(ValueError, match=f"less than the 12 data points there are, not {holdout}"):
        split(images(), holdout)


def test_holding_out_nothing_returns_the_data():
    pool = images()
    assert split(pool, 0) == (pool, None)


def quick(**sections):
    return resolve({"network": {"channels": 8}, "target": {"kind": "exact", "missing_mass": 0.0}, **sections})


@pytest.mark.usefixtures("unchecked")
def test_a_run_never_sees_the_held_out_data():
    def parts(seed: int, conditional: bool = True):
        training = {"seed": seed, "conditional": conditional, "batch_size": 599}
        return build(quick(data={"kind": "digits", "holdout": 599}, training=training))

    one, other = parts(0), parts(1)
    assert torch.equal(one.held_out.view_index, other.held_out.view_index)  # independent of the seed of the run
    assert (len(one.data), len(one.pool), len(one.held_out)) == (1797, 1198, 599)
    assert one.held_out.num_classes == 10
    assert parts(0, conditional=False).held_out.labels is None
    seen = torch.cat([one.pool.view_index[one.batches(images).index] for images in (0, 599)])
    assert sorted(seen.tolist()) == one.pool.view_index.tolist()
    assert one.objective.target.target.pool is one.pool  # within Prefetched
    with pytest.raises(ConfigError, match="less than the 1797 data points"):
        build(quick(data={"kind": "digits", "holdout": 1797}))


def test_holding_out_data_changes_neither_the_cache_nor_the_repr():
    assert repr(Digits(holdout=3)) == repr(Digits())
    assert resolve({"data": {"kind": "store", "path": "x", "holdout": 3}}).make("data").holdout == 3
    assert resolve({"data": {"kind": "store", "path": "x"}}).make("data").path == Path("x")


@pytest.mark.usefixtures("unchecked")
def test_data_inspect_refuses_to_hold_out_data(tmp_path):
    result = CliRunner().invoke(app, ["data", "inspect", "digits", "--set", "data.holdout=5"])
    assert isinstance(result.exception, ConfigError)
    assert "held out in training only" in str(result.exception)
