"""The case that shows how much one daemon could serve with enough cores.

Two things of a daemon cannot be divided among cores: a thread, and the lock of an interpreter. The
one that takes most time per GiB is the ceiling.

The daemon has the settings of a node with `CORES` cores. Before the large file it reads the model,
because processes that fetch start under a sustained load, and the first bytes come without them.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmark import gil, processes
from benchmark.contenders import Ready, ckptfs_node
from benchmark.results import amount
from benchmark.run import FAILURES, working
from benchmark.warm import drop_mounted, filled
from ckptfs._daemon.fuse.reply_threads import threads_for
from ckptfs._workers.spread import processes_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from benchmark.node import Node
    from benchmark.run import Run
    from benchmark.stores import Store

GIB, GB = 1 << 30, 1e9
READERS = (1, 8)
ROUNDS = 3
CORES = 16
COLD_HTTPS, COLD_HTTP, WARM = "cold, HTTPS", "cold, HTTP", "warm"
GOALS_GB_PER_S = {COLD_HTTPS: 6, COLD_HTTP: 10, WARM: 15}
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

    def measure(name: str, reading: Callable[[], AbstractContextManager[_Reading]]) -> None:
        with reading() as read:
            _note_lock(read, name, locks, by_process)
        for _ in range(min(run.rounds, ROUNDS)):
            with reading() as read:
                threads.setdefault(name, []).append(_busiest(read))

    for way, store in {COLD_HTTPS: run.tls, COLD_HTTP: run.store}.items():
        for readers in READERS if store else ():
            measure(name_of(way, readers), partial(_cold, run, store, readers))
    with filled(run, passthrough=False, **settings_of_a_large_node()) as ready:
        for readers in READERS:
            measure(name_of(WARM, readers), partial(_warm, run, ready, readers))

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


def settings_of_a_large_node() -> dict[str, int]:
    return {
        "fetch_processes": processes_for("auto", CORES),
        "reply_threads": threads_for("auto", CORES),
    }


@dataclass(frozen=True)
class _Reading:
    """The reads of `readers` processes from one node; the model comes first if `reads_model`."""

    run: Run
    ready: Ready
    readers: int
    reads_model: bool

    @property
    def node(self) -> Node:
        assert self.ready.node
        return self.ready.node

    def watched(self, watch: Callable[[], AbstractContextManager[None]]) -> float:
        """Read all of it, with `watch` around the reads. Returns the GiB."""
        objects = self.run.objects
        # The place of a node that is filled has a name of its own.
        jobs = [{"name": "large", "files": ["data.bin"]} | self.ready.job]
        if self.reads_model:
            jobs.insert(0, {"name": "model", "files": objects.shards()})
        task = {"task": "parts", "processes": self.readers}
        with ExitStack() as stack:
            *before, last = [stack.enter_context(working(self.ready, job | task)) for job in jobs]
            self.node.wait_idle()
            with watch():
                for worker in before:
                    worker.go()
                last.go(objects.large_check)
        size = len(jobs) * objects.large_bytes  # the model has as many
        return size / GIB


@contextmanager
def _cold(run: Run, store: Store, readers: int) -> Iterator[_Reading]:
    """The reads from a node with an empty cache."""
    with ckptfs_node(store, run.temp, **settings_of_a_large_node()) as ready:
        yield _Reading(run, ready, readers, reads_model=True)


@contextmanager
def _warm(run: Run, ready: Ready, readers: int) -> Iterator[_Reading]:
    """The reads from a node that has all of it, but not in the kernel's cache of the mount."""
    drop_mounted(ready)
    yield _Reading(run, ready, readers, reads_model=False)


def _busiest(read: _Reading) -> float:
    """CPU seconds per GiB of the daemon's busiest thread."""
    keeper = read.node.keeper_pid()
    found: list[float] = []

    @contextmanager
    def watch() -> Iterator[None]:
        before = processes.thread_cpu_s(keeper)
        yield
        found.append(processes.busiest_s(before, processes.thread_cpu_s(keeper)))

    size_gib = read.watched(watch)
    return found[0] / size_gib


def _note_lock(read: _Reading, name: str, locks: Series, by_process: Series) -> None:
    """Add the seconds per GiB for which the daemon's processes hold their locks; of several
    workers the one that holds it most."""
    report = read.run.report
    if LOCK_ABSENT in report.absent:
        return
    held = gil.Held()
    try:
        size_gib = read.watched(lambda: gil.sampling(read.node.keeper_pid(), read.run.temp, held))
    except FAILURES as error:
        report.absent[LOCK_ABSENT] = " ".join(str(error).split())
        return
    roles = read.node.roles()
    by_role: dict[str, float] = {}
    for pid, seconds in held.by_pid.items():
        role = roles.get(pid, "other")
        by_role[role] = max(by_role.get(role, 0.0), seconds / size_gib)
    locks[name] = [max(by_role.values(), default=0.0)]
    by_process.update({f"{name}: {role}": [each] for role, each in sorted(by_role.items())})
