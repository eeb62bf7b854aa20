"""Threads that copy long replies to the kernel.

A reply to a read is one writev(2), in which the kernel copies the bytes into the page cache of the
mount. That takes 0.25 s per GiB, two thirds of the event loop's work for a cold read. The call does
not need the interpreter's lock, so on a node with enough cores threads make it.

Only the bytes leave the event loop: it has decided the reply and counted it. It lends the memory of
the reply to a thread (`Buffers.lend`), and takes it back after the call, so no span and no other
reply uses that memory meanwhile.

A thread costs a switch for each reply. On two cores a cold read then takes 7 % longer, so there are
no threads below `_CORES_MIN` cores.
"""

import errno
import logging
import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import Final, Literal, TypeAlias

from ckptfs._daemon.cache.buffer_pool import Buffers, Lent, Owner

log = logging.getLogger(__name__)

Parts: TypeAlias = "list[bytes | memoryview]"

_CORES_MIN: Final = 4
_CORES_PER_THREAD: Final = 8
_THREADS_MAX: Final = 4
"""Four threads copy 16 GB/s, more than the interpreter's lock permits the daemon to decide on."""
_WAITING_MAX: Final = 4
"""The replies that wait or are copied, for each thread. The event loop sends further ones itself,
so the memory that is lent stays bounded."""


def threads_for(setting: int | Literal["auto"], cores: int) -> int:
    """The number of threads that the setting `reply_threads` stands for with so many cores."""
    if setting != "auto":
        return setting
    return 0 if cores < _CORES_MIN else min(_THREADS_MAX, 1 + cores // _CORES_PER_THREAD)


def write_message(fuse_fd: int, parts: Parts) -> bool:
    """Write a message to the kernel. Returns whether the kernel has taken it."""
    try:
        os.writev(fuse_fd, parts)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            log.error("the daemon cannot answer a FUSE request: %s", error)
        return False
    return True


class ReplyThreads:
    """`count` threads that write messages to `fuse_fd`. The methods belong to the event loop.

    The threads start with the first message.
    """

    def __init__(self, fuse_fd: int, count: int, buffers: Buffers[Owner]) -> None:
        self._fd = fuse_fd
        self._count = count
        self._buffers = buffers
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[tuple[Parts, Lent] | None] = SimpleQueue()
        self._written: deque[Lent] = deque()  # by the threads, to be taken back
        self._under_way = 0

    def send(self, parts: Parts) -> bool:
        """Have a thread write a message. Returns False if no thread has time for it."""
        self.take_back()
        if self._under_way >= self._count * _WAITING_MAX:
            return False
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._write, name="ckptfs-reply", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._under_way += 1
        self._queue.put((parts, self._buffers.lend(parts)))
        return True

    def take_back(self) -> None:
        """Let the memory of written messages be used again."""
        while self._written:
            self._buffers.take_back(self._written.popleft())
            self._under_way -= 1

    def close(self) -> None:
        """End the threads, after they have written what they have."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.take_back()

    def _write(self) -> None:
        while (message := self._queue.get()) is not None:
            parts, lent = message
            write_message(self._fd, parts)
            self._written.append(lent)
            del message, parts, lent  # a thread that waits must not keep the memory
