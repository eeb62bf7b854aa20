"""Retries of requests for pages of listings, small objects and uploads.

Requests for reads and checks are sent once, because ``_daemon.fetch.retry`` repeats reads and
checks as a whole.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from ckptfs._model.backoff import Backoff
from ckptfs._store.request_context import left_s
from ckptfs._store.s3.advice import translate_error
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs.errors import StoreUnavailable

T = TypeVar("T")

ATTEMPTS = 2
"""The tries of most requests, and of each request that got no answer."""
BACKOFF = Backoff(0.2, 10.0)
"""The pauses between tries. A server may ask for a longer pause, up to its `max_s`."""


def repeat(
    attempt: Callable[[], T],
    what: str,
    attempts_max: int = ATTEMPTS,
    pause_s_max: float = BACKOFF.max_s,
) -> T:
    """The result of `attempt`, which is tried again if another try can help.

    `attempts_max` counts if the server answers with errors. `what` is the object or listing, for
    messages. Raises the last error, as `translate_error` translates it.
    """
    tried = 0
    while True:
        try:
            return attempt()
        except (S3Error, BrokenConnection) as error:
            tried += 1
            translated = translate_error(error, what)
            most = attempts_max if isinstance(error, S3Error) else ATTEMPTS
            if tried >= most or not isinstance(translated, StoreUnavailable):
                raise translated from error
            asked_s = translated.retry_after_s
            if max(BACKOFF.longest_s(tried), asked_s) > min(pause_s_max, left_s()):
                raise translated from error
            time.sleep(max(BACKOFF.pause_s(tried), asked_s))
