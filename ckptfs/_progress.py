"""A progress bar on the terminal, for copies and prefetches. rich is imported when one is shown."""

import contextlib
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text


@contextlib.contextmanager
def progress_bar(what: str, *, of_bytes: bool = True) -> Generator[Callable[[int, int], None]]:
    """Show a bar on standard error while the context lasts, where that is a terminal.

    Args:
        what: Text before the bar, taken as it is.
        of_bytes: Whether bytes are counted. Where other things are, the bar is gone at the end:
            what is printed then is the result.

    Yields:
        A function to be called with the bytes that are there and the bytes of the whole.
    """
    done = Column(no_wrap=True)
    if of_bytes:
        counts = (DownloadColumn(binary_units=True, table_column=done), TransferSpeedColumn())
    else:
        counts = (MofNCompleteColumn(table_column=done),)
    # Where there is little room the text before the bar is cut, and nothing is folded.
    before = Column(no_wrap=True, overflow="ellipsis", ratio=2)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=before),
        BarColumn(bar_width=None, table_column=Column(ratio=3)),
        *counts,
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = not console.is_terminal
    progress = Progress(
        *columns, console=console, disable=disable, transient=not of_bytes, expand=True
    )
    with progress:
        task = progress.add_task(Text(what).plain, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
