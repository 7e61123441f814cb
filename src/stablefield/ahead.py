"""The next item while one is used: what waits for a disk need not keep what computes waiting."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order; while one is used, a thread of its own makes the next.

    Never more than one is waiting. What making an item raises is raised where that item would have come. Whoever stops
    early, or fails, waits for the item that is being made, and no thread is left.
    """
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
