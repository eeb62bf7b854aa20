"""How a report is shown: on the terminal, and as tables in RESULTS.md and the README."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from benchmark.results import Goal, Panel, Report

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- made by scripts/bench --tables -->\n", "<!-- end -->\n"
COMPARED = (
    ("sequential", "load", "capped", "tensor", "small"),
    ("sequential-tls", "load-tls", "capped-tls", "tensor-tls", "small-tls", "link"),
)
"""The cases of the first tables of RESULTS.md: over HTTP, and over HTTPS or a slow link."""
CEILING = "ceiling"
HEADLINES = ("tensor", "capped", "sequential")
"""The cases of the README's table, a row each."""
RIVALS = ("ckptfs", "rclone mount, full", "s3fs", "Ray's way")
"""The columns of the README's table."""


def show_case(report: Report, case: str, console: Console) -> None:
    """All figures, goals and notes of one case."""
    for panel in report.panels:
        if panel.case == case:
            console.print(f"[bold]{panel.case}[/]: {panel.title} ({panel.unit})")
            console.print(_panel_table(panel))
    table = Table(box=None, pad_edge=False, show_header=False)
    for goal in report.goals:
        if goal.case == case:
            color = "green" if goal.is_reached else "red"
            table.add_row(
                "  ", goal.text, value_of(goal), bound_of(goal), f"[{color}]{verdict(goal)}"
            )
    console.print(table)
    for note in report.notes.get(case, []):
        console.print(f"   note: {note}")
    console.print()


def _panel_table(panel: Panel) -> Table:
    table = Table(box=None)
    for column in ("", "median", "min", "max", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    base = None
    for name, values in panel.series.items():
        if values:
            middle = statistics.median(values)
            base = base or middle
            shown = [number(value) for value in (middle, min(values), max(values))]
            table.add_row(name, *shown, f"{middle / base:.2f}")
    return table


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def value_of(goal: Goal) -> str:
    if goal.value is None:
        return goal.reason
    unit = goal.unit if goal.unit == "×" else f" {goal.unit}"
    spread = f" ({number(goal.low)}–{number(goal.high)})" if goal.low != goal.high else ""
    return f"{number(goal.value)}{unit}{spread}"


def bound_of(goal: Goal) -> str:
    unit = goal.unit if goal.unit == "×" else f" {goal.unit}"
    return f"{'≥' if goal.at_least else '≤'} {goal.bound:g}{unit}"


def verdict(goal: Goal) -> str:
    if goal.value is None:
        return "not measured"
    return "reached" if goal.is_reached else "not reached"


def markdown(report: Report) -> str:
    """The tables of RESULTS.md."""
    lines = [line for cases in COMPARED for line in _comparison(report, cases)]
    lines += _series_table(report, CEILING)
    lines += ["| | goal | measured (single rounds) | |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| `{goal.case}`: {goal.text} | {bound_of(goal)} | {value_of(goal)} | {verdict(goal)} |"
        for goal in report.goals
    ]
    lines += [f"\nAbsent: {name} ({why})." for name, why in report.absent.items()]
    host = "{cpus} CPUs ({cpu}), Linux {kernel}, {filesystem}".format_map(report.host)
    length = ", a quick run" if report.quick else ""
    lines += ["", f"Measured on {report.date[:10]} at {report.commit[:12]}{length}: {host}."]
    return "\n".join(lines) + "\n"


def _comparison(report: Report, cases: tuple[str, ...]) -> list[str]:
    """A table of the contenders in some cases. It ends with an empty line."""
    panels = {panel.case: panel for panel in report.panels if panel.case in cases}
    shown = [panels[case] for case in cases if case in panels]
    if not shown:
        return []
    lines = ["| median seconds | " + " | ".join(panel.title for panel in shown) + " |"]
    lines.append("| --- " + "| ---: " * len(shown) + "|")
    for name in dict.fromkeys(name for panel in shown for name in panel.series):
        cells = [panel.series.get(name) for panel in shown]
        medians = [number(statistics.median(values)) if values else "" for values in cells]
        lines.append(f"| {name} | " + " | ".join(medians) + " |")
    return [*lines, ""]


def _series_table(report: Report, case: str) -> list[str]:
    """A table of all series of one case, a column for each panel with the same names."""
    panels = [panel for panel in report.panels if panel.case == case and panel.series]
    if not panels:
        return []
    names = list(panels[0].series)
    shown = [panel for panel in panels if set(panel.series) <= set(names)]
    titles = (f"{panel.title} ({panel.unit})" for panel in shown)
    lines = [f"| `{case}` | " + " | ".join(titles) + " |", "| --- " + "| ---: " * len(shown) + "|"]
    for name in names:
        cells = [panel.series.get(name) for panel in shown]
        medians = [number(statistics.median(values)) if values else "" for values in cells]
        lines.append(f"| {name} | " + " | ".join(medians) + " |")
    return [*lines, ""]


def headlines(report: Report) -> str:
    """The README's table."""
    lines = ["| median seconds | " + " | ".join(RIVALS) + " |", "| --- " + "| ---: " * len(RIVALS)]
    lines[1] += "|"
    panels = {panel.case: panel for panel in report.panels}
    for panel in (panels[case] for case in HEADLINES if case in panels):
        medians = [panel.series.get(name) for name in RIVALS]
        shown = [number(statistics.median(values)) if values else "" for values in medians]
        lines.append(f"| {panel.title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def update_pages(report: Report) -> None:
    """Put the tables into RESULTS.md and the README, between their marks."""
    for page, tables in ((RESULTS, markdown(report)), (README, headlines(report))):
        before, begin, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise RuntimeError(f"{page} has no marks for the tables: {BEGIN!r}, {END!r}")
        page.write_text(f"{before}{BEGIN}{tables}{END}{after}")
