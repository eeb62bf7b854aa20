"""A progress bar on the terminal, for copies and prefetches. rich is imported when one is shown."""

import contextlib
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


@contextlib.contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """Show a bar on standard error while the context lasts, where that is a terminal.

    Args:
        what: Text before the bar, taken as it is.

    Yields:
        A function to be called with the bytes that are there and the bytes of the whole.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(Text(what).plain, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
