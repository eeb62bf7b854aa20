"""A progress bar for copies and prefetches, on a terminal or in a notebook."""

import contextlib
import io
import time
from collections.abc import Callable, Generator
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

_NOTEBOOK_COLUMNS = 100
"""Characters of a line in a notebook, which does not report its width."""
_NOTEBOOK_INTERVAL_S = 0.25
"""Shortest time between two messages to a notebook, which draws each and could lag behind."""


@contextlib.contextmanager
def progress_bar(what: str, *, of_bytes: bool = True) -> Generator[Callable[[int, int], None]]:
    """Show a bar during the context: on standard error if that is a terminal, or below the cell of
    a notebook. Elsewhere there is none.

    Args:
        what: The text before the bar, without markup.
        of_bytes: Whether the bar counts bytes. A bar of other things disappears at its end, before
            the caller prints the result.

    Yields:
        A function of the number of bytes that are done, and of all bytes.
    """
    console = Console(stderr=True)
    shows = console.is_terminal
    in_notebook = console.is_jupyter
    if in_notebook:
        console = Console(
            file=io.StringIO(), width=_NOTEBOOK_COLUMNS, force_jupyter=False, no_color=True
        )
    progress = Progress(
        *_columns(of_bytes=of_bytes),
        console=console,
        disable=in_notebook or not shows,
        transient=not of_bytes,
        expand=True,
    )
    task = progress.add_task(Text(what).plain, total=None)

    def update(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    if in_notebook:
        with _in_notebook(progress, update, keep=of_bytes) as show:
            yield show
    else:
        with progress:
            yield update


def _columns(*, of_bytes: bool) -> list[ProgressColumn]:
    done = Column(no_wrap=True)
    counts: list[ProgressColumn] = [MofNCompleteColumn(table_column=done)]
    if of_bytes:
        counts = [DownloadColumn(binary_units=True, table_column=done), TransferSpeedColumn()]
    # On a narrow terminal rich cuts the text before the bar, and folds nothing.
    before = Column(no_wrap=True, overflow="ellipsis", ratio=2)
    return [
        TextColumn("{task.description}", markup=False, table_column=before),
        BarColumn(bar_width=None, table_column=Column(ratio=3)),
        *counts,
        TimeRemainingColumn(),
    ]


# -- in a notebook


@contextlib.contextmanager
def _in_notebook(
    progress: Progress, update: Callable[[int, int], None], *, keep: bool
) -> Generator[Callable[[int, int], None]]:
    """The bar as text that the notebook replaces. rich itself needs ipywidgets for a bar there."""
    display: Any = import_module("IPython.display").display
    handle = display(_text_of(progress), raw=True, display_id=True)
    shown_s = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_s
        update(done, total)
        now_s = time.monotonic()
        if now_s - shown_s >= _NOTEBOOK_INTERVAL_S or done == total:
            shown_s = now_s
            handle.update(_text_of(progress), raw=True)

    try:
        yield show
    finally:
        handle.update(_text_of(progress) if keep else {"text/plain": ""}, raw=True)


def _text_of(progress: Progress) -> dict[str, str]:
    console = progress.console
    with console.capture() as captured:
        console.print(progress.get_renderable())
    return {"text/plain": captured.get().rstrip("\n")}
