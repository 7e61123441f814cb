"""A checkpoint is read completely or refused, and a failed write leaves the previous file untouched."""

import itertools
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import stablefield.checkpoint
from stablefield.checkpoint import CheckpointError, checksum, read, save

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    tensors = {f"part.{n}": torch.randn(n, 3).mul(10).to(dtype) for n, dtype in enumerate(TYPES)}
    tensors["step"] = torch.tensor(7.0)
    save(path, tensors, config={"text": "ä\n", "list": [1, 2.5, None]}, images=1234)
    return path, tensors


def test_a_checkpoint_is_read_as_it_was_saved_bit_for_bit(written):
    path, tensors = written
    found = read(path)
    assert found.images == 1234
    assert found.config == {"text": "ä\n", "list": [1, 2.5, None]}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name], tensor)


def test_a_checkpoint_that_is_replaced_during_reading_is_read_completely(tmp_path):
    path, done = tmp_path / "checkpoint.safetensors", threading.Event()
    for number in range(2):
        save(tmp_path / str(number), {"x": torch.full((1000,), float(number))}, config={}, images=number)

    def replace() -> None:
        for number in itertools.cycle(range(2)):
            shutil.copyfile(tmp_path / str(number), tmp_path / "beside")
            (tmp_path / "beside").replace(path)
            if done.is_set():
                return

    shutil.copyfile(tmp_path / "0", path)
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(1000):
            found = read(path)
            assert (found.tensors["x"] == found.images).all()
    finally:
        done.set()
        thread.join()


def test_a_checkpoint_that_is_removed_during_reading_is_reported_as_missing(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save(path, {"x": torch.zeros(3)}, config={}, images=1)

    def removed(*_):
        path.unlink()
        raise CheckpointError("cut short")

    monkeypatch.setattr(stablefield.checkpoint, "_read", removed)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_an_incomplete_file_is_refused_wherever_it_ends(written, share):
    path, _ = written
    content = path.read_bytes()
    short = path.with_name("short.safetensors")
    short.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"short\.safetensors"):
        read(short)


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_no_tensor(written, share, flip):
    path, tensors = written
    changed = bytearray(path.read_bytes())
    changed[int(share * len(changed))] ^= flip
    other = path.with_name("changed.safetensors")
    other.write_bytes(changed)
    try:
        found = read(other)
    except (CheckpointError, ValueError):
        return
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_files_of_other_programs_and_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read(tmp_path / "none.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of the format"):
        read(tmp_path / "other.safetensors")
    torch.save({"x": 1}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read(tmp_path / "pickle.pt")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, r"earlier version \(format 1\) and cannot be read; train it again or use the version that wrote it$"),
        (3, r"later version \(format 3\), and this one reads format 2; upgrade stablefield$"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_in_one_line(tmp_path, version, message):
    path, tensors = tmp_path / "c.safetensors", {"x": torch.ones(2)}
    metadata = {"format": f"stablefield/{version}", "config": json.dumps({}), "images": "1"}
    save_file(tensors, path, metadata | {"checksum": checksum(tensors, metadata)})
    with pytest.raises(CheckpointError, match=message) as found:
        read(path)
    assert len(str(found.value).splitlines()) == 1


FILL = """
import resource, sys, torch
from pathlib import Path
from stablefield.checkpoint import save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1]), {"x": torch.zeros(1_000_000)}, config={}, images=2)
except OSError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save(path, {"x": torch.ones(3)}, config={}, images=1)
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    assert "refused: could not write" in done.stdout
    assert read(path).images == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tensors_that_share_memory_are_saved(tmp_path):
    x = torch.ones(3)
    save(
        tmp_path / "c.safetensors",
        {"a": x, "b": x, "row": torch.eye(3)[1], "transposed": torch.eye(3).T},
        config={},
        images=0,
    )
    assert torch.equal(read(tmp_path / "c.safetensors").tensors["b"], x)
