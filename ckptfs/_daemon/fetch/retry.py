"""Retries of requests to stores, and the stores that do not answer.

The daemon repeats a request after a temporary error (`StoreUnavailable`), with growing, jittered
pauses, until the deadline of the caller. A store that asks for a longer pause gets it. The daemon
raises a permanent error (`ObjectChanged`, `AccessDenied`) at once. It remembers a failure only for
the extended attributes.

**A dark store** must not delay the readers of the others. A store is dark from its first temporary
error until it has delivered a span. Meanwhile its spans go last and leave slots free, also those
that wait for a slot already, and its version checks have their own threads. When the store is back,
its spans get their priority back, and callers that pause because of it retry at once.
"""

import random
import weakref
from collections.abc import Awaitable, Callable

import trio

from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Scheduler
from ckptfs._daemon.usage.counters import current
from ckptfs._model.backoff import Backoff
from ckptfs._store.base import Store
from ckptfs.errors import CkptfsError, StoreTimeout, StoreUnavailable

_BACKOFF = Backoff(first_s=0.1, max_s=5.0)
_RETRY_AFTER_SPREAD = 1.25
"""The daemon retries at the time that the store has named or up to a quarter later, so that not all
requests come at once."""
_CUT_OFF_S = 0.1
"""A timeout that comes so close to the end of the deadline is the deadline's."""


def _is_cut_off(error: StoreUnavailable) -> bool:
    """Whether the deadline has ended that attempt, which then says less than the one before it."""
    left_s = trio.current_effective_deadline() - trio.current_time()
    return isinstance(error, StoreTimeout) and left_s < _CUT_OFF_S


class Retry:
    """Repeats requests, and knows which stores are dark. Their spans go last in `scheduler`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # The event is set when the store has delivered again. The keys are weak, because the
        # credentials of a detached store must not stay in memory.
        self._dark: weakref.WeakKeyDictionary[Store, trio.Event] = weakref.WeakKeyDictionary()

    def is_dark(self, store: Store) -> bool:
        """Whether the store did not answer last time. May be called from any thread."""
        return store in self._dark

    def delivered(self, store: Store) -> None:
        """The store has answered with data, so it is not dark any more."""
        is_back = self._dark.pop(store, None)
        if is_back is not None:
            is_back.set()
            self._scheduler.brighten(store)

    def _darken(self, store: Store) -> trio.Event:
        """The store did not answer. Returns the event that is set when it delivers again."""
        is_back = self._dark.get(store)
        if is_back is None:
            is_back = self._dark[store] = trio.Event()
            self._scheduler.darken(store)
        return is_back

    async def run(self, file: RemoteFile, attempt: Callable[[], Awaitable[None]]) -> None:
        """Run `attempt` until it succeeds. Raises its first permanent error.

        All errors are noted at the file.
        """
        failures = 0
        while True:
            try:
                await attempt()
                file.health.recovered()
                return
            except StoreUnavailable as error:
                failures += 1
                is_back = self._darken(file.store)
                file.note(error, is_cause=not (file.health.cause and _is_cut_off(error)))
                asked_s = error.retry_after_s * random.uniform(1, _RETRY_AFTER_SPREAD)
            except CkptfsError as error:
                file.note(error)
                raise
            await trio.sleep(asked_s)
            with trio.move_on_after(max(0.0, _BACKOFF.pause_s(failures) - asked_s)):
                await is_back.wait()
            current(file.activity.background).retries += 1
