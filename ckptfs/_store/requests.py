"""What this process has asked of stores: how often, with which outcome, and how long it took.

Of S3 each request is counted as the server sees it, with those that are repeated; of other stores
each call of their library, which may make several requests or none.

There is one `REQUESTS`, because a process has one network, and between the sockets and whoever
looks at the numbers there are many modules that have nothing to do with them.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

from ckptfs.errors import (
    AccessDenied,
    CheckpointNotFound,
    ObjectChanged,
    StoreTimeout,
    StoreUnavailable,
)

Kind = Literal["list", "head", "read", "get", "put"]
Outcome = Literal[
    "ok", "redirected", "absent", "changed", "denied", "unavailable", "timeout", "error"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""What they mean stands in ``_model.metrics``."""
BUCKETS = 64
"""Of a histogram: bucket `i` has what took less than 2**i nanoseconds, and not less than half of
it."""


class RequestCounts(NamedTuple):
    """Of one kind: how often with each outcome, and how long they took (see `BUCKETS`)."""

    kind: Kind
    outcomes: dict[Outcome, int]
    latency_ns: list[int]
    total_ns: int


class Requests:
    """The counts. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[tuple[Kind, Outcome]] = Counter()
        self._latency_ns = {kind: [0] * BUCKETS for kind in KINDS}
        self._total_ns: Counter[Kind] = Counter()

    def count(self, kind: Kind, outcome: Outcome) -> None:
        """One has ended so."""
        with self._lock:
            self._outcomes[kind, outcome] += 1

    def time(self, kind: Kind, took_ns: int) -> None:
        """One has taken so long."""
        with self._lock:
            self._latency_ns[kind][took_ns.bit_length()] += 1
            self._total_ns[kind] += took_ns

    def snapshot(self) -> list[RequestCounts]:
        """All kinds, each with all outcomes."""
        with self._lock:
            return [
                RequestCounts(
                    kind,
                    {outcome: self._outcomes[kind, outcome] for outcome in OUTCOMES},
                    list(self._latency_ns[kind]),
                    self._total_ns[kind],
                )
                for kind in KINDS
            ]


REQUESTS = Requests()


def outcome_of(error: BaseException) -> Outcome:
    """Of what a Store raises."""
    if isinstance(error, ObjectChanged):
        return "changed"
    if isinstance(error, CheckpointNotFound):
        return "absent"
    if isinstance(error, AccessDenied):
        return "denied"
    if isinstance(error, StoreTimeout):
        return "timeout"
    return "unavailable" if isinstance(error, StoreUnavailable) else "error"


def outcome_of_status(status: int) -> Outcome:
    """Of an HTTP status."""
    if status < 400:
        return "ok"
    known: dict[int, Outcome] = {
        401: "denied",
        403: "denied",
        404: "absent",
        408: "unavailable",
        412: "changed",
        416: "changed",
        429: "unavailable",
    }
    return known.get(status, "unavailable" if status >= 500 else "error")


@contextmanager
def counted(
    kind: Kind, outcome_of: Callable[[BaseException], Outcome] = outcome_of
) -> Generator[None]:
    """Count what happens in this context as one request, whose outcome is the exception that leaves
    it."""
    began_ns = time.perf_counter_ns()
    outcome: Outcome = "ok"
    try:
        yield
    except BaseException as error:
        outcome = outcome_of(error)
        raise
    finally:
        REQUESTS.count(kind, outcome)
        REQUESTS.time(kind, time.perf_counter_ns() - began_ns)
