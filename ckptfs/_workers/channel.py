"""The daemon's end of a channel; see the package's docstring."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import msgspec

from ckptfs._os.write_all import pwrite_all
from ckptfs._store.request_context import Progress, current_progress
from ckptfs._workers import messages

_KEPT_BYTES_MAX = 16 << 20
"""The highest value of `Config.span_bytes_max`."""
LOOK_S = 0.5
"""The time between two checks of the worker while a call waits."""
_PART_BYTES_MAX = 64 << 20
"""The longest part of a listing, whose names have 8 KiB each at most."""


class Nonsense(Exception):
    """The worker has sent an invalid message, or has made the memory too short."""


class LeftBehind(TimeoutError):
    """The worker still works for a call whose caller has gone."""


class Channel:
    """One socket with its memory. One thread at a time uses it.

    Attributes:
        used_s: The time of `time.monotonic` when it was last given back.
        deadline_s: The time when the call that was left behind in it should have ended.
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
            socket.send_fds(control, [b"channel"], [self._theirs.fileno(), self._memory])

    def close(self) -> None:
        """Close the socket and the memory."""
        self._sock.close()
        self._theirs.close()
        os.close(self._memory)
        self._close_wakes()

    # -- calls

    def ask(
        self, text: bytes, deadline_s: Callable[[], float], look: Callable[[], None]
    ) -> messages.Done | messages.Failed | None:
        """Send a call and return its answer; None if the worker has died.

        Args:
            text: The encoded call.
            deadline_s: A function for the caller's deadline, a time of `time.monotonic`. It is
                called repeatedly, because the deadline may move while bytes come.
            look: A function that is called each `LOOK_S` while the call waits.

        Raises:
            TimeoutError: The caller gave the call up before it was sent.
            LeftBehind: The caller gave the call up, or its deadline is over.
            Nonsense: The answer is not valid.
        """
        read = current_progress()
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
        finally:
            if read.let_go():  # also a read that was given up when its answer had arrived
                self._close_wakes()

    def _wait(
        self,
        wake: socket.socket,
        read: Progress,
        deadline_s: Callable[[], float],
        look: Callable[[], None],
    ) -> messages.Done | messages.Failed | None:
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
                if not isinstance(answer, messages.Came):
                    return answer
                read.came(answer.count)
            elif ready:
                raise LeftBehind("the call was given up")
            else:
                look()

    def _receive(self) -> messages.Answer | None:
        try:
            text = self._sock.recv(messages.MESSAGE_BYTES_MAX)
        except OSError:
            return None
        if not text:
            return None
        try:
            return messages.decode_answer(text)
        except msgspec.MsgspecError as error:
            raise Nonsense(str(error)) from None

    def look_behind(self) -> bool | None:
        """Whether the call that was left behind has ended; None if its worker has died. Raises
        Nonsense."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while poll.poll(0):
            answer = self._receive()
            if answer is None:
                return None
            if not isinstance(answer, messages.Came):
                return True
        return False

    def _close_wakes(self) -> None:
        for end in self._wakes or ():
            end.close()
        self._wakes = None

    # -- the memory

    @property
    def is_large(self) -> bool:
        """Whether the memory is larger than any read needs, after a long listing."""
        return os.fstat(self._memory).st_size > _KEPT_BYTES_MAX

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill `buffer` from the memory at `offset`. Raises Nonsense."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._memory, [buffer[done:]], offset + done)
            if not count:
                raise Nonsense("the memory is too short")
            done += count

    def data(self, size: int, offset: int = 0) -> bytes:
        """The `size` bytes of the memory at `offset`. Raises Nonsense."""
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def put(self, data: bytes) -> None:
        """Write `data` to the beginning of the memory."""
        pwrite_all(self._memory, data, 0)

    def parts(self, size: int) -> Iterator[messages.Part]:
        """The parts of the listing in the first `size` bytes. Raises Nonsense."""
        offset = 0
        while offset < size:
            length = int.from_bytes(self.data(messages.LENGTH_BYTES, offset), "little")
            if length > _PART_BYTES_MAX:
                raise Nonsense(f"a part of a listing has {length} bytes")
            text = self.data(length, offset + messages.LENGTH_BYTES)
            offset += messages.LENGTH_BYTES + length
            try:
                yield messages.decode_part(text)
            except msgspec.MsgspecError as error:
                raise Nonsense(str(error)) from None
