"""Reads that have just failed by their deadline, and that fail at once when they are repeated.

A program's read(2) or page fault is several requests of the kernel. Its readahead fails first, and
then the kernel asks again for the one page that the program waits for (`filemap_fault`,
`filemap_read` in Linux's mm/filemap.c). Processes that wait for the same page do so one after the
other, because each holds the page's lock meanwhile. Without a memory of the first failure each of
these requests would wait for a deadline of its own.

The memory is short, so that a program that retries later causes a new request to the store. A
second request of the kernel and one of the program look alike. Only the time tells them apart.
"""

import trio

from ckptfs.errors import StoreTimeout

FRESH_S = 1.0
"""The time for which a failure is remembered. The kernel asks again within a millisecond, or on a
loaded machine as soon as the waiting thread gets a CPU. Programs that retry pause for a second or
more."""
_BLOCKS_MAX = 4096
"""The most blocks that one file remembers, more than the kernel has requests in flight."""


class FailedReads:
    """The blocks of one file for which a read has just failed by its deadline."""

    def __init__(self) -> None:
        self._failed: dict[int, tuple[float, StoreTimeout]] = {}  # by block, oldest first

    def __bool__(self) -> bool:
        """Whether some failures may be remembered."""
        return bool(self._failed)

    def add(self, blocks: range, error: StoreTimeout) -> None:
        """Remember that a read of `blocks` has failed now."""
        for index in blocks:
            self._failed.pop(index, None)
            self._failed[index] = trio.current_time() + FRESH_S, error
        while len(self._failed) > _BLOCKS_MAX:
            del self._failed[next(iter(self._failed))]

    def of(self, blocks: "range | list[int]") -> StoreTimeout | None:
        """The failure of one of `blocks`, if it is still fresh."""
        now_s = trio.current_time()
        while self._failed:
            oldest = next(iter(self._failed))
            if self._failed[oldest][0] > now_s:
                break
            del self._failed[oldest]
        found = (self._failed[index][1] for index in blocks if index in self._failed)
        return next(found, None)

    def clear(self) -> None:
        """Forget all failures."""
        self._failed.clear()
