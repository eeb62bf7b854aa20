"""Stores around a store: with deadlines, with a limit on stuck calls, with renewed credentials.

**Deadlines** are for a program that reads a store itself, in its own thread. A library (pyarrow,
fsspec) decides what it does with a silent server, and some wait for ever. So `within` runs the call
in a thread of its own, and the caller leaves when the time is over. The thread stays behind, and
keeps what it works on. It does not hold up the end of the process.

A read of content has no time of its own: its limit counts from the last byte that came, because a
slow link is not a failure. The caller gives up a read that it leaves behind (see
``request_context.Progress``), so our own clients end it at once.

**Stuck calls.** No program can end a thread that a library keeps. `BoundedStore` counts such
threads, and a store that has too many of them gets no more. A daemon needs no such limit, because
its libraries run in processes of their own, which it can end (``ckptfs._workers``).
"""

import contextvars
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

from ckptfs._model.manifest import ListedFile, Listing
from ckptfs._store.base import Method, Pin, Store
from ckptfs._store.credentials import SecretFile
from ckptfs._store.request_context import Progress, deadline_s, ends_at, left_s
from ckptfs._store.request_metrics import KIND_OF, counted
from ckptfs._store.uploads import HasUploads, Uploads
from ckptfs.errors import AccessDenied, StoreTimeout

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_S = 60.0
"""The longest wait for the answer to a small request, with all tries of the library. A read of the
daemon waits as long by default."""
LISTING_S = 600.0
"""The longest wait for a listing: a million objects are a thousand requests, one after the
other."""
OVERDUE_MAX = 8
"""The most calls of one store that still run after their callers' deadlines. As many new calls can
be tried later, in case the store is back and only the old connections hang."""
_BYTES_PER_S_MIN = 16 << 10
"""The lowest speed of one request of many that share a slow link, because a library does not say
what has arrived."""


def within(limit_s: float, name: str, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """The result of `call` within `limit_s` seconds and the deadline of this thread.

    `name` is the store, for messages. Raises StoreTimeout when the time is over; the call goes on
    in its thread.
    """
    limit_s = max(0.0, min(limit_s, left_s()))
    return _run(limit_s, limit_s, name, partial(call, *args, **more))


def while_bytes_come(limit_s: float, name: str, read: Callable[[], T]) -> T:
    """As `within`, but `limit_s` counts from the last byte that `read` reports."""
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


class StoreWrapper(ABC):
    """A Store that makes each call of another one in its own way, which `_call` says."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = store.name

    @abstractmethod
    def _call(self, method: Method, call: Callable[[Store], T], length: int = 0) -> T:
        """Make one call of `method`. `call` calls it on the store that it is given. `length` is the
        bytes that a read is to bring."""

    def list(self, files_max: int) -> Listing:
        return self._call("list", lambda store: store.list(files_max))

    def confirm(self, pin: Pin) -> Pin:
        return self._call("confirm", lambda store: store.confirm(pin))

    def read_into(self, pin: Pin, offset: int, buffer: memoryview) -> bool:
        return self._call(
            "read_into", lambda store: store.read_into(pin, offset, buffer), len(buffer)
        )

    def get(self, path: str) -> bytes | None:
        return self._call("get", lambda store: store.get(path))

    def put(self, path: str, data: bytes) -> None:
        self._call("put", lambda store: store.put(path, data))

    def find(self, path: str) -> ListedFile | None:
        return self._call("find", lambda store: store.find(path))

    def close(self) -> None:
        self._store.close()


class TimedStore(StoreWrapper):
    """A Store whose calls end within a time, with StoreTimeout at the latest: see `within`.

    A `put` that ends so may take effect later. A buffer that a `read_into` has not filled may be
    written to later.
    """

    def _call(self, method: Method, call: Callable[[Store], T], length: int = 0) -> T:
        if method == "read_into":
            limit_s = ANSWER_S + length / _BYTES_PER_S_MIN
            return while_bytes_come(limit_s, self.name, partial(call, self._store))
        limit_s = LISTING_S if method == "list" else ANSWER_S
        return within(limit_s, self.name, call, self._store)


class BoundedStore(StoreWrapper):
    """A Store that counts its calls as requests, and limits those that are stuck.

    While more than `OVERDUE_MAX` calls run whose deadline is over, new calls raise StoreTimeout.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._lock = threading.Lock()  # guards _deadlines_s; never held during IO
        self._deadlines_s: dict[object, float] = {}  # of the calls that run now

    def _call(self, method: Method, call: Callable[[Store], T], length: int = 0) -> T:
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
            with counted(KIND_OF[method]):
                return call(self._store)
        finally:
            with self._lock:
                del self._deadlines_s[this]


class RenewedStore(StoreWrapper):
    """A Store whose credentials are in a file. The next call after a change opens the store again,
    by `open_with`."""

    def __init__(self, file: SecretFile, open_with: Callable[[dict[str, str]], Store]) -> None:
        self._file = file
        self._open_with = open_with
        self._secrets: dict[str, str] = file.current()
        super().__init__(open_with(self._secrets))
        self._lock = threading.Lock()  # guards _secrets and _store; never held during their IO

    def _now(self) -> Store:
        secrets = self._file.current()
        with self._lock:
            if secrets != self._secrets:
                # Calls in other threads may still use the former store, so it stays open. It closes
                # its worker and connections when these calls have ended.
                self._store = self._open_with(secrets)
                self._secrets = secrets
            return self._store

    def uploads(self) -> Uploads | None:
        """See ``HasUploads``. An upload keeps the credentials of its begin."""
        store = self._now()
        return store.uploads() if isinstance(store, HasUploads) else None

    def _call(self, method: Method, call: Callable[[Store], T], length: int = 0) -> T:
        store = self._now()
        try:
            return call(store)
        except AccessDenied:
            renewed = self._now()  # the file may have changed meanwhile
            if renewed is store:
                raise
        return call(renewed)
