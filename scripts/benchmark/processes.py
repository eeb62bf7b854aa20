"""CPU time and memory of processes and threads, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from support.serverbase import children

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
UTIME, CUTIME = 11, 13
"""Places in a stat line behind the name, each with the system's time after the user's."""


class Thread(NamedTuple):
    """One thread of a process, by the kernel's numbers."""

    pid: int
    tid: int


class Schedule(NamedTuple):
    """The seconds for which a thread ran, and waited for a CPU."""

    ran_s: float
    waited_s: float


def fields_of(stat: str) -> list[str]:
    """The fields of a line of /proc/PID/stat behind the name, which may hold blanks and ")"."""
    return stat.rpartition(")")[2].split()


def own_cpu_s(stat: str) -> float:
    """CPU seconds of the process or thread itself."""
    return sum(map(int, fields_of(stat)[UTIME : UTIME + 2])) / TICKS_PER_S


def cpu_with_ended_s(stat: str) -> float:
    """CPU seconds of the process and of its children that have ended."""
    return own_cpu_s(stat) + sum(map(int, fields_of(stat)[CUTIME : CUTIME + 2])) / TICKS_PER_S


def parent_of(pid: int) -> int:
    return int(fields_of(Path(f"/proc/{pid}/stat").read_text())[1])


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    return [pid, *children(pid)]


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants, ended ones included."""
    total_s = 0.0
    for each in tree(pid):
        with suppress(OSError):  # it has just ended
            total_s += cpu_with_ended_s(Path(f"/proc/{each}/stat").read_text())
    return total_s


def thread_cpu_s(pid: int) -> dict[Thread, float]:
    """CPU seconds of each thread of a process and its descendants."""
    return _of_threads(pid, "stat", own_cpu_s)


def schedule_of(schedstat: str) -> Schedule:
    """The seconds in the file schedstat of a thread."""
    ran_ns, waited_ns, _ = schedstat.split()
    return Schedule(int(ran_ns) / 1e9, int(waited_ns) / 1e9)


def thread_schedules(pid: int) -> dict[Thread, Schedule]:
    """For each thread of a process and its descendants, how long it has run and waited."""
    return _of_threads(pid, "schedstat", schedule_of)


def _of_threads(pid: int, file: str, parse: Callable[[str], T]) -> dict[Thread, T]:
    """The parsed file of each thread of a process and its descendants."""
    found: dict[Thread, T] = {}
    for each in tree(pid):
        with suppress(OSError):  # the process, or a thread below, has just ended
            for task in Path(f"/proc/{each}/task").iterdir():
                with suppress(OSError):
                    found[Thread(each, int(task.name))] = parse((task / file).read_text())
    return found


def schedule_between(
    before: dict[Thread, Schedule], after: dict[Thread, Schedule], thread: Thread
) -> Schedule:
    """How long a thread ran and waited between two looks. It is 0 for a thread that has ended."""
    old, new = before.get(thread, Schedule(0.0, 0.0)), after.get(thread)
    return Schedule(new.ran_s - old.ran_s, new.waited_s - old.waited_s) if new else Schedule(0, 0)


def busiest_s(before: dict[Thread, float], after: dict[Thread, float]) -> float:
    """The most CPU seconds that one thread took between two looks; a new one began at 0."""
    return max((took - before.get(thread, 0.0) for thread, took in after.items()), default=0.0)


def memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants now. A page that several share counts once (PSS)."""
    return sum(_kib(each, "smaps_rollup", "Pss") << 10 for each in tree(pid))


def peak_bytes(pid: int) -> int:
    """The most memory of a process and its descendants.

    It is an upper bound: the peaks of the processes add up, whenever they were, and a page that
    several share counts for each.
    """
    return sum(_kib(each, "status", "VmHWM") << 10 for each in tree(pid))


def _kib(pid: int, file: str, name: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0])
    return 0
