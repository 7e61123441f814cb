"""Commands that are killed, or whose disk is full, at a chosen change of the files in the current folder.

A command runs in a fork of the test process. Python tells an audit hook of every file that is opened, renamed, linked
or removed, before it happens; the hook counts these changes, and kills the process or raises an error at one of them.
"""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import forked

from stablefield.cli import main

CREATING = {"open", "os.mkdir", "os.link"}
CHANGING = CREATING | {"os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITABLE = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Attributes:
        status: its exit status; negative for the number of a signal.
        output: what it printed.
        changes: number of changes of files in the folder, as far as they were counted.
    """

    status: int
    output: str
    changes: int

    @property
    def message(self) -> str:
        """The error that the command printed."""
        return self.output[self.output.rindex("stablefield: ") :]


def _inside(path: object, root: str) -> bool:
    try:
        return f"{os.path.abspath(os.fsdecode(path))}/".startswith(root)
    except TypeError:
        return False


def command(
    folder: Path,
    words: Sequence[str],
    *,
    kill: int | None = None,
    full: int | None = None,
    read_only: Path | None = None,
    room: int | None = None,
) -> Outcome:
    """Run a command in a folder.

    Args:
        folder: the folder, which becomes the current one and holds the cache.
        words: the command line.
        kill: number of the change before which the process is killed; None for never.
        full: number of the change from which on files cannot be created, as on a full disk; None for never.
        read_only: folder that cannot be written.
        room: size in bytes beyond which no file can grow; None for no limit.
    """
    (reader, writer), (counts, counted) = os.pipe(), os.pipe()
    root, locked = f"{folder.absolute()}/", read_only and f"{read_only.absolute()}/"
    changes = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event not in CHANGING or not _inside(arguments[0], root):
            return
        if event == "open" and not arguments[2] & WRITABLE:
            return
        changes += 1
        os.write(counted, b".")
        if kill is not None and changes > kill:
            os.kill(os.getpid(), signal.SIGKILL)
        creates = event in CREATING and (event != "open" or arguments[2] & os.O_CREAT)
        if full is not None and changes > full and creates:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(arguments[0]))
        if locked and any(_inside(path, locked) for path in arguments[:2]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(arguments[0]))

    def work() -> None:
        os.chdir(folder)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ["STABLEFIELD_CACHE"] = "cache"
        sys.argv = ["stablefield", *words]
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
        if locked:
            access = os.access
            os.access = lambda path, mode, **options: (
                not (mode & os.W_OK and _inside(path, locked)) and access(path, mode, **options)
            )
        sys.addaudithook(watch)
        _exit_status(main)

    child = forked(work)
    for end in (writer, counted):
        os.close(end)
    with os.fdopen(reader, errors="replace") as text, os.fdopen(counts, "rb") as number:
        output = text.read()
        _, status = os.waitpid(child, 0)
        return Outcome(os.waitstatus_to_exitcode(status), output, len(number.read()))


def _exit_status(run: Callable[[], object]) -> None:
    """Call a function, and end the process with the status that it exits with."""
    status: object = 0
    try:
        run()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder that are results, by their relative paths: without the cache and its locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "cache"
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder, its cache included."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".tmp-*")]
