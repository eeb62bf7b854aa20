"""How long a client waits for first bytes. Pure decisions.

Most silence before the first byte of an answer means that a server, or the way to it, is broken,
and another try helps. Some servers are only slow: they fetch the object from a tape or hash it
first. A client that always asks again after the same time asks such a server for ever, and each
try adds to its load.

So each silence that was too long doubles the patience, and fast answers lower it again. A request
whose failure would leave too little time for another one waits until its deadline.
"""

import threading

_LOWERED_BY = 0.95
"""What a fast answer leaves of the patience: one timeout is forgotten after 14 fast answers."""
_FAST_SHARE = 0.25
"""An answer is fast that took less than this part of the patience."""
_REPORT_SHARE = 0.1
_REPORT_S_MAX = 0.5
"""Of the time left, for the report that there was no answer: it has to be there at the deadline."""
PATIENCE_S_MAX = 600.0
"""The longest patience, for callers without a deadline: as long as a listing may take."""


class Patience:
    """The patience with one server. May be used by several threads.

    Args:
        least_s: The patience with a server that is fast.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._seconds = least_s
        self._lock = threading.Lock()  # guards _seconds

    @property
    def seconds(self) -> float:
        """How long the client waits for the first byte of an answer."""
        return self._seconds

    @property
    def is_raised(self) -> bool:
        """Whether the server was too slow lately."""
        return self._seconds > self._least_s

    def for_request(self, left_s: float) -> float:
        """The longest silence before the first byte of a request that has `left_s` seconds left."""
        seconds = self._seconds
        all_s = left_s - min(_REPORT_S_MAX, _REPORT_SHARE * left_s)
        if seconds > self._least_s and left_s < 3 * seconds:  # the next try would need the double
            return all_s
        return min(seconds, all_s)

    def was_silent(self, waited_s: float) -> None:
        """A request ended after so much silence without a first byte."""
        with self._lock:
            # Requests that began together end together, and count as one.
            raised_s = min(2 * waited_s, PATIENCE_S_MAX)
            self._seconds = max(self._seconds, raised_s)

    def answered(self, silence_s: float) -> None:
        """The first byte of an answer came after so much silence."""
        with self._lock:
            if silence_s < _FAST_SHARE * self._seconds:
                self._seconds = max(self._least_s, _LOWERED_BY * self._seconds)
