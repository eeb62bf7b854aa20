"""The outcome of a run, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from chaostest.verdict import Breach

if TYPE_CHECKING:
    from rich.console import Console

MB = 1e6


@dataclass
class Outcome:
    """The outcome of a run. Times are in seconds, and sizes in bytes.

    Attributes:
        actions: Number of times that each action was done.
        sequence: The order of the actions, by lane.
        requests_met: Number of requests that have met each fault of the store.
        errors_allowed: Number of allowed errors, by "operation: error".
        longest_s: Longest time of each operation.
        undisturbed_s: Longest time of all operations without a fault, if above a second.
        uploads: Number of uploads that have begun, that were complete, read back and wrong, and of
            their tries that were killed and that have failed.
        kills: Number of kills during uploads in the background, by the killed process.
        samples: Memory, descriptors and threads, by process ("daemon", "keeper") and moment
            ("first" and "last" at rest, "most").
        cache_cannot: Failed operations of the cache in the log, by verb.
        disk_failed: Number of failed operations of the disk, by kind.
        left_out: Actions that this machine or a short run cannot have.
    """

    seed: int
    settings: dict[str, Any]
    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter[str])
    sequence: dict[str, list[str]] = field(default_factory=dict[str, "list[str]"])
    requests_met: dict[str, int] = field(default_factory=dict[str, int])
    operations: Counter[str] = field(default_factory=Counter[str])
    bytes_verified: int = 0
    errors_allowed: Counter[str] = field(default_factory=Counter[str])
    longest_s: dict[str, float] = field(default_factory=dict[str, float])
    undisturbed_s: float = 0.0
    daemons: int = 0
    uploads: Counter[str] = field(default_factory=Counter[str])
    kills: Counter[str] = field(default_factory=Counter[str])
    samples: dict[str, dict[str, list[int]]] = field(default_factory=dict[str, Any])
    breaches: list[Breach] = field(default_factory=list[Breach])
    cache_cannot: Counter[str] = field(default_factory=Counter[str])
    disk_failed: dict[str, int] = field(default_factory=dict[str, int])
    left_out: list[str] = field(default_factory=list[str])


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
    if outcome.uploads:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(outcome.uploads.items()))
        console.print(f"uploads, and their tries: {counts}")
    if outcome.kills:
        counts = ", ".join(f"{count} × {what}" for what, count in sorted(outcome.kills.items()))
        console.print(f"{outcome.kills.total()} kills during uploads in the background: {counts}")
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
