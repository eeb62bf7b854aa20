"""The results of a run as plain data, which the JSON file has."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

REFERENCE = Path(__file__).parents[2] / "tests" / "bench" / "reference.json"


class Panel(msgspec.Struct, kw_only=True):
    """One thing measured of several contenders.

    Attributes:
        case: The case that it belongs to.
        title: What was measured.
        unit: Of all figures, e.g. "s" or "GB/s".
        series: By contender all single figures, in the order of the rounds. The first contender is
            the one that the others are shown in ratio to.
    """

    case: str
    title: str
    unit: str
    series: dict[str, list[float]]


class Goal(msgspec.Struct, kw_only=True):
    """A goal, and the measured value.

    Attributes:
        case: Its case.
        text: Its description.
        at_least: Whether `bound` is a lower bound.
        unit: Unit of the figures; "×" for a ratio.
        value: The measured value, of medians; None without one.
        low, high: The least and the most of the single rounds.
        reason: The reason for a missing value.
    """

    case: str
    text: str
    bound: float
    at_least: bool
    unit: str
    value: float | None = None
    low: float = 0.0
    high: float = 0.0
    reason: str = ""

    @property
    def is_reached(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Report(msgspec.Struct, kw_only=True):
    """A whole run.

    Attributes:
        date: When it began (UTC, ISO 8601).
        commit: Of git; with "+" if files were changed.
        quick: Whether it was a short run with small objects.
        host: Machine, kernel, CPUs, memory.
        versions: Of all that took part.
        absent: By contender, or "contender in case", why it is missing.
        notes: By case, what has to be known to read its figures.
    """

    date: str
    commit: str
    quick: bool
    host: dict[str, str]
    versions: dict[str, str]
    absent: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    panels: list[Panel] = []
    goals: list[Goal] = []

    def note(self, case: str, text: str) -> None:
        notes = self.notes.setdefault(case, [])
        if text not in notes:
            notes.append(text)


def ratio(
    case: str,
    text: str,
    over: list[float] | None,
    under: list[float] | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Goal:
    """A goal for the ratio of two series whose figures were taken in turns."""
    values = None
    if over and under:
        values = [a / b for a, b in zip(over, under, strict=False)]
    goal = amount(case, text, "×", values, at_least=at_least, at_most=at_most)
    if over and under:
        goal.value = statistics.median(over) / statistics.median(under)
    return goal


def amount(
    case: str,
    text: str,
    unit: str,
    values: list[float] | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Goal:
    """A goal for a series of figures. Exactly one bound must be given."""
    bound = at_most if at_least is None else at_least
    assert bound is not None
    goal = Goal(case=case, text=text, bound=bound, at_least=at_least is not None, unit=unit)
    if values:
        goal.value, goal.low, goal.high = statistics.median(values), min(values), max(values)
    else:
        goal.reason = "not measured"
    return goal


def best(taken: dict[str, list[float]], *names: str) -> list[float] | None:
    """The series with the least median of these."""
    found = [taken[name] for name in names if taken.get(name)]
    return min(found, key=statistics.median) if found else None


def read(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
