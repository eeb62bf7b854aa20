"""Attribution of counters: a `Usage` per process, an `Activity` per checkpoint, an `Activities` per
daemon. ``_model.counters`` has the counters themselves.

**Attribution.** Each open handle has the `Usage` of the process that opened it, so a read finds its
counters with its handle. Counting a read costs some 300 ns: an addition, an entry of a histogram,
and two looks at the clock. Reads of a process that inherits a handle count for the process that
opened it. The daemon does not see reads that the kernel serves from its page cache or by itself
(passthrough). It counts the opens of the latter, and nothing of the former.

**Exact and bounded.** A checkpoint has at most `PROCESSES_MAX` processes of its own, and all
checkpoints together have at most `_RECORDS_MAX`. If there are more, the counters of a process with
no open file are merged into `others`. If every process has open files, a new process counts in
`others` from the start. So the sum over all usages is always that of the checkpoint. Likewise for
the node: at the end of a checkpoint its counters are merged into `Activities.ended`.

All of it belongs to the event loop, and starts at zero with each daemon.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptfs._daemon.usage import procfs
from ckptfs._model.counters import Counts, total
from ckptfs.errors import CkptfsError

PROCESSES_MAX = 64
"""Processes of one checkpoint with counters of their own: the ranks of a node and their loaders."""
_RECORDS_MAX = 4096
"""The same for all checkpoints together. Each record takes 1.5 kB."""
NAMED_MAX = 100
"""Checkpoints with a label of their own among the metrics. The others share one."""
_SAMPLES = 11


class Sample(NamedTuple):
    """Counters at one moment, or their increase per second."""

    at_s: float
    reads: float
    read_bytes: float
    fetched_bytes: float


class Usage(Counts, kw_only=True):
    """The counters of one process for one checkpoint, or of several processes.

    Attributes:
        pid: The process; 0 for several processes and for prefetches.
        started: When the process began, see `procfs.started`.
        command: The command that it runs.
        owner: Its user, see `procfs.owner`.
        merged_into: The counters that these were merged into, if they were.
    """

    pid: int = 0
    started: int = 0
    command: str = ""
    owner: int = -1
    merged_into: Counts | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended. False if proc(5) did not show it when it began."""
        return self.started != 0 and procfs.started(self.pid) != self.started


def current(counts: Counts) -> Counts:
    """The counters that count now for `counts`, which may have been merged into others."""
    while isinstance(counts, Usage) and counts.merged_into is not None:
        counts = counts.merged_into
    return counts


def count_failed_read(counts: Counts, error: Exception) -> None:
    """Count a failed read."""
    code = error.code if isinstance(error, CkptfsError) else "stale"
    counts.errors[code] = counts.errors.get(code, 0) + 1


class Activity:
    """The counters of one checkpoint.

    Attributes:
        others: Counters of processes that have none of their own.
        background: Counters of work that no single read has asked for: prefetches, the daemon's own
            reads, retries, and the exchange of blocks with other nodes.
        in_flight: Requests for data that are under way or wait.
        queued: Requests for data that wait for a connection.
        is_named: Whether it has a label of its own among the metrics, as long as it is attached.
    """

    def __init__(self) -> None:
        self.others = Usage(command="(others)")
        self.background = Usage(command="(prefetch)")
        self.in_flight = self.queued = 0
        self._by_pid: dict[int, Usage] = {}
        self._all = Activities()
        self._is_begun = False
        self.is_named = False
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)

    def sample(self, now_s: float) -> None:
        """Take a sample for `rates`. The daemon calls it about once a second."""
        reads = read_bytes = fetched_bytes = 0
        for usage in self.usages():
            reads += usage.reads
            read_bytes += usage.read_bytes
            fetched_bytes += usage.fetched_bytes
        self._samples.append(Sample(now_s, reads, read_bytes, fetched_bytes))

    def rates(self) -> Sample:
        """Increase of each counter per second, over the last ten seconds or so."""
        if len(self._samples) < 2:
            return Sample(0.0, 0, 0, 0)
        first, last = self._samples[0], self._samples[-1]
        seconds = last.at_s - first.at_s or 1.0
        return Sample(
            at_s=seconds,
            reads=(last.reads - first.reads) / seconds,
            read_bytes=(last.read_bytes - first.read_bytes) / seconds,
            fetched_bytes=(last.fetched_bytes - first.fetched_bytes) / seconds,
        )

    def usages(self) -> Iterator[Usage]:
        """The counters of each process, then `others` and `background`."""
        yield from self._by_pid.values()
        yield self.others
        yield self.background

    def total(self) -> Counts:
        """The sum of all usages."""
        return total(self.usages())

    def begin(self, activities: "Activities") -> None:
        """Take in that the checkpoint was attached."""
        self._all = activities
        self._is_begun = True
        self.is_named = sum(a.is_named for a in activities.begun) < NAMED_MAX
        activities.begun.append(self)

    def end(self) -> None:
        """Take in that the checkpoint was detached. The node keeps its counters."""
        if not self._is_begun:
            return
        self._is_begun = False
        self._all.begun.remove(self)
        counts = self.total()
        counts.open_files = counts.waiting = 0
        self._all.ended.add(counts)
        if not self.is_named:
            self._all.ended_unnamed.add(counts)
        self._all.records -= len(self._by_pid)
        for usage in self.usages():
            usage.merged_into = self._all.ended  # requests of these may still be under way

    def opened(self, pid: int) -> Usage:
        """The counters for reads of a file that the process opens now. The caller counts the end
        in `open_files`."""
        usage = self.usage_of(pid)
        usage.open_files += 1
        usage.opens += 1
        return usage

    def commands(self) -> dict[int, str]:
        """The commands of the processes that have counters of their own."""
        return {pid: usage.command for pid, usage in self._by_pid.items()}

    def of(self, pid: int) -> Usage | None:
        """The counters of that process alone."""
        return self._by_pid.get(pid)

    def fetched(self, usage: Usage, length: int) -> None:
        """Count a finished request for data, which `usage` was the first to need."""
        counts = current(usage)
        counts.fetches += 1
        counts.fetched_bytes += length

    @contextmanager
    def queueing(self) -> Generator[None]:
        """A request for data waits for a connection in this context."""
        self.queued += 1
        try:
            yield
        finally:
            self.queued -= 1

    def failed(self, error: CkptfsError) -> None:
        """Count a failed attempt to fetch or to check a version."""
        failures = current(self.background).failures
        failures[error.code] = failures.get(error.code, 0) + 1

    def usage_of(self, pid: int) -> Usage:
        """The counters of a process that opens the checkpoint or a file of it: its own, or
        `others`."""
        known = self._by_pid.get(pid)
        if known is not None and (known.open_files or known.waiting):
            return known
        started = procfs.started(pid)
        if known is not None:
            if known.started == started:
                return known
            self._merge(known)
        if not self._may_add():
            return self.others
        known = self._by_pid[pid] = Usage(
            pid=pid, started=started, command=procfs.name(pid), owner=procfs.owner(pid)
        )
        self._all.on_new(known)
        self._all.records += 1
        return known

    def _may_add(self) -> bool:
        """Whether one more process may have counters of its own, after merging an idle one if
        necessary."""
        if len(self._by_pid) < PROCESSES_MAX and self._all.records < _RECORDS_MAX:
            return True
        idle = next((u for u in self._by_pid.values() if not u.open_files and not u.waiting), None)
        if idle is not None:
            self._merge(idle)
        return idle is not None

    def _merge(self, usage: Usage) -> None:
        del self._by_pid[usage.pid]
        self.others.add(usage)
        usage.merged_into = self.others  # its requests may still be under way
        self._all.records -= 1


class Activities:
    """The counters of all checkpoints.

    Args:
        on_new: Called with the counters of each new process, to look up more about it.

    Attributes:
        begun: Those of attached checkpoints, in the order of their attaching.
        ended: Counters of detached checkpoints.
        ended_unnamed: Counters of those that had no label of their own.
        records: Number of processes with counters of their own.
    """

    def __init__(self, on_new: Callable[[Usage], None] = lambda usage: None) -> None:
        self.on_new = on_new
        self.begun: list[Activity] = []
        self.ended = Counts()
        self.ended_unnamed = Counts()
        self.records = 0

    def sample(self, now_s: float) -> None:
        """Take a sample of each attached checkpoint."""
        for activity in self.begun:
            activity.sample(now_s)

    def total(self) -> Counts:
        """The sum of everything since the daemon began."""
        return total([self.ended, *(usage for a in self.begun for usage in a.usages())])
