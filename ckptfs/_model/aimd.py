"""A limit of concurrent requests that follows what a server can answer in time.

The limit is halved after a timeout and grows by one after as many answers as there are requests
("additive increase, multiplicative decrease", as TCP does it: RFC 5681).
"""

import math


class AimdLimit:
    """The limit for one server. All times are of one clock. Threads have to share a lock.

    Attributes:
        limit: The most requests at once.

    Args:
        limit_min: The lowest limit after timeouts.
        limit_max: The limit at first, and the highest one later. Infinity means no limit until the
            first timeout.
    """

    def __init__(self, limit_min: float, limit_max: float = math.inf) -> None:
        self.limit = limit_max
        self._limit_min = limit_min
        self._limit_max = limit_max
        self._cut_s = -math.inf

    def answered(self) -> None:
        """Count a request that had all of its answer."""
        self.limit = min(self._limit_max, self.limit + 1 / self.limit)

    def timed_out(self, begun_s: float, now_s: float, running: float = math.inf) -> None:
        """Halve the limit, because a request that began at `begun_s` had no answer in time.

        The requests of one burst time out together, so a request that began before the last cut
        changes nothing. `running` is the number of requests that run now, with the one that failed.
        """
        if begun_s < self._cut_s:
            return
        self._cut_s = now_s
        self.limit = max(self._limit_min, min(self.limit, running) / 2)
