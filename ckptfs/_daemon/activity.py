"""What is counted of reads, and of what they make the daemon fetch.

**Whose it is.** Each open handle has the `Usage` of the process that opened it, so a read finds its
counters with its handle: an addition, and one more in a histogram, some 300 ns with the two looks
at the clock. A process that inherits a handle counts as the one that opened it. What the kernel
reads by itself (passthrough), or has in its page cache, nobody tells us: of the former the opens
are counted, of the latter nothing.

**Exact and bounded.** A checkpoint has at most `PROCESSES_MAX` processes of its own, and all of
them together `_RECORDS_MAX`. When there are more, those that have nothing open are added to
`others`, and where there is none the new one counts there from the start. So the sum of all is
always that of the checkpoint. The same for the node: what ended with its checkpoint is in
`Activities.ended`.

All of it belongs to the event loop, and begins at zero with each daemon.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptfs._daemon import processes
from ckptfs.errors import CkptfsError

PROCESSES_MAX = 64
"""Processes of one checkpoint that are counted by themselves: the ranks of a node and their
loaders."""
_RECORDS_MAX = 4096
"""The same for all checkpoints together: each takes 1.5 kB."""
NAMED_MAX = 100
"""Checkpoints with a label of their own among the metrics; the others share one."""
_SAMPLES = 11
BUCKETS = 64
"""Of a histogram: bucket `i` has what took less than 2**i nanoseconds, and not less than half of
it. No time is too long for it."""


class Sample(NamedTuple):
    """What was counted at a moment, or how much of it there was in a second."""

    at_s: float
    reads: float
    read_bytes: float
    fetched_bytes: float


class Usage:
    """What one process, or several, did with one checkpoint, or several.

    Attributes:
        pid: The process; 0: it is none, or several. `started`, `command`, `owner`: as
            `processes` says of it.
        handles: Files that it has open.
        opens: Files that it has opened; `kernel_opens`: those that the kernel reads by itself.
        waiting: Reads that wait for their bytes now.
        read_ns: Time that all reads took together.
        latency_ns: How long reads took, from when the daemon saw them to when the kernel had the
            answer: a histogram, see `BUCKETS`.
        read_bytes: That were handed to the kernel.
        misses: Reads that had to wait for the store; `missed_bytes`: what they got.
        errors: Reads that failed, by the error's code.
        fetches: Requests for data that it was the first to ask for, also ahead of its reads;
            `fetched_bytes`: what they brought.
        heir: Where it counts now; None: it is still one of its own.
    """

    __slots__ = (
        "command",
        "errors",
        "fetched_bytes",
        "fetches",
        "handles",
        "heir",
        "kernel_opens",
        "latency_ns",
        "missed_bytes",
        "misses",
        "opens",
        "owner",
        "pid",
        "read_bytes",
        "read_ns",
        "started",
        "waiting",
    )

    def __init__(self, pid: int = 0, started: int = 0, command: str = "", owner: int = -1) -> None:
        self.pid = pid
        self.started = started
        self.command = command
        self.owner = owner
        self.heir: Usage | None = None
        self.handles = self.opens = self.kernel_opens = 0
        self.read_ns = self.waiting = self.read_bytes = self.misses = self.missed_bytes = 0
        self.fetches = self.fetched_bytes = 0
        self.latency_ns = [0] * BUCKETS
        self.errors: Counter[str] = Counter()

    def failed(self, error: Exception) -> None:
        """A read has failed so."""
        self.errors[error.code if isinstance(error, CkptfsError) else "stale"] += 1

    @property
    def reads(self) -> int:
        """How many reads were answered."""
        return sum(self.latency_ns)

    def add(self, other: "Usage") -> None:
        """Count what the other one has, too."""
        self.handles += other.handles
        self.opens += other.opens
        self.kernel_opens += other.kernel_opens
        self.waiting += other.waiting
        self.read_ns += other.read_ns
        self.read_bytes += other.read_bytes
        self.misses += other.misses
        self.missed_bytes += other.missed_bytes
        self.fetches += other.fetches
        self.fetched_bytes += other.fetched_bytes
        self.errors.update(other.errors)
        self.latency_ns = [a + b for a, b in zip(self.latency_ns, other.latency_ns, strict=True)]


def total(usages: Iterable[Usage]) -> Usage:
    """The sum."""
    result = Usage()
    for usage in usages:
        result.add(usage)
    return result


class Activity:
    """What happens in one checkpoint.

    Attributes:
        others: Of processes that are not told apart any more.
        background: What no read has asked for: prefetch, and what the daemon itself looks at.
        in_flight: Requests for data that are under way or wait; `queued`: those that wait for a
            place.
        retries: Attempts that were made after one which had failed.
        failures: Attempts to fetch that failed, by the error's code.
        taken_bytes: That came from other nodes; `given_bytes`: that were given to them.
    """

    def __init__(self) -> None:
        self.others = Usage(command="(others)")
        self.background = Usage(command="(prefetch)")
        self.in_flight = self.queued = 0
        self.retries = 0
        self.failures: Counter[str] = Counter()
        self.taken_bytes = self.given_bytes = 0
        self._by_pid: dict[int, Usage] = {}
        self._all = Activities()
        self._is_begun = False
        self._is_named = False
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)

    @property
    def is_named(self) -> bool:
        """Whether it has a label of its own among the metrics, as long as it is attached."""
        return self._is_named

    def sample(self, now_s: float) -> None:
        """To be called about once a second, for `rates`."""
        reads = read_bytes = fetched_bytes = 0
        for usage in self.usages():
            reads += usage.reads
            read_bytes += usage.read_bytes
            fetched_bytes += usage.fetched_bytes
        self._samples.append(Sample(now_s, reads, read_bytes, fetched_bytes))

    def rates(self) -> Sample:
        """How much there was of each, for a second, in the last ten or so."""
        if len(self._samples) < 2:
            return Sample(0.0, 0, 0, 0)
        first, last = self._samples[0], self._samples[-1]
        seconds = last.at_s - first.at_s or 1.0
        return Sample(
            seconds,
            *((now - then) / seconds for now, then in zip(last[1:], first[1:], strict=True)),
        )

    def usages(self) -> Iterator[Usage]:
        """Those of single processes, and the two that are of none."""
        yield from self._by_pid.values()
        yield self.others
        yield self.background

    def total(self) -> Usage:
        """Of all of them."""
        return total(self.usages())

    def begin(self, activities: "Activities") -> None:
        """Its checkpoint is attached."""
        self._all = activities
        self._is_begun = True
        self._is_named = sum(a.is_named for a in activities.begun) < NAMED_MAX
        activities.begun.append(self)

    def end(self) -> None:
        """Its checkpoint is not attached any more. What was read is still known of the node."""
        if self._is_begun:
            self._is_begun = False
            self._all.begun.remove(self)
            self._all.ended.add(self.total())
            self._all.ended.handles = self._all.ended.waiting = 0
            if not self._is_named:
                self._all.ended_unnamed.add(self.total())
                self._all.ended_unnamed.handles = self._all.ended_unnamed.waiting = 0
            self._all.records -= len(self._by_pid)

    def opened(self, pid: int) -> Usage:
        """That process opens a file: where its reads are to be counted, until `closed`."""
        usage = self._usage_of(pid)
        usage.handles += 1
        usage.opens += 1
        return usage

    def commands(self) -> dict[int, str]:
        """What the processes run that are told apart."""
        return {pid: usage.command for pid, usage in self._by_pid.items()}

    def holds(self, pid: int) -> None:
        """That process holds the checkpoint, though it may not have read of it."""
        self._usage_of(pid)

    def of(self, pid: int) -> Usage | None:
        """What is counted of that process alone."""
        return self._by_pid.get(pid)

    def closed(self, usage: Usage) -> None:
        """Undo one `opened`."""
        usage.handles -= 1

    def fetched(self, usage: Usage, length: int) -> None:
        """A request for data, which this `usage` was the first to want, has brought its bytes."""
        usage = usage if usage.heir is None else usage.heir
        usage.fetches += 1
        usage.fetched_bytes += length

    @contextmanager
    def queueing(self) -> Generator[None]:
        """A request for data waits for its place in this context."""
        self.queued += 1
        try:
            yield
        finally:
            self.queued -= 1

    def retried(self) -> None:
        """An attempt begins after one that has failed."""
        self.retries += 1
        self._all.retries += 1

    def failed(self, error: CkptfsError) -> None:
        """An attempt to fetch, or to check a version, has failed."""
        self.failures[error.code] += 1
        self._all.failures[error.code] += 1

    def took(self, length: int) -> None:
        """Bytes have come from another node."""
        self.taken_bytes += length
        self._all.taken_bytes += length

    def gave(self, length: int) -> None:
        """Bytes were given to a client that takes them to another node."""
        self.given_bytes += length
        self._all.given_bytes += length

    def _usage_of(self, pid: int) -> Usage:
        known = self._by_pid.get(pid)
        if known is not None and (known.handles or known.waiting):
            return known
        started = processes.started(pid)
        if known is not None:
            if known.started == started:
                return known
            self._give_up(known)
        if not self._has_room():
            return self.others
        about = started, processes.name(pid), processes.owner(pid)
        known = self._by_pid[pid] = Usage(pid, *about)
        self._all.on_new(known)
        self._all.records += 1
        return known

    def _has_room(self) -> bool:
        """Whether there is room for one more, or can be made."""
        if len(self._by_pid) < PROCESSES_MAX and self._all.records < _RECORDS_MAX:
            return True
        idle = next((u for u in self._by_pid.values() if not u.handles and not u.waiting), None)
        if idle is not None:
            self._give_up(idle)
        return idle is not None

    def _give_up(self, usage: Usage) -> None:
        del self._by_pid[usage.pid]
        self.others.add(usage)
        usage.heir = self.others  # what it has asked for may still come
        self._all.records -= 1


class Activities:
    """What happens in all checkpoints. `on_new`: called with each process that is new; it may find
    out more of it.

    Attributes:
        begun: Of those that are attached, in that order.
        ended: What was read of those that are not attached any more; `ended_unnamed`: of those
            that had no label of their own.
        records: How many processes are counted by themselves.
        retries, failures, taken_bytes, given_bytes: As those of an `Activity`, of all that there
            ever were.
    """

    def __init__(self, on_new: Callable[[Usage], None] = lambda usage: None) -> None:
        self.on_new = on_new
        self.begun: list[Activity] = []
        self.ended = Usage()
        self.ended_unnamed = Usage()
        self.records = 0
        self.retries = 0
        self.failures: Counter[str] = Counter()
        self.taken_bytes = self.given_bytes = 0

    def sample(self, now_s: float) -> None:
        """See `Activity.sample`."""
        for activity in self.begun:
            activity.sample(now_s)

    def total(self) -> Usage:
        """What was read since the daemon began."""
        return total([self.ended, *(usage for a in self.begun for usage in a.usages())])
