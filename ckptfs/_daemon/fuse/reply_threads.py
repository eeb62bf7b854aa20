"""Threads that copy long replies to the kernel.

A reply to a read is one writev(2), in which the kernel copies the bytes into the page cache of the
mount. That takes 0.25 s per GiB, two thirds of the event loop's work for a cold read. Bytes of the
cache's disk are copied once more before, out of the page cache. These calls do not need the
interpreter's lock, so on a node with enough cores threads make them.

Only the bytes leave the event loop: it has decided the reply and counted it. It lends the memory of
the reply to a thread (`MemoryReads.lend`), and takes it back after the call. So no span and no
other reply uses that memory meanwhile. If a copy out of the page cache fails
(``cache.page_copies``), the thread does not reply, and the event loop begins the read again.

A thread costs a switch for each reply. On two cores a cold read then takes 7 % longer, so there are
no threads below `_CORES_MIN` cores.
"""

import contextlib
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Literal, NamedTuple, TypeAlias

import trio

from ckptfs._daemon.cache.memory_reads import MemoryReads
from ckptfs._daemon.cache.page_copies import Found, Loan

log = logging.getLogger(__name__)

Parts: TypeAlias = "list[bytes | memoryview]"

_CORES_MIN: Final = 4
_CORES_PER_THREAD: Final = 8
_THREADS_MAX: Final = 4
"""Four threads copy 16 GB/s, more than the interpreter's lock permits the daemon to decide on."""
_WAITING_MAX: Final = 8
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


class _Reply(NamedTuple):
    """A reply of a thread: the header, what comes behind it, and its memory.

    Attributes:
        read_again: A function for the event loop that begins the read again.
    """

    header: bytes
    found: Found
    loan: Loan
    read_again: Callable[[], None]


class ReplyThreads:
    """`count` threads that write replies to `fuse_fd`. The methods belong to the event loop.

    The threads start with the first reply.
    """

    def __init__(self, fuse_fd: int, count: int, reads: MemoryReads) -> None:
        self._fd = fuse_fd
        self._count = count
        self._reads = reads
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[_Reply | None] = SimpleQueue()
        # Loans to be taken back: of files whose copies have run, and of memory that was written.
        self._copied: deque[Loan] = deque()
        self._written: deque[Loan] = deque()
        self._under_way = 0

    @property
    def has_time(self) -> bool:
        """Whether a thread has time for one more reply."""
        return self._under_way < self._count * _WAITING_MAX

    def send(self, header: bytes, found: Found, read_again: Callable[[], None]) -> None:
        """Have a thread run the copies of a reply, and write it.

        If a copy fails, the event loop calls `read_again` instead.
        """
        if not self._threads:
            token = trio.lowlevel.current_trio_token()
            for _ in range(self._count):
                thread = threading.Thread(
                    target=self._run, args=(token,), name="ckptfs-reply", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._under_way += 1
        self._queue.put(_Reply(header, found, self._reads.lend(found), read_again))

    def take_back(self) -> None:
        """Take back what the threads need no more, and may close objects. A loan of a file ends
        before its reply is written, so no reply that a program has keeps an object open."""
        while self._copied:
            self._reads.take_back(self._copied.popleft())
        while self._written:
            self._reads.take_back(self._written.popleft())
            self._under_way -= 1

    def close(self) -> None:
        """End the threads, after they have written what they have."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.take_back()

    def _run(self, token: trio.lowlevel.TrioToken) -> None:
        while (reply := self._queue.get()) is not None:
            try:
                is_copied = all(copy.run() for copy in reply.found.copies)
            except Exception:  # it must not end the thread
                log.exception("unexpected error while copying a reply")
                is_copied = False
            if is_copied:
                self._copied.append(Loan([], reply.loan.entries))
                write_message(self._fd, [reply.header, *reply.found.views])
                self._written.append(Loan(reply.loan.memory, []))
            else:
                with contextlib.suppress(trio.RunFinishedError):  # the event loop has ended
                    token.run_sync_soon(self._begin_again, reply)
            del reply  # a thread that waits must not keep the memory

    def _begin_again(self, reply: _Reply) -> None:
        for copy in reply.found.copies:
            self._reads.note_failed_copy(copy)
        self._reads.take_back(reply.loan)
        self._under_way -= 1
        reply.read_again()
