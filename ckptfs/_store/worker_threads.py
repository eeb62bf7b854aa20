"""Threads that work until all is done, until one fails, or until their caller is interrupted.

If a work fails, or the caller is interrupted (KeyboardInterrupt), the requests of the other threads
end at once. `WorkerThreads.work` returns when no thread works any more.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from ckptfs._store.request_context import Progress
from ckptfs.errors import CkptfsError

Work = Callable[[], int]
"""A function that returns the bytes that it has done."""


class Ended(CkptfsError):
    """The work of a thread ends, because another thread has failed. Callers never see it."""


class Pace:
    """A limit of `rate` bytes per second for all threads together."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = threading.Lock()  # guards _free_s
        self._free_s = 0.0  # the time of `time.monotonic` when the next byte may go

    def delay_s(self, count: int) -> float:
        """The seconds to wait before the next `count` bytes."""
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(self._free_s, now_s)
            self._free_s = begin_s + count / self._rate
            return begin_s - now_s


class WorkerThreads:
    """`count` threads, whose requests send bytes at `pace`. `interrupt` is called when the work
    ends. It ends what the threads wait for besides their requests to a store."""

    def __init__(
        self,
        count: int,
        pace: Pace | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._threads = count
        self._pace = pace
        self._interrupt = interrupt
        self._ends = threading.Event()
        self._events: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._next = threading.Lock()  # guards the iterator of `work`

    def work(self, works: Iterator[Work], count: Callable[[int], None]) -> None:
        """Do all works. This thread calls `count` with the bytes of each. Raises the first
        error."""
        progress = [_Sending(self._pace, self._ends) for _ in range(self._threads)]
        running = self._threads
        with ThreadPoolExecutor(self._threads, "ckptfs-upload") as pool:
            try:
                for each in progress:
                    pool.submit(contextvars.copy_context().run, self._run, each, works)
                while running:
                    event = self._events.get()
                    if isinstance(event, BaseException):
                        raise event
                    if event is None:
                        running -= 1
                    else:
                        count(event)
            finally:
                self._ends.set()
                for each in progress:
                    each.give_up()
                self._interrupt()

    def report(self, length: int) -> None:
        """Report bytes of a work that goes on."""
        self._events.put(length)

    def check(self) -> None:
        """Raise Ended if the work is to end."""
        if self._ends.is_set():
            raise Ended("another part of the upload has failed")

    def _run(self, progress: "_Sending", works: Iterator[Work]) -> None:
        try:
            while not self._ends.is_set():
                with self._next:
                    work = next(works, None)
                if work is None:
                    break
                self._events.put(progress.run(work))
            self._events.put(None)
        except BaseException as error:
            self._events.put(error)


class _Sending(Progress):
    """The progress of the requests of one thread, which wait for their turn before they send."""

    def __init__(self, pace: Pace | None, ends: threading.Event) -> None:
        super().__init__()
        self._pace = pace
        self._ends = ends

    def goes(self, count: int) -> None:
        if self._pace is not None:
            self._ends.wait(self._pace.delay_s(count))
