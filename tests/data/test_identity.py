"""A run knows its data again: no data point can be replaced without being noticed, however large the data are."""

import threading

import numpy as np
import pytest
import torch
from short_runs import same, trained

from stablefield.checkpoint import read
from stablefield.config import ConfigError
from stablefield.data import content_hash, identity
from stablefield.data.identity import DataIdentity, fingerprint, is_same, refuse_other_data
from stablefield.pool import Pool
from stablefield.run import RunFolder


@pytest.fixture
def large(monkeypatch):
    """From now on, a kilobyte is large."""
    monkeypatch.setattr(identity, "_LARGE", 1000)


def data(count: int = 50) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_fingerprint_of_small_data_is_their_hash():
    assert fingerprint(Pool(data())) == content_hash(Pool(data()))


@pytest.mark.usefixtures("large")
def test_the_fingerprint_of_large_data_covers_every_value_and_their_number():
    x = data()
    found = fingerprint(Pool(x))
    assert is_same(found, fingerprint(Pool(x.clone())))
    assert not is_same(found, fingerprint(Pool(x[:-1])))
    for index in range(len(x)):
        other = x.clone()
        other[index, 0, index % 8, 3] ^= 1
        assert not is_same(fingerprint(Pool(other)), found)
        # the part alone, as older checkpoints have it, cannot tell all of them
        assert is_same(fingerprint(Pool(other), whole=False), found) == (index % 4 != 0)


@pytest.mark.usefixtures("large")
def test_other_data_are_named_with_the_hashes_that_differ():
    x, other = data(), data()
    other[1] += 1
    known = fingerprint(Pool(x))
    with pytest.raises(
        ConfigError, match=r"has the hash (\w{16}) of 50, all \w{16}, .*data \1 of 50, all \w{16}; restore"
    ):
        refuse_other_data(Pool(other), fingerprint(Pool(other)), known, "restore")


@pytest.fixture
def arrays(tmp_path) -> list[str]:
    """Settings for a data set in a file."""
    np.save(tmp_path / "data.npy", data().numpy())
    return ["data.kind=arrays", f"data.path={tmp_path / 'data.npy'}", "data.channels_last=false"]


def replace_one(path, index: int) -> None:
    x = np.load(path)
    x[index] ^= 255
    np.save(path, x)


@pytest.mark.usefixtures("large")
def test_a_resumed_run_refuses_large_data_of_which_any_data_point_was_replaced(tmp_path, arrays):
    run = tmp_path / "run"
    trained(run, *arrays, "training.images=128")
    assert read(RunFolder(run).checkpoint).config["data"] == fingerprint(Pool(data()))
    before = RunFolder(run).checkpoint.read_bytes()
    for index in (0, 1, 49):
        replace_one(tmp_path / "data.npy", index)
        with pytest.raises(ConfigError, match="not the data that the run was trained on"):
            trained(run, *arrays)
        assert RunFolder(run).checkpoint.read_bytes() == before
        replace_one(tmp_path / "data.npy", index)
    assert trained(run, *arrays) == 0
    trained(tmp_path / "whole", *arrays)
    assert same(run, tmp_path / "whole")


@pytest.mark.usefixtures("large")
def test_a_run_stopped_before_its_data_are_hashed_still_compares_them_when_it_is_resumed(tmp_path, arrays, monkeypatch):
    run = tmp_path / "run"
    trained(run, *arrays, "training.images=64")
    replace_one(tmp_path / "data.npy", 1)
    hashing = threading.Event()

    def slow(self) -> None:
        hashing.wait(60)

    class Stop(Exception):
        pass

    def stop(images: int, metrics: object) -> None:
        if images == 96:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(DataIdentity, "_complete", slow)
        with pytest.raises(Stop):
            trained(run, *arrays, "training.save_every=1000", on_step=stop)
    hashing.set()
    assert read(RunFolder(run).checkpoint).images == 96
    with pytest.raises(ConfigError, match="not the data that the run was trained on"):
        trained(run, *arrays)


@pytest.mark.usefixtures("large")
def test_an_error_while_data_are_hashed_in_the_background_ends_the_run(tmp_path, arrays, monkeypatch):
    def fail(pool: Pool) -> str:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("Stale file handle")
        return content_hash(pool)

    monkeypatch.setattr(identity, "content_hash", fail)
    with pytest.raises(OSError, match="Stale file handle"):
        trained(tmp_path / "run", *arrays)


@pytest.mark.usefixtures("large")
def test_a_checkpoint_in_the_background_waits_until_the_data_are_hashed(tmp_path, arrays, monkeypatch):
    waits = []
    checked = DataIdentity.checked

    def watch(self, *, wait: bool) -> str:
        waits.append(wait)
        return checked(self, wait=wait)

    monkeypatch.setattr(DataIdentity, "checked", watch)
    trained(tmp_path, *arrays, "training.images=192")
    assert waits == [False, True, True, True]  # at the start, every 64 images, at the end
