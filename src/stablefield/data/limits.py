"""Limits on what a file of data may ask for, so that a small file cannot fill the memory.

    archives     may unpack to 256 MiB, or to 20 times their own size if that is more
    images       may have 2^26 pixels, and their files 256 MiB
    JSON         may have 64 KiB per image and no deeper lists than labels need

Each refusal names the limit and a way out.
"""

import json
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

MAX_FILE = 2**28  # bytes of an image file
MAX_PIXELS = 2**26  # 8,192 x 8,192
_FREE, _RATIO = 2**28, 20


class LimitError(ValueError):
    """A file that asks for more than a limit."""


def _most_unpacked(packed: int) -> int:
    """Largest number of bytes that an archive of a size may unpack to."""
    return max(_FREE, _RATIO * packed)


def refuse_unpacked(name: str, packed: int, unpacked: int, way_out: str) -> None:
    """Refuse an archive that unpacks to much more than its size.

    Args:
        name: the archive, or the file in it.
        packed: its size in bytes.
        unpacked: its size after unpacking.
        way_out: what the user can do, the end of the message.

    Raises:
        LimitError: the size is beyond the limit.
    """
    if unpacked > _most_unpacked(packed):
        raise LimitError(
            f"{name} unpacks {packed:,} bytes to {unpacked:,}; the limit is {_most_unpacked(packed):,} ({_FREE >> 20} "
            f"MiB, or {_RATIO} times the packed size); {way_out}"
        )


class Unpacked:
    """Stream of the bytes of an archive that ends with an error beyond a limit.

    Args:
        stream: the unpacked bytes.
        name: name of the archive in errors.
        packed: size of the archive in bytes.
        way_out: what the user can do, the end of the message.
    """

    def __init__(self, stream: BinaryIO, name: str, packed: int, way_out: str) -> None:
        self._stream, self._name, self._packed, self._way_out, self._done = stream, name, packed, way_out, 0

    def read(self, size: int) -> bytes:
        """The next bytes.

        Args:
            size: largest number of bytes, at least 0.

        Raises:
            LimitError: the stream is longer than the limit.
        """
        content = self._stream.read(min(size, _most_unpacked(self._packed) - self._done + 1))
        self._done += len(content)
        refuse_unpacked(self._name, self._packed, self._done, self._way_out)
        return content


def read_bytes(read: Callable[[int], bytes], size: int) -> UInt8[np.ndarray, "n"]:
    """The next bytes of a file, fewer if it ends before.

    Args:
        read: method of the file, which may be unpacked as it is read.
        size: number of bytes, for which memory is allocated at once.
    """
    content, done = np.empty(size, np.uint8), 0
    while done < size and (part := read(min(2**20, size - done))):
        content[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    return content[:done]


def read_json(content: bytes, name: str, most_lists: int) -> Any:
    """The value of a JSON file.

    Args:
        content: content of the file.
        name: name of the file in errors.
        most_lists: largest number of lists and objects in it.

    Raises:
        ValueError: the file is not JSON, is nested too deeply, or has more lists than may be expected.
    """
    lists = content.count(b"[") + content.count(b"{")
    if lists > most_lists:
        raise ValueError(f"{name} has {lists:,} lists; the limit is {most_lists:,} for what it describes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
