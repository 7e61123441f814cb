"""Checkpoints: tensors as safetensors, and their description as JSON in the header. No pickle, no code.

A file is written beside its place, flushed to the disk and then renamed, so that a reader finds either the old file or
the new one, complete. A checksum over the whole content is stored in the file and compared when it is read.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "atomic_path",
    "checksum",
    "create_text",
    "finite",
    "other_version",
    "read",
    "save",
    "write_text_atomically",
]

FORMAT_VERSION = 2  # of checkpoints and of the configurations in them and beside them
FORMAT = f"stablefield/{FORMAT_VERSION}"


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
    # cloned: safetensors refuses tensors that share memory, as tied weights do
    cloned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(config), "images": str(images)}
    metadata["checksum"] = checksum(cloned, metadata)
    with atomic_path(path) as temporary:
        save_file(cloned, temporary, metadata)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context with a temporary path to write to, which is renamed to `path` at the end if nothing failed.

    Args:
        path: the file to write or replace.

    Raises:
        OSError: the file could not be written; the previous file is untouched.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors makes its files readable by their owner only
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path} ({error}); what was there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


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


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text (UTF-8), replacing the file that was there.

    Args:
        path: the file.
        text: its new content.

    Raises:
        OSError: the file could not be written; the previous file is untouched.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> None:
    """Write a text (UTF-8) to a new file, which appears complete; if several processes try at once, one succeeds.

    Args:
        path: the file, which must not exist.
        text: its content.

    Raises:
        FileExistsError: the file exists.
        OSError: the file could not be written, and does not exist.
    """
    # a name of its own for each writer: two machines may share the folder and the number of a process
    temporary = path.with_name(f".{os.getpid()}{secrets.randbelow(10**12):012d}.{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _rename_to_new(temporary, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"could not write {path} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(file: Path, name: Path) -> None:
    """Give a file a name that does not exist yet: with a hard link, or behind a lock where there are no hard links."""
    try:
        os.link(file, name)
        return
    except FileExistsError:
        raise
    except OSError:
        pass  # the file system has no hard links, or another error that will occur again below
    lock = name.with_name(f".{name.name}.lock")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise OSError(f"another process is writing it; if none is, remove {lock}") from None
    try:
        if name.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name))
        file.replace(name)
    finally:
        lock.unlink(missing_ok=True)


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
        return Checkpoint(tensors, json.loads(metadata["config"]), int(metadata["images"]), stored)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} has no valid description of its tensors: {error!r}") from None


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
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _umask() -> int:
    # it can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # a rename is on the disk only once its folder is
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
