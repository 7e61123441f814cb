"""A progress bar for work whose total is known once it begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Context with a progress bar on a terminal, which appears when its callback is first called.

    Args:
        title: text beside the bar.
        visible: False to display nothing.

    Returns:
        The callback, called with (done, total).
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
