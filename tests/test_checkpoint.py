"""A checkpoint is read completely or refused, and a failed write leaves the previous file untouched."""

import itertools
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from short_runs import trained

import stablefield.checkpoint
from stablefield.checkpoint import CheckpointError, Draft, checksum, read, save
from stablefield.run import RunFolder, open_run

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


def test_a_draft_holds_the_tensors_as_they_were(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, {"x": torch.zeros(3)}, config={}, images=1)
    x = torch.arange(5.0)
    with Draft(path, {"x": x, "y": x[1:]}, {"data": ""}) as draft:
        x.zero_()
        assert read(path).images == 1
        draft.finish(config={"data": "all"}, images=2)
    found = read(path)
    assert (found.images, found.config) == (2, {"data": "all"})
    assert torch.equal(found.tensors["x"], torch.arange(5.0))
    assert torch.equal(found.tensors["y"], torch.arange(1, 5.0))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("config", [None, {"long": "a" * 4096}])
def test_a_draft_that_is_not_finished_leaves_the_previous_checkpoint_alone(tmp_path, config):
    path = tmp_path / "c.safetensors"
    save(path, {"x": torch.zeros(3)}, config={}, images=1)
    with (
        nullcontext() if config is None else pytest.raises(ValueError, match="the description grew by more than 1024"),
        Draft(path, {"x": torch.ones(3)}, {}) as draft,
    ):
        if config is not None:
            draft.finish(config=config, images=2)
    assert read(path).images == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_whose_file_is_cut_short_before_the_end_is_not_saved(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, {"x": torch.zeros(3)}, config={}, images=1)
    with Draft(path, {"x": torch.ones(100_000)}, {}) as draft:
        (temporary,) = tmp_path.glob(".tmp-*")
        os.truncate(temporary, 300_000)
        with pytest.raises(OSError, match=r"could not write .*c\.safetensors \(the file was cut short"):
            draft.finish(config={}, images=2)
    assert read(path).images == 1
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_beside_a_draft_keeps_its_words(tmp_path):
    with pytest.raises(OSError, match=r"^the data are gone$"), Draft(tmp_path / "c", {"x": torch.ones(3)}, {}):
        raise OSError("the data are gone")
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_saved(tmp_path):
    x = torch.ones(3)
    save(
        tmp_path / "c.safetensors",
        {"a": x, "b": x, "row": torch.eye(3)[1], "transposed": torch.eye(3).T},
        config={},
        images=0,
    )
    assert torch.equal(read(tmp_path / "c.safetensors").tensors["b"], x)


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    return struct.pack("<Q", len(text) if length is None else length) + text


SHARED = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        header(b"{}", 2**63),
        header(b"{}", 10**8 + 1),
        header(b"[" * 100_000),
        header(b'{"x":' + b"[" * 100_000),
        header(SHARED) + bytes(8),
        header(b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        header(b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"__metadata__":{"format":"stablefield/2"}}'),
        header(b'{"__metadata__":{"format":"\\u001b[2J"}}'),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, octets):
    (tmp_path / "c.safetensors").write_bytes(octets)
    with pytest.raises(CheckpointError, match=r"c\.safetensors") as found:
        read(tmp_path / "c.safetensors")
    assert len(str(found.value)) < 1000


def fuzzed(tmp_path, seed: int, rounds: int) -> dict[str, int]:
    pytest.importorskip("resource")  # limits on memory and alarms exist on Unix only
    trained(tmp_path / "run", "training.images=32")
    (tmp_path / "hostile").mkdir()
    script, file = Path(__file__).with_name("checkpoint_fuzz.py"), RunFolder(tmp_path / "run").checkpoint
    command = [sys.executable, str(script), str(seed), str(rounds), str(tmp_path / "hostile"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_changed_checkpoint_with_a_matching_checksum_is_opened_or_refused(tmp_path):
    counts = fuzzed(tmp_path, 0, 200)
    assert counts["opened"] > 5
    assert counts["refused"] > 100


@pytest.mark.slow
def test_many_changed_checkpoints_with_a_matching_checksum_are_opened_or_refused(tmp_path):
    assert fuzzed(tmp_path, 1, 5000)["refused"] > 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 2**31}, "width must be between 1 and 65,536"),
        ({"width": 2**16}, "of shape .*, and the weights have"),
        ({"width": 66}, "of shape .*, and the weights have"),
        ({"layers": -1}, "layers must be between 1 and 1,024, not -1"),
    ],
)
def test_a_network_that_does_not_fit_the_weights_is_refused_before_it_is_built(tmp_path, change, message):
    trained(tmp_path, "training.images=32")
    path = RunFolder(tmp_path).checkpoint
    found = read(path)
    found.config["config"]["network"] |= change
    save(path, found.tensors, config=found.config, images=found.images)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        open_run(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 200_000  # kB
