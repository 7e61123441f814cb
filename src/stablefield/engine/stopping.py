"""Signals that stop a run: the first one ends work that can be repeated at once, and a training step when it is done.

Sheets of samples, held-out losses, measurements of the excess, scores and targets change no weight, and a resumed run
repeats them. So a signal is raised as `Stopped` inside them, wherever they are. On several ranks none may be left alone
in a collective operation: they agree before each of them, and at the end, whether one of them was stopped.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import TypeVar

from stablefield.distributed import Ranks

T = TypeVar("T")
_SIGNALS = [  # SIGUSR1 is sent by SLURM before a time limit, SIGHUP by a terminal that is closed; Windows lacks them
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]


class Stopped(BaseException):
    """Exception that the first signal raises in work that can be repeated."""


class StopRequest:
    """Signal handler that records the first signal.

    Attributes:
        number: number of the first signal; 0 until one arrives.
        time: time at which it arrived, in seconds of the monotonic clock.
        raises: True while the first signal is raised as `Stopped`.
    """

    number = 0
    time = 0.0
    raises = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Args:
            number: number of the signal.
            frame: the interrupted frame, which is not used.

        Raises:
            KeyboardInterrupt: this is a second signal, more than a second after the first.
            Stopped: this is the first signal, and `raises` is set.
        """
        # launchers that forward Ctrl-C deliver it to a process twice at once, which must not count as the second signal
        if self.number and monotonic() - self.time > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.time = number, monotonic()
            if self.raises:
                raise Stopped

    @contextmanager
    def raising(self, enabled: bool) -> Iterator[None]:
        """Context in which the first signal is raised as `Stopped`, or only recorded.

        Args:
            enabled: True to raise it, also if it has arrived already.

        Raises:
            Stopped: a signal arrives, or has arrived.
        """
        before, self.raises = self.raises, enabled
        try:
            if enabled and self.number:
                raise Stopped
            yield
        finally:
            self.raises = before


class Interruptible:
    """Calls functions that change nothing that is saved, and ends them on all ranks when a signal arrives at any.

    Args:
        stop: the signals of this process.
        ranks: this process and those it trains with.

    Attributes:
        stopped: True on all ranks once a function was ended by a signal, or one has arrived.
    """

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self.stop, self.ranks, self.stopped = stop, ranks, False

    def __call__(self, work: Callable[[], T]) -> T | None:
        """The result of a function, or None if a signal has arrived at any rank; must be called on all ranks.

        Args:
            work: the function; tensors that it exchanges between ranks go through `ranks.all_gather`.
        """
        result = None
        self.ranks.around.append(self._exchange)
        try:
            with self.stop.raising(True):
                result = work()
        except Stopped:
            if self.stopped:  # the ranks have agreed before an exchange
                return None
        finally:
            self.ranks.around.remove(self._exchange)
        self.stopped = self.ranks.any(self.stop.number > 0)
        return None if self.stopped else result

    def number(self) -> int:
        """Number of the signal that arrived at any rank; 0 for none. Must be called on all ranks."""
        return int(self.ranks.all_gather_int(self.stop.number).max())

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Context around an exchange of tensors, which begins on all ranks or on none."""
        with self.stop.raising(False):
            self.stopped = self.ranks.any(self.stop.number > 0)
            if self.stopped:
                raise Stopped
            yield


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Context in which Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP are recorded; a second one interrupts.

    A signal that the process ignores (SIGHUP under nohup) stays ignored. Outside the main thread, which alone receives
    signals, nothing is recorded.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
