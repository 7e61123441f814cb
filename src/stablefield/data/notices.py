"""Text of files as it may be shown, and notes about data that are said once."""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache

from stablefield.files import printable

LOGGER = logging.getLogger("stablefield")


def summarize(problem: str, names: Sequence[object], most: int = 20) -> str:
    """One line with a problem, the first names that have it, and their number.

    >>> summarize("images without a label", ["a.png", "b.png"], 1)
    'images without a label: a.png, and 1 more (2 in all)'

    Args:
        problem: the problem.
        names: names of what has it.
        most: number of names to show.
    """
    more = f", and {len(names) - most:,} more ({len(names):,} in all)" if len(names) > most else f" ({len(names):,})"
    return f"{problem}: {', '.join(map(printable, names[:most]))}{more}"


@lru_cache(maxsize=1024)
def say(note: str) -> None:
    """Log a note about data as a warning, once for each process and by the main rank only.

    Args:
        note: the note, one line.
    """
    if os.environ.get("RANK", "0") == "0":
        LOGGER.warning("%s", note)
