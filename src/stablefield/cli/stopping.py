"""Clean end of a command that is stopped by a signal: what is done is kept, and the command to resume is printed."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


@contextmanager
def stoppable(activity: str, done: Callable[[], str]) -> Iterator[None]:
    """Context that a signal ends at once, with a message and the signal's exit status; a second signal interrupts.

    The work inside must leave only complete files behind at any moment.

    Args:
        activity: what the signal stops, for the message.
        done: returns what exists already, for the message; called after the signal.

    Raises:
        Exit: a signal arrived.
    """
    from stablefield.engine.stopping import Stopped, stop_signals

    with stop_signals() as stop:
        try:
            with stop.raising(True):
                yield
        except Stopped:
            if os.environ.get("RANK", "0") == "0":
                command = shlex.join(["stablefield", *sys.argv[1:]])
                name = signal.Signals(stop.number).name
                print(f"{activity} was stopped by {name}: {done()}\nresume it with: {command}", flush=True)
            raise typer.Exit(128 + stop.number) from None
