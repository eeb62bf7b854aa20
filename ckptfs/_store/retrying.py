"""Retries of requests that run at once in several threads, for copies and uploads.

No try begins later than `_TRIES_WITHIN_S` after the first failure. So a call to a silent store ends
with StoreTimeout. If the store is silent, fewer requests run at once (`Places`).
"""

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from ckptfs._model.aimd import AimdLimit
from ckptfs._model.backoff import Backoff
from ckptfs._store.request_context import left_s
from ckptfs.errors import StoreTimeout, StoreUnavailable

T = TypeVar("T")

_TRIES = 5
"""The most tries of a request."""
_BACKOFF = Backoff(0.2, 1.6)
"""The pauses between them."""
_TRIES_WITHIN_S = 60.0
"""The longest time from the first failure of a request to the begin of its last try."""
_PLACES_MIN = 2
"""The lowest limit of requests at once. With one, a single stuck request would stop all others."""


class Places:
    """The places for requests that run at once (see `AimdLimit`). Any thread may use it."""

    def __init__(self, most: int) -> None:
        self._aimd = AimdLimit(_PLACES_MIN, most)
        self._running = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self) -> Generator[None]:
        """Wait for a place, and keep it for the request that runs in this context."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < int(self._aimd.limit))
            self._running += 1
        begun_s = time.monotonic()
        try:
            yield
            with self._changed:
                self._aimd.answered()
        except StoreTimeout:
            with self._changed:
                self._aimd.timed_out(begun_s, time.monotonic())
            raise
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def retry(attempt: Callable[[], T], places: Places) -> T:
    """The result of `attempt`, which is tried again after StoreUnavailable. Raises the last
    error."""
    end_s = math.inf
    for failures in itertools.count(1):
        try:
            with places.one():
                return attempt()
        except StoreUnavailable as error:
            now_s = time.monotonic()
            end_s = min(end_s, now_s + min(_TRIES_WITHIN_S, left_s()))
            wait_s = max(_BACKOFF.pause_s(failures), error.retry_after_s)
            if failures == _TRIES or now_s + wait_s > end_s:
                raise
            time.sleep(wait_s)
    raise AssertionError
