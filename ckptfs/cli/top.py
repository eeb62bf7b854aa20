"""``top``: what happens now, by checkpoint and process."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Generator
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ckptfs import _client, _connection
from ckptfs._model.manifest import printable
from ckptfs.cli import output
from ckptfs.cli.activity import SORTS, Line, Picture, Sort, picture
from ckptfs.cli.numbers import count, duration, size

_WIDE = 110
"""Columns from which on all of the table is shown."""
_PLACE_WIDTH_MIN = 20
_PIPED_WIDTH = 160


def top(
    as_json: output.JsonOption = False,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=60, help="Seconds between two looks.")
    ] = 1.0,
    sort: Annotated[Sort, typer.Option("--sort", help="What comes first.")] = "read",
) -> None:
    """Show live what is read, and what comes from the store, the cache and the kernel.

    Keys: q ends it, s sorts by the next column, p shows or hides the processes.
    """
    with _client.connect() as connection:
        if as_json or once or not sys.stdout.isatty():
            before = connection.activity()
            time.sleep(interval_s)
            found = picture(before, connection.activity(), time.time(), sort)
            if as_json:
                output.print_json(found)
            else:
                screen = Screen(sort)
                console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
                console.print(screen.shown(found, console.width, None))
            return
        _run(connection, interval_s, Screen(sort))


def _run(connection: _connection.Connection, interval_s: float, screen: "Screen") -> None:
    console = Console()
    before = after = connection.activity()
    with _keys(), _live(console) as live:
        while True:
            next_s = time.monotonic() + interval_s
            while (left_s := next_s - time.monotonic()) > 0:
                found = picture(before, after, time.time(), screen.sort)
                live.update(screen.shown(found, console.width, console.height), refresh=True)
                key = _key(left_s)
                if key == "q":
                    return
                screen.take_key(key)
            before, after = after, connection.activity()


def _live(console: Console) -> Live:
    # Standard output stays what it is: `output.share` asks it what it can show.
    return Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False)


@contextlib.contextmanager
def _keys() -> Generator[None]:
    """Let single keys come in, without an echo."""
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    settings = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, settings)


def _key(timeout_s: float) -> str:
    """The next key; "": none within that time."""
    if not sys.stdin.isatty():
        time.sleep(timeout_s)
        return ""
    if not select.select([sys.stdin], [], [], timeout_s)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 16)[:1].decode(errors="replace")


class Screen:
    """How it is shown, and what the keys have changed about that."""

    def __init__(self, sort: Sort) -> None:
        self.sort: Sort = sort
        self._with_processes = True

    def take_key(self, key: str) -> None:
        """Change what it asks for."""
        if key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "p":
            self._with_processes = not self._with_processes

    def shown(self, found: Picture, width: int, height: int | None) -> RenderableType:
        """What is to be printed. `height`: of the terminal; None: all of it is printed."""
        head = _head(found, width)
        foot = Text(f"q end   s sort: {self.sort}   p processes", style="dim", no_wrap=True)
        rows_max = None if height is None else max(1, height - len(head) - 4)
        body = self._table(found, width, rows_max)
        return Group(*head, Text(), body, *([] if height is None else [Text(), foot]))

    def _table(self, found: Picture, width: int, rows_max: int | None) -> RenderableType:
        if not found.checkpoints:
            return Text("no checkpoint is attached")
        lines = [
            (line, is_process)
            for checkpoint in found.checkpoints
            for line, is_process in _with_processes(checkpoint)
            if self._with_processes or not is_process
        ]
        left_out = found.checkpoints_left_out
        if rows_max is not None and len(lines) > rows_max:
            left_out += sum(not is_process for _, is_process in lines[rows_max - 1 :])
            lines = lines[: rows_max - 1]
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        is_wide = width >= _WIDE
        columns = [name for name, wide_only in _COLUMNS if is_wide or not wide_only]
        place_width = max(_PLACE_WIDTH_MIN, width - sum(_WIDTHS[name] + 1 for name in columns))
        table.add_column("CHECKPOINT", no_wrap=True, width=place_width)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True, width=_WIDTHS[name])
        for line, is_process in lines:
            cells = _cells(line, is_process)
            style = "dim" if is_process else ""
            place = _place(line, is_process, place_width)
            table.add_row(place, *[cells[name] for name in columns], style=style)
        if left_out > 0:
            return Group(table, Text(f"and {left_out} more checkpoints", style="dim"))
        return table


_COLUMNS = (
    ("READS/s", False),
    ("READ/s", False),
    ("CACHE/s", True),
    ("STORE/s", False),
    ("HIT", False),
    ("P50", False),
    ("P99", False),
    ("WAIT", False),
    ("FLIGHT", True),
    ("QUEUE", True),
    ("OPEN", True),
    ("KERNEL", True),
    ("ERR", False),
)
"""Name, and whether a narrow terminal has no room for it."""
_WIDTHS = {
    "READS/s": 7,
    "READ/s": 7,
    "CACHE/s": 7,
    "STORE/s": 7,
    "HIT": 4,
    "P50": 6,
    "P99": 6,
    "WAIT": 4,
    "FLIGHT": 6,
    "QUEUE": 5,
    "OPEN": 5,
    "KERNEL": 6,
    "ERR": 4,
}


def _with_processes(checkpoint: Line) -> list[tuple[Line, bool]]:
    """The line of a checkpoint, and those of its processes: True. Those that are of no single
    process are shown while something happens."""
    shown = [p for p in checkpoint.processes if p.pid or p.reads_per_s or p.store_bytes_per_s]
    return [(checkpoint, False), *((process, True) for process in shown)]


def _cells(line: Line, is_process: bool) -> dict[str, Text]:
    errors = line.errors + line.failures
    return {
        "READS/s": Text(count(line.reads_per_s)),
        "READ/s": Text(size(line.read_bytes_per_s)),
        "CACHE/s": Text(size(line.cache_bytes_per_s)),
        "STORE/s": Text(size(line.store_bytes_per_s)),
        "HIT": Text("" if line.hit_ratio is None else f"{int(100 * line.hit_ratio)}%"),
        "P50": Text(duration(line.p50_s)),
        "P99": Text(duration(line.p99_s)),
        "WAIT": Text(count(line.waiting), style="yellow" if line.waiting else ""),
        "FLIGHT": Text("" if is_process else count(line.in_flight)),
        "QUEUE": Text("" if is_process else count(line.queued)),
        "OPEN": Text(count(line.open_files)),
        "KERNEL": Text(count(line.kernel_opens)),
        "ERR": Text(count(errors), style="red" if errors else ""),
    }


def _place(line: Line, is_process: bool, width: int) -> Text:
    """Of a checkpoint the end of its URI, which tells it from others; of a process what it is."""
    if is_process:
        text = f"{line.pid} {line.name}".strip() if line.pid else line.name
        return Text("  " + printable(text))
    text = printable(line.uri.partition("?")[0])
    return Text(text if len(text) <= width else "…" + text[1 - width :])


def _head(found: Picture, width: int) -> list[Text]:
    node = found.node
    restarts = f"   restarts {found.restarts}" if found.restarts else ""
    up = duration(found.up_s)
    lines = [
        f"ckptfs {found.version}   pid {found.pid}   up {up}{restarts}   {found.mount}",
        _rates("reads", node.reads_per_s, node.read_bytes_per_s, node.p50_s, node.p99_s)
        + f"  hit {_share(node.hit_ratio)}  waiting {node.waiting}  errors {count(node.errors)}",
        _rates("store", found.requests_per_s, node.store_bytes_per_s, *_request_times(found))
        + f"  running {found.running}  queue {node.queued}  failed {count(node.failures)}",
        f"kernel {count(node.kernel_opens)} opens of files that it reads by itself"
        f" (passthrough {found.passthrough})",
    ]
    cache = Text(f"cache {size(found.cache_bytes)}")
    if found.cache_bytes_max:
        cache = Text("cache ") + output.share(found.cache_bytes, found.cache_bytes_max)
        cache += f"   {size(found.cache_bytes)} of {size(found.cache_bytes_max)}"
    cache += f"   evicted {size(found.evicted_bytes)}"
    head = [*map(Text, lines), cache]
    for text in head:
        text.no_wrap = True
        text.truncate(width, overflow="ellipsis")
    return head


def _rates(
    what: str, per_s: float, bytes_per_s: float, p50_s: float | None, p99_s: float | None
) -> str:
    rates = f"{what} {count(per_s):>5}/s {size(bytes_per_s):>6}/s"
    return f"{rates}  p50 {duration(p50_s) or '-':>5}  p99 {duration(p99_s) or '-':>5}"


def _request_times(found: Picture) -> tuple[float | None, float | None]:
    return found.request_p50_s, found.request_p99_s


def _share(ratio: float | None) -> str:
    return "-" if ratio is None else f"{int(100 * ratio)}%"
