"""Processes of tests: forks of the test process, which need not import anything again."""

import os
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Call a function in a fork of this process; the number of the fork."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child
