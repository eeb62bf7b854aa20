"""Until when whoever has called a store waits for it.

A thread that waits in a store cannot be ended from outside: the daemon abandons it when its
deadline is over. So the thread knows that deadline beforehand, and ends by itself where the code is
ours (`s3client`); where it is a library's, it is counted (`bounded`).

It is a context variable, because between the event loop and the socket there are a dozen calls that
have nothing to do with it.
"""

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=math.inf)


@contextmanager
def ends_in(left_s: float) -> Generator[None]:
    """Nobody waits for the calls in this context any more when `left_s` seconds are over."""
    token = _deadline_s.set(time.monotonic() + left_s)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def deadline_s() -> float:
    """The deadline of this thread's call, of `time.monotonic`; infinity: there is none."""
    return _deadline_s.get()


def left_s() -> float:
    """Seconds until then; negative when it is over."""
    return _deadline_s.get() - time.monotonic()
