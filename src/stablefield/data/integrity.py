"""Stores are compared with their hash when they are used, once for each state of their files.

A state is the size, the times of the last changes and the inode of each file; the cache remembers the last state that
was compared. Small data are compared before they are used, large data in the background, while they are used.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from stablefield.files import cache_folder, write_text

LOGGER = logging.getLogger("stablefield")

_WAIT = 2**32  # bytes of data up to which a comparison is waited for
_GOOD = "good"


def check_once(folder: Path, nbytes: int, check: Callable[[], None]) -> None:
    """Check the files of a folder, unless the cache remembers that they were checked in this state.

    Args:
        folder: the folder.
        nbytes: size of the data in bytes.
        check: reads the files, and raises ValueError if they are damaged.

    Raises:
        ValueError: the files are damaged.
    """
    state = state_of(folder)
    known, result = _remembered(folder)
    if known == state and result != _GOOD:
        raise ValueError(result)
    if known == state:
        return

    def compare() -> None:
        try:
            check()
        except ValueError as error:
            remember(folder, state, str(error))
            raise
        remember(folder, state)

    def compare_later() -> None:
        try:
            compare()
        except ValueError as error:
            LOGGER.error("%s; stop this program: it uses the damaged data", error)

    if nbytes <= _WAIT:
        compare()
    else:
        threading.Thread(target=compare_later, daemon=True).start()


def remember(folder: Path, state: str, result: str = _GOOD) -> None:
    """Note in the cache that a folder was checked; where the cache cannot be written, it is checked again next time.

    Args:
        folder: the folder.
        state: state of its files, from `state_of`, before they were checked.
        result: "good", or the error that was found.
    """
    with suppress(OSError):
        write_text(_note(folder), json.dumps([state, result]))


def state_of(folder: Path) -> str:
    """Hash of the sizes, the times of the last changes and the inodes of the files in a folder.

    Args:
        folder: the folder.
    """
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    states = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats]
    return hashlib.sha256(repr(states).encode(errors="surrogateescape")).hexdigest()


def _remembered(folder: Path) -> tuple[str, str]:
    """The last state of a folder that was checked, and its result; empty if there is none."""
    try:
        known, result = json.loads(_note(folder).read_text(encoding="utf-8"))
        return str(known), str(result)
    except (OSError, ValueError, TypeError):
        return "", ""


def _note(folder: Path) -> Path:
    """The file of the cache with the last state of a folder that was checked."""
    name = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / f"{name}.checked"
