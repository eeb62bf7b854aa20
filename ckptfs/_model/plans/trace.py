"""The daemon's record of the reads and fetches of a checkpoint. Plain data.

All times are seconds since the checkpoint was attached.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import Literal

import msgspec

from ckptfs._model.plans import ranges

Purpose = Literal["demand", "readahead", "prefetch"]
"""The reason of a fetch: a reader waits for the bytes, a reader will want them, or a client or plan
has asked for them."""


class Access(msgspec.Struct, array_like=True):
    """Reads of one process in one file that followed one another soon and without a gap.

    Attributes:
        file: Position of the file in the manifest.
        pid: The process that has opened the file; 0 for one of another pid namespace.
        start: First byte.
        stop: End of the bytes.
        reads: Number of the kernel's requests, of up to 1 MiB each, with its own readahead.
        waits: Number of these requests that waited for bytes outside the cache's memory and files.
        waited_s: Time that all of these requests together have waited.
        began_s: Time of the first request.
        ended_s: Time of the last answer.
    """

    file: int
    pid: int
    start: int
    stop: int
    reads: int
    waits: int
    waited_s: float
    began_s: float
    ended_s: float


class Fetch(msgspec.Struct, array_like=True, frozen=True):
    """The fetch of one span of bytes from the store.

    Attributes:
        file: Position of the file in the manifest.
        start: First byte.
        stop: End of the bytes.
        purpose: Its most urgent purpose.
        tries: Number of its requests.
        error: The error that ended it; "" if it succeeded.
        wanted_s: Time of the decision to fetch the span.
        began_s: Time of its last request.
        ended_s: Time of its last byte.
    """

    file: int
    start: int
    stop: int
    purpose: Purpose
    tries: int
    error: str
    wanted_s: float
    began_s: float
    ended_s: float


class TracedFile(msgspec.Struct, array_like=True, frozen=True):
    """A file that entries of a trace name by `index`; `path` is relative to the checkpoint."""

    index: int
    path: str
    size: int


class TracedProcess(msgspec.Struct, array_like=True, frozen=True):
    """A process that has opened files.

    Attributes:
        pid: Its id.
        command: Its name, as far as the daemon can see it.
        rank: Its rank in its job; -1 if unknown.
    """

    pid: int
    command: str
    rank: int = -1


class Reads:
    """An index of the reads of one file. There can be 20,000 of them, and as many tensors.

    Args:
        accesses: At least one.

    Attributes:
        read: All bytes.
        began_s: Time of the first read.
    """

    def __init__(self, accesses: Iterable[Access]) -> None:
        self._by_start = sorted(accesses, key=lambda access: access.start)
        self._starts = [access.start for access in self._by_start]
        self._stops_max = list(accumulate((a.stop for a in self._by_start), max))
        self.read = ranges.union((a.start, a.stop) for a in self._by_start)
        self.began_s = min(access.began_s for access in self._by_start)

    def overlapping(self, start: int, stop: int) -> list[Access]:
        """The accesses to at least one of these bytes."""
        found: list[Access] = []
        position = bisect_left(self._starts, stop) - 1
        while position >= 0 and self._stops_max[position] > start:
            access = self._by_start[position]
            if access.stop > start:
                found.append(access)
            position -= 1
        return found
