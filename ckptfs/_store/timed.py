"""Deadlines for a program that asks a store itself, in its own thread.

What a library (pyarrow, fsspec) does with a server that stays silent is up to it; some wait for
ever. So the call runs in a thread of its own, and who has called goes away when the time is over.
The thread is left behind: it holds up neither the end of the process, nor (``bounded``) without
limit others like it. What it works on belongs to it from then on.

**Reading content** has no time of its own: its limit counts from the last byte that came, because a
slow link is no failure. A call that is left behind is given up (``progress``), so that our own S3
client ends it at once.
"""

import contextvars
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import Pin, Store
from ckptfs._store.deadline import deadline_s, ends_at, left_s
from ckptfs._store.progress import Progress
from ckptfs.errors import StoreTimeout

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_S = 60.0
"""Longest wait for the answer to a small request, with all that the library tries meanwhile: as
long as a read of the daemon waits by default."""
LISTING_S = 600.0
"""Longest wait for a listing: a million objects are a thousand requests, one after the other."""
_BYTES_PER_S_MIN = 16 << 10
"""Of one request of many that share a slow link: a library does not say what has arrived."""


def within(limit_s: float, name: str, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """What `call` returns or raises, if it does so in `limit_s` seconds, and within the deadline of
    this thread (``deadline``), if it has one.

    Raises:
        StoreTimeout: It did not; it goes on in its thread. `name` is for the message.
    """
    limit_s = max(0.0, min(limit_s, left_s()))
    return _run(limit_s, limit_s, name, partial(call, *args, **more))


def while_bytes_come(limit_s: float, name: str, read: Callable[[], T]) -> T:
    """As `within`, but `limit_s` counts from the last byte that `read` says has come."""
    return _run(limit_s, math.inf, name, read)


def _run(silence_s: float, limit_s: float, name: str, call: Callable[[], T]) -> T:
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    progress = Progress()
    begun_s = time.monotonic()
    latest_s = min(begun_s + limit_s, deadline_s())

    def end_s() -> float:
        return min(max(begun_s, progress.last_s) + silence_s, latest_s)

    def run() -> None:
        try:
            with ends_at(end_s):
                outcome.put((progress.run(call), None))
        except BaseException as error:
            outcome.put((None, error))

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="ckptfs-store", daemon=True).start()
    while True:
        try:
            result, error = outcome.get(timeout=max(0.0, end_s() - time.monotonic()))
            break
        except Empty:
            if time.monotonic() < end_s():
                continue
            progress.give_up()
            raise StoreTimeout(
                f"{name}: no answer within {silence_s:.3g} s; check the endpoint and try again"
            ) from None
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType] - it is what `call` returned


class TimedStore:
    """A Store whose calls end within a time, by StoreTimeout if not otherwise: see `within`.

    `put` may take effect later, then. A buffer that `read_into` was given and has not filled may be
    written to later.
    """

    gives_up = False

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = store.name

    def list(self, files_max: int) -> Listing:
        """See Store.list."""
        return within(LISTING_S, self.name, self._store.list, files_max)

    def confirm(self, pin: Pin) -> Pin:
        """See Store.confirm."""
        return within(ANSWER_S, self.name, self._store.confirm, pin)

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        """See Store.read_into."""
        limit_s = ANSWER_S + len(buffer) / _BYTES_PER_S_MIN
        read = partial(self._store.read_into, pin, offset, buffer)
        return while_bytes_come(limit_s, self.name, read)

    def get(self, path: str) -> bytes | None:
        """See Store.get."""
        return within(ANSWER_S, self.name, self._store.get, path)

    def put(self, path: str, data: bytes) -> None:
        """See Store.put."""
        within(ANSWER_S, self.name, self._store.put, path, data)

    def find(self, path: str) -> ListedFile | None:
        """See Store.find."""
        return within(ANSWER_S, self.name, self._store.find, path)

    def close(self) -> None:
        """See Store.close."""
        self._store.close()
