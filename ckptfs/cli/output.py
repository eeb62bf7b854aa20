"""How things look on a terminal, shared by the commands."""

import json
import sys
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckptfs._model.message import Message
from ckptfs._model.units import size_text

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

INTERRUPTED = 130
"""Exit status of who was ended by Ctrl-C, as shells have it: 128 + SIGINT."""
_WIDE = 100
"""Columns of a terminal that has room for what can be spared."""
_BAR_WIDTH = 10
_PIPED_WIDTH = 5000
"""Longer than any row: a path has at most 4096 bytes (PATH_MAX)."""


def console() -> Console:
    """Standard output. Piped, a line is a row: nothing is folded."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on standard output; the wire protocol's own fields are left out."""
    plain: Any = msgspec.to_builtins(value)
    if isinstance(value, Message):
        plain = {k: v for k, v in plain.items() if k not in ("op", "v")}
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, or a terminal of ASCII only
        text = json.dumps(plain, indent=2)
    print(text)


def print_table(
    columns: list[str],
    rows: list[list[str | Text]],
    right: tuple[int, ...] = (),
    spare: tuple[int, ...] = (),
) -> None:
    """A table without frame. Numbers, bars and states are never folded.

    Args:
        columns: Their headings.
        rows: The cells.
        right: Positions of the columns that are aligned to the right.
        spare: Positions of those that a narrow terminal can do without.
    """
    target = console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [i for i in range(len(columns)) if target.width >= _WIDE or i not in spare]
    for position in shown:
        whole = position in right or any(isinstance(row[position], Text) for row in rows)
        justify = "right" if position in right else "left"
        table.add_column(columns[position], justify=justify, overflow="fold", no_wrap=whole)
    for row in rows:
        # Names come from the store: Text, so that rich does not look for markup in them.
        cells = [row[position] for position in shown]
        table.add_row(*[cell if isinstance(cell, Text) else Text(cell) for cell in cells])
    target.print(table)


size = size_text


def share(part: int, whole: int) -> Text:
    """A bar and the percentage of `part` in `whole`."""
    ratio = part / whole if whole else 1.0
    filled = round(ratio * _BAR_WIDTH)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    full, empty = ("█", "░") if unicode else ("#", ".")
    bar = Text(full * filled, style="green") + Text(empty * (_BAR_WIDTH - filled), style="dim")
    return bar + f" {int(100 * ratio):3}%"  # never 100 % before it is all there


_STATE_STYLES = {"cached": "green", "fetching": "cyan", "changed": "yellow", "failing": "red"}


def state(value: str) -> Text:
    """A state, coloured."""
    return Text(value, style=_STATE_STYLES.get(value, ""))
