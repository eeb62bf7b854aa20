"""The descriptors that come and go with messages on the control socket (SCM_RIGHTS, unix(7)).

A client's descriptor is closed in a thread. It may be that of a file in this daemon's own mount.
Then close(2) waits for the answer to a FUSE request, which the event loop gives.
"""

import array
import contextlib
import fcntl
import os
import socket
from collections.abc import Generator

import trio

from ckptfs.errors import ProtocolError

_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4
"""fcntl(2): F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW, so the size of a memfd stays the same.
Python's fcntl has the names, but not on every platform that is type-checked."""

_SPACE = socket.CMSG_SPACE(array.array("i").itemsize)


class Passed:
    """The last descriptor that a client has passed along and no request has used yet. A further one
    closes the one before it."""

    def __init__(self) -> None:
        self._fd = -1

    async def receive(self, stream: trio.SocketStream, count: int) -> bytes:
        """Receive as `stream.receive_some` does, and keep the descriptor that comes along."""
        flags = socket.MSG_CMSG_CLOEXEC
        try:
            data, ancillary, _, _ = await stream.socket.recvmsg(count, _SPACE, flags)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                for fd in fds:
                    self.close()
                    self._fd = fd
        return data

    @contextlib.contextmanager
    def used(self) -> Generator[int]:
        """The descriptor, which the context closes at its end. Raises ProtocolError without one."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise ProtocolError("the request needs a descriptor that is passed along")
        try:
            yield fd
        finally:
            _close_in_thread(fd)

    def close(self) -> None:
        """Close the descriptor that no request has used."""
        if self._fd >= 0:
            _close_in_thread(self._fd)
            self._fd = -1


def _close_in_thread(fd: int) -> None:
    trio.lowlevel.start_thread_soon(lambda: os.close(fd), lambda _: None)


class Lent:
    """Memory of the daemon for a client, which writes to it.

    The daemon takes no descriptor from users other than root and its own, because the end of a
    foreign descriptor can take for ever (a file system of that user). A client of any user may have
    one of the daemon's.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._is_due = False

    def make(self, size: int) -> None:
        """Make the memory. The next message brings it to the client. Raises ProtocolError for a
        second call, because descriptors that no client takes count against the daemon's user."""
        if self._fd >= 0:
            raise ProtocolError("this connection has borrowed memory before")
        self._fd = os.memfd_create("ckptfs-lent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, _F_ADD_SEALS, _SEALS)
        self._is_due = True

    @property
    def fd(self) -> int:
        """Its descriptor. Raises ProtocolError if the client has borrowed none."""
        if self._fd < 0:
            raise ProtocolError("the request needs memory that was borrowed before")
        return self._fd

    async def send(self, stream: trio.SocketStream, message: bytes) -> None:
        """Send a message, and the descriptor with its first byte if that is due."""
        if self._is_due:
            self._is_due = False
            along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._fd]))]
            try:
                message = message[await stream.socket.sendmsg([message], along) :]
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
        await stream.send_all(message)

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
