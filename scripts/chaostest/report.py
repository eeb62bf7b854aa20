"""What a run has come to, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from chaostest.run import Outcome

MB = 1e6


def show(outcome: Outcome, console: Console) -> None:
    """Print all figures."""
    done = sum(outcome.operations.values())
    console.print(
        f"[bold]chaos[/]: seed {outcome.seed}, {outcome.seconds:.0f} s, {done} operations, "
        f"{outcome.bytes_verified / MB:.0f} MB verified, {outcome.daemons} daemons"
    )
    console.print("settings: " + ", ".join(f"{k}={v}" for k, v in outcome.settings.items()))
    table = Table(box=None, title="what went wrong", title_justify="left")
    for column in ("action", "times", "requests met"):
        table.add_column(column, justify="left" if column == "action" else "right")
    for name, times in sorted(outcome.actions.items()):
        table.add_row(name, str(times), str(outcome.requests_met.get(name, "")))
    console.print(table)
    table = Table(box=None, title="what was done", title_justify="left")
    for column in ("operation", "times", "longest s", "errors that may be"):
        table.add_column(column, justify="right" if column in ("times", "longest s") else "left")
    for name, times in sorted(outcome.operations.items()):
        errors = [
            f"{key.partition(': ')[2]} {count}"
            for key, count in sorted(outcome.errors_allowed.items())
            if key.partition(": ")[0] == name
        ]
        longest_s = f"{outcome.longest_s.get(name, 0.0):.2f}"
        table.add_row(name, str(times), longest_s, ", ".join(errors))
    console.print(table)
    if outcome.undisturbed_s:
        console.print(f"longest while nothing was wrong: {outcome.undisturbed_s:.2f} s")
    table = Table(box=None, title="what it took", title_justify="left")
    for column in ("", "", "first", "most", "last"):
        table.add_column(column, justify="right" if column else "left")
    for name, samples in outcome.samples.items():
        for index, what in enumerate(("memory, MB", "descriptors", "threads")):
            values = [samples.get(label, [0, 0, 0])[index] for label in ("first", "most", "last")]
            shown = [f"{value / MB:.0f}" if not index else str(value) for value in values]
            table.add_row(name, what, *shown)
    console.print(table)
    if outcome.cache_cannot:
        said = ", ".join(f"{verb} {times}" for verb, times in outcome.cache_cannot.most_common())
        console.print(f"the log, one line a minute for each verb: the cache cannot {said}")
    if outcome.disk_failed:
        failed = ", ".join(f"{kind} {times}" for kind, times in outcome.disk_failed.items())
        console.print(f"operations of the disk that failed: {failed}")
    if outcome.left_out:
        console.print(f"[yellow]left out here: {', '.join(outcome.left_out)}[/]")
    kinds = Counter(breach.kind for breach in outcome.breaches)
    if kinds:
        shown = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        console.print(f"[red]BREACHES: {shown}[/]")
        for breach in outcome.breaches[:20]:
            console.print(f"  {breach.kind}: {breach.text}", markup=False)
    else:
        console.print("[green]nothing that SEMANTICS.md rules out[/]")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All figures."""
    return vars(outcome) | {"breaches": [asdict(breach) for breach in outcome.breaches]}
