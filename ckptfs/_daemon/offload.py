"""Worker threads: the only place that leaves the event loop.

Network and disk have lanes of their own, so that a dark store cannot delay the disk.

**A cancelled call** is abandoned. The caller does not wait for it. A call to a store knows the
deadline of its caller and ends by then, or at once when the read is given up
(``_store.request_context``). Our own S3 client does so by itself, and no other library runs in this
process (``ckptfs._workers``). Two calls may take longer: the look-up of a name by the system's
resolver, and the look-up of credentials by botocore. Such an abandoned thread takes no place from
other calls: its lane has one more thread for as long as it runs, up to `_ABANDONED_MAX`.

A computation holds the interpreter's lock, so a long one has to release it now and then.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import trio

from ckptfs._store.request_context import ends_in

P = ParamSpec("P")
T = TypeVar("T")

_DISK_THREADS = 8
"""Enough to keep an NVMe disk busy with 1 MiB reads. More threads would only wait for each
other."""
_SPOOL_THREADS = 4
"""Enough to keep a disk busy with copies of 64 MiB, which the kernel makes."""
_CONTROL_THREADS = 16
"""The threads of listings and version checks, which must not wait behind data."""
_DARK_THREADS = 4
"""The threads of version checks at stores that do not answer, which must not delay other checks."""
_COMPUTE_THREADS = 1
"""More threads would only share one interpreter lock. One also bounds the memory that parsing
takes."""
_ABANDONED_MAX = 64
"""The most abandoned threads of one lane that take no place. One costs some 50 KiB."""


class Offload:
    """The lanes. `await offload.disk(function, ...)` runs a function in a thread of that lane.

    Args:
        data_threads: The most ranged reads at the same time.

    Attributes:
        data: Ranged reads.
        control: Small requests to stores: listings, version checks.
        dark: Small requests to stores that did not answer last time.
        disk: Disk IO.
        upkeep: Disk IO of maintenance tasks, one thread for all of them.
        spool: Disk IO of uploads in the background.
        compute: Computations that are too long for the event loop.
        names: Functions that read the state of other processes, which may wait for this one.
    """

    def __init__(self, data_threads: int) -> None:
        self.data = Lane(data_threads, _ABANDONED_MAX)
        self.control = Lane(_CONTROL_THREADS, _ABANDONED_MAX)
        self.dark = Lane(_DARK_THREADS, _ABANDONED_MAX)
        self.disk = Lane(_DISK_THREADS, 0)
        self.upkeep = Lane(1, 0)
        self.spool = Lane(_SPOOL_THREADS, 0)
        self.compute = Lane(_COMPUTE_THREADS, 0)
        self.names = Lane(1, 0)

    def threads(self) -> int:
        """The number of threads that work, or wait, now."""
        lanes = (self.data, self.control, self.dark, self.disk, self.upkeep, self.spool)
        return sum(lane.threads for lane in (*lanes, self.compute, self.names))


class Lane:
    """At most `width` threads that callers wait for, and up to `abandoned_max` abandoned ones."""

    def __init__(self, width: int, abandoned_max: int) -> None:
        self._width = width
        self._abandoned_max = abandoned_max
        self._abandoned = 0
        self._limiter = trio.CapacityLimiter(width)

    @property
    def threads(self) -> int:
        """The number of threads that work, or wait, now."""
        return int(self._limiter.borrowed_tokens)

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in a thread. Raises what it raises."""
        left_s = trio.current_effective_deadline() - trio.current_time()
        token = trio.lowlevel.current_trio_token()
        call = functools.partial(function, *args, **kwargs)
        thread = _Thread(call, left_s, lambda: token.run_sync_soon(self._add_abandoned, -1))
        try:
            return await trio.to_thread.run_sync(
                thread.run, limiter=self._limiter, abandon_on_cancel=True
            )
        except trio.Cancelled:
            if thread.abandon():
                self._add_abandoned(1)
            raise

    def resize(self, width: int) -> None:
        """Have that width from now on."""
        self._width = width
        self._add_abandoned(0)

    def _add_abandoned(self, count: int) -> None:
        self._abandoned += count
        more = min(self._abandoned, self._abandoned_max)
        self._limiter.total_tokens = self._width + more


class _Thread(Generic[T]):
    """One call in its thread, which may be abandoned.

    Args:
        call: The call.
        left_s: The time until the deadline of the caller.
        on_end: Called in the thread when a call ends that was abandoned while it ran.
    """

    def __init__(self, call: Callable[[], T], left_s: float, on_end: Callable[[], None]) -> None:
        self._call = call
        self._end_s = time.monotonic() + left_s
        self._on_end = on_end
        self._lock = threading.Lock()  # guards the two below
        self._runs = False
        self._is_abandoned = False

    def run(self) -> T:
        with self._lock:
            if self._is_abandoned:
                raise TimeoutError  # the call has not begun, and no caller waits for it
            self._runs = True
        try:
            with ends_in(self._end_s - time.monotonic()):
                return self._call()
        finally:
            with self._lock:
                self._runs = False
                was_abandoned = self._is_abandoned
            if was_abandoned:
                with contextlib.suppress(trio.RunFinishedError):
                    self._on_end()

    def abandon(self) -> bool:
        """The caller waits no longer. Returns whether the call runs."""
        with self._lock:
            self._is_abandoned = True
            return self._runs
