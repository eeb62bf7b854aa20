"""CPU time and memory of processes and threads, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.serverbase import children

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
UTIME, CUTIME = 11, 13
"""Places in a stat line behind the name, each with the system's time after the user's."""


class Thread(NamedTuple):
    """One thread of a process; a process may reuse neither while it is measured."""

    pid: int
    tid: int


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
    found: dict[Thread, float] = {}
    for each in tree(pid):
        with suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                with suppress(OSError):
                    stat = (task / "stat").read_text()
                    found[Thread(each, int(task.name))] = own_cpu_s(stat)
    return found


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
