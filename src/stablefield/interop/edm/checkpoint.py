"""From a file to a checkpoint: weights of the moving average, and the arguments that build the network.

Checkpoints come in three formats:

plain pickle   one pickle; each tensor's numbers are a byte string, itself an archive in the legacy format
ZIP            {name}/data.pkl, and each storage as the record {name}/data/{key}
legacy         pickles of a magic number, a version, the system, the data and the list of keys;
               then for each key the count of its numbers (8 bytes), and the numbers

The data may refer to the same part many times, or contain itself. Everything that is kept is copied by one `_Copier`,
which limits the total size.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from stablefield.data.pickles import Name, RefusedError, Stream, Table, expect, not_allowed, refusing, unpickle
from stablefield.interop.edm.allowlist import (
    ALLOWED,
    PRECONDITIONERS,
    STORAGE_TYPES,
    Object,
    Storage,
    TensorView,
)

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


@dataclass(frozen=True)
class EDMCheckpoint:
    """Contents of an EDM or STF checkpoint, as plain data.

    Attributes:
        kind: which of the two kinds of file it is.
        precond: class name of the preconditioner, one of `PRECONDITIONERS`.
        arguments: constructor arguments of the preconditioner (`model_type`, `img_resolution`, ...), as after a round
            trip through JSON.
        state: parameters and buffers of the exponential moving average under EDM's names (`model.enc...`), on the CPU,
            contiguous and independent of the file.
        loss: class name and constructor arguments of the loss (`{"class_name": "EDMLoss"}`), if present.
        augment: class name and constructor arguments of the augmentation, if present.
        dataset_kwargs: arguments with which the training set was opened, if present.
        step: step of the training state, if present.
        optimizer_state: `state_dict` of the optimiser (training states only). It belongs to the network that was being
            trained, which is one step ahead of the average in `state`.
    """

    kind: Literal["network-snapshot", "training-state"]
    precond: str
    arguments: dict[str, Any]
    state: dict[str, Shaped[Tensor, " *shape"]]
    loss: dict[str, Any] | None = None
    augment: dict[str, Any] | None = None
    dataset_kwargs: dict[str, Any] | None = None
    step: int | None = None
    optimizer_state: dict[str, Any] | None = None


def read(path: str | os.PathLike[str]) -> EDMCheckpoint:
    """Read `network-snapshot-*.pkl` or `training-state-*.pt` as published by EDM and STF, without unpickling.

    Args:
        path: the file: a pickle (protocol 2 or later), or either of `torch.save`'s formats.

    Returns:
        The weights of the moving average, and the arguments that build the network.

    Raises:
        RefusedError: the file is damaged, or contains a name that is not on the allow-list (a ValueError).
        OSError: the file cannot be opened.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023)
    """
    path = Path(path)
    with refusing(path.name):
        return _checkpoint(expect(_read_file(path), dict), _Copier(path.stat().st_size))


def _checkpoint(data: dict[str, Any], copier: _Copier) -> EDMCheckpoint:
    if "ema" not in data:
        raise RefusedError(
            "there is no moving average (`ema`); read the network-snapshot-*.pkl of the same run instead"
        )
    network = expect(data["ema"], Object)
    if network.kind not in PRECONDITIONERS:
        raise RefusedError(f"`ema` is a {network.kind}, not one of {', '.join(sorted(PRECONDITIONERS))}")
    optimizer, step = data.get("optimizer_state"), data.get("step")
    return EDMCheckpoint(
        kind="network-snapshot" if optimizer is None else "training-state",
        precond=network.kind,
        arguments=copier.arguments(network),
        state=dict(copier.state(network)),
        loss=copier.class_and_arguments(data.get("loss_fn")),
        augment=copier.class_and_arguments(data.get("augment_pipe")),
        dataset_kwargs=copier.json(data.get("dataset_kwargs") or {}) or None,
        step=None if step is None else expect(step, int),
        optimizer_state=None if optimizer is None else copier.plain(expect(optimizer, dict)),
    )


@dataclass
class _Copier:
    """Copies data out of a file within a size budget, so that a small file cannot expand to a large one."""

    budget: int  # bytes that may still be copied; a number or a character counts as one byte

    def charge(self, octets: int) -> None:
        """Subtract from the budget."""
        self.budget -= octets
        if self.budget < 0:
            raise RefusedError("the data expand to more than the size of the file")

    def tensor(self, view: TensorView) -> Shaped[Tensor, " *size"]:
        """A contiguous copy of a tensor."""
        dtype, extent = view.storage.dtype, view.extent
        self.charge(1 + max(extent, view.numel) * dtype.itemsize)
        if extent == 0:
            return torch.empty(view.size, dtype=dtype)
        octets = np.frombuffer(view.storage.data, np.uint8)[view.offset * dtype.itemsize :]
        elements = torch.tensor(octets[: extent * dtype.itemsize]).view(dtype)
        return elements.as_strided(view.size, view.stride).contiguous()

    def state(self, module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as in `Module.state_dict`."""
        fields = expect(expect(module, Object).state, dict)
        for part in ("_parameters", "_buffers", "_modules"):
            for name, value in expect(fields[part], dict).items():
                if not re.fullmatch(r"\w{1,100}", expect(name, str), re.ASCII):
                    raise not_allowed(name)
                self.charge(len(prefix) + len(name))
                if part == "_modules" and value is not None:
                    yield from self.state(value, f"{prefix}{name}.")
                elif value is not None:
                    yield prefix + name, self.tensor(expect(value, TensorView))

    def plain(self, value: object) -> Any:
        """A copy of containers, strings, numbers and tensors; anything else is refused."""
        self.charge(1 + len(value) if isinstance(value, str) else 1)
        match value:
            case dict():
                return {self.plain(key): self.plain(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self.plain(item) for item in value)
            case TensorView():
                return self.tensor(value)
            case None | str() | int() | float():
                return value
            case _:
                raise not_allowed(value.kind if isinstance(value, Object) else type(value).__name__)

    def json(self, value: object) -> dict[str, Any]:
        """A dictionary as after a round trip through JSON: tuples become lists, and a tensor is a TypeError."""
        return expect(json.loads(json.dumps(self.plain(value))), dict)

    def arguments(self, instance: Object) -> dict[str, Any]:
        """Constructor arguments by name; the first four are the same for all preconditioners."""
        fields = expect(instance.state, dict)
        positional, keyword = expect(fields["_init_args"], tuple), expect(fields["_init_kwargs"], dict)
        names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
        if len(positional) > (len(names) if instance.kind in PRECONDITIONERS else 0):
            raise RefusedError(f"a {instance.kind} has {len(positional)} positional arguments, whose names are unknown")
        return self.json(dict(zip(names, positional, strict=False)) | keyword)

    def class_and_arguments(self, instance: object) -> dict[str, Any] | None:
        """Class name and constructor arguments of an object; None for None."""
        if instance is None:
            return None
        return {"class_name": expect(instance, Object).kind, **self.arguments(expect(instance, Object))}


# ---- the three file formats, and the archive that is embedded in the first


def _read_file(path: Path) -> object:
    """The data of a checkpoint in any of the three formats; damaged files raise any error (see `pickles.refusing`)."""
    read = cache(_read_embedded_storage)  # once however often it is referred to
    table = {**ALLOWED, "torch.storage _load_from_bytes": lambda data: read(expect(data, bytes))}
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _read_zip(path, table)
        if path.stat().st_size == 0:
            raise RefusedError("the file is empty")
        return _read_pickle(Stream(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))), table)


def _read_embedded_storage(data: bytes) -> Storage:
    """The storage in an archive within a pickle, in the legacy format; it may name storage types only."""
    stream = Stream(data)
    if unpickle(stream, {}) != MAGIC:
        raise RefusedError("an embedded archive has an unknown format")
    storage = expect(_read_legacy(stream, dict.fromkeys(STORAGE_TYPES)), Storage)
    if stream.remaining:
        raise RefusedError(f"an embedded archive has more than one storage: {stream.remaining} bytes follow the first")
    return storage


def _read_pickle(stream: Stream, table: Table) -> object:
    """Data of a plain pickle, or of the legacy format if it starts with the magic number."""
    first = unpickle(stream, table)
    data = _read_legacy(stream, table) if first == MAGIC else first
    if stream.remaining:
        raise RefusedError(f"{stream.remaining} bytes follow the end of the data")
    return data


def _read_legacy(stream: Stream, table: Table) -> object:
    """Data of the legacy format, of which the magic number has been read."""
    version, system = unpickle(stream, {}), expect(unpickle(stream, {}), dict)
    if version != VERSION or system.get("little_endian") is not True:
        raise RefusedError("an archive has an unknown version, or is from a big-endian machine")

    storages: dict[str, Storage] = {}
    data = unpickle(stream, table, partial(_find_storage, storages))
    keys = [expect(key, str) for key in expect(unpickle(stream, {}), list)]
    if sorted(keys) != sorted(storages):
        raise RefusedError(f"an archive refers to {len(storages)} storages, but {len(keys)} follow")

    for key in keys:
        count = int.from_bytes(stream.take(8), "little")
        storages[key].fill(stream.take(count * storages[key].dtype.itemsize))
    return data


def _read_zip(path: Path, table: Table) -> object:
    storages: dict[str, Storage] = {}
    try:
        records = _read_records(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise RefusedError("a record of the ZIP file begins before the file") from error
    if records.get("byteorder", b"little") != b"little":
        raise RefusedError("the file is from a big-endian machine")
    data = unpickle(Stream(records["data.pkl"]), table, partial(_find_storage, storages))
    for key, storage in storages.items():
        storage.fill(memoryview(records[f"data/{key}"]))
    return data


def _read_records(path: Path) -> dict[str, bytes]:
    """Records of a ZIP file by name, without the name of the folder that holds them all."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        folders = {info.filename.partition("/")[0] for info in infos}
        records = {info.filename.partition("/")[2]: info for info in infos}
        if len(folders) != 1 or len(records) != len(infos):
            raise RefusedError("the ZIP file has more than one folder, or two records of one name")
        for name in records:
            if not re.fullmatch(r"data\.pkl|version|byteorder|data/\d+|\.\w[\w./]*", name):
                raise not_allowed(name)
        # torch does not compress its records; compressed or overlapping ones could expand to any size
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        if not stored or sum(info.file_size for info in infos) > path.stat().st_size:
            raise RefusedError("the ZIP file has compressed or overlapping records")
        return {name: archive.read(info) for name, info in records.items()}


def _find_storage(storages: dict[str, Storage], identity: object) -> Storage | Name:
    """The storage that a persistent id stands for, new or known by its key; in the legacy format also a class name."""
    match identity:
        case ("module", Name() as name, *_):  # its source follows, and is ignored
            return name
        case ("storage", Name(path), str(key), str(), int(count)):
            pass
        case ("storage", Name(path), str(key), str(), int(count), None):
            pass
        case _:
            raise RefusedError("a persistent id is not that of a storage")
    if path not in STORAGE_TYPES or count < 0:
        raise RefusedError("a persistent id is that of a storage that is not allowed here")
    storage = storages.setdefault(key, Storage(STORAGE_TYPES[path], count))
    if (storage.dtype, storage.count) != (STORAGE_TYPES[path], count):
        raise RefusedError("a storage is used with two types or sizes")
    return storage
