"""The reads of one file, to be asked for by their bytes. There can be 20,000 of them, and as many
tensors."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from ckptfs._model import ranges
from ckptfs._model.trace import Access


class Reads:
    """What was read of one file.

    Args:
        accesses: At least one.

    Attributes:
        read: All bytes.
        began_s: When the first of them was read.
    """

    def __init__(self, accesses: Iterable[Access]) -> None:
        self._by_start = sorted(accesses, key=lambda access: access.start)
        self._starts = [access.start for access in self._by_start]
        self._stops_max = list(accumulate((a.stop for a in self._by_start), max))
        self.read = ranges.union((a.start, a.stop) for a in self._by_start)
        self.began_s = min(access.began_s for access in self._by_start)

    def overlapping(self, start: int, stop: int) -> list[Access]:
        """The accesses to some of these bytes."""
        found: list[Access] = []
        position = bisect_left(self._starts, stop) - 1
        while position >= 0 and self._stops_max[position] > start:
            access = self._by_start[position]
            if access.stop > start:
                found.append(access)
            position -= 1
        return found
