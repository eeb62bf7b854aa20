"""``doctor``: what is wrong with this machine, its daemon or a store, and what to do about it."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ckptfs._doctor.checks import Examination, Result
from ckptfs.cli import output

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_STATUS_WIDTH = max(map(len, _STYLES))
_TEXT_WIDTH_MIN = 30
"""On a narrower terminal, lines are folded by it."""


def doctor(
    uri: Annotated[
        str,
        typer.Argument(
            metavar="[URI]", help="Also check its store, e.g. s3://bucket/run.", show_default=False
        ),
    ] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Check this machine, the daemon and its cache, and the store of a URI.

    Each line is ok, warning, failed (with what to do), or skipped (with why). The exit status is 1
    if a check has failed, and 0 otherwise, also with warnings. Nothing is changed: a mount is made
    for a moment, and a file of 64 MiB.
    """
    # Not at the top: it brings what only checks need.
    from ckptfs._doctor.plan import all_checks

    checks = all_checks(uri)
    examination = Examination(checks)
    if as_json:
        results = list(examination.results())
        output.print_json({"checks": results, "status": _worst(results)})
    else:
        width = max(len(check.name) for check in checks)
        results = _print_lines(examination.results(), width)
    status = int(any(result.status == "failed" for result in results))
    if examination.has_late:
        # A thread that hangs in a library would keep the interpreter from ending.
        sys.stdout.flush()
        os._exit(status)
    raise typer.Exit(status)


def _worst(results: list[Result]) -> str:
    found = {result.status for result in results}
    return next((status for status in ("failed", "warning") if status in found), "ok")


def _print_lines(results: Iterable[Result], name_width: int) -> list[Result]:
    """Each result as soon as it is there; piped, each is one line, which a script can look at."""
    console = Console(soft_wrap=True, highlight=False)
    done: list[Result] = []
    for result in results:
        if console.is_terminal:
            if not done or done[-1].group != result.group:
                console.print(Text(f"{'' if not done else chr(10)}{result.group}", style="bold"))
            for line in _lines_for_terminal(result, name_width):
                console.print(line)
        else:
            remedy = f" → {result.remedy}" if result.remedy else ""
            print(
                f"{result.status:{_STATUS_WIDTH}}  {result.name:{name_width}}  "
                f"{result.message}{remedy}",
                flush=True,
            )
        done.append(result)
    if console.is_terminal:
        console.print(_summary(done))
    return done


def _lines_for_terminal(result: Result, name_width: int) -> list[Text]:
    indent = 2 + _STATUS_WIDTH + 2 + name_width + 2
    width = max(_TEXT_WIDTH_MIN, shutil.get_terminal_size().columns - indent)
    style = _STYLES[result.status]
    begin = Text("  ") + Text(f"{result.status:{_STATUS_WIDTH}}", style=style)
    begin += Text(f"  {result.name:{name_width}}  ")
    first, *others = textwrap.wrap(result.message, width) or [""]
    words = Text(first, style="dim" if result.status == "skipped" else "")
    lines = [begin + words, *(Text(" " * indent + line) for line in others)]
    remedy = textwrap.wrap(result.remedy, width - 2, break_on_hyphens=False)
    for number, line in enumerate(remedy):
        mark = "  " if number else "→ "
        lines.append(Text(" " * indent) + Text(mark + line, style=f"not bold {style}"))
    return lines


def _summary(results: list[Result]) -> Text:
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {status}" for status in _STYLES if counts[status]]
    return Text(f"\n{', '.join(parts)}")
