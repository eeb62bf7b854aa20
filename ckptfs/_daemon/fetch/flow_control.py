"""Flow control: how much may be under way at one store, by its measured speed. Pure decisions.

A link may bring 100 kB/s or 10 GB/s, and a server may hash a whole file before its first byte. A
limit that suits one store is wrong for another. So three limits follow the measurements:

**Bytes ahead.** Readahead and prefetch share the link with the readers. So they have no more bytes
in flight than the store brings in `_AHEAD_S`. The window of a reader is as long.

**Span length.** The blocks of a span become readable together. So a span is no longer than what the
store brings in `_SPAN_S`.

**Requests.** A server that does not send a first byte in time gets fewer requests at once (see
`AimdLimit`).

The speed is that of all requests together, during the time in which bytes came. The wait for a
first byte says nothing about the link. The last few seconds have the most weight. A store without
measurements has no limits.
"""

import math
import weakref

from ckptfs._model.aimd import AimdLimit
from ckptfs._model.blocks import BLOCK_BYTES

_AHEAD_S = 4.0
"""A new reader waits for a few seconds at most, and a pause of a reader does not leave the link
idle."""
_SPAN_S = 1.0
_HORIZON_S = 5.0
"""The time that the measurement of the speed covers: a link changes within seconds."""
_KNOWN_S = 0.25
"""A shorter time says nothing about the speed."""
_REQUESTS_MIN = 2
"""The lowest limit of requests. With one request at once, a request that hangs would stop all
readers."""


class FlowControl:
    """The limits of one store. All times are those of the event loop, in seconds."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._busy_s = 0.0  # the time in which bytes came
        self._busy_until_s = -math.inf
        self._running = 0
        self._requests = AimdLimit(_REQUESTS_MIN)

    # -- events

    def came(self, count: int, since_s: float, until_s: float) -> None:
        """Count bytes that came between two times."""
        busy_s = max(0.0, until_s - max(since_s, self._busy_until_s))
        self._busy_until_s = max(self._busy_until_s, until_s)
        kept = math.exp(-busy_s / _HORIZON_S)
        self._busy_s = self._busy_s * kept + busy_s
        self._bytes = self._bytes * kept + count

    def began(self) -> None:
        """Count the start of a request."""
        self._running += 1

    def ended(self) -> None:
        """Count the end of a request, with or without an answer."""
        self._running -= 1

    def answered(self) -> None:
        """Count a request that brought all of its bytes."""
        self._requests.answered()

    def timed_out(self, begun_s: float, now_s: float) -> None:
        """Count a request that began at `begun_s` and had no byte in time, before it `ended`."""
        self._requests.timed_out(begun_s, now_s, self._running)

    # -- limits

    @property
    def bytes_per_s(self) -> float:
        """The speed of the store; infinity while it is not known."""
        return self._bytes / self._busy_s if self._busy_s >= _KNOWN_S else math.inf

    @property
    def requests_max(self) -> float:
        """The most requests at once."""
        return self._requests.limit

    @property
    def ahead_bytes_max(self) -> float:
        """The most bytes in flight that no reader waits for, and the longest window of a reader."""
        return max(BLOCK_BYTES, self.bytes_per_s * _AHEAD_S)

    @property
    def span_blocks_max(self) -> float:
        """The most blocks of one span."""
        return max(1.0, self.bytes_per_s * _SPAN_S / BLOCK_BYTES)


class FlowControls:
    """The flow control of each store."""

    def __init__(self) -> None:
        # The keys are weak, because the credentials of a detached store must not stay in memory.
        self._by_store: weakref.WeakKeyDictionary[object, FlowControl] = weakref.WeakKeyDictionary()

    def of(self, store: object) -> FlowControl:
        """The flow control of one store."""
        found = self._by_store.get(store)
        if found is None:
            found = self._by_store[store] = FlowControl()
        return found
