"""Checkpoints: tensors as safetensors, and their description as JSON in the header. No pickle, no code.

A file is written beside its place, flushed to the disk and then renamed, so that a reader finds either the old file or
the new one, complete. A checksum over the whole content is stored in the file and compared when it is read.
"""

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablefield.files import atomic_path, cached

FORMAT_VERSION = 2  # of checkpoints and of the configurations in them and beside them
FORMAT = f"stablefield/{FORMAT_VERSION}"
_SPARE = 1024  # bytes by which a description may grow while tensors are written
_PART = 2**22  # bytes that are hashed at once
_SAFETENSORS_TYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this package, or is damaged."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        tensors: the tensors by name, such as `average.network.out.weight`.
        config: the description that was saved with them, as JSON has it: the configuration and facts about the data.
        images: number of images seen in training.
        checksum: SHA-256 of the content; "" for one that was not read from a file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    images: int
    checksum: str = ""

    @property
    def sections(self) -> dict[str, Any]:
        """The sections of the configuration in the description.

        Raises:
            KeyError: the description has no configuration.
        """
        return self.config["config"]

    @property
    def data(self) -> str:
        """Fingerprint of the training data (see `data.identity`); "" if the description does not have it."""
        return self.config.get("data", "")


class Draft:
    """A checkpoint whose tensors are in a temporary file already: they may change, and memory holds no copy of them.

    It is a context manager, which removes the file unless `finish` was called. The checksum is that of the bytes that
    `finish` reads back from the file.

    Args:
        path: the file to write, replacing the one that is there.
        tensors: the tensors by name, on any device; they may share memory.
        config: a preliminary description; that of `finish` may be longer by at most 1,024 bytes.

    Raises:
        ValueError: a tensor has a type that safetensors does not know.
        OSError: the disk is full or not writable; the previous file is untouched.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self._table, order = _table(tensors)
        self._kinds = {name: _kind(tensors[name]) for name in sorted(tensors)}
        room = len(_header(self._table, _metadata(config, 2**53) | {"checksum": "0" * 64})) + _SPARE
        self._length = room + -room % 8
        with ExitStack() as stack:
            self._file = stack.enter_context(stack.enter_context(atomic_path(path)).open("w+b"))
            self._file.seek(8 + self._length)
            for name in order:
                self._file.write(_octets(tensors[name]))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(_UnfinishedError, _UnfinishedError(), None)  # nothing is left of it after `finish`

    def finish(self, *, config: Mapping[str, Any], images: int) -> None:
        """Describe the tensors, flush the file to the disk and give it its name.

        Args:
            config: description that is stored with them; must be JSON.
            images: number of images seen in training.

        Raises:
            ValueError: the description is much longer than the one that the draft was made with.
            OSError: the disk is full or not writable; the previous file is untouched.
        """
        metadata = _metadata(config, images)
        with self._stack:
            found = _checksum(metadata, ((name, kind, self._read(name)) for name, kind in self._kinds.items()))
            header = _header(self._table, metadata | {"checksum": found})
            if len(header) > self._length:
                raise ValueError(f"the description grew by more than {_SPARE} bytes while the tensors were written")
            self._file.seek(0)
            self._file.write(self._length.to_bytes(8, "little") + header.ljust(self._length))

    def _read(self, name: str) -> Iterator[bytes]:
        start, end = self._table[name]["data_offsets"]
        self._file.seek(8 + self._length + start)
        for at in range(start, end, _PART):
            part = self._file.read(min(_PART, end - at))
            if len(part) != min(_PART, end - at):
                raise OSError("the file was cut short while it was written")
            yield part


class _UnfinishedError(Exception):
    """Ends the context of a temporary file that is to be removed."""


def save(path: Path, tensors: Mapping[str, Tensor], *, config: Mapping[str, Any], images: int) -> None:
    """Write a checkpoint, replacing the file that was there.

    Args:
        path: the file.
        tensors: the tensors by name, on any device.
        config: description that is stored with them; must be JSON.
        images: number of images seen in training.

    Raises:
        OSError: the disk is full or not writable; the previous file is untouched.
    """
    with Draft(path, tensors, config) as draft:
        draft.finish(config=config, images=images)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, replacing the file that was there.

    Args:
        path: the file.
        tensors: the tensors by name, on any device; they may share memory.
        metadata: strings that are stored with them.

    Raises:
        ValueError: a tensor has a type that safetensors does not know.
        OSError: the disk is full or not writable; the previous file is untouched.
    """
    table, order = _table(tensors)
    header = _header(table, metadata)
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(_octets(tensors[name]))


def _metadata(config: Mapping[str, Any], images: int) -> dict[str, str]:
    return {"format": FORMAT, "config": json.dumps(config), "images": str(images)}


def _table(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Entries of the header for the tensors, and the order of the tensors in the file."""
    table: dict[str, Any] = {}
    # readers want each tensor to begin at a multiple of its element's size
    order, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        if (kind := _SAFETENSORS_TYPES.get(tensor.dtype)) is None:
            raise ValueError(f"cannot save {name}: safetensors files hold no {tensor.dtype}")
        table[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return table, order


def _header(table: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata), **table}, separators=(",", ":")).encode()


def finite(value: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: both become null.

    Args:
        value: numbers, strings, lists and dictionaries, nested in any way.
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file.
        device: device of the tensors.

    Raises:
        CheckpointError: the file does not exist, belongs to another program or another version, was cut short, or is
            damaged.
    """
    while True:
        before = _file_identity(path)
        try:
            return _read(path, device)
        except CheckpointError:
            # the header is read before the tensors, and a run that saves in between replaces the file: try again
            if _file_identity(path) == before:
                raise


def _file_identity(path: Path) -> tuple[int, int]:
    """Numbers that change when the file is replaced."""
    try:
        found = path.stat()
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"there is no checkpoint {path}")
    return found.st_ino, found.st_mtime_ns


def cached_tensors(
    name: str, description: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors from the cache, which are computed if it has none, or a file of another description, or a damaged one.

    Args:
        name: name of the file, with a hash of all that the tensors depend on.
        description: all that they depend on, as JSON has it; stored with them.
        compute: returns the tensors by name.

    Raises:
        OSError: the cache cannot be read or written.
    """

    def find(path: Path) -> dict[str, Tensor] | None:
        try:
            found = read(path)
        except CheckpointError:
            return None
        return found.tensors if found.config == description else None

    return cached(name, find, lambda path: save(path, compute(), config=description, images=0))


def _read(path: Path, device: str | torch.device) -> Checkpoint:
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata.get("format", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or was cut short: {error}") from None
    stored = metadata.pop("checksum", "")
    if stored != checksum(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: its content does not match the checksum in it")
    try:
        config, images = json.loads(metadata["config"]), int(metadata["images"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no valid description of its tensors: {error!r}") from None
    if not isinstance(config, dict) or not 0 <= images <= 2**53:
        raise CheckpointError(f"{path} has no valid description of its tensors, or of the images seen")
    return Checkpoint(tensors, config, images, stored)


def _check_format(path: Path, found: str) -> None:
    """Refuse other programs' files and other versions of this format."""
    if found == FORMAT:
        return
    if version := re.fullmatch(r"stablefield/(\d{1,9})", found):
        raise CheckpointError(other_version(path, int(version[1])))
    raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of the format {FORMAT}")


def other_version(path: Path, version: int) -> str:
    """The message about a file that another version of this package wrote, in one line.

    Args:
        path: the file.
        version: its format version.
    """
    if version < FORMAT_VERSION:
        return (
            f"{path} was written by an earlier version (format {version}) and cannot be read; train it again or use "
            "the version that wrote it"
        )
    return (
        f"{path} was written by a later version (format {version}), and this one reads format {FORMAT_VERSION}; "
        "upgrade stablefield"
    )


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of names, types, shapes and bytes of all tensors, in the order of their names.

    Args:
        tensors: the tensors by name.
        metadata: strings that are stored with them.
    """
    return _checksum(metadata, ((name, _kind(tensors[name]), (_octets(tensors[name]),)) for name in sorted(tensors)))


def _checksum(metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, Iterable[bytes | memoryview]]]) -> str:
    """`checksum` of tensors whose names, kinds and bytes are given, in the order of their names."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, kind, parts in tensors:
        digest.update(f"{name} {kind}".encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    """Type and shape of a tensor, as they are hashed."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _octets(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its elements."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
