"""Stores that do not answer, and trying again.

What can pass (`StoreUnavailable`) is tried again with growing, jittered pauses until the deadline
of whoever waits; a store that asks for a longer pause gets it. What cannot (`ObjectChanged`,
`AccessDenied`) is raised at once. Nothing remembers a failure but the attributes.

**A dark store** must not keep the others waiting: from its first error that can pass until it has
delivered a span, its spans go last and leave places free, also those that are in the queue by then,
and its checks have their own threads. When it is back, its spans get their priority back, and who
pauses because of it tries at once.
"""

import random
import weakref
from collections.abc import Awaitable, Callable

import trio

from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Slots
from ckptfs._store.base import Store
from ckptfs.errors import CkptfsError, StoreUnavailable

_PAUSE_S = 0.1
_PAUSE_S_MAX = 5.0
"""First and longest pause before another try; each is twice the last, times 0.5 to 1."""
_RETRY_AFTER_SPREAD = 1.25
"""Who is asked to come again later comes then or up to a quarter later: not all at once."""


class Outages:
    """Knows which stores are dark. `slots`: the queue in which their spans go last."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        # The event: it has delivered again. Weak: a detached store's credentials must not stay.
        self._dark: weakref.WeakKeyDictionary[Store, trio.Event] = weakref.WeakKeyDictionary()

    def is_dark(self, store: Store) -> bool:
        """Whether its last answer was none. May be called from any thread."""
        return store in self._dark

    def delivered(self, store: Store) -> None:
        """It has answered with data."""
        is_back = self._dark.pop(store, None)
        if is_back is not None:
            is_back.set()
            self._slots.brighten(store)

    def _darken(self, store: Store) -> trio.Event:
        """It has not answered; returns what is set when it delivers again."""
        is_back = self._dark.get(store)
        if is_back is None:
            is_back = self._dark[store] = trio.Event()
            self._slots.darken(store)
        return is_back

    async def persist(self, file: RemoteFile, attempt: Callable[[], Awaitable[None]]) -> None:
        """Run `attempt` until it succeeds; only errors that can pass are tried again.

        All of them are noted.
        """
        pause_s = _PAUSE_S
        while True:
            try:
                await attempt()
                file.is_well()
                return
            except StoreUnavailable as error:
                is_back = self._darken(file.store)
                file.cause = str(error)
                file.note(error)
                asked_s = error.retry_after_s * random.uniform(1, _RETRY_AFTER_SPREAD)
            except CkptfsError as error:
                file.note(error)
                raise
            await trio.sleep(asked_s)
            with trio.move_on_after(max(0.0, pause_s * random.uniform(0.5, 1) - asked_s)):
                await is_back.wait()
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)
            file.activity.retried()
