"""A limit on the threads of a program that hang in a library.

What pyarrow or an fsspec package does with a server that stays silent is up to it; some wait for
ever. A program that asks a store itself has a deadline and goes on then (``timed``). The thread
cannot be ended, and stays until the library returns. Such threads are counted here, and a store
that has too many gets no more. A daemon needs no such limit: libraries run in processes of their
own there, which can be ended (``ckptfs._workers``).
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import Pin, Store
from ckptfs._store.deadline import deadline_s
from ckptfs._store.requests import Kind, counted
from ckptfs.errors import StoreTimeout

OVERDUE_MAX = 8
"""Calls of one store that have not ended when their callers' deadline was over. As many new ones
can still be tried, in case that the store is back and only the old connections hang."""


class BoundedStore:
    """A Store that has at most `OVERDUE_MAX` calls in `store` whose deadline is over.

    Further ones raise StoreTimeout, until one of those returns.
    """

    gives_up = False

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = store.name
        self._lock = threading.Lock()  # guards _deadlines_s; never held during IO
        self._deadlines_s: dict[object, float] = {}  # of the calls that run now

    @contextmanager
    def _call(self, kind: Kind) -> Generator[None]:
        this, now_s = object(), time.monotonic()
        with self._lock:
            overdue = sum(end_s < now_s for end_s in self._deadlines_s.values())
            if overdue < OVERDUE_MAX:
                self._deadlines_s[this] = deadline_s()
        if overdue >= OVERDUE_MAX:
            raise StoreTimeout(
                f"{self.name}: {overdue} earlier requests have never ended; check the endpoint, "
                "and if it answers, detach the checkpoint and attach it again"
            )
        try:
            with counted(kind):
                yield
        finally:
            with self._lock:
                del self._deadlines_s[this]

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        with self._call("list"):
            return self._store.list(files_max)

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        with self._call("head"):
            return self._store.confirm(pin)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
        with self._call("read"):
            return self._store.read_into(pin, offset, buffer)

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        with self._call("get"):
            return self._store.get(path)

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        with self._call("put"):
            self._store.put(path, data)

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        with self._call("head"):
            return self._store.find(path)

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
