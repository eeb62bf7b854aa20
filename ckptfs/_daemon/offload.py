"""Worker threads: the only place that leaves the event loop.

Network and disk have lanes of their own, so that a dark store cannot keep the disk waiting.

**A call that is cancelled** is abandoned, not waited for. A call to a store knows the deadline of
its caller (``_store.deadline``) and ends by then, or at once where a read is given up
(``_store.progress``): our own S3 client does so by itself, and no other library runs in this
process (``ckptfs._workers``). What may take longer is the look-up of a name by the system's
resolver, and the look-up of credentials by botocore. A thread that was left behind so takes no
place from the others: its lane has one more for as long as it runs, up to `_LEFT_BEHIND_MAX`.

Computing holds the interpreter's lock, so what takes long has to let go of it now and then.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import trio

from ckptfs._store.deadline import ends_in

P = ParamSpec("P")
T = TypeVar("T")

_DISK_THREADS = 8
"""Enough to keep an NVMe disk busy with 1 MiB reads; more only wait for each other."""
_CONTROL_THREADS = 16
"""Listings and version checks, which must not wait behind data."""
_DARK_THREADS = 4
"""Version checks at stores that do not answer, which must not keep the others waiting."""
_COMPUTE_THREADS = 1
"""They would only share one interpreter lock; one also bounds the memory that parsing takes."""
_LEFT_BEHIND_MAX = 64
"""Threads of one lane that were left behind and take no place. One costs some 50 KiB."""


class Offload:
    """The lanes. `data_threads`: how many ranged reads run at the same time."""

    def __init__(self, data_threads: int) -> None:
        self._data = _Lane(data_threads, _LEFT_BEHIND_MAX)
        self._control = _Lane(_CONTROL_THREADS, _LEFT_BEHIND_MAX)
        self._dark = _Lane(_DARK_THREADS, _LEFT_BEHIND_MAX)
        self._disk = _Lane(_DISK_THREADS, 0)
        self._compute = _Lane(_COMPUTE_THREADS, 0)
        self._names = _Lane(1, 0)

    def resize(self, data_threads: int) -> None:
        """Run so many ranged reads at the same time from now on."""
        self._data.resize(data_threads)

    async def data(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a ranged read."""
        return await self._data.run(functools.partial(function, *args, **kwargs))

    async def control(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small request to the store: a listing, a version check."""
        return await self._control.run(functools.partial(function, *args, **kwargs))

    async def dark(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small request to a store that did not answer last time."""
        return await self._dark.run(functools.partial(function, *args, **kwargs))

    async def disk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run disk IO."""
        return await self._disk.run(functools.partial(function, *args, **kwargs))

    async def names(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what looks at other processes, which may wait for us."""
        return await self._names.run(functools.partial(function, *args, **kwargs))

    async def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what needs neither network nor disk, and too long for the event loop."""
        return await self._compute.run(functools.partial(function, *args, **kwargs))

    def threads(self) -> int:
        """How many threads work, or wait, now."""
        lanes = (
            *(self._data, self._control, self._dark, self._disk),
            *(self._compute, self._names),
        )
        return sum(lane.threads for lane in lanes)


class _Lane:
    """At most `width` threads that somebody waits for, or a few more: see the module's text."""

    def __init__(self, width: int, left_behind_max: int) -> None:
        self._width = width
        self._left_behind_max = left_behind_max
        self._left_behind = 0
        self._limiter = trio.CapacityLimiter(width)

    @property
    def threads(self) -> int:
        return int(self._limiter.borrowed_tokens)

    async def run(self, call: Callable[[], T]) -> T:
        left_s = trio.current_effective_deadline() - trio.current_time()
        token = trio.lowlevel.current_trio_token()
        thread = _Thread(call, left_s, lambda: token.run_sync_soon(self._add_left_behind, -1))
        try:
            return await trio.to_thread.run_sync(
                thread.run, limiter=self._limiter, abandon_on_cancel=True
            )
        except trio.Cancelled:
            if thread.abandon():
                self._add_left_behind(1)
            raise

    def resize(self, width: int) -> None:
        """Have that width from now on."""
        self._width = width
        self._add_left_behind(0)

    def _add_left_behind(self, count: int) -> None:
        self._left_behind += count
        more = min(self._left_behind, self._left_behind_max)
        self._limiter.total_tokens = self._width + more


class _Thread(Generic[T]):
    """One call in its thread, which may be abandoned. `on_end` is called in the thread if it was
    abandoned in the middle of the call."""

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
                raise TimeoutError  # for nobody: the call has not begun, and is not needed
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
        """Nobody waits any more; returns whether the call is under way."""
        with self._lock:
            self._is_abandoned = True
            return self._runs
