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
    bytes_columns = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(bytes_columns if of_bytes else (MofNCompleteColumn(),)),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = not console.is_terminal
    with Progress(*columns, console=console, disable=disable, transient=not of_bytes) as progress:
        task = progress.add_task(Text(what).plain, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
