"""How fast a store answers, and when a request is so slow that a second one pays. Pure decisions.

A few of a store's answers take far longer than the others: a lost packet, a server that is busy or
about to die. A second request for the same range, on another connection, most likely is as fast as
the others are (Dean and Barroso, "The Tail at Scale", 2013; Amazon S3 performance guidelines,
"retries for latency-sensitive applications"). Two things say that a request is slow:

- it has brought nothing yet, after `_FAR` times the time in which nine of ten others had their
  first byte;
- it has brought something, but at its rate so far it needs `_FAR` times the time in which nine of
  ten others of its size were done. So one that stalls is noticed soon at its beginning and late at
  its end, where a second request could hardly overtake it.

Nine of ten, because of those that are remembered some have stalled themselves.

**An overloaded store** must not get more to do. Each transfer earns `_SHARE` of a second request,
so there is never more than that; where everything becomes slow, so does the measure; and after an
error that can pass all that was earned is lost.
"""

import math
from collections import deque

_FAR = 3
"""With 2, one of 100 requests of an ordinary sequential read was made again where the store shared
two busy cores with everything else; with 3 it was one of 300, and one of random reads never."""
_SHARE = 0.05
"""Second requests per transfer, at most: "The Tail at Scale" adds as much."""
_EARNED_MAX = 5.0
"""For stalls that come together."""
_RECENT = 100
"""Times that are remembered of each kind."""
_KNOWN_MIN = 20
"""With fewer nobody knows what is usual. The first second request is earned by then, too."""
_FLOOR_S = 0.1
"""Nobody suffers from less; it is also what a busy node takes now and then to look at an answer."""


class Pace:
    """Of one store."""

    def __init__(self) -> None:
        self._first_s = _Times()
        self._whole_s: dict[int, _Times] = {}
        self._earned = 0.0

    @property
    def has_earned(self) -> bool:
        """Whether a second request may begin."""
        return self._earned >= 1

    def took(self, length: int, first_s: float, whole_s: float) -> None:
        """A transfer of `length` bytes had its first one after `first_s`, all after `whole_s`."""
        self._first_s.add(first_s)
        self._whole_s.setdefault(length.bit_length(), _Times()).add(whole_s)
        self._earned = min(_EARNED_MAX, self._earned + _SHARE)

    def is_slow(self, length: int, done: int, elapsed_s: float) -> bool:
        """Whether a request is slow that has brought `done` of `length` bytes."""
        if elapsed_s < _FLOOR_S:
            return False
        if not done:
            return elapsed_s > _FAR * self._first_s.most()
        times = self._whole_s.get(length.bit_length())
        most_s = times.most() if times else math.inf
        return elapsed_s > most_s and elapsed_s * length > _FAR * most_s * done

    def spend(self) -> None:
        """A second request begins; it has to be earned."""
        self._earned -= 1

    def failed(self) -> None:
        """There was an error that can pass."""
        self._earned = 0.0


class _Times:
    """The last times of one kind, in seconds."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, time_s: float) -> None:
        self._recent.append(time_s)

    def most(self) -> float:
        """What 90 % of them are not longer than; infinity: too few are known."""
        if len(self._recent) < _KNOWN_MIN:
            return math.inf
        return sorted(self._recent)[math.ceil(0.9 * len(self._recent)) - 1]
