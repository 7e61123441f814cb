"""Hostile pickles are refused by every reader of pickles with the reason, and nothing in them is imported or run."""

import copyreg
import pickle
import sys
import tracemalloc
from pathlib import Path

import edm_files
import pytest
from data_files import cifar_files, noise
from pickle_attacks import (
    BOMBS,
    DANGEROUS_NAMES,
    MISUSES,
    REFUSED_INSTRUCTIONS,
    call,
    fuzz,
    mapping,
    nested,
    text,
    whole,
)

from stablefield.data import CIFAR, pickles
from stablefield.interop import edm

pytestmark = pytest.mark.usefixtures("unchecked")  # hostile files must be caught by the reader's own checks

READERS = {"checkpoint": edm.read, "test_batch": lambda path: CIFAR(path.parent, split="test").contents()}


@pytest.fixture(params=READERS)
def file(request, tmp_path):
    """A file that a reader reads; its name is the reader's."""
    return tmp_path / request.param


@pytest.fixture
def refused(file, monkeypatch):
    """Function that asserts that bytes are refused for a reason, and that nothing is imported or run (`touch ran`)."""
    monkeypatch.chdir(file.parent)

    def refused(octets, *reasons):
        file.write_bytes(octets)
        modules = set(sys.modules)
        with pytest.raises(ValueError, match=file.name) as error:
            READERS[file.name](file)
        assert str(error.value).isprintable()
        assert all(reason in str(error.value) for reason in reasons), error.value
        assert set(sys.modules) == modules
        assert not Path("ran").exists()

    return refused


def valid(name):
    """A valid file for a reader."""
    if name == "checkpoint":
        return edm_files.save(edm_files.contents(), "pickle4")
    return cifar_files(noise(5, 3, 32, 32), [0, 1, 2, 3, 4])["test_batch"]


def test_a_valid_file_is_read(file):
    file.write_bytes(valid(file.name))
    READERS[file.name](file)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("path", DANGEROUS_NAMES)
def test_a_name_that_is_not_allowed_is_refused_anywhere_in_a_file(refused, path, protocol):
    calls, named = call(path, protocol), path.replace(" ", ".")
    refused(whole(calls, protocol), named)
    refused(whole(mapping(data=calls), protocol), named)
    refused(whole(mapping(data=b"](" + calls + b"e"), protocol), named)


@pytest.mark.parametrize(("instruction", "octets"), REFUSED_INSTRUCTIONS)
def test_an_instruction_that_no_file_needs_is_refused_with_its_name(refused, instruction, octets):
    refused(whole(octets), f"{instruction} is not allowed")


def test_the_extension_registry_is_not_used(refused):
    copyreg.add_extension("posix", "system", 240)
    try:
        refused(whole(b"\x82\xf0" + text("touch ran") + b"\x85R"), "EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 240)


@pytest.mark.parametrize("octets", MISUSES)
def test_an_allowed_instruction_can_only_be_used_as_files_use_it(refused, octets):
    refused(whole(octets))
    refused(whole(mapping(data=octets)))


@pytest.mark.parametrize(("octets", "reason"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_that_would_expand_is_refused_with_little_memory(refused, monkeypatch, octets, reason):
    monkeypatch.setattr(pickles, "MOST_READS", 2**17)  # so that tracing takes less time
    tracemalloc.start()
    try:
        refused(octets, "" if reason == "NoneType" else reason)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(octets) + 50_000_000
    finally:
        tracemalloc.stop()


def test_a_truncated_file_is_refused_at_every_length(refused, file):
    octets = valid(file.name)
    for end in [*range(0, len(octets), max(1, len(octets) // 60)), len(octets) - 1]:
        refused(octets[:end])


def test_a_mutated_file_of_cifar_is_read_or_refused_without_side_effects(tmp_path):
    (tmp_path / "test_batch").write_bytes(valid("test_batch"))
    outcome = fuzz(tmp_path, 0, 300, tmp_path / "test_batch")
    assert outcome["read"] > 10
    assert outcome["refused"] > 100


def test_errors_contain_no_control_characters_of_the_file(refused):
    refused(whole(b"c\x1b[2J\xe2\x80\xaeall\nis well\n"), r"\x1b[2J\u202eall.is well")


def test_a_reader_that_is_only_python_reads_what_the_standard_library_reads():
    data = {"a": [1, -1, 2**40, 1.5, None, True, "\u00e9", b"x" * 300], b"b": ((), (1,), (1, 2), (1, 2, 3), (1,) * 4)}
    data["shared"] = [data["a"], data["a"], "a" * 300, {7: {}}]
    for protocol in (2, 3, 4, 5):
        octets = pickle.dumps(data, protocol)
        found = pickles.unpickle(stream := pickles.Stream(octets + b"rest"), pickles.NUMPY)
        assert found == data
        assert found["shared"][0] is found["shared"][1]
        assert stream.remaining == 4


# ---- CIFAR's arrays and words


def array(shape=b"K\x01M\x00\x0c\x86", dtype=b"U\x02u1", content=b"T\x00\x0c\x00\x00" + bytes(3072)):
    """Instructions for an array of bytes as Python 2 pickles it, by default of shape (1, 3072)."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape
    numbers = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return made + b"cnumpy\ndtype\n" + dtype + b"K\x00K\x01\x87R" + numbers + b"\x89" + content + b"tb"


def read_cifar(folder, batch, meta=None):
    (folder / "test_batch").write_bytes(whole(batch, 2))
    if meta is not None:
        (folder / "batches.meta").write_bytes(whole(meta, 2))
    return CIFAR(folder, split="test").contents()


HUGE = b"\x8a\xff" + b"\x7f" * 255


@pytest.mark.parametrize(
    "batch",
    [
        mapping(data=array(shape=b")"), labels=b"]K\x00a"),
        mapping(data=array(shape=b"(" + HUGE * 10_000 + b"t"), labels=b"]K\x00a"),
        mapping(data=array(shape=HUGE + b"K\x01\x86"), labels=b"]K\x00a"),
        mapping(data=array(shape=b"J\xff\xff\xff\xffJ\x00\xf4\xff\xff\x86"), labels=b"]K\x00a"),
        mapping(data=array(shape=b"K\x00\x8a\x05\x00\x00\x00\x00\x01\x86"), labels=b"]"),
        mapping(data=array(shape=b"G?\xf0\x00\x00\x00\x00\x00\x00M\x00\x0c\x86"), labels=b"]K\x00a"),
        mapping(data=array(shape=b")q\x01" + b"h\x01\x86q\x01" * 60), labels=b"]K\x00a"),
        mapping(data=array(dtype=b"U\x02O8"), labels=b"]K\x00a"),
        mapping(data=array(dtype=b"U\x03V99"), labels=b"]K\x00a"),
        mapping(data=array(dtype=b"]"), labels=b"]K\x00a"),
        mapping(data=array(content=b"]"), labels=b"]K\x00a"),
        mapping(data=array(), labels=nested(20_000)),
        mapping(data=array(), labels=b"]" + HUGE + b"a"),
        mapping(data=array(), labels=b"](K\x00K\x00e"),
        mapping(data=b"cnumpy.core.multiarray\n_reconstruct\n)R", labels=b"]"),
        mapping(data=nested(20_000), labels=b"]"),
    ],
)
def test_arrays_and_labels_of_another_form_are_refused_by_cifar(tmp_path, batch):
    with pytest.raises(ValueError, match="test_batch") as error:
        read_cifar(tmp_path, batch)
    assert len(str(error.value)) < 1000


NAMES = [b"N", b"K\x01", text("abc"), nested(20_000), b"](" + b"]q\x01" + b"](h\x01h\x01eq\x01" * 40 + b"e"]


@pytest.mark.parametrize("names", [*NAMES, b"](" + b"U\x00" * 1001 + b"e"])
def test_class_names_of_another_form_are_refused_by_cifar(tmp_path, names):
    batch = mapping(data=array(), labels=b"]K\x00a")
    assert read_cifar(tmp_path, batch, mapping(label_names=b"]U\x03cata")).classes == ("cat",)
    with pytest.raises(ValueError, match=r"batches\.meta .* does not name its classes"):
        read_cifar(tmp_path, batch, mapping(label_names=names))
