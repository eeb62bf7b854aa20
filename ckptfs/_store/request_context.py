"""The context of a request to a store: how long its caller waits, and how far the request is.

Both are context variables, because a dozen unrelated calls lie between the event loop and the
socket.

**The deadline.** Nothing can end a thread that waits in a store: the daemon abandons the thread
when the caller's deadline is over. So the thread knows the deadline, and our own clients end by
themselves. A library does not look at it, so ``wrappers.BoundedStore`` counts the calls that are
late. A deadline can move: a read of content may last as long as bytes come.

**The progress.** A caller that reads in another thread makes a `Progress` and runs the read in it.
Our own clients report to it what comes from the socket, and end at once when the caller gives the
read up. A library reports nothing.
"""

import math
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

# -- the deadline

_deadline_s: ContextVar[Callable[[], float]] = ContextVar("deadline_s", default=lambda: math.inf)


@contextmanager
def ends_in(left_s: float) -> Generator[None]:
    """Give the calls in this context a deadline in `left_s` seconds."""
    end_s = time.monotonic() + left_s
    with ends_at(lambda: end_s):
        yield


@contextmanager
def ends_at(end_s: Callable[[], float]) -> Generator[None]:
    """Give the calls in this context the deadline `end_s()`, a time of `time.monotonic` that may
    move to a later one."""
    token = _deadline_s.set(end_s)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def deadline_s() -> float:
    """The deadline of this thread's call as of now, a time of `time.monotonic`; infinity without a
    deadline."""
    return _deadline_s.get()()


def left_s() -> float:
    """The seconds until the deadline; negative after it."""
    return deadline_s() - time.monotonic()


# -- the progress


class Progress:
    """The progress of one read.

    Attributes:
        count: The bytes that came so far, with those of the answer's head.
        body_count: The bytes of the answer's body that came so far. A head that does not end is not
            progress.
        is_in_head: Whether the next bytes are those of an answer's head.
        first_s: The seconds until the first byte came; 0 before that.
        last_s: The time of `time.monotonic` when the last byte of the body came; 0 before that.
    """

    def __init__(self) -> None:
        self.count = 0
        self.body_count = 0
        self.is_in_head = False
        self.first_s = 0.0
        self.last_s = 0.0
        self._begun_s = time.monotonic()
        self._lock = threading.Lock()  # guards the two below
        self._sock: socket.socket | None = None
        self._is_given_up = False

    def run(self, read: Callable[[], T]) -> T:
        """Run `read` in this thread, with this object as its `current_progress`."""
        token = _progress.set(self)
        try:
            return read()
        finally:
            _progress.reset(token)

    def give_up(self) -> None:
        """End the read from another thread, because its caller waits no longer."""
        with self._lock:
            self._is_given_up = True
            if self._sock is not None:
                # The method of an SSLSocket would leave the connection open, but unencrypted.
                with suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def hold(self, sock: socket.socket) -> None:
        """Note the socket that the read waits for from now on. Raises TimeoutError if the caller
        has given the read up."""
        with self._lock:
            if self._is_given_up:
                raise TimeoutError("its caller has given the request up")
            self._sock = sock

    def let_go(self) -> bool:
        """Forget the socket; call this before the socket is closed or serves another read.

        Returns whether the caller has given the read up, which may have shut down the socket.
        """
        with self._lock:
            self._sock = None
            return self._is_given_up

    def goes(self, count: int) -> None:
        """Note that `count` bytes of the request's body are about to be sent. A subclass may wait
        here."""

    def came(self, count: int) -> None:
        """Note that `count` more bytes came."""
        if not count:
            return
        now_s = time.monotonic()
        if not self.count:
            self.first_s = now_s - self._begun_s
        self.count += count
        if not self.is_in_head:
            self.last_s = now_s
            self.body_count += count


_progress: ContextVar[Progress] = ContextVar("progress")


def current_progress() -> Progress:
    """The progress of this thread's read; a new object if no caller has made one."""
    return _progress.get(None) or Progress()
