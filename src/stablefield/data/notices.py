"""Text of files as it may be shown, and notes about data that are said once."""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["printable", "say", "summarize"]

LOGGER = logging.getLogger("stablefield")


def printable(text: object, most: int = 300) -> str:
    r"""Text from a file in one line, without escape sequences, controls and marks that change its direction.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'

    Args:
        text: the text, or an object that is converted to one.
        most: number of characters beyond which the text is cut.
    """
    shown = "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in str(text)[: most + 1]
    )
    return shown if len(shown) <= most else f"{shown[:most]}..."


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
