"""What became of this process's workers. There is one `COUNTS`, as there is one `REQUESTS`."""

import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, get_args

from ckptfs._workers.process import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

REASONS: tuple[Reason, ...] = get_args(Reason)


class WorkerCounts(NamedTuple):
    """A snapshot.

    Attributes:
        running: How many workers there are now; `memory_bytes`: what they have in memory.
        starts: How many were started.
        ends: How many have ended, by reason.
    """

    running: int
    memory_bytes: int
    starts: int
    ends: dict[Reason, int]


class Counts:
    """The counts. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts = 0
        self._ends: Counter[Reason] = Counter()
        self.running: Callable[[], list[int]] = list  # the memory of each worker, in bytes

    def started(self) -> None:
        """One was started."""
        with self._lock:
            self._starts += 1

    def ended(self, reason: Reason) -> None:
        """One has ended."""
        with self._lock:
            self._ends[reason] += 1

    def snapshot(self) -> WorkerCounts:
        """As it is now."""
        running = self.running()
        with self._lock:
            ends: dict[Reason, int] = {reason: self._ends[reason] for reason in REASONS}
            return WorkerCounts(len(running), sum(running), self._starts, ends)


COUNTS = Counts()
