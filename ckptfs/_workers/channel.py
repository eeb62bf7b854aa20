"""The daemon's end of a channel; see the package's text."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import msgspec

from ckptfs._store import progress
from ckptfs._workers.messages import (
    LENGTH_BYTES,
    MESSAGE_BYTES_MAX,
    Answer,
    Came,
    Done,
    Failed,
    Part,
    decode_answer,
    decode_part,
)

_KEPT_BYTES_MAX = 16 << 20
"""The most that `Config.span_bytes_max` can be."""
LOOK_S = 0.5
"""How often a call that waits looks at its worker."""
_PART_BYTES_MAX = 64 << 20
"""Of a part of a listing: its names have 8 KiB each at most."""


class Nonsense(Exception):
    """The worker has sent something that is no message, or has made the memory too short."""


class LeftBehind(TimeoutError):
    """The worker still works for a call that has no caller any more."""


class Channel:
    """One socket with its memory. One thread at a time uses it.

    Attributes:
        used_s: When it was last given back, of `time.monotonic`.
        deadline_s: When the call that was left behind in it should have ended.
    """

    def __init__(self) -> None:
        self._memory = os.memfd_create("ckptfs-channel", os.MFD_CLOEXEC)
        try:
            self._sock, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self._memory)
            raise
        self._wakes: tuple[socket.socket, socket.socket] | None = None
        self.used_s = 0.0
        self.deadline_s = 0.0

    def pass_to(self, control: socket.socket) -> None:
        """Give the worker its ends. Raises OSError."""
        with self._theirs:
            fds = [self._theirs.fileno(), self._memory]
            socket.send_fds(control, [b"channel"], fds, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """End it."""
        self._sock.close()
        self._theirs.close()
        os.close(self._memory)
        self._close_wakes()

    # -- calls

    def ask(
        self, text: bytes, deadline_s: Callable[[], float], look: Callable[[], None]
    ) -> Done | Failed | None:
        """Send a call and return its answer; None: the worker has died.

        Args:
            text: The call.
            deadline_s: Until when a caller waits, of `time.monotonic`. It is asked for again and
                again, because it may move while bytes come.
            look: Called each `LOOK_S` while there is no answer.

        Raises:
            TimeoutError: The call was given up before it was sent.
            LeftBehind: It was given up, or its deadline is over.
            Nonsense: The answer is none.
        """
        read = progress.current()
        if self._wakes is None:
            self._wakes = socket.socketpair()
        held, wake = self._wakes
        read.hold(held)
        try:
            try:
                self._sock.send(text)
            except OSError:
                return None
            return self._wait(wake, read, deadline_s, look)
        except LeftBehind:
            read.let_go()
            self._close_wakes()
            raise
        finally:
            read.let_go()

    def _wait(
        self,
        wake: socket.socket,
        read: progress.Progress,
        deadline_s: Callable[[], float],
        look: Callable[[], None],
    ) -> Done | Failed | None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            left_s = deadline_s() - time.monotonic()
            if left_s <= 0:
                raise LeftBehind("the deadline is over")
            ready = [fd for fd, _ in poll.poll(1000 * min(left_s, LOOK_S) + 1)]
            if self._sock.fileno() in ready:
                answer = self._receive()
                if not isinstance(answer, Came):
                    return answer
                read.came(answer.count)
            elif ready:
                raise LeftBehind("the call was given up")
            else:
                look()

    def _receive(self) -> Answer | None:
        try:
            text = self._sock.recv(MESSAGE_BYTES_MAX)
        except OSError:
            return None
        if not text:
            return None
        try:
            return decode_answer(text)
        except msgspec.MsgspecError as error:
            raise Nonsense(str(error)) from None

    def look_behind(self) -> bool | None:
        """Whether the call that was left behind has ended; None: its worker has died. Raises
        Nonsense."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while poll.poll(0):
            answer = self._receive()
            if answer is None:
                return None
            if not isinstance(answer, Came):
                return True
        return False

    def _close_wakes(self) -> None:
        for end in self._wakes or ():
            end.close()
        self._wakes = None

    # -- the memory

    @property
    def is_large(self) -> bool:
        """Whether it takes more memory than any read needs: it had a long listing."""
        return os.fstat(self._memory).st_size > _KEPT_BYTES_MAX

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill `buffer` from that place on. Raises Nonsense."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._memory, [buffer[done:]], offset + done)
            if not count:
                raise Nonsense("the memory is too short")
            done += count

    def data(self, size: int, offset: int = 0) -> bytes:
        """So many bytes from that place on. Raises Nonsense."""
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def put(self, data: bytes) -> None:
        """Have the memory begin with `data`."""
        rest, done = memoryview(data), 0
        while rest:
            count = os.pwrite(self._memory, rest, done)
            done, rest = done + count, rest[count:]

    def parts(self, size: int) -> Iterator[Part]:
        """The parts of the listing that lies in the first `size` bytes. Raises Nonsense."""
        offset = 0
        while offset < size:
            length = int.from_bytes(self.data(LENGTH_BYTES, offset), "little")
            if length > _PART_BYTES_MAX:
                raise Nonsense(f"a part of a listing has {length} bytes")
            text = self.data(length, offset + LENGTH_BYTES)
            offset += LENGTH_BYTES + length
            try:
                yield decode_part(text)
            except msgspec.MsgspecError as error:
                raise Nonsense(str(error)) from None
