"""Answers of a server, whose reads end in time.

**The head** of an answer has to arrive before the caller's deadline, and within twice the longest
silence. So a server that sends interim answers for ever keeps no caller. The client's `Patience`
limits the silence before the first byte of the body.

**The body** may come slowly. The client never throws away bytes that keep coming, so the deadline
of an answer that `may_last` counts from the last byte. Its read ends after `silence_s` seconds
without a byte, or when less than `_PROGRESS_BYTES` come in twice that time.
"""

import http.client
import io
import math
import socket
import time
from typing import Any, NamedTuple, cast

from ckptfs._store.request_context import current_progress, deadline_s
from ckptfs._store.transport.errors import BrokenConnection
from ckptfs._store.transport.patience import Patience

_PROGRESS_BYTES = 4 << 10
"""The fewest bytes in twice the longest silence (6 s) that count as progress. At a lower speed, 16
connections together bring no block of 1 MiB within the default read deadline."""
_RECORD_BYTES = 16 << 10
"""The longest record of TLS (RFC 8446, section 5.1)."""
_BURST_S = 0.02
"""How long bytes that came may stay uncounted: shorter than any interval of those who look at the
count."""


class Silence(TimeoutError):
    """The server was silent for too long."""


class Limits(NamedTuple):
    """The limits for the reads of one answer.

    Attributes:
        first_s: The longest silence before the first byte of the body.
        silence_s: The longest silence after it.
        may_last: Whether the body may last longer than the caller's deadline while bytes come.
        patience: The patience that learns from the answer; None if the answer is not typical.
    """

    first_s: float
    silence_s: float
    may_last: bool = False
    patience: Patience | None = None


class Answer(http.client.HTTPResponse):
    """An answer with limits, whose bytes are `incoming`."""

    def __init__(self, limits: Limits, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self.incoming = Incoming(self.fp.detach(), sock, limits)
        self.fp = io.BufferedReader(cast("io.RawIOBase", self.incoming))

    def begin(self, *args: Any, **more: Any) -> None:
        """Read the head. http.client skips only the interim answer 100. This method skips the
        others (RFC 9110, 15.2, for example 103 Early Hints)."""
        super().begin(*args, **more)
        while 100 <= self.status < 200 and self.status != http.client.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin(*args, **more)
        # The fields that a cut head lacks would be taken to be absent.
        if self.incoming.has_ended:
            raise http.client.IncompleteRead(b"")
        self.incoming.is_head = False


class Incoming(io.RawIOBase):
    """The bytes of one answer as they come from the server by `sock`, whose timeout limits the
    silence. `raw` keeps `sock` open until the end of the answer."""

    def __init__(self, raw: Any, sock: socket.socket, limits: Limits) -> None:
        self._raw = raw
        self._sock = sock
        self._limits = limits
        self._longest_s = limits.first_s  # silence
        self._timeout_s = -1.0  # that of the socket; negative: it is not known
        self._deadline_s = deadline_s()
        self._begun_s = time.monotonic()
        self._progress = current_progress()
        self._counted_s = self._begun_s  # since when `_count` bytes came
        self._count = 0
        self._total = 0
        self._first_s = 0.0  # the longest silence until the body began
        self.is_head = True
        self._is_body = False
        self.has_ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        asked_s = time.monotonic()
        self._limit(asked_s)
        count, is_silent = self._receive(memoryview(buffer), asked_s)
        now_s = time.monotonic()
        self._total += count
        self._progress.came(count)
        if is_silent:
            raise self._silence(now_s - asked_s)
        self.has_ended = not count
        if not self._is_body:
            self._first_s = max(self._first_s, now_s - asked_s)
            if not self.is_head:
                self._body_begins(now_s)
        self._check_progress(count, now_s)
        return count

    def _receive(self, buffer: memoryview, asked_s: float) -> tuple[int, bool]:
        """Receive bytes, and return their number, and whether the server has been silent since.

        A call of `recv_into` with TLS brings one record, 16 KiB at most. So this method makes more
        of them before it lets its callers count the bytes, which takes longer than such a call.
        """
        receive, done, end_s = self._sock.recv_into, 0, asked_s + _BURST_S
        # A smaller buffer may be larger than what is left of the body (`io.BufferedReader`).
        may_last = self._is_body and len(buffer) > _RECORD_BYTES
        try:
            while done < len(buffer):
                count = receive(buffer[done:])
                done += count
                if not count or not may_last or time.monotonic() > end_s:
                    break
        except TimeoutError:
            return done, True
        return done, False

    def _limit(self, now_s: float) -> None:
        longest_s = self._longest_s
        if self._deadline_s - now_s < longest_s:
            longest_s = self._deadline_s - now_s
            if longest_s <= 0:
                raise TimeoutError("the time for the request is over")
        if longest_s != self._timeout_s:
            self._sock.settimeout(longest_s)
            self._timeout_s = longest_s

    def _body_begins(self, now_s: float) -> None:
        self._is_body = True
        self._counted_s, self._count = now_s, 0
        self._longest_s = self._limits.silence_s
        if self._limits.may_last:
            self._longest_s = min(self._longest_s, self._deadline_s - self._begun_s)
            self._deadline_s = math.inf

    def _check_progress(self, count: int, now_s: float) -> None:
        self._count += count
        elapsed_s = now_s - self._counted_s
        silence_s = self._limits.silence_s if self._is_body else self._limits.first_s
        if count and elapsed_s > 2 * silence_s:
            if self.is_head:
                raise TimeoutError(f"the head of the answer has not ended after {elapsed_s:.1f} s")
            if self._count < _PROGRESS_BYTES:
                raise TimeoutError(f"no more than {self._count} bytes in {elapsed_s:.1f} s")
            self._counted_s, self._count = now_s, 0

    def _silence(self, waited_s: float) -> Silence:
        if not self._is_body and self._limits.patience is not None:
            self._limits.patience.was_silent(waited_s)
        what = f"after {self._total} bytes nothing" if self._total else "no first byte"
        return Silence(f"{what} within {waited_s:.3g} s")

    def end(self) -> None:
        """Let the patience learn from the answer, which was read to its end."""
        if self._limits.patience is not None and self._total:
            self._limits.patience.answered(self._first_s)

    def close(self) -> None:
        self._raw.close()
        super().close()


def read_all(response: http.client.HTTPResponse, bytes_max: int) -> bytes:
    """The answer's body, or its first `bytes_max` bytes. Call it in the context of the request.
    Raises BrokenConnection if the body ends early, which `HTTPResponse.read` does not notice."""
    data = response.read(bytes_max)
    if response.length and len(data) < bytes_max:
        raise BrokenConnection(f"the answer ended {response.length} bytes early")
    return data


def read_into(response: http.client.HTTPResponse, buffer: memoryview) -> int:
    """Fill `buffer` with the answer's body, and return the number of bytes. Call it in the context
    of the request."""
    done = 0
    while done < len(buffer):
        count = response.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done
