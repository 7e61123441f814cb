"""IDX files, CIFAR's pickles and data sets of the hub are read exactly, and no code in them is run."""

import gzip
import io
import pickle
import pickletools
import sys
from dataclasses import replace

import numpy as np
import pytest
from data_files import CLASSES, cifar_files, idx, make_folder, make_mnist, make_tar, noise, png
from PIL import Image

from stablefield.data import CIFAR, IDX, HuggingFace
from stablefield.data.cifar import _read_pickle
from stablefield.data.idx import _find_labels, _read_idx

pytestmark = pytest.mark.usefixtures("unchecked", "cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_of_mnist_are_read_as_images_of_one_channel_with_their_labels(packed, tmp_path):
    images, labels = noise(6, 7, 5), np.array([2, 0, 3, 1, 1, 2], np.uint8)
    folder = make_mnist(tmp_path / "x", images, labels, packed=packed)
    for path in (folder, folder / ("train-images-idx3-ubyte" + packed * ".gz")):
        pool = IDX(path).load()
        assert np.array_equal(pool.data.numpy(), images[:, None])
        assert pool.labels.tolist() == labels.tolist()
    assert IDX(folder, labels=False, max_images=2).load().labels is None


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ],
)
def test_labels_are_found_under_their_usual_file_names(images, labels, tmp_path):
    make_folder(tmp_path, {images: b"", labels: b""})
    assert _find_labels(tmp_path / images) == tmp_path / labels
    assert _find_labels(tmp_path / "other-images-idx3-ubyte") is None
    assert _find_labels(tmp_path / "other") is None


def test_idx_images_are_resized_and_converted(tmp_path):
    folder = make_mnist(tmp_path / "x", noise(3, 8, 8), noise(3) % 10)
    pool = IDX(folder, resolution="4x4", mode="rgb").load()
    assert pool.shape == (3, 4, 4)
    assert (pool.data[:, 0] == pool.data[:, 2]).all()


def test_floating_idx_files_are_read_unchanged(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype("f4")
    (tmp_path / "x.idx").write_bytes(idx(values))
    assert np.array_equal(IDX(tmp_path / "x.idx").load().data.numpy(), values)
    with pytest.raises(ValueError, match="only images in bytes can be cropped"):
        IDX(tmp_path / "x.idx", resolution="4x4").load()


def test_damaged_idx_files_are_refused_by_name(tmp_path):
    file, whole = tmp_path / "train-images-idx3-ubyte", idx(noise(6, 7, 5))
    for content, message in (
        (whole[:-1], r"\(6, 7, 5\) needs 226 bytes, the file has 225"),
        (whole + b"x", "needs 226 bytes, the file has 227"),
        (whole[:7], "its header needs 16 bytes, the file has 7"),
        (b"PK" + whole, "is not an IDX file"),
        (b"", "is not an IDX file"),
        (gzip.compress(whole)[:-9], "cannot be decompressed"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}"):
            _read_idx(file)
    file.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(noise(5)))
    with pytest.raises(ValueError, match=r"contains 6 images, but .*train-labels-idx1-ubyte .* of shape \(5,\)"):
        IDX(file).load()


@pytest.fixture
def cifar():
    return noise(12, 3, 32, 32), [number % 10 for number in range(12)]


def test_cifar_10_is_read_in_order_with_the_names_of_its_classes(cifar, tmp_path):
    images, labels = cifar
    files = cifar_files(images, labels)
    tar = make_tar(tmp_path / "cifar-10-python.tar.gz", dict(reversed(files.items())))
    for path in (tar, make_folder(tmp_path / "cifar-10-batches-py", files)):
        pool = CIFAR(path).load()
        assert np.array_equal(pool.data.numpy(), images)
        assert pool.labels.tolist() == labels
        assert CIFAR(path).contents().classes == tuple(CLASSES)
        assert np.array_equal(CIFAR(path, split="test").load().data.numpy(), images[:1])


def test_cifar_100_is_read_with_its_fine_labels(cifar, tmp_path):
    images, labels = cifar
    batch = {b"data": images.reshape(12, -1), b"fine_labels": labels, b"coarse_labels": [0] * 12}
    files = {"train": batch, "meta": {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"x"]}}
    tar = make_tar(tmp_path / "x.tar.gz", {name: pickle.dumps(content, 2) for name, content in files.items()})
    assert CIFAR(tar).load().labels.tolist() == labels
    assert CIFAR(tar).contents().classes == ("apple", "bear")


def test_pickles_of_python_2_are_read():
    # protocol 2 of Python 2: byte strings as such, and numpy under its old name
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T\x00\x0c\x00\x00" + bytes(range(256)) * 12 + b"tb"
    )
    found = _read_pickle(b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au.", "x")
    assert found["labels"] == [7]
    assert np.array_equal(found["data"], np.tile(np.arange(256, dtype=np.uint8), 12)[None])


class Calls:
    """Object whose pickle asks the unpickler to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_asks_for_another_name_is_refused_and_nothing_runs(cifar, tmp_path):
    touched = tmp_path / "touched"
    for call in (Calls(open, str(touched), "w"), Calls(eval, f"open({str(touched)!r}, 'w')"), Calls(getattr, int, "x")):
        files = cifar_files(*cifar) | {"data_batch_3": pickle.dumps({b"data": call, b"labels": []}, 2)}
        tar = make_tar(tmp_path / "x.tar.gz", files)
        with pytest.raises(ValueError, match=r"data_batch_3 in .*x\.tar\.gz is refused: `(io|builtins|__builtin__)\."):
            CIFAR(tar).load()
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\ndecode\n.",
        b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR.",
        b"cnumpy\ndtype.__init__.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__reduce__\x93.",
        b"(S'x'\nios\nsystem\n.",
        b"\x82\x01.",
        b"Pname\n.",
    ],
)
def test_names_that_cifar_does_not_need_are_refused(content):
    with pytest.raises(ValueError, match=r"x is (refused|damaged)"):
        _read_pickle(content, "x")


def test_a_pickle_cannot_change_the_replacements_of_names():
    for name in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"):
        for state in (b"}S'call'\nI1\ns", b"N}S'call'\nI1\ns\x86", b"N}S'__class__'\nI1\ns\x86"):
            with pytest.raises(ValueError, match="refused"):
                _read_pickle(b"\x80\x02" + name + state + b"b.", "x")
    assert _read_pickle(pickle.dumps({b"data": noise(2, 3)}, 2), "x")["data"].shape == (2, 3)


def test_arrays_of_objects_or_of_a_wrong_length_are_refused():
    for array in (np.array([{}, []], object), np.zeros(3), np.zeros(3, ">i4")):
        with pytest.raises(ValueError, match=r"x is refused: (an array in it is not uint8|`numpy.dtype\(O8\)`)"):
            _read_pickle(pickle.dumps({b"data": array}, 2), "x")
    content = pickle.dumps({b"data": noise(2, 77)}, 2)
    (place,) = (at for opcode, arg, at in pickletools.genops(content) if opcode.name == "BININT1" and arg == 77)
    with pytest.raises(ValueError, match=r"x is refused: .* \(2, 78\) and 154 bytes"):
        _read_pickle(content[: place + 1] + bytes([78]) + content[place + 2 :], "x")


def test_an_incomplete_or_damaged_cifar_is_refused_by_name(cifar, tmp_path):
    files = cifar_files(*cifar)
    del files["data_batch_4"]
    with pytest.raises(ValueError, match=r"x\.tar\.gz is not a complete CIFAR .*: data_batch_4 or train is missing"):
        CIFAR(make_tar(tmp_path / "x.tar.gz", files)).load()
    whole = make_tar(tmp_path / "y.tar.gz", cifar_files(*cifar)).read_bytes()
    (tmp_path / "y.tar.gz").write_bytes(whole[:-3000])
    with pytest.raises(ValueError, match=r"y\.tar\.gz is not a tar archive, or is damaged"):
        CIFAR(tmp_path / "y.tar.gz").load()
    files = cifar_files(*cifar)
    files["data_batch_2"] = files["data_batch_2"][:-30]
    with pytest.raises(ValueError, match=r"data_batch_2 in .* is refused: the file ends early"):
        CIFAR(make_tar(tmp_path / "z.tar.gz", files)).load()
    files["data_batch_2"] = pickle.dumps({b"data": noise(2, 3072), b"labels": [1]}, 2)
    with pytest.raises(ValueError, match=r"data_batch_2 in .* contains 2 images, but not one label for each"):
        CIFAR(make_tar(tmp_path / "w.tar.gz", files)).load()


@pytest.fixture
def hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = noise(5, 8, 6, 3)
    columns = {"number": list(range(5)), "img": [Image.fromarray(i) for i in images], "kind": [2, 0, 1, 1, 2]}
    features = datasets.Features(
        {"number": datasets.Value("int64"), "img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(tmp_path / "hub")
    return tmp_path / "hub", images.transpose(0, 3, 1, 2)


def test_a_data_set_of_the_hub_is_read_with_its_images_labels_and_class_names(hub):
    path, images = hub
    pool = HuggingFace(str(path)).load()
    assert np.array_equal(pool.data.numpy(), images)
    assert pool.labels.tolist() == [2, 0, 1, 1, 2]
    assert HuggingFace(str(path)).contents().classes == ("a", "b", "c")
    assert HuggingFace(str(path), label="number").load().labels.tolist() == [0, 1, 2, 3, 4]
    assert HuggingFace(str(path), resolution="4x4", max_images=2).load().data.shape == (2, 3, 4, 4)


def test_an_unknown_column_is_refused_with_the_names_of_all_columns(hub):
    with pytest.raises(ValueError, match="no column 'picture'; its columns are number, img, kind"):
        HuggingFace(str(hub[0]), image="picture").load()


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels = noise(6, 3, 8, 8)

    def save(images, labels=None, kind="ClassLabel", split=None):
        columns, features = {"image": images}, {"image": datasets.Image()}
        if labels is not None:
            known = {"ClassLabel": datasets.ClassLabel(names=["a", "b", "c"]), "int64": datasets.Value("int64")}
            columns, features = columns | {"label": labels}, features | {"label": known[kind]}
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        path = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
        (datasets.DatasetDict({split: made}) if split else made).save_to_disk(path)
        return HuggingFace(str(path))

    return save, [{"bytes": png(image), "path": None} for image in pixels]


def test_hub_data_go_through_the_same_checks_as_files(saved, caplog):
    save, images = saved
    frames = [Image.fromarray(noise(8, 8, seed=n)) for n in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    wrong = {1: None, 2: {"bytes": b"<html>", "path": None}, 3: {"bytes": images[3]["bytes"][:90], "path": None}}
    wrong[4] = {"bytes": file.getvalue(), "path": None}
    source = save([wrong.get(n, image) for n, image in enumerate(images)])
    with pytest.raises(ValueError, match="4 of the 6 images in") as error:
        source.load()
    for part in ("image 1 of", "is missing", "image 2 in", "image 3 in", "image 4 in", "several frames"):
        assert part in str(error.value)
    assert len(replace(source, skip_unreadable=True).load()) == 2
    assert "left out 4 images" in caplog.text


def test_hub_labels_splits_and_columns_are_refused_by_name(saved, caplog):
    save, images = saved
    with pytest.raises(ValueError, match="data point 2 has the label None"):
        save(images, [0, 1, None, 0, 1, 2]).load()
    with pytest.raises(ValueError, match="no split 'train'; its splits are training"):
        save(images, split="training").load()
    assert save(images, [0, 1, 2, 0, 1, 2], "int64").load().labels is None
    assert "whole numbers are in label: data.label=COLUMN" in caplog.text
    with pytest.raises(ValueError, match=r"column 'label' .* is not one of images"):
        replace(save(images, [0, 1, 2, 0, 1, 2]), image="label").load()


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[datasets\]'"):
        HuggingFace("mnist").load()
