"""Hedging: when a request is so slow that a second one for the same range pays. Pure decisions.

A few answers of a store take far longer than the others, because of a lost packet, or of a server
that is busy or about to die. A second request for the same range, on another connection, is most
likely as fast as the others (Dean and Barroso, "The Tail at Scale", 2013; Amazon S3 performance
guidelines, "retries for latency-sensitive applications"). A request is slow in two cases:

- It has brought no byte after `_FAR` times the time in which nine of ten others had their first
  byte.
- It has brought some bytes, but at its rate so far it needs `_FAR` times the time in which nine of
  ten others of its size were done. So the daemon notices a stalled request early at its beginning
  and late at its end, where a second request could hardly overtake it.

The limit is nine of ten, because some of the remembered requests have stalled themselves.

**An overloaded store** must not get more work. Each transfer earns `_SHARE` of a second request, so
second requests stay below that share. If all requests become slow, the limits grow with them. After
a temporary error all earned requests are lost.
"""

import math
from collections import defaultdict, deque

_FAR = 3
"""With 2, the daemon repeated one of 100 requests of an ordinary sequential read, where the store
shared two busy cores with all other processes. With 3 it repeated one of 300, and no request of
random reads."""
_SHARE = 0.05
"""The most second requests per transfer. "The Tail at Scale" adds as many."""
_EARNED_MAX = 5.0
"""The most second requests that are saved up, for stalls that come together."""
_RECENT = 100
"""The number of times of each kind that are remembered."""
_KNOWN_MIN = 20
"""Fewer times do not show the usual one. The first second request is earned by then, too."""
_FLOOR_S = 0.1
"""No request is slow before this time: such a delay harms no reader, and a busy node may need it to
process an answer."""


class Hedging:
    """The times and the second requests of one store."""

    def __init__(self) -> None:
        self._first_s = _recent_times()
        self._whole_s = defaultdict[int, deque[float]](_recent_times)  # by bits of the length
        self._earned = 0.0

    @property
    def has_earned(self) -> bool:
        """Whether a second request may begin."""
        return self._earned >= 1

    def add(self, length: int, first_s: float, whole_s: float) -> None:
        """Remember a transfer: the times until its first and until its last byte."""
        self._first_s.append(first_s)
        self._whole_s[length.bit_length()].append(whole_s)
        self._earned = min(_EARNED_MAX, self._earned + _SHARE)

    def is_slow(self, length: int, done: int, elapsed_s: float) -> bool:
        """Whether a request is slow that has brought `done` of `length` bytes."""
        if elapsed_s < _FLOOR_S:
            return False
        if not done:
            return elapsed_s > _FAR * _usual_s(self._first_s)
        usual_s = _usual_s(self._whole_s[length.bit_length()])
        return elapsed_s > usual_s and elapsed_s * length > _FAR * usual_s * done

    def spend(self) -> None:
        """Count a second request that begins. It must have been earned."""
        self._earned -= 1

    def failed(self) -> None:
        """Forget what was earned, because of a temporary error."""
        self._earned = 0.0


def _recent_times() -> deque[float]:
    return deque(maxlen=_RECENT)


def _usual_s(times: deque[float]) -> float:
    """The time that 90 % of the requests did not exceed; infinity if too few are known."""
    if len(times) < _KNOWN_MIN:
        return math.inf
    return sorted(times)[math.ceil(0.9 * len(times)) - 1]
