"""A store returns exactly the data that were written, is complete or absent, and trains like data in memory."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from data_files import edm_files, make_zip, noise

import stablefield.files
from stablefield.data import (
    IDX,
    Arrays,
    Contents,
    Digits,
    Images,
    ShuffledBatches,
    Store,
    content_hash,
    write_npz,
    write_store,
)
from stablefield.data import store as stores
from stablefield.pool import Pool

pytestmark = pytest.mark.usefixtures("unchecked", "cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pool_of(*shape: int, labels: bool = True, floating: bool = False) -> Pool:
    data = torch.from_numpy(noise(*shape))
    data = data.float() / 7 if floating else data
    return Pool(data, torch.arange(shape[0]) % 3 if labels else None)


def store_of(path, pool: Pool) -> Store:
    return write_store(path, Contents.from_pool(pool), source="a test")


def same(a: Pool, b: Pool) -> bool:
    labels = (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)
    return a.data.dtype == b.data.dtype and torch.equal(a.data, b.data) and labels and a.num_levels == b.num_levels


@pytest.mark.parametrize("shape", [(7, 3, 4, 6), (7, 1, 5, 5), (7, 2), (300, 4, 3), (7, 1, 3, 4, 5)])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_data_of_any_shape_are_stored_bit_for_bit(shape, labels, floating, tmp_path):
    pool = pool_of(*shape, labels=labels, floating=floating)
    store = store_of(tmp_path / "x", pool)
    assert same(store.load(), pool)
    assert store.verify() == content_hash(pool)
    assert {file.name for file in tmp_path.iterdir()} == {"x", "cache"}


def test_num_levels_and_class_names_are_stored(tmp_path):
    pool = Digits().load()
    store = write_store(tmp_path / "x", Contents.from_pool(pool, tuple("abcdefghij")), source="a test")
    assert store.load().num_levels == 17
    assert store.contents().classes == tuple("abcdefghij")


def test_the_hash_depends_on_every_pixel_every_label_the_shape_and_num_levels():
    data, labels = torch.from_numpy(noise(5, 1, 2, 3)), torch.arange(5)
    hashes = {
        content_hash(Pool(data, labels)),
        content_hash(Pool(data)),
        content_hash(Pool(data, labels, num_levels=17)),
    }
    hashes.add(content_hash(Pool(data.reshape(5, 1, 3, 2), labels)))
    for place in range(data.numel()):
        changed = data.clone()
        changed.flatten()[place] ^= 1
        hashes.add(content_hash(Pool(changed, labels)))
    for place in range(5):
        hashes.add(content_hash(Pool(data, labels.clone().index_fill_(0, torch.tensor(place), 7))))
    assert len(hashes) == 4 + data.numel() + 5


def test_a_store_is_mapped_without_a_warning_and_writing_to_its_tensor_changes_no_file(tmp_path):
    store = store_of(tmp_path / "x", pool_of(50, 3, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = store.load()
        pool.data.zero_()
    assert store.verify()
    assert store.load().data.any()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="requires Linux, which lists what is mapped")
def test_the_data_of_a_store_are_pages_of_its_file(tmp_path):
    pool = store_of(tmp_path / "x", pool_of(50, 3, 4, 4)).load()
    with open("/proc/self/maps") as maps:
        own = [line for line in maps if str(tmp_path / "x" / "data.npy") in line]
    low, high = (int(end, 16) for end in own[0].split()[0].split("-"))
    assert low <= pool.data.data_ptr() < high


def test_data_are_mapped_read_only_where_copy_on_write_is_refused(tmp_path, monkeypatch):
    pool, load = pool_of(50, 3, 4, 4), np.load
    store = store_of(tmp_path / "x", pool)

    def refuse(path, mmap_mode, **options):
        if mmap_mode == "c":
            raise OSError("Cannot allocate memory")
        return load(path, mmap_mode=mmap_mode, **options)

    monkeypatch.setattr(np, "load", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(store.load(), pool)


def test_batches_of_a_store_equal_those_of_memory_and_need_no_decoding(tmp_path, monkeypatch):
    images, labels = noise(40, 3, 8, 8), [number % 4 for number in range(40)]
    mapped = Images(make_zip(tmp_path / "x.zip", edm_files(images, labels))).load()
    memory = Pool(torch.from_numpy(images), torch.tensor(labels))
    monkeypatch.setattr("PIL.Image.open", None)
    monkeypatch.setattr("zipfile.ZipFile.open", None)
    for seen in range(0, 160, 16):
        one, other = (ShuffledBatches(pool, 16, seed=3)(seen) for pool in (mapped, memory))
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.label, other.label)


def test_an_existing_store_is_not_overwritten(tmp_path):
    pool = pool_of(5, 2)
    store_of(tmp_path / "x", pool)
    with pytest.raises(ValueError, match="x exists already"):
        store_of(tmp_path / "x", pool_of(6, 2))
    assert same(Store(tmp_path / "x").load(), pool)


def failing(pool: Pool, error: BaseException) -> Contents:
    def blocks():
        yield pool.data[:3].numpy()
        raise error

    return Contents(len(pool), blocks)


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyboardInterrupt(), OSError("no space left")])
def test_a_failed_write_leaves_nothing_behind(error, tmp_path):
    with pytest.raises(type(error)):
        write_store(tmp_path / "x", failing(pool_of(5, 2), error), source="a test")
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_writing_leaves_no_store_and_the_next_write_succeeds(tmp_path):
    code = """
import os, sys, numpy as np
from pathlib import Path
from stablefield.data import Contents, write_store

def blocks():
    yield np.zeros((3, 2), np.uint8)
    os._exit(9)

write_store(Path(sys.argv[1]), Contents(5, blocks), source="a test")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "x").exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=r"not a complete store: store\.json is missing"):
        Store(left).load()
    assert len(store_of(tmp_path / "x", pool_of(5, 2)).load()) == 5


def test_blocks_of_different_types_or_not_finite_are_refused(tmp_path):
    def contents(*blocks):
        return Contents(sum(map(len, blocks)), lambda: iter(blocks))

    for other in (np.zeros((2, 4), np.uint8), np.zeros((2, 3), np.float32)):
        with pytest.raises(ValueError, match="must have the same type and shape"):
            write_store(tmp_path / "x", contents(np.zeros((2, 3), np.uint8), other), source="a test")
    with pytest.raises(ValueError, match="not finite"):
        write_store(tmp_path / "x", contents(np.full((2, 3), np.nan, np.float32)), source="a test")


def test_truncated_swapped_and_damaged_files_are_refused_by_name(tmp_path):
    store = store_of(tmp_path / "x", pool_of(50, 3, 4, 4))
    for name in ("data.npy", "labels.npy", "store.json"):
        whole = (tmp_path / "x" / name).read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"}"):
            (tmp_path / "x" / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                store.load()
        (tmp_path / "x" / name).unlink()
        with pytest.raises(ValueError, match=f"not a complete store: {name} is missing"):
            store.load()
        (tmp_path / "x" / name).write_bytes(whole)
    store_of(tmp_path / "y", pool_of(49, 3, 4, 4))
    (tmp_path / "y" / "data.npy").replace(tmp_path / "x" / "data.npy")
    with pytest.raises(ValueError, match=r"contains uint8 \(49, 3, 4, 4\), but store.json says uint8 \(50, 3, 4, 4\)"):
        store.load()


def test_verify_detects_a_single_changed_bit(tmp_path):
    store = store_of(tmp_path / "x", pool_of(50, 3, 4, 4))
    for name in ("data.npy", "labels.npy"):
        whole = (tmp_path / "x" / name).read_bytes()
        (tmp_path / "x" / name).write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
        with pytest.raises(ValueError, match="is damaged: its data have the hash"):
            store.verify()
        (tmp_path / "x" / name).write_bytes(whole)
    assert store.verify()


def test_a_changed_description_is_noticed_and_one_without_a_checksum_is_read(tmp_path):
    write_store(tmp_path / "x", Contents.from_pool(pool_of(6, 2), ("cat", "dog", "owl")), source="here")
    file = tmp_path / "x" / "store.json"
    whole = json.loads(file.read_text())
    changes = {"classes": ["dog", "cat", "owl"], "values": None, "num_levels": 128, "source": "there", "notes": ["x"]}
    for name, value in changes.items():
        assert whole[name] != value
        file.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ValueError, match=r"store\.json is damaged: its checksum differs; convert the data again"):
            Store(tmp_path / "x").metadata()
    file.write_text(json.dumps({name: value for name, value in whole.items() if name != "checksum"}))
    assert Store(tmp_path / "x").metadata()["classes"] == ["cat", "dog", "owl"]


def test_a_store_of_another_format_is_refused(tmp_path):
    store_of(tmp_path / "x", pool_of(5, 2))
    metadata = json.loads((tmp_path / "x" / "store.json").read_text())
    for other in ("stablefield store 1", "stablefield store 9"):
        (tmp_path / "x" / "store.json").write_text(json.dumps(metadata | {"format": other}))
        with pytest.raises(ValueError, match=f"x has the format '{other}', .* 'stablefield store 2'; convert the data"):
            Store(tmp_path / "x").load()


def test_ranks_that_start_together_decode_the_data_once(tmp_path, monkeypatch):
    source = Images(make_zip(tmp_path / "x.zip", edm_files(noise(30, 3, 8, 8), None)))
    log, original = tmp_path / "written", write_store

    def recorded(*arguments, **options):
        with log.open("a") as file:
            file.write("once\n")
        return original(*arguments, **options)

    monkeypatch.setattr(stores, "write_store", recorded)
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    ranks = [fork.Process(target=lambda: found.put(content_hash(source.load()))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert {found.get(timeout=60) for _ in ranks} == {content_hash(Pool(torch.from_numpy(noise(30, 3, 8, 8))))}
    for rank in ranks:
        rank.join()
    assert log.read_text() == "once\n"


@pytest.mark.parametrize("when", ["before the first block", "before the last rename"])
def test_without_locks_the_first_store_is_used_and_no_rank_fails(when, cache, monkeypatch):
    pool = pool_of(5, 2)
    monkeypatch.setattr(stablefield.files, "exclusive_lock", lambda path: nullcontext())

    def other_rank():
        stores.cached_pool("recipe", lambda: Contents.from_pool(pool), source="a test")

    def contents():
        def blocks():
            yield pool.data[:2].numpy()
            if when == "before the last rename":
                other_rank()
            yield pool.data[2:].numpy()

        if when == "before the first block":
            other_rank()
        return Contents(len(pool), blocks, pool.labels.numpy())

    assert same(stores.cached_pool("recipe", contents, source="a test"), pool)
    assert len([place for place in cache.iterdir() if place.is_dir()]) == 1


def test_the_error_of_a_damaged_cache_says_which_folder_to_remove(tmp_path, cache):
    source = Images(make_zip(tmp_path / "x.zip", edm_files(noise(3, 3, 8, 8), None)))
    source.load()
    (place,) = (place for place in cache.iterdir() if place.is_dir())
    (place / "data.npy").write_bytes((place / "data.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"in the cache; remove {place} to decode the data again"):
        source.load()


def test_a_npy_file_is_mapped_and_refused_by_name_if_damaged(tmp_path):
    data = noise(20, 3, 8, 8)
    np.save(tmp_path / "x.npy", data)
    pool = Arrays(tmp_path / "x.npy").load()
    assert torch.equal(pool.data, torch.from_numpy(data))
    pool.data.zero_()
    assert np.array_equal(np.load(tmp_path / "x.npy"), data)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"x\.npy is damaged"):
        Arrays(tmp_path / "x.npy").load()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
def test_floating_arrays_of_any_precision_and_memory_order_become_float32(dtype, tmp_path):
    data = np.asfortranarray(np.random.default_rng(0).normal(size=(6, 5, 4)).astype(dtype))
    np.save(tmp_path / "x.npy", data)
    assert torch.equal(Arrays(tmp_path / "x.npy").load().data, torch.from_numpy(np.array(data, np.float32, order="C")))


def test_bytes_that_look_channels_last_require_channels_last_to_be_set(tmp_path):
    data = noise(6, 8, 8, 3)
    np.savez(tmp_path / "x.npz", arr_0=data)
    with pytest.raises(ValueError, match=r"\(6, 8, 8, 3\).*channels_last"):
        Arrays(tmp_path / "x.npz").load()
    last = Arrays(tmp_path / "x.npz", channels_last=True).load()
    assert np.array_equal(last.data.numpy(), data.transpose(0, 3, 1, 2))
    assert Arrays(tmp_path / "x.npz", channels_last=False).load().shape == (8, 8, 3)


def test_labels_in_an_archive_must_be_whole_numbers(tmp_path):
    np.savez(tmp_path / "x.npz", data=noise(3, 2), labels=np.array([0.5, 1, 2]))
    with pytest.raises(ValueError, match=r"labels in .*x\.npz are float64"):
        Arrays(tmp_path / "x.npz").load()


def test_a_single_value_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.uint8(3))
    with pytest.raises(ValueError, match=r"x\.npy: data must be \(N, \*D\)"):
        Arrays(tmp_path / "x.npy").load()


def test_values_beyond_num_levels_are_refused(tmp_path):
    for top in (15, 16):
        np.savez(tmp_path / f"{top}.npz", data=np.full((2, 1, 4, 4), top, np.uint8), num_levels=16)
    assert Arrays(tmp_path / "15.npz").load().num_levels == 16
    with pytest.raises(ValueError, match=r"16\.npz contains the value 16, but its num_levels is 16: values 0 to 15"):
        Arrays(tmp_path / "16.npz").load()


def test_further_arrays_that_could_be_the_data_are_named(tmp_path, caplog):
    np.savez(tmp_path / "x.npz", images=noise(3, 1, 4, 4), data=noise(2, 1, 4, 4))
    assert len(Arrays(tmp_path / "x.npz").load()) == 2
    assert "x.npz: the array data is used, and images passed over" in caplog.text


@pytest.mark.parametrize("name", ["label", "y", "targets"])
def test_labels_under_another_name_are_refused_and_not_ignored(name, tmp_path):
    np.savez(tmp_path / "x.npz", data=noise(3, 2), **{name: np.array([0, 1, 2])})
    with pytest.raises(ValueError, match=f"contains an array {name}; labels must be named labels"):
        Arrays(tmp_path / "x.npz").load()


def fields(n: int = 20, channels: int = 1) -> np.ndarray:
    """Normalised fields, with a third of their values outside [-1, 1]."""
    return np.random.default_rng(0).standard_normal((n, channels, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_by_default_floats_are_floats_and_bytes_of_one_or_three_channels_are_images(channels):
    floats, octets = torch.from_numpy(fields(5, channels)), torch.from_numpy(noise(5, channels, 4, 4))
    assert [Pool(data).values for data in (floats, floats / 10, octets)] == ["float", "float", "image"]
    assert [Pool(floats / 10, values="image").images, Pool(octets, values="float").images] == [True, False]
    assert [Pool(octets[:, :, 0]).images, Pool(octets.repeat(1, 4, 1, 1)).images] == [False, False]
    view = Pool(floats / 10, torch.arange(5), values="image").subset(torch.arange(3)).mirrored()
    assert view.images
    assert view.to(torch.device("cpu")).images


def test_images_outside_their_range_are_refused_with_the_range_found():
    x = torch.zeros(3000, 3, 2, 2)
    x[2999, 2, 1, 1], x[5, 0, 0, 0] = 1.0005, -1.0005
    assert Pool(x, values="image").images  # rounding
    x[2999, 2, 1, 1] = 2.5
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], but these are -1 to 2\.5"):
        Pool(x, values="image")
    with pytest.raises(ValueError, match=r"-255 to -0:"):
        Pool(-255 * torch.eye(4).view(4, 1, 2, 2), values="image")
    with pytest.raises(ValueError, match="image or float, not 'picture'"):
        Pool(x, values="picture")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6, 6), (5, 1, 4), (5, 1, 3, 4, 5)])
def test_data_of_other_shapes_cannot_be_declared_images(shape):
    for data in (torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"needs data of shape \(1 or 3, H, W\)"):
            Pool(data, values="image")
    with pytest.raises(ValueError, match="channels_last=true"):
        Pool(torch.zeros(5, 8, 8, 3), values="image")


@pytest.mark.parametrize(("data", "declared"), [(fields() / 10, "image"), (noise(20, 3, 4, 4), "float")])
def test_the_declaration_of_values_is_kept_in_every_format(data, declared, tmp_path):
    np.save(tmp_path / "x.npy", data)
    source = Arrays(tmp_path / "x.npy", values=declared)
    stored = write_store(tmp_path / "store", source.contents(), source="a test")
    write_npz(tmp_path / "y.npz", stored.contents())
    again = write_store(tmp_path / "again", Arrays(tmp_path / "y.npz").contents(), source="a test")
    kinds = (source, stored, Arrays(tmp_path / "y.npz"), again)
    assert [kind.load().values for kind in kinds] == 4 * [declared]
    assert len({content_hash(kind.load()) for kind in kinds} | {content_hash(Pool(torch.from_numpy(data)))}) == 1
    # the key overrides the declaration in the file
    other = {"image": "float", "float": "image"}[declared]
    assert Store(tmp_path / "store", values=other).load().values == other


def test_the_values_of_a_store_without_a_declaration_follow_from_their_type(tmp_path):
    for name, data, values in (("x", fields(), "float"), ("y", noise(5, 3, 4, 4), "image")):
        store = store_of(tmp_path / name, Pool(torch.from_numpy(data)))
        metadata = json.loads((tmp_path / name / "store.json").read_text())
        assert metadata["values"] == values
        del metadata["checksum"]
        (tmp_path / name / "store.json").write_text(json.dumps(metadata | {"values": None}))
        assert store.load().values == values


def test_an_array_of_values_in_an_archive_is_not_a_declaration(tmp_path):
    np.savez(tmp_path / "x.npz", data=fields(), values=np.arange(20))
    assert Arrays(tmp_path / "x.npz").load().values == "float"
    np.savez(tmp_path / "y.npz", data=fields(), values=np.array("pictures"))
    with pytest.raises(ValueError, match=r"y\.npz: .*not 'pictures'"):
        Arrays(tmp_path / "y.npz").load()


def test_image_files_are_images_and_floating_idx_files_are_floats(tmp_path):
    assert Images(make_zip(tmp_path / "x.zip", edm_files(noise(4, 1, 8, 8), [0, 1, 0, 1]))).load().images
    assert Digits().load().images
    x = fields()[:, 0]
    header = bytes([0, 0, 0x0D, 3]) + b"".join(n.to_bytes(4, "big") for n in x.shape)
    for name, data in (("wide", x), ("narrow", x / 10)):
        (tmp_path / f"{name}-images-idx3-float").write_bytes(header + data.astype(">f4").tobytes())
    narrow = tmp_path / "narrow-images-idx3-float"
    assert IDX(path=narrow).load().values == "float"
    assert IDX(path=narrow, values="image").load().values == "image"
    assert IDX(path=narrow).load().values == "float"  # the declaration does not remain in the cache
    with pytest.raises(ValueError, match=r"wide-images.*floats in \[-1, 1\]"):
        IDX(path=tmp_path / "wide-images-idx3-float", values="image").contents()
