"""The three forms in which the files come, and the small one that stands inside the first.

plain pickle   one pickle; each tensor's numbers are a byte string, itself an archive in the older form
zip            {name}/data.pkl, and each storage as the record {name}/data/{key}
older form     pickles of a magic number, a version, the system, the data and the list of keys;
               then for each key the count of its numbers (8 bytes), and the numbers
"""

from __future__ import annotations

import errno
import mmap
import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

from stablefield.interop.edm.machine import Machine, Stream
from stablefield.interop.edm.names import ALL, STORAGES, RefusedCheckpoint, Storage, expect, refusal

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001


def read_file(path: Path) -> object:
    """The data of a checkpoint in any form."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return read_zip(path)
        if path.stat().st_size == 0:
            raise RefusedCheckpoint("is empty")
        return read_stream(Stream(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))))


def read_stream(stream: Stream) -> object:
    first = Machine(stream, ALL, load=read_bare_storage).run()
    data = read_older(stream, ALL, load=read_bare_storage) if first == MAGIC else first
    if stream.left:
        raise RefusedCheckpoint(f"goes on for {stream.left} bytes behind its end")
    return data


def read_bare_storage(data: bytes) -> Storage:
    """An archive within a pickle. The only names it may contain are those of storages."""
    stream = Stream(memoryview(data))
    if Machine(stream).run() != MAGIC:
        raise RefusedCheckpoint("has numbers in an archive of an unknown form")
    storage = expect(read_older(stream, STORAGES), Storage)
    if stream.left:
        raise RefusedCheckpoint(f"has an archive of more than one storage: {stream.left} bytes follow the first")
    return storage


def read_older(stream: Stream, names: Collection[str], load: Callable[[bytes], object] | None = None) -> object:
    """What follows the magic number."""
    version, system = Machine(stream).run(), expect(Machine(stream).run(), dict)
    if version != VERSION or system.get("little_endian") is not True:
        raise RefusedCheckpoint("has an archive of an unknown version, or of a big-endian machine")

    shelf: dict[str, Storage] = {}
    data = Machine(stream, names, shelf, load).run()
    keys = [expect(key, str) for key in expect(Machine(stream).run(), list)]
    if sorted(keys) != sorted(shelf):
        raise RefusedCheckpoint(f"has an archive that mentions {len(shelf)} storages, and {len(keys)} follow")

    for key in keys:
        count = int.from_bytes(stream.take(8), "little")
        shelf[key].fill(stream.take(count * shelf[key].dtype.itemsize))
    return data


def read_zip(path: Path) -> object:
    shelf: dict[str, Storage] = {}
    try:
        records = read_records(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise RefusedCheckpoint("has a zip with a record that begins before the file does") from error
    if records.get("byteorder", b"little") != b"little":
        raise RefusedCheckpoint("is from a big-endian machine")
    data = Machine(Stream(memoryview(records["data.pkl"])), ALL, shelf, read_bare_storage).run()
    for key, storage in shelf.items():
        storage.fill(memoryview(records[f"data/{key}"]))
    return data


def read_records(path: Path) -> dict[str, bytes]:
    """By name, less that of the folder that holds them all."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        folders = {info.filename.partition("/")[0] for info in infos}
        records = {info.filename.partition("/")[2]: info for info in infos}
        if len(folders) != 1 or len(records) != len(infos):
            raise RefusedCheckpoint("has more than one folder in its zip, or two records of one name")
        for name in records:
            if not re.fullmatch(r"data\.pkl|version|byteorder|data/\d+|\.\w[\w./]*", name):
                raise refusal(name)
        # torch stores its records as they are; compressed or overlapping ones could unfold to any size
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        if not stored or sum(info.file_size for info in infos) > path.stat().st_size:
            raise RefusedCheckpoint("has compressed or overlapping records in its zip")
        return {name: archive.read(info) for name, info in records.items()}
