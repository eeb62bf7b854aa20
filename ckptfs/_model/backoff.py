"""Pauses between the tries of a request: each is longer than the last one, and jittered.

The jitter keeps clients that failed together from trying again together.
"""

import random
from typing import NamedTuple

_DOUBLINGS_MAX = 64
"""More of them make the pause no longer in practice, and a float overflows at some point."""


class Backoff(NamedTuple):
    """The rule for the pauses of one kind of request.

    Attributes:
        first_s: The longest pause after the first failure, in seconds.
        max_s: The longest pause of all, in seconds.
        factor: The ratio of a pause to the one before.
    """

    first_s: float
    max_s: float
    factor: float = 2.0

    def longest_s(self, failures: int) -> float:
        """The pause after that many failures (at least 1) without the jitter."""
        growth = self.factor ** min(failures - 1, _DOUBLINGS_MAX)
        return min(self.max_s, self.first_s * growth)

    def pause_s(self, failures: int) -> float:
        """The pause after that many failures: a random one of half to all of `longest_s`."""
        return self.longest_s(failures) * random.uniform(0.5, 1)
