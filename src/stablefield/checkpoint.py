"""One format: tensors as safetensors, and what they are as JSON in its header. No pickle, nothing to execute.

A file is written beside its place, forced to the disk, and renamed: whoever looks finds the old one or the new one,
whole. A checksum over all of it is written too, and compared when it is read.
"""

import errno
import hashlib
import json
import os
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

FORMAT = "stablefield/1"


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or no longer one."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds: named tensors, the configuration they belong to, and the images they have seen."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    images: int
    checksum: str = ""


def save(path: Path, tensors: Mapping[str, Tensor], *, config: Mapping[str, Any], images: int) -> None:
    """Write a checkpoint in place of what is there.

    Raises:
        OSError: the disk is full, or cannot be written; what was there before is untouched.
    """
    # cloned: safetensors refuses tensors that share memory, as tied weights do
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(config), "images": str(images)}
    metadata["checksum"] = checksum(whole, metadata)
    with replacing(path) as beside:
        save_file(whole, beside, metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write what shall stand at `path`: it takes its place when all of it is on the disk, or not at all.

    Raises:
        OSError: it could not be written; what was at `path` before is untouched.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(0o666 & ~_umask())  # safetensors leaves its files to their owner alone
        beside.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path} ({error}); what was there before is untouched") from error
    finally:
        beside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """For JSON, which knows no infinity and no nan: they become null."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text (UTF-8) in place of what is there.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> None:
    """Write a text (UTF-8) where nothing is yet: it appears whole, and of several writers at once one succeeds.

    Raises:
        FileExistsError: something is there.
        OSError: it could not be written; then nothing is there.
    """
    # one name for each writer: two machines may share a folder and the number of a process
    beside = path.with_name(f".{os.getpid()}{secrets.randbelow(10**12):012d}.{path.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        _name_once(beside, path)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"could not write {path} ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def _name_once(file: Path, name: Path) -> None:
    """Give a file a name that nothing has: a second one, or where files cannot have two, behind a lock."""
    try:
        os.link(file, name)
        return
    except FileExistsError:
        raise
    except OSError:
        pass  # a file system without hard links, or one that says so below
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

    Raises:
        CheckpointError: there is none, it is another program's, cut short, or damaged.
    """
    while True:
        before = _written(path)
        try:
            return _read(path, device)
        except CheckpointError:
            # the header is read first, and then the tensors: a run that saves in between has put another file here
            if _written(path) == before:
                raise


def _written(path: Path) -> tuple[int, int]:
    """What tells a file from another that takes its place."""
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
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of the format {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or was cut short: {error}") from None
    written = metadata.pop("checksum", "")
    if written != checksum(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: it does not have the checksum that was written with it")
    try:
        return Checkpoint(tensors, json.loads(metadata["config"]), int(metadata["images"]), written)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not say what it is a checkpoint of: {error!r}") from None


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and over names, types, shapes and bytes of all tensors, in the order of their names."""
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
    # a rename is only on the disk once its folder is
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
