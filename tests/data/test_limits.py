"""Files that claim or unpack to more than they are worth are refused before memory is used, with a way out."""

import gzip
import io
import json
import resource
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from data_files import make_folder, make_zip, noise, png
from PIL import Image

from stablefield.data import CIFAR, IDX, Arrays, DataSummary, Images, Store, range_question, say, write_store
from stablefield.data.arrays import map_array
from stablefield.data.contents import Contents
from stablefield.data.limits import read_json
from stablefield.pool import Pool, torch

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    say.cache_clear()


@pytest.fixture
def bounded():
    """At most 1 GB of memory beyond what is used already."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("shape", [(3 * 10**11, 4), (2**62, 2**62), (5, 2**40), (10**9, 3072)])
def test_headers_that_claim_terabytes_are_refused(shape, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy_header(shape) + bytes(100))
    make_zip(tmp_path / "x.npz", {"data.npy": npy_header(shape) + bytes(100)})
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=r"is damaged: its array uint8 .* needs .* bytes, the file has 100"):
            Arrays(tmp_path / name).load()
    header = bytes([0, 0, 8, len(shape)]) + b"".join(min(n, 2**32 - 1).to_bytes(4, "big") for n in shape)
    for name, content in (("a.idx", header + bytes(100)), ("b.idx.gz", gzip.compress(header + bytes(100)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged|the limit is 268,435,456 .*gunzip"):
            IDX(tmp_path / name).load()


@pytest.mark.usefixtures("bounded")
def test_archives_that_unpack_to_gigabytes_are_refused_with_the_limit_and_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("data.npy", npy_header((257, 2**20)) + bytes(257 * 2**20))
    with pytest.raises(ValueError, match=r"x\.npz unpacks .* the limit is 268,435,456 .*np\.savez"):
        Arrays(tmp_path / "x.npz").load()
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**11, 2**10, 2**10)
    bomb = gzip.compress(bytes(2**24), 1) * 17  # a gzip file may consist of several
    (tmp_path / "x.idx.gz").write_bytes(gzip.compress(head) + bomb)
    with pytest.raises(ValueError, match=r"x\.idx\.gz unpacks .* the limit is .*gunzip"):
        IDX(tmp_path / "x.idx.gz").load()
    entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    entry.size = 2**31
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(entry.tobuf()) + bomb)
    with pytest.raises(ValueError, match=r"x\.tar\.gz unpacks .* the limit is .*unpack it with tar"):
        CIFAR(tmp_path / "x.tar.gz").load()


@pytest.mark.usefixtures("bounded")
def test_large_images_are_refused_before_they_are_decoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (8200, 8200)).save(file, "PNG", compress_level=1)
    folder = make_folder(tmp_path / "x", {"a.png": file.getvalue(), "b.png": png(noise(3, 8, 8))})
    with pytest.raises(ValueError, match=r"a\.png .* more pixels than the limit of 8192x8192; .*--skip-unreadable"):
        Images(folder).load()
    assert len(Images(folder, skip_unreadable=True).load()) == 1
    with pytest.raises(ValueError, match=r"pixels, not 99999x99999"):
        Images(folder, resolution="99999x99999")


@pytest.mark.usefixtures("bounded")
def test_a_file_in_a_zip_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.png", bytes(2**28 + 1))
        archive.writestr("b.png", png(noise(3, 8, 8)))
    with pytest.raises(ValueError, match=r"a\.png .* has 268,435,457 bytes; the limit for an image file is"):
        Images(tmp_path / "x.zip").load()


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"labels": ' + b"[" * 900, b"[" + b"[]," * 10**5, b'{"labels": 1}']
)
def test_deep_and_wide_json_is_refused(content, tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.png": png(noise(3, 8, 8)), "dataset.json": content})
    with pytest.raises(ValueError, match=r"dataset\.json in .*x\.zip (is|has)"):
        Images(path).load()
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(b"[" * 10**5, "x", 10**6)


@pytest.mark.parametrize("label", [3 * 10**11, 2**62, 2**20])
def test_labels_as_large_as_identity_numbers_allocate_nothing(label, tmp_path, bounded):
    np.savez(tmp_path / "x.npz", data=noise(3, 2), labels=np.array([label, 5, label]))
    pool = Arrays(tmp_path / "x.npz").load()
    assert pool.labels.tolist() == [1, 0, 1]
    assert Arrays(tmp_path / "x.npz").contents().classes == ("5", str(label))
    assert DataSummary.from_pool(pool).class_counts == (1, 2)
    with pytest.raises(ValueError, match=f"labels must be below 1,048,576, not {label:,}"):
        DataSummary.from_pool(Pool(torch.zeros(3, 2), torch.tensor([label, 0, 1])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>404</html>", r"web page"),
        (b"\n <!DOCTYPE html>", r"web page"),
        (b"", r"\(none\)"),
        (b"version https://git-lfs", r"begins with the bytes"),
        (b"PK\3\4" + bytes(100), r"cut short|damaged"),
    ],
)
@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_what_is_not_an_array_file_is_refused_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.np. is .*{message}") as error:
        Arrays(tmp_path / name).load()
    assert "pickle" not in str(error.value)


def test_an_archive_that_was_cut_short_anywhere_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", data=noise(20, 3, 4, 4), labels=np.arange(20))
    whole = (tmp_path / "x.npz").read_bytes()
    for size in range(4, len(whole), 97):
        (tmp_path / "y.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"y\.npz is damaged, or cut short"):
            Arrays(tmp_path / "y.npz").load()


def test_values_that_are_not_finite_are_refused_with_their_data_point(tmp_path):
    x = np.zeros((3000, 1, 4, 4), np.float32)
    x[2217, 0, 3, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: .*not finite, first in data point 2217"):
        Arrays(tmp_path / "x.npy").load()


def test_objects_and_other_types_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}, []], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        map_array(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.zeros((3, 4), np.int64))
    with pytest.raises(ValueError, match=r"contains int64; .*astype\(np\.uint8\)"):
        Arrays(tmp_path / "y.npy").load()


@pytest.mark.parametrize(
    ("shape", "asked"),
    [
        ((6, 8, 8, 4), True),
        ((6, 8, 8, 3), True),
        ((6, 8, 8, 1), True),
        ((6, 16, 16, 12), True),
        ((6, 6, 8, 3), True),
        ((6, 8, 8, 8, 3), True),
        ((6, 4, 8, 8), False),
        ((6, 32, 8, 8), False),
        ((6, 3, 8, 10), False),
        ((6, 1, 1, 7), False),
        ((6, 1, 3, 4, 5), False),
        ((6, 8, 8, 8), False),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16])
def test_channels_last_is_asked_about_for_any_number_of_channels_and_type(shape, asked, dtype, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(shape, dtype) * np.arange(6).reshape(-1, *[1] * (len(shape) - 1)).astype(dtype))
    if asked:
        with pytest.raises(ValueError, match=r"looks like \(N, H, W, C\); set data\.channels_last=true"):
            Arrays(tmp_path / "x.npy").load()
        last = Arrays(tmp_path / "x.npy", channels_last=True).load()
        assert last.shape == (shape[-1], *shape[1:-1])
    assert Arrays(tmp_path / "x.npy", channels_last=False).load().shape == shape[1:]


def test_a_missing_axis_of_channels_is_named_or_inserted(tmp_path, caplog):
    np.save(tmp_path / "x.npy", noise(6, 8, 8))
    with pytest.raises(ValueError, match=r"\(6, 8, 8\), which looks like \(N, H, W\) .*data\.values=image"):
        Arrays(tmp_path / "x.npy").load()
    assert Arrays(tmp_path / "x.npy", values="image").load().shape == (1, 8, 8)
    assert Arrays(tmp_path / "x.npy", values="float").load().shape == (8, 8)
    np.save(tmp_path / "y.npy", noise(6, 8, 8).astype(np.float32))
    assert Arrays(tmp_path / "y.npy").load().shape == (8, 8)
    assert "looks like (N, H, W) without a channel axis" in caplog.text


def pool_of(values: np.ndarray, **options) -> Pool:
    return Pool(torch.from_numpy(values), **options)


def test_the_range_of_values_is_questioned_and_good_data_are_not():
    pixels = noise(64, 1, 8, 8)
    floats = pixels.astype(np.float32)
    normal = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    asked = {
        r"values 0 to 255, standard deviation 7\d.* but sigma_data is 0.5": (pool_of(floats), 0.5),
        r"values 0 to 1, .*but sigma_data is 0.5: images in \[0, 1\]": (pool_of(floats / 255), 0.5),
        r"values 0 to 1, .*but about 0.5 is expected: images in": (pool_of(floats // 128), None),
        "bytes use few of their 256 levels": (pool_of(pixels // 128), 0.5),
        "values 7 to 7, standard deviation 0: all values are equal": (pool_of(pixels * 0 + 7), 0.5),
        "standard deviation 0.0996, but sigma_data is 0.5": (pool_of(normal * 0.1), 0.5),
    }
    for message, (pool, sigma_data) in asked.items():
        with pytest.raises(ValueError, match=message):
            raise ValueError(range_question(pool, sigma_data))
        assert "\n" not in range_question(pool, sigma_data)
    good = [(pixels, {}), (pixels // 16, {"num_levels": 17}), (pixels // 128, {"num_levels": 2}), (normal, {})]
    for values, options in good:
        assert range_question(pool_of(values, **options), 0.5) is None
    assert range_question(pool_of(floats), 75) is None
    assert range_question(pool_of(floats / 255), 0.29) is None


def test_flipped_labels_and_replaced_data_points_of_a_store_are_noticed_when_it_is_used(tmp_path):
    labels = np.arange(66) % 5
    data = noise(66, 3, 4, 4)
    make = lambda: iter([data])  # noqa: E731
    path = write_store(tmp_path / "x", Contents(66, make, labels), source="a test").path
    Store(path).load()
    for name in ("labels.npy", "data.npy"):
        whole = (path / name).read_bytes()
        for place in (-1, -8, -16, -160):
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[len(whole) + place + 1 :])
            for _ in range(2):
                with pytest.raises(ValueError, match=r"is damaged|are int64"):
                    Store(path).load()
        (path / name).write_bytes(whole)
        assert len(Store(path).load()) == 66


def test_a_store_that_was_checked_is_not_read_again_until_a_file_changes(tmp_path, monkeypatch):
    path = write_store(tmp_path / "x", Contents.from_pool(Pool(torch.zeros(5, 2))), source="a test").path
    monkeypatch.setattr("stablefield.data.store.content_hash", lambda pool: pytest.fail("the data were read"))
    assert len(Store(path).load()) == 5
    (path / "data.npy").touch()
    with pytest.raises(pytest.fail.Exception, match="were read"):
        Store(path).load()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**62, 2]},
        {"shape": [-5, 2]},
        {"shape": []},
        {"shape": "x"},
        {"num_levels": 0},
        {"num_levels": "9"},
        {"classes": 7},
        {"labels": 1},
        {"hash": None},
        {"dtype": "object"},
        {"values": "\x1b[2J"},
    ],
)
def test_damaged_entries_of_a_store_are_refused(change, tmp_path):
    path = write_store(tmp_path / "x", Contents.from_pool(Pool(torch.zeros(5, 2))), source="a test").path
    entries = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(entries | change))
    with pytest.raises(ValueError, match=r"store\.json") as error:
        Store(path).load()
    assert str(error.value).isprintable()
