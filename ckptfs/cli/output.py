"""The output of commands: tables, JSON, warnings and colours."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import msgspec
import rich.console
import typer
from rich.text import Text

from ckptfs._model.protocol.message import Message
from ckptfs._model.units import size_text

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_WIDE = 100
"""Width of a terminal with room for spare columns."""
_BAR_WIDTH = 10
_CELL_WIDTH_MAX = 60
"""Longer cells are not lined up, because one long name would move the others off the screen."""
_PIPED_WIDTH = 5000
"""Longer than any row: a path has at most 4096 bytes (PATH_MAX)."""


class Console(rich.console.Console):
    """A console that raises the error of a closed pipe. rich's ends the process with status 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error that rich handles when it calls this."""
        raise


def console() -> Console:
    """Standard output. In a pipe, each row is one line."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def print_json(value: Any) -> None:
    """Print one JSON document, without the fields of the control protocol."""
    plain: Any = msgspec.to_builtins(value)
    if isinstance(value, Message):
        plain = {k: v for k, v in plain.items() if k not in ("op", "v")}
    print(json_text(plain, indent=2))


def warn(text: str) -> None:
    """Print a warning on standard error. The command does not fail."""
    print(f"ckptfs: warning: {text}", file=sys.stderr)


def json_text(value: Any, indent: int | None = None) -> str:
    """Encode as JSON that every parser reads, and that standard output can encode.

    Python and Ray write numbers that JSON does not have. They become the strings "NaN", "Infinity"
    and "-Infinity", as in the JSON of Protocol Buffers (proto3). jq sorts strings after all
    numbers, so a loss of NaN is never the smallest. null would be.
    """
    strict = json.loads(json.dumps(value), parse_constant=str)
    text = json.dumps(strict, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, or a terminal with ASCII only
        text = json.dumps(strict, indent=indent, allow_nan=False)
    return text


def print_table(
    columns: list[str],
    rows: Sequence[Sequence[str | Text]],
    right: tuple[int, ...] = (),
    spare: tuple[int, ...] = (),
) -> None:
    """Print a table without a frame, one line for each row.

    The terminal folds a line that is too long. So a path or a URI in the last column can be copied
    as a whole.

    Args:
        columns: The headings.
        rows: The cells of each line.
        right: Positions of the columns to align to the right.
        spare: Positions of the columns that a narrow terminal leaves out.
    """
    target = console()
    shown = [i for i in range(len(columns)) if target.width >= _WIDE or i not in spare]
    # Cells are Text, so that rich finds no markup in names from the store.
    lines = [[Text(columns[i], style="bold") for i in shown]]
    for row in rows:
        cells = [row[i] for i in shown]
        lines.append([cell.copy() if isinstance(cell, Text) else Text(cell) for cell in cells])
    widths = [
        min(_CELL_WIDTH_MAX, max(cell.cell_len for cell in column))
        for column in zip(*lines, strict=True)
    ]
    for cells in lines:
        for cell, width, position in zip(cells[:-1], widths, shown, strict=False):
            padding = " " * max(0, width - cell.cell_len)
            cell.pad_left(len(padding)) if position in right else cell.append(padding)
        target.print(Text("  ").join(cells), soft_wrap=True)


size = size_text


def share(part: int, whole: int) -> Text:
    """A bar and the percentage of `part` in `whole`."""
    ratio = part / whole if whole else 1.0
    filled = round(ratio * _BAR_WIDTH)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    full, empty = ("█", "░") if unicode else ("#", ".")
    bar = Text(full * filled, style="green") + Text(empty * (_BAR_WIDTH - filled), style="dim")
    return bar + f" {int(100 * ratio):3}%"  # rounded down, so that 100 % means all


_STATE_STYLES = {"cached": "green", "fetching": "cyan", "changed": "yellow", "failing": "red"} | {
    "done": "green",
    "running": "cyan",
    "failed": "red",
}


def state(value: str) -> Text:
    """A coloured state."""
    return Text(value, style=_STATE_STYLES.get(value, ""))
