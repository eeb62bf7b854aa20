"""The ends of clients that carry blocks to the daemon, or from it: a patient connection, and memory
that both see."""

import mmap
import os

from ckptfs._client import client
from ckptfs._client.connection import Connection
from ckptfs._config.load import load_config

_ANSWER_S = 150.0
"""Longest wait for an answer of the daemon, more than twice its default read deadline."""


def connect() -> Connection:
    """Connect to the daemon. Raises NoDaemon, DaemonError."""
    return client.connect(load_config(), _ANSWER_S)


class SharedMemory:
    """Memory of `size` bytes, and its descriptor `fd`, which this owns. Without `fd`, the memory is
    new, and the descriptor goes along with requests."""

    def __init__(self, size: int, fd: int = -1) -> None:
        self.fd = fd if fd >= 0 else os.memfd_create("ckptfs-blocks", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, size)  # so that it counts as this process's memory
            self.memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Close the descriptor, if it is open. The memory ends with its last view."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
