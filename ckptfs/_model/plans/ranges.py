"""Sets of byte positions, as ascending ranges that do not touch."""

from bisect import bisect_right
from collections.abc import Iterable

Ranges = list[tuple[int, int]]
"""(start, stop) pairs."""


def union(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """All positions that lie in one of the `pairs`."""
    result: Ranges = []
    for start, stop in sorted(pairs):
        if start >= stop:
            continue
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(stop, result[-1][1])
        else:
            result.append((start, stop))
    return result


def length(ranges: Ranges) -> int:
    """Number of positions."""
    return sum(stop - start for start, stop in ranges)


def within(ranges: Ranges, start: int, stop: int) -> int:
    """Number of the positions that lie in [start, stop)."""
    return length(inside(ranges, start, stop))


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """The positions of `ranges` that are not in `others`."""
    result: Ranges = []
    position = 0
    for start, stop in ranges:
        while position < len(others) and others[position][1] <= start:
            position += 1
        at = position
        while at < len(others) and others[at][0] < stop:
            first, last = others[at]
            if start < first:
                result.append((start, first))
            start = max(start, last)
            at += 1
        if start < stop:
            result.append((start, stop))
    return result


def inside(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The positions that lie in [start, stop)."""
    found: Ranges = []
    position = max(0, bisect_right(ranges, (start, start)) - 1)
    while position < len(ranges) and ranges[position][0] < stop:
        first, last = ranges[position]
        if max(first, start) < min(last, stop):
            found.append((max(first, start), min(last, stop)))
        position += 1
    return found
