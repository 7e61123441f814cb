"""Clean end of a command that is stopped by a signal: what is done is kept, and the command to resume is printed."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

import typer

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]  # Windows lacks some


class Stopped(BaseException):
    """Exception that a signal raises inside `stoppable`.

    Args:
        number: number of the signal.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def command_line() -> str:
    """The command of this process, quoted for a shell."""
    return shlex.join(["stablefield", *sys.argv[1:]])


@contextmanager
def stoppable(activity: str, done: Callable[[], str]) -> Iterator[None]:
    """Context that a signal ends at once, with a message and the signal's exit status; a second signal kills.

    The work inside must leave only complete files behind at any moment.

    Args:
        activity: what the signal stops, for the message.
        done: returns what exists already, for the message; called after the signal.

    Raises:
        Exit: a signal arrived.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return

    begun = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal begun
        if not begun:
            begun = monotonic()
            raise Stopped(number)
        if monotonic() - begun > 1:  # launchers that forward Ctrl-C deliver it twice at once
            os._exit(128 + number)

    before = {each: signal.getsignal(each) for each in _SIGNALS}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}  # as nohup sets it
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(stopped.number).name
            print(f"{activity} was stopped by {name}: {done()}\nresume it with: {command_line()}", flush=True)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
