"""The moment from which the times of a file tell its versions apart.

A filesystem takes the times of a file from a clock that ticks. Two writes within one tick leave the
same times, so equal times before and after a read do not prove that the bytes are of one version.
A read that begins when the tick is over is safe: each later write leaves other times.
"""

import time

TICK_S = 0.02
"""Twice the longest tick of Linux's coarse clock (CONFIG_HZ=100), which gives files their times."""
_SECONDS_S = 2.0
"""The longest tick of filesystems that keep whole seconds, which is FAT's. Others have one
second."""
_SKEW_S = 1.0
"""The largest difference between the clocks of this machine and the store for which a wait
works."""


def wait_until_settled(*stamps_ns: int) -> None:
    """Wait until a write to any of some files would leave another time than its one of `stamps_ns`.

    The wait is at most two seconds for all files together, and only for files that were written
    some moments ago. `stamps_ns` are in nanoseconds since the epoch, and 0 for a store without
    times.
    """
    now_s = time.time()
    wait_s = max((_wait_s(stamp_ns, now_s) for stamp_ns in stamps_ns), default=0.0)
    if wait_s > 0:
        time.sleep(wait_s)


def _wait_s(stamp_ns: int, now_s: float) -> float:
    tick_s = TICK_S if stamp_ns % 10**9 else _SECONDS_S
    return min(stamp_ns / 1e9 + tick_s + _SKEW_S - now_s, tick_s)


def is_same_time(one_ns: int, other_ns: int) -> bool:
    """Whether two answers of a store may mean the same modification time.

    A store may give whole seconds in one kind of answer and fractions in another. Fractions that
    went through a float, or that the daemon has told apart, differ by less than a microsecond.
    """
    if abs(one_ns - other_ns) < 1000:
        return True
    return (one_ns % 10**9 < 1000 or other_ns % 10**9 < 1000) and (
        one_ns // 10**9 == other_ns // 10**9
    )
