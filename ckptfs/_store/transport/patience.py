"""The longest wait for the first byte of an answer. Pure decisions.

Silence before the first byte usually means that a server, or the network to it, is broken, and that
another try helps. Some servers are only slow, because they fetch the object from a tape or hash it
first. A client that always retries after the same time never gets an answer from such a server, and
each try adds to its load.

So each timeout doubles the patience, and fast answers lower it again. If a failure would leave too
little time for another try, the request waits until its deadline.
"""

import threading

_LOWERED_BY = 0.95
"""The factor by which a fast answer lowers the patience: 14 fast answers make up for a timeout."""
_FAST_SHARE = 0.25
"""The part of the patience below which an answer is fast."""
_REPORT_SHARE = 0.1
_REPORT_S_MAX = 0.5
"""The part of the time left, and the most, for reporting the failure before the deadline."""
PATIENCE_S_MAX = 600.0
"""The longest patience, for callers without a deadline: as long as a listing may take."""


class Patience:
    """The patience with one server. Several threads may use it.

    `seconds` is the longest wait for the first byte of an answer now. With a fast server it is
    `least_s`.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self.seconds = least_s
        self._lock = threading.Lock()  # guards seconds

    def for_request(self, left_s: float) -> float:
        """The longest silence before the first byte of a request that has `left_s` seconds left."""
        seconds = self.seconds
        all_s = left_s - min(_REPORT_S_MAX, _REPORT_SHARE * left_s)
        if seconds > self._least_s and left_s < 3 * seconds:  # the next try needs twice as long
            return all_s
        return min(seconds, all_s)

    def was_silent(self, waited_s: float) -> None:
        """Count a request that ended after that silence without a first byte."""
        with self._lock:
            # Requests that began together end together, so they count as one.
            raised_s = min(2 * waited_s, PATIENCE_S_MAX)
            self.seconds = max(self.seconds, raised_s)

    def answered(self, silence_s: float) -> None:
        """Count an answer whose first byte came after that silence."""
        with self._lock:
            if silence_s < _FAST_SHARE * self.seconds:
                self.seconds = max(self._least_s, _LOWERED_BY * self.seconds)
