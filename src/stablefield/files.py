"""Files that are complete or absent, locks, and the cache. Everything that this package writes is written here.

A file or folder is written under a temporary name beside its final place, `.tmp-` and 12 digits before the final name,
flushed to the disk and renamed. A reader finds what was there before or what is new, complete, whenever the writer is
killed. The writer holds a lock on what it writes, so that leftovers of killed processes can be distinguished from
files that are being written; the next write of the same file removes them, and `sweep` all those in a folder.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_OTHER_CACHE = "set the environment variable STABLEFIELD_CACHE to a folder that can be written"
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{12}\..+", re.DOTALL)


@contextmanager
def atomic_path(path: Path, *, new: bool = False, durable: bool = True) -> Iterator[Path]:
    """Context with the path of an empty temporary file, which is renamed to `path` at the end if nothing failed.

    Args:
        path: the file to write or replace; its folder is created if it does not exist.
        new: True to refuse a path that exists; if several processes try at once, one succeeds.
        durable: True to flush the file to the disk before it is renamed, so that a power failure leaves it complete.

    Raises:
        FileExistsError: `new` is set and the path exists.
        OSError: the file could not be written, and what was there before is untouched.
    """
    with _temporary(path, folder=False, durable=durable) as temporary:
        yield temporary
        if durable:
            sync(temporary)
        if new:
            _rename_to_new(temporary, path)
        else:
            temporary.replace(path)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Context with the path of an empty temporary folder, which is renamed to `path` at the end if nothing failed.

    Args:
        path: the folder to write, which must not exist, or must be empty.
        replace: True to replace a folder that exists: it is renamed away and then removed.

    Raises:
        OSError: the folder could not be written, or the path exists and is not replaced; nothing is left behind.
    """
    with _temporary(path, folder=True, durable=True) as temporary:
        yield temporary
        for place in (*temporary.rglob("*"), temporary):
            sync(place)
        if replace and path.exists():
            with _temporary(path, folder=True, durable=False) as removed:
                before = path.rename(removed / path.name)
                try:
                    temporary.rename(path)
                except OSError:
                    before.rename(path)
                    raise
        else:
            temporary.rename(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Context with an empty temporary folder, for many files that are each renamed when they are complete.

    Args:
        path: the first of these files; the folder lies beside it, and errors name it.

    Raises:
        OSError: a file could not be written.
    """
    with _temporary(path, folder=True, durable=False) as temporary:
        yield temporary


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """Write a text (UTF-8) as `atomic_path` does.

    Args:
        path: the file.
        text: its new content.
        new: True to refuse a path that exists.

    Raises:
        FileExistsError: `new` is set and the path exists.
        OSError: the file could not be written; what was there before is untouched.
    """
    with atomic_path(path, new=new) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: Path, content: str | bytes) -> None:
    """Append a text (UTF-8) or bytes to a file; if the disk is full, the file is as before.

    Args:
        path: the file, created if it does not exist.
        content: what to append.

    Raises:
        OSError: the file could not be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            size, octets = file.tell(), content.encode() if isinstance(content, str) else content
            try:
                while octets:
                    octets = octets[file.write(octets) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error})") from error


def sync(path: Path) -> None:
    """Flush a file or folder to the disk.

    Args:
        path: the file or folder.

    Raises:
        OSError: a file cannot be written. Folders that cannot be flushed on this file system are passed over.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(*folders: Path) -> None:
    """Remove temporary files and folders of processes that were killed while they wrote them.

    What another process is writing is left alone, also on file systems without locks.

    Args:
        *folders: the folders to look in, not in the folders inside them; those that do not exist are passed over.
    """
    for folder in folders:
        _sweep(folder)


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Context that one process at a time can enter; where the file system has no locks, all of them enter.

    Args:
        path: a folder, or a file that is created if it does not exist.
        wait: True to wait for another process to leave; False to refuse.

    Raises:
        BlockingIOError: another process is in the context, and `wait` is False.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY) if path.is_dir() else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # the file system has no locks
        yield
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of the content of a file.

    Args:
        path: the file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder of the cache: the environment variable `STABLEFIELD_CACHE`, or `~/.cache/stablefield`.

    Raises:
        OSError: there is no home.
    """
    if given := os.environ.get("STABLEFIELD_CACHE"):
        return Path(given)
    try:
        return Path("~/.cache/stablefield").expanduser()
    except RuntimeError:
        raise OSError(f"this user has no home for the cache; {_OTHER_CACHE}") from None


def cached(name: str, find: Callable[[Path], T | None], make: Callable[[Path], object]) -> T:
    """An entry of the cache, which is made if there is none; of several processes that need it, one makes it.

    Args:
        name: name of the entry, with a hash of all that it depends on.
        find: reads the entry at a path; None if there is none.
        make: makes the entry and writes it to a path, atomically.

    Returns:
        The entry, as `find` returns it.

    Raises:
        OSError: the cache cannot be read or written.
    """
    path = cache_folder() / name
    try:
        if (found := find(path)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(f"cannot use the cache {path.parent} ({error.strerror or error}); {_OTHER_CACHE}") from error
    with exclusive_lock(path.with_name(f"{path.name}.lock")):
        sweep(path.parent)
        if (found := find(path)) is None:
            try:
                make(path)
            except (OSError, ValueError):
                if find(path) is None:  # else another process was faster, where there are no locks
                    raise
            found = find(path)
    assert found is not None, f"{path} was not written"
    return found


@contextmanager
def _temporary(path: Path, *, folder: bool, durable: bool) -> Iterator[Path]:
    """A new temporary file or folder for a path, locked until it has been renamed, or removed after an error."""
    temporary, descriptor = path, -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent, path.name)
        temporary, descriptor = _create(path, folder)
        yield temporary
        if durable:
            sync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"could not write {path} ({reason}); what was there before is untouched") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if temporary != path:
            _remove(temporary)


def _create(path: Path, folder: bool) -> tuple[Path, int]:
    """A new temporary file or folder for a path, and the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".tmp-{secrets.token_hex(6)}.{path.name}")
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if fcntl is None:
            return temporary, -1
        descriptor = -1
        with suppress(FileNotFoundError):
            descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
        if descriptor >= 0:
            os.close(descriptor)  # `sweep` removed it before it was locked


def _sweep(folder: Path, name: str = "") -> None:
    """Remove temporary files and folders that no process is writing: those of one name, or all."""
    for path in folder.glob(".tmp-*"):
        if _TEMPORARY.fullmatch(path.name) and (not name or path.name[18:] == name):
            with suppress(OSError):
                _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file or folder that no process has locked."""
    if fcntl is None:
        _remove(path)  # Windows does not remove files that are open
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def printable(text: object, most: int = 300) -> str:
    r"""Text from a file in one line, without escape sequences, controls and marks that change its direction.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'

    Args:
        text: the text, or an object that is converted to one.
        most: number of characters beyond which the text is cut.
    """
    shown = str(text)[: most + 1]
    if not shown.isprintable():  # names of files, of which there may be millions, usually are
        shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown)
    return shown if len(shown) <= most else f"{shown[:most]}..."
