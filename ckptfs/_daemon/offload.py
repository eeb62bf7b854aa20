"""Worker threads: the only place that leaves the event loop.

Network and disk have limiters of their own, so that a dark store cannot keep the disk waiting. A
call that is cancelled is abandoned, not waited for: its thread keeps its place in the limiter until
it really ends, which bounds the threads that a library can hold.

Computing holds the interpreter's lock, so what takes long has to let go of it now and then.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

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


class Offload:
    """The limiters. `data_threads`: how many ranged reads run at the same time."""

    def __init__(self, data_threads: int) -> None:
        self._data = trio.CapacityLimiter(data_threads)
        self._control = trio.CapacityLimiter(_CONTROL_THREADS)
        self._dark = trio.CapacityLimiter(_DARK_THREADS)
        self._disk = trio.CapacityLimiter(_DISK_THREADS)
        self._compute = trio.CapacityLimiter(_COMPUTE_THREADS)

    async def data(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a ranged read."""
        return await _run(self._data, functools.partial(function, *args, **kwargs))

    async def control(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small request to the store: a listing, a version check."""
        return await _run(self._control, functools.partial(function, *args, **kwargs))

    async def dark(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a small request to a store that did not answer last time."""
        return await _run(self._dark, functools.partial(function, *args, **kwargs))

    async def disk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run disk IO."""
        return await _run(self._disk, functools.partial(function, *args, **kwargs))

    async def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what needs neither network nor disk, and too long for the event loop."""
        return await _run(self._compute, functools.partial(function, *args, **kwargs))


async def _run(limiter: trio.CapacityLimiter, call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
