"""The counters: one struct for all that the daemon counts of reads and of their fetches, and one
for the requests to stores.

A new counter is a field here, a line where the daemon counts it, and a row of the table in
``_model.metrics``. The daemon adds these structs up and sends them as they are.
"""

from collections.abc import Iterable
from itertools import zip_longest

import msgspec

BUCKETS = 64
"""Length of a histogram. Bucket `i` counts what took less than 2**i nanoseconds and at least half
of that, so a histogram has room for every time."""


def new_histogram() -> list[int]:
    """A histogram that has counted nothing."""
    return [0] * BUCKETS


def without_zeros(histogram: list[int]) -> list[int]:
    """A copy of the histogram without the zeros at its end, for a message."""
    end = len(histogram)
    while end and not histogram[end - 1]:
        end -= 1
    return histogram[:end]


class Counts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Counters of one process or of several, since the daemon started.

    Attributes:
        opens: Files that were opened.
        kernel_opens: Files of `opens` that the kernel reads by itself (passthrough), so the daemon
            does not see their reads.
        open_files: Files that are open now.
        waiting: Reads that wait now, for the store or the disk.
        read_ns: Time that all reads took together.
        read_bytes: Bytes that the daemon returned to the kernel.
        misses: Reads that had to wait for the store.
        missed_bytes: Bytes of these.
        errors: Failed reads, by the error's code.
        fetches: Requests for data that these reads were the first to need, with readahead.
        fetched_bytes: Bytes that these requests brought.
        retries: Attempts to fetch after one that had failed.
        failures: Failed attempts to fetch or to check a version, by the error's code.
        taken_bytes: Bytes that came from other nodes, or from programs that have uploaded them.
        given_bytes: Bytes that went to other nodes.
        latency_ns: Times of reads, from the daemon's receipt to its answer. A histogram, see
            `BUCKETS`.
    """

    opens: int = 0
    kernel_opens: int = 0
    open_files: int = 0
    waiting: int = 0
    read_ns: int = 0
    read_bytes: int = 0
    misses: int = 0
    missed_bytes: int = 0
    errors: dict[str, int] = {}
    fetches: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    failures: dict[str, int] = {}
    taken_bytes: int = 0
    given_bytes: int = 0
    latency_ns: list[int] = msgspec.field(default_factory=new_histogram)

    @property
    def reads(self) -> int:
        """Reads that the daemon answered."""
        return sum(self.latency_ns)

    def add(self, other: "Counts") -> None:
        """Add the other's counts to these."""
        for name in Counts.__struct_fields__:
            theirs: int | dict[str, int] | list[int] = getattr(other, name)
            if isinstance(theirs, dict):
                add_to(getattr(self, name), theirs)
            elif isinstance(theirs, list):
                mine: list[int] = getattr(self, name)
                mine[:] = [a + b for a, b in zip_longest(mine, theirs, fillvalue=0)]
            elif theirs:
                setattr(self, name, getattr(self, name) + theirs)


def add_to(counts: dict[str, int], more: dict[str, int]) -> None:
    """Add the counts of `more` to those of `counts`, key by key."""
    for key, number in more.items():
        counts[key] = counts.get(key, 0) + number


def total(several: Iterable[Counts]) -> Counts:
    """The sum, as a struct of its own."""
    result = Counts()
    for counts in several:
        result.add(counts)
    result.latency_ns = without_zeros(result.latency_ns)
    return result


class RequestCounts(msgspec.Struct):
    """The requests to stores of one kind, since the process started.

    Attributes:
        kind: See ``_store.request_metrics``.
        outcomes: How many requests ended with each outcome.
        latency_ns: Times of these requests. A histogram, see `BUCKETS`.
        total_ns: Sum of these times.
    """

    kind: str
    outcomes: dict[str, int] = {}
    latency_ns: list[int] = msgspec.field(default_factory=new_histogram)
    total_ns: int = 0
