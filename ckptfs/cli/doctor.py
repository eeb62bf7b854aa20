"""``doctor``: find faults of this machine, its daemon or a store, and their remedies."""

import itertools
import os
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.text import Text

from ckptfs._doctor.checks import Examination, Result
from ckptfs._model.wording import counted
from ckptfs.cli import output
from ckptfs.cli.checkpoints import AnonymousOption, asked

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}
_STATUS_WIDTH = max(map(len, _STYLES))
_INDENT = "  "
_TEXT_WIDTH_MIN = 30
"""A narrower terminal folds lines itself."""


def doctor(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Also check this store, e.g. s3://bucket/run.")
    ] = "",
    anonymous: AnonymousOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Check this machine, the daemon and its cache, and the store of a URI.

    Each line is ok, warning or failed (with a remedy), or skipped (with the reason). The exit
    status is 1 if a check has failed, and otherwise 0, also with warnings. The checks make a mount
    for a moment, write up to 64 MiB to the cache's disk and remove them, and read as much from the
    store. They leave no change.
    """
    # Not at the top, because it imports modules that only checks need.
    from ckptfs._doctor.plan import all_checks

    with all_checks(asked(uri, anonymous)) as checks:
        examination = Examination(checks)
        try:
            if as_json:
                results = list(examination.results())
                output.print_json({"checks": results, "status": _worst(results)})
            else:
                width = max(len(check.name) for check in checks)
                results = _print_lines(examination.results(), width)
        except (KeyboardInterrupt, OSError) as error:  # OSError: standard output failed
            _give_up(examination, error)
            raise
    status = int(any(result.status == "failed" for result in results))
    if examination.has_late:
        # The interpreter would wait for a thread that hangs in a library.
        sys.stdout.flush()
        os._exit(status)
    raise typer.Exit(status)


def _give_up(examination: Examination, error: BaseException) -> None:
    """End the checks before the interpreter ends, because a thread in a C++ library would crash
    then."""
    interrupted = isinstance(error, KeyboardInterrupt)
    status = 128 + (signal.SIGINT if interrupted else signal.SIGPIPE)
    try:
        examination.give_up()
    except KeyboardInterrupt:  # a second one
        os._exit(status)
    if examination.has_late and (interrupted or isinstance(error, BrokenPipeError)):
        os._exit(status)


def _worst(results: list[Result]) -> str:
    found = {result.status for result in results}
    return next((status for status in ("failed", "warning") if status in found), "ok")


def _print_lines(results: Iterable[Result], name_width: int) -> list[Result]:
    """Print each result as soon as possible. In a pipe each is one line, for scripts."""
    console = output.Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        return [_print_plain(result, name_width) for result in results]
    done: list[Result] = []
    for _, alike in itertools.groupby(results, _likeness):
        first, *others = alike
        if not done or done[-1].group != first.group:
            console.print(Text(f"{'' if not done else chr(10)}{first.group}", style="bold"))
        done += [first, *others]
        for line in _collapsed(first, others) if others else _lines(first, name_width):
            console.print(line)
    console.print(_summary(done))
    return done


def _print_plain(result: Result, name_width: int) -> Result:
    remedy = f" → {result.remedy}" if result.remedy else ""
    begin = f"{result.status:{_STATUS_WIDTH}}  {result.name:{name_width}}"
    print(f"{begin}  {result.message}{remedy}", flush=True)
    return result


def _likeness(result: Result) -> tuple[str, ...]:
    """A key that is equal for neighbours with the same reason to be skipped."""
    own = result.message if result.status == "skipped" else result.name
    return result.group, result.status, own


def _lines(result: Result, name_width: int) -> list[Text]:
    """A result on a terminal, with long texts wrapped into their column."""
    indent = len(_INDENT) + _STATUS_WIDTH + 2 + name_width + 2
    style = _STYLES[result.status]
    first, *others = _wrapped(result.message, indent)
    words = Text(first, style="dim" if result.status == "skipped" else "")
    lines = [_begin(result) + f"{result.name:{name_width}}  " + words]
    lines += [Text(" " * indent + line) for line in others]
    for number, line in enumerate(_wrapped(result.remedy, indent + 2)):
        lines.append(Text(" " * indent) + Text(("  " if number else "→ ") + line, style=style))
    return lines


def _collapsed(first: Result, others: list[Result]) -> list[Text]:
    indent = len(_INDENT) + _STATUS_WIDTH + 2
    names = ", ".join(result.name for result in (first, *others))
    begin, *rest = _wrapped(f"{names}: {first.message}", indent)
    return [
        _begin(first) + Text(begin, style="dim"),
        *(Text(" " * indent + line, style="dim") for line in rest),
    ]


def _begin(result: Result) -> Text:
    return Text(_INDENT) + Text(f"{result.status:{_STATUS_WIDTH}}  ", style=_STYLES[result.status])


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(_TEXT_WIDTH_MIN, shutil.get_terminal_size().columns - indent)
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _summary(results: list[Result]) -> Text:
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {status}" for status in _STYLES if counts[status]]
    parts = [counted(counts[part], part) if part == "warning" else part for part in parts]
    return Text(f"\n{', '.join(parts)}")
