"""Flow control: how much may be under way at one store, as its measured speed says. Pure decisions.

A link may bring 100 kB/s or 10 GB/s, and a server may hash a whole file before its first byte. What
is right for one is wrong for the other, so three things follow what was measured:

**Bytes ahead.** Readahead and prefetch share the link with the readers. So they have no more in
flight than the store brings in `_AHEAD_S`. A reader's window is as long.

**Span length.** The blocks of a span become readable together. So a span is no longer than what the
store brings in `_SPAN_S`.

**Requests.** A server that gives no byte in time is asked by fewer requests at once: half as many
after each timeout of a request that began after the last cut, and one more after as many answers
as there are requests ("additive increase, multiplicative decrease", as TCP does it: RFC 5681).

The speed is that of all requests together, in the time in which bytes came: the wait for a first
byte says nothing about the link. The last few seconds count most. A store that was not measured yet
has no limits.
"""

import math
import weakref

from ckptfs._model.blocks import BLOCK_BYTES

_AHEAD_S = 4.0
"""A reader that comes meanwhile waits for a few seconds at most, and a pause of the reader does not
leave the link idle."""
_SPAN_S = 1.0
_HORIZON_S = 5.0
"""How much of that time the speed remembers: a link changes within seconds."""
_KNOWN_S = 0.25
"""A shorter time says nothing about the speed."""
_REQUESTS_MIN = 2
"""Fewest requests at once. With one, a request that hangs would hold up all readers."""


class Flow:
    """Of one store. Times are those of the event loop, in seconds."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._busy_s = 0.0  # while bytes came
        self._busy_until_s = -math.inf
        self._running = 0
        self._requests_max = math.inf
        self._cut_s = -math.inf

    # -- what happens

    def came(self, count: int, since_s: float, until_s: float) -> None:
        """So many bytes came between these times."""
        busy_s = max(0.0, until_s - max(since_s, self._busy_until_s))
        self._busy_until_s = max(self._busy_until_s, until_s)
        kept = math.exp(-busy_s / _HORIZON_S)
        self._busy_s = self._busy_s * kept + busy_s
        self._bytes = self._bytes * kept + count

    def began(self) -> None:
        """A request begins."""
        self._running += 1

    def ended(self) -> None:
        """A request ends, with or without an answer."""
        self._running -= 1

    def answered(self) -> None:
        """A request brought all of its bytes."""
        if self._requests_max < math.inf:
            self._requests_max += 1 / self._requests_max

    def timed_out(self, begun_s: float, now_s: float) -> None:
        """A request that began at `begun_s`, and still counts, had no byte in time."""
        if begun_s < self._cut_s:
            return  # the requests of one burst are cut once
        self._cut_s = now_s
        self._requests_max = max(_REQUESTS_MIN, min(self._requests_max, self._running) / 2)

    # -- what follows from it

    @property
    def bytes_per_s(self) -> float:
        """Infinity while the speed is not known."""
        return self._bytes / self._busy_s if self._busy_s >= _KNOWN_S else math.inf

    @property
    def requests_max(self) -> float:
        """Most requests at once."""
        return self._requests_max

    @property
    def ahead_bytes_max(self) -> float:
        """Most bytes in flight that no reader waits for, and longest window of one reader."""
        return max(BLOCK_BYTES, self.bytes_per_s * _AHEAD_S)

    @property
    def span_blocks_max(self) -> float:
        """Most blocks of one span."""
        return max(1.0, self.bytes_per_s * _SPAN_S / BLOCK_BYTES)


class Flows:
    """That of each store."""

    def __init__(self) -> None:
        # Weak: a detached store's credentials must not stay.
        self._flows: weakref.WeakKeyDictionary[object, Flow] = weakref.WeakKeyDictionary()

    def of(self, store: object) -> Flow:
        """The flow of one store."""
        return self._flows.setdefault(store, Flow())
