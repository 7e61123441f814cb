"""The three file formats of the checkpoints, and the archive that is embedded in the first.

plain pickle   one pickle; each tensor's numbers are a byte string, itself an archive in the legacy format
ZIP            {name}/data.pkl, and each storage as the record {name}/data/{key}
legacy         pickles of a magic number, a version, the system, the data and the list of keys;
               then for each key the count of its numbers (8 bytes), and the numbers
"""

from __future__ import annotations

import errno
import mmap
import re
import zipfile
from functools import cache, partial
from pathlib import Path

from stablefield.data.pickles import RefusedError, Stream, Table, expect, not_allowed, unpickle
from stablefield.interop.edm.allowlist import ALLOWED, STORAGE_TYPES, Storage, find_storage

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_file(path: Path) -> object:
    """The data of a checkpoint in any of the three formats.

    Args:
        path: the file.

    Raises:
        RefusedError: the file is damaged or contains something that is not allowed. Damaged files may raise other
            errors too (see `pickles.refusing`).
        OSError: the file cannot be opened.
    """
    read = cache(read_embedded_storage)  # once however often it is referred to
    table = {**ALLOWED, "torch.storage _load_from_bytes": lambda data: read(expect(data, bytes))}
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _read_zip(path, table)
        if path.stat().st_size == 0:
            raise RefusedError("the file is empty")
        return _read_pickle(Stream(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))), table)


def read_embedded_storage(data: bytes) -> Storage:
    """The storage in an archive within a pickle; the only names allowed in it are those of storage types.

    Args:
        data: the archive, in the legacy format.

    Raises:
        RefusedError: the archive is damaged or holds anything but one storage.
    """
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
    data = unpickle(stream, table, partial(find_storage, storages))
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
    data = unpickle(Stream(records["data.pkl"]), table, partial(find_storage, storages))
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
