"""The case that shows how much one daemon could serve with enough cores.

Two things of a daemon cannot be divided among cores: a thread, and the lock of an interpreter. The
one that takes most time per GiB is the ceiling.
"""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmark import gil, processes
from benchmark.contenders import Ready, ckptfs_node
from benchmark.results import amount
from benchmark.run import FAILURES, working
from benchmark.warm import drop_mounted, filled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from benchmark.node import Node
    from benchmark.run import Run
    from benchmark.stores import Store

GIB, GB = 1 << 30, 1e9
READERS = (1, 8)
ROUNDS = 3
FETCH_PROCESSES = 4
COLD_HTTPS, COLD_HTTP, WARM = "cold, HTTPS", "cold, HTTP", "warm"
SPREAD = f"{FETCH_PROCESSES} fetch processes"
SPREAD_HTTPS, SPREAD_HTTP = f"{COLD_HTTPS}, {SPREAD}", f"{COLD_HTTP}, {SPREAD}"
GOALS_GB_PER_S = {SPREAD_HTTPS: 6, COLD_HTTP: 10, WARM: 15}
LOCK_ABSENT = "the interpreter's lock in ceiling"

Series = dict[str, list[float]]


def gb_per_s(thread_s_per_gib: float, lock_s_per_gib: float) -> float:
    """The ceiling, of the CPU seconds of the busiest thread and the seconds of the lock."""
    return GIB / GB / max(thread_s_per_gib, lock_s_per_gib)


def ceiling(run: Run) -> None:
    """CPU of the busiest thread and time of the interpreter's lock, and the ceiling from both."""
    case = "ceiling"
    if why := gil.why_missing():
        run.report.absent[LOCK_ABSENT] = why
    threads: Series = {}
    locks: Series = {}
    by_process: Series = {}
    ways: dict[str, Callable[[], AbstractContextManager[Ready]]] = {}
    if run.tls:
        tls = run.tls
        ways[COLD_HTTPS] = lambda: _cold(run, tls, 0)
        ways[SPREAD_HTTPS] = lambda: _cold(run, tls, FETCH_PROCESSES)
    ways[COLD_HTTP] = lambda: _cold(run, run.store, 0)
    ways[SPREAD_HTTP] = lambda: _cold(run, run.store, FETCH_PROCESSES)
    for way, make in ways.items():
        for readers in READERS:
            name = name_of(way, readers)
            for _ in range(min(run.rounds, ROUNDS)):
                with make() as ready:
                    threads.setdefault(name, []).append(_busiest(run, ready, readers))
            with make() as ready:
                _note_lock(run, ready, readers, name, locks, by_process)
    with filled(run, plain=True) as ready:
        for readers in READERS:
            name = name_of(WARM, readers)
            for _ in range(min(run.rounds, ROUNDS)):
                drop_mounted(ready)
                threads.setdefault(name, []).append(_busiest(run, ready, readers))
            drop_mounted(ready)
            _note_lock(run, ready, readers, name, locks, by_process)

    run.add_panel(case, "CPU of the busiest thread per GiB", threads)
    run.add_panel(case, "interpreter's lock held per GiB, the process that holds it most", locks)
    run.add_panel(case, "interpreter's lock held per GiB, each process", by_process)
    ceilings = ceilings_of(threads, locks)
    run.add_panel(case, "most that one daemon could serve", ceilings, "GB/s")
    for way, bound in GOALS_GB_PER_S.items():
        for readers in READERS:
            name = name_of(way, readers)
            goal = amount(case, f"one daemon, {name}", "GB/s", ceilings.get(name), at_least=bound)
            run.report.goals.append(goal)


def ceilings_of(threads: Series, locks: Series) -> Series:
    """The ceiling of each round, in GB/s; without a figure for the lock by the thread alone."""
    return {
        name: [
            gb_per_s(thread_s, statistics.median(locks[name]) if locks.get(name) else 0.0)
            for thread_s in values
            if thread_s > 0
        ]
        for name, values in threads.items()
    }


def name_of(way: str, readers: int) -> str:
    return f"{way}, {readers} reader{'s' if readers > 1 else ''}"


@contextmanager
def _cold(run: Run, store: Store, fetch_processes: int) -> Iterator[Ready]:
    """A node that jobs read the large file through, with an empty cache."""
    with ckptfs_node(store, run.temp, fetch_processes=fetch_processes) as ready:
        yield Ready(ready.job | {"name": "large"}, ready.environment, ready.node)


def _busiest(run: Run, ready: Ready, readers: int) -> float:
    """CPU seconds per GiB of the daemon's busiest thread, while `readers` read the large file."""
    keeper = _node(ready).keeper_pid()
    found: list[float] = []

    @contextmanager
    def watch() -> Iterator[None]:
        before = processes.thread_cpu_s(keeper)
        yield
        found.append(processes.busiest_s(before, processes.thread_cpu_s(keeper)))

    _read(run, ready, readers, watch())
    return found[0] / (run.objects.large_bytes / GIB)


def _note_lock(
    run: Run, ready: Ready, readers: int, name: str, locks: Series, by_process: Series
) -> None:
    """Add the seconds per GiB for which the daemon's processes hold their locks; of several
    workers the one that holds it most."""
    if LOCK_ABSENT in run.report.absent:
        return
    node, held = _node(ready), gil.Held()
    try:
        _read(run, ready, readers, gil.sampling(node.keeper_pid(), run.temp, held))
    except FAILURES as error:
        run.report.absent[LOCK_ABSENT] = " ".join(str(error).split())
        return
    roles = node.roles()
    size_gib = run.objects.large_bytes / GIB
    by_role: dict[str, float] = {}
    for pid, seconds in held.by_pid.items():
        role = roles.get(pid, "other")
        by_role[role] = max(by_role.get(role, 0.0), seconds / size_gib)
    locks[name] = [max(by_role.values(), default=0.0)]
    by_process.update({f"{name}: {role}": [each] for role, each in sorted(by_role.items())})


def _read(run: Run, ready: Ready, readers: int, watched: AbstractContextManager[None]) -> None:
    """Have processes read the large file, each a part of it, and watch from start to end."""
    job = {"file": "data.bin", "task": "parts", "processes": readers}
    with working(ready, job) as worker:
        _node(ready).wait_idle()
        with watched:
            worker.go(run.objects.large_check)


def _node(ready: Ready) -> Node:
    assert ready.node
    return ready.node
