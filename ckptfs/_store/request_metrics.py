"""The requests of this process to stores: their number, outcomes and times.

For our own clients, each request to the server counts, with the retries. For other stores, each
call of their library counts, which may make several requests or none.

`REQUESTS` is global, because a process has one network, and many unrelated modules lie between the
sockets and the metrics.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, get_args

from msgspec.structs import replace

from ckptfs._model.counters import RequestCounts, without_zeros
from ckptfs._store.base import Method
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
"""The outcomes. ``_model.metrics`` explains them."""
KIND_OF: dict[Method, Kind] = {
    "list": "list",
    "confirm": "head",
    "read_into": "read",
    "get": "get",
    "put": "put",
    "find": "head",
}
"""The kinds of the calls of a library's store."""


class Requests:
    """The counts of all requests. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_kind = {kind: RequestCounts(kind, dict.fromkeys(OUTCOMES, 0)) for kind in KINDS}

    def count(self, kind: Kind, outcome: Outcome) -> None:
        """Count one finished request."""
        with self._lock:
            self._by_kind[kind].outcomes[outcome] += 1

    def time(self, kind: Kind, took_ns: int) -> None:
        """Count the time of one request."""
        with self._lock:
            counts = self._by_kind[kind]
            counts.latency_ns[took_ns.bit_length()] += 1
            counts.total_ns += took_ns

    def snapshot(self) -> list[RequestCounts]:
        """The counts of all kinds, each with all outcomes."""
        with self._lock:
            return [
                replace(each, outcomes={**each.outcomes}, latency_ns=without_zeros(each.latency_ns))
                for each in self._by_kind.values()
            ]


REQUESTS = Requests()


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a call of a Store that raised `error`."""
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
    """The outcome of a response with that HTTP status."""
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
    """Count this context as one request, whose outcome is the exception that leaves it."""
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
