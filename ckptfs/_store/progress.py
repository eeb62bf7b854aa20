"""How far a read is, and whether anybody still waits for it.

Whoever reads in another thread makes a `Progress`, and runs the read in it. What reads from a
socket says so there, and ends at once when it is given up; a library's call knows nothing of it. It
is a context variable for the same reason as the `deadline`.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """One read.

    Attributes:
        count: Bytes that came so far, those of the answer's head included.
        body_count: Those of the answer's body: a head that does not end is no progress.
        first_s: Seconds until the first of them came; 0: none did.
        last_s: When the last byte of the body came, by `time.monotonic`; 0: none did.
    """

    def __init__(self) -> None:
        self.count = 0
        self.body_count = 0
        self._is_in_head = False
        self.first_s = 0.0
        self.last_s = 0.0
        self._begun_s = time.monotonic()
        self._lock = threading.Lock()  # guards the two below
        self._sock: socket.socket | None = None
        self._is_given_up = False

    def run(self, read: Callable[[], T]) -> T:
        """Run `read`, in this thread, as the one that is meant here."""
        token = _current.set(self)
        try:
            return read()
        finally:
            _current.reset(token)

    def give_up(self) -> None:
        """Nobody waits for it any more: end it, from another thread."""
        with self._lock:
            self._is_given_up = True
            if self._sock is not None:
                # Not the method of an SSLSocket, which goes on unencrypted.
                with suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def hold(self, sock: socket.socket) -> None:
        """The read waits for `sock` from now on. Raises TimeoutError where it was given up."""
        with self._lock:
            if self._is_given_up:
                raise TimeoutError("nobody waits for the request any more")
            self._sock = sock

    def let_go(self) -> None:
        """The read has no socket any more: to be called before that is closed, or another's."""
        with self._lock:
            self._sock = None

    def expect_head(self) -> None:
        """The bytes that come from now on are those of an answer's head."""
        self._is_in_head = True

    def expect_body(self) -> None:
        """The bytes that come from now on are those of an answer's body."""
        self._is_in_head = False

    def came(self, count: int) -> None:
        """So many more bytes came."""
        if not count:
            return
        now_s = time.monotonic()
        if not self.count:
            self.first_s = now_s - self._begun_s
        self.count += count
        if not self._is_in_head:
            self.last_s = now_s
            self.body_count += count


_current: ContextVar[Progress] = ContextVar("progress")


def current() -> Progress:
    """That of this thread's read; where nobody asked for it, one that nobody looks at."""
    return _current.get(None) or Progress()
