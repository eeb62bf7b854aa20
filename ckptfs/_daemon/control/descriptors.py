"""The descriptor that comes along with a message on the control socket (SCM_RIGHTS, unix(7))."""

import array
import contextlib
import os
import socket
from collections.abc import Generator

import trio

from ckptfs.errors import ProtocolError

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
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor that no request has used."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
