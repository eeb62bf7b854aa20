"""Until when whoever has called a store waits for it.

A thread that waits in a store cannot be ended from outside: the daemon abandons it when its
deadline is over. So the thread knows that deadline beforehand, and ends by itself where the code is
ours (`s3client`); where it is a library's, it is counted (`bounded`).

A deadline can move: reading content may last as long as bytes come.

It is a context variable, because between the event loop and the socket there are a dozen calls that
have nothing to do with it.
"""

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline_s: ContextVar[Callable[[], float]] = ContextVar("deadline_s", default=lambda: math.inf)


@contextmanager
def ends_in(left_s: float) -> Generator[None]:
    """The calls in this context have no caller any more when `left_s` seconds are over."""
    end_s = time.monotonic() + left_s
    with ends_at(lambda: end_s):
        yield


@contextmanager
def ends_at(end_s: Callable[[], float]) -> Generator[None]:
    """The calls in this context have no caller any more at `end_s()`, which may move to a later
    time of `time.monotonic`."""
    token = _deadline_s.set(end_s)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def deadline_s() -> float:
    """The deadline of this thread's call now, of `time.monotonic`; infinity: there is none."""
    return _deadline_s.get()()


def left_s() -> float:
    """Seconds until then; negative when it is over."""
    return deadline_s() - time.monotonic()
