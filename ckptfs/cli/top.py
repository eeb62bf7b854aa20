"""``top``: the current activity, by checkpoint and process."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ckptfs._client import client
from ckptfs._client.connection import Connection
from ckptfs._model.manifest import printable
from ckptfs._model.protocol.requests import Activity
from ckptfs._model.units import brief_count, brief_duration, brief_size, parse_duration
from ckptfs.cli import output
from ckptfs.cli.counter_deltas import SORTS, Line, Picture, Sort, picture
from ckptfs.errors import AgeError

_WIDE = 110
"""Terminals with fewer columns get a part of the table."""
_PLACE_WIDTH_MIN = 20
_PIPED_WIDTH = 160
_ENDED_SHOWN_S = 5.0
"""Long enough to read a process's last figures, on a screen that changes each second."""
_INTERVAL_S_MIN, _INTERVAL_S_MAX = 0.2, 60.0
"""A shorter interval would keep the daemon busy. A longer one would delay the answer to keys."""


def top(
    as_json: output.JsonOption = False,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and exit.")] = False,
    interval: Annotated[
        str,
        typer.Option(
            metavar="DURATION", help="Time between two snapshots, from 200ms to 1min. Default: 1s."
        ),
    ] = "1s",
    sort: Annotated[
        Sort,
        typer.Option(
            metavar="|".join(SORTS), help="Column to sort by, the highest first. Default: read."
        ),
    ] = "read",
) -> None:
    """Show reads live, and the bytes from the store, from the cache and by the kernel.

    A pipe gets one snapshot. The key q quits, s sorts by the next column, and p shows or hides the
    processes. A process that has ended stays visible for a few seconds.
    """
    interval_s = _interval_of(interval)
    with client.connect() as connection:
        if as_json or once or not sys.stdout.isatty():
            before = connection.ask(Activity())
            time.sleep(interval_s)
            found = picture(before, connection.ask(Activity()), time.time(), sort)
            if as_json:
                output.print_json(found)
            else:
                screen = Screen(sort, ended_shown_s=0)
                console = output.Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
                console.print(screen.shown(found, console.width, None))
            return
        _run(connection, interval_s, Screen(sort))


def _interval_of(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except AgeError as error:
        raise typer.BadParameter(str(error), param_hint="'--interval'") from None
    if not _INTERVAL_S_MIN <= seconds <= _INTERVAL_S_MAX:
        raise typer.BadParameter(f"{text} is not from 200ms to 1min", param_hint="'--interval'")
    return seconds


def _run(connection: Connection, interval_s: float, screen: "Screen") -> None:
    console = output.Console()
    before = after = connection.ask(Activity())
    # Standard output is not redirected, because `output.share` asks it what it can show.
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False)
    with _keys(), live:
        while True:
            next_s = time.monotonic() + interval_s
            while (left_s := next_s - time.monotonic()) > 0:
                found = picture(before, after, time.time(), screen.sort)
                live.update(screen.shown(found, console.width, console.height), refresh=True)
                key = _key(left_s)
                if key == "q":
                    return
                screen.apply_key(key)
            before, after = after, connection.ask(Activity())


@contextlib.contextmanager
def _keys() -> Generator[None]:
    """Read single keys, without an echo."""
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
    """The next key, or "" if none is pressed within that time."""
    if not sys.stdin.isatty():
        time.sleep(timeout_s)
        return ""
    if not select.select([sys.stdin], [], [], timeout_s)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 16)[:1].decode(errors="replace")


class Screen:
    """The layout of the screen, and its settings by keys."""

    def __init__(self, sort: Sort, ended_shown_s: float = _ENDED_SHOWN_S) -> None:
        self.sort: Sort = sort
        self._ended_shown_s = ended_shown_s
        self._with_processes = True
        self._ended: dict[tuple[str, int], float] = {}  # when the screen first saw its end

    def apply_key(self, key: str) -> None:
        """Apply a key."""
        if key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "p":
            self._with_processes = not self._with_processes

    def shown(self, found: Picture, width: int, height: int | None) -> RenderableType:
        """The text to print. `height` is the terminal's; None prints all lines."""
        self._note_ended(found)
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
            if not is_process or (self._with_processes and self._is_recent(checkpoint, line, found))
        ]
        left_out = found.checkpoints_left_out
        if rows_max is not None and len(lines) > rows_max:
            left_out += sum(not is_process for _, is_process in lines[rows_max - 1 :])
            lines = lines[: rows_max - 1]
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        is_wide = width >= _WIDE
        columns = [column for column in _COLUMNS if is_wide or not column.is_wide]
        place_width = max(_PLACE_WIDTH_MIN, width - sum(column.width + 1 for column in columns))
        table.add_column("CHECKPOINT", no_wrap=True, width=place_width)
        for column in columns:
            table.add_column(column.name, justify="right", no_wrap=True, width=column.width)
        for line, is_process in lines:
            style = "dim" if is_process else ""
            place = _place(line, is_process, place_width)
            cells = [column.cell(line, is_process) for column in columns]
            table.add_row(place, *cells, style=style)
        if left_out > 0:
            return Group(table, Text(f"and {left_out} more checkpoints", style="dim"))
        return table

    def _note_ended(self, found: Picture) -> None:
        """Note when processes ended, on the daemon's clock."""
        ended = [(c.name, p.pid) for c in found.checkpoints for p in c.processes if p.ended]
        self._ended = {each: self._ended.get(each, found.up_s) for each in ended}

    def _is_recent(self, checkpoint: Line, process: Line, found: Picture) -> bool:
        """Whether a process runs, or ended a moment ago."""
        if not process.ended or process.reads_per_s or process.store_bytes_per_s:
            return True
        return found.up_s - self._ended[checkpoint.name, process.pid] < self._ended_shown_s


@dataclass(frozen=True)
class _Column:
    """A column of figures.

    Attributes:
        width: Its width in characters.
        text: Function from a line to its figure.
        is_wide: Whether a narrow terminal leaves it out.
        has_processes: Whether lines of processes have a figure.
        style: Style of figures other than 0.
    """

    name: str
    width: int
    text: Callable[[Line], str]
    is_wide: bool = False
    has_processes: bool = True
    style: str = ""

    def cell(self, line: Line, is_process: bool) -> Text:
        """The figure in the table."""
        text = self.text(line) if self.has_processes or not is_process else ""
        return Text(text, style="" if text == "0" else self.style)


_COLUMNS = (
    _Column("READS/s", 7, lambda row: brief_count(row.reads_per_s)),
    _Column("READ/s", 7, lambda row: brief_size(row.read_bytes_per_s)),
    _Column("CACHE/s", 7, lambda row: brief_size(row.cache_bytes_per_s), is_wide=True),
    _Column("STORE/s", 7, lambda row: brief_size(row.store_bytes_per_s)),
    _Column("HIT", 4, lambda row: _share(row.hit_ratio)),
    _Column("P50", 6, lambda row: brief_duration(row.p50_s)),
    _Column("P99", 6, lambda row: brief_duration(row.p99_s)),
    _Column("WAIT", 4, lambda row: brief_count(row.waiting), style="yellow"),
    _Column("FLIGHT", 6, lambda row: brief_count(row.in_flight), is_wide=True, has_processes=False),
    _Column("QUEUE", 5, lambda row: brief_count(row.queued), is_wide=True, has_processes=False),
    _Column("OPEN", 5, lambda row: brief_count(row.open_files), is_wide=True),
    _Column("KERNEL", 6, lambda row: brief_count(row.kernel_opens), is_wide=True),
    _Column("ERR", 4, lambda row: brief_count(row.errors + row.failures), style="red"),
)


def _with_processes(checkpoint: Line) -> list[tuple[Line, bool]]:
    """The line of a checkpoint (False), and the lines of its processes (True). Lines of several
    processes are shown only while they are active."""
    shown = [p for p in checkpoint.processes if p.pid or p.reads_per_s or p.store_bytes_per_s]
    return [(checkpoint, False), *((process, True) for process in shown)]


def _place(line: Line, is_process: bool, width: int) -> Text:
    """A checkpoint's URI, cut at its beginning because the end differs; or a process."""
    if is_process:
        text = f"{line.pid} {line.name}".strip() if line.pid else line.name
        return Text(f"  {printable(text)}{' (ended)' if line.ended else ''}")
    text = printable(line.uri.partition("?")[0])
    return Text(text if len(text) <= width else "…" + text[1 - width :])


def _head(found: Picture, width: int) -> list[Text]:
    node = found.node
    restarts = f"   restarts {found.restarts}" if found.restarts else ""
    up = brief_duration(found.up_s)
    lines = [
        f"ckptfs {found.version}   pid {found.pid}   up {up}{restarts}   {found.mount}",
        _rates("reads", node.reads_per_s, node.read_bytes_per_s, node.p50_s, node.p99_s)
        + f"  hit {_share(node.hit_ratio) or '-'}"
        + f"  waiting {node.waiting}  errors {brief_count(node.errors)}",
        _rates(
            "store",
            found.requests_per_s,
            node.store_bytes_per_s,
            found.request_p50_s,
            found.request_p99_s,
        )
        + f"  running {found.running}  queue {node.queued}  failed {brief_count(node.failures)}",
        f"kernel {brief_count(node.kernel_opens)} opens of files that it reads by itself"
        f" (passthrough {found.passthrough})",
    ]
    cache = Text(f"cache {brief_size(found.cache_bytes)}")
    if found.cache_bytes_max:
        cache = Text("cache ") + output.share(found.cache_bytes, found.cache_bytes_max)
        cache += f"   {brief_size(found.cache_bytes)} of {brief_size(found.cache_bytes_max)}"
    cache += f"   evicted {brief_size(found.evicted_bytes)}"
    head = [*map(Text, lines), cache]
    if any(found.uploads.values()):
        states = "  ".join(f"{state} {count}" for state, count in found.uploads.items())
        rate, kept = brief_size(found.upload_bytes_per_s), brief_size(found.uploads_bytes)
        head.append(Text(f"uploads {rate:>10}/s  {states}  on the disk {kept}"))
    for text in head:
        text.no_wrap = True
        text.truncate(width, overflow="ellipsis")
    return head


def _rates(
    what: str, per_s: float, bytes_per_s: float, p50_s: float | None, p99_s: float | None
) -> str:
    rates = f"{what} {brief_count(per_s):>5}/s {brief_size(bytes_per_s):>6}/s"
    return f"{rates}  p50 {brief_duration(p50_s) or '-':>5}  p99 {brief_duration(p99_s) or '-':>5}"


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{int(100 * ratio)}%"
