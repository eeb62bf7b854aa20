"""Restores the attachments of the daemon before this one, from their events in the journal.

A read from one of a thousand attachments does not wait for the others, because most of an
attachment is built at its first use (`Attachment.snapshot`).
"""

import logging
from contextlib import suppress

import msgspec
import trio

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.journal import (
    OWN,
    EtagLearned,
    Event,
    FileHidden,
    FileShown,
    Made,
    PinSet,
    PrefetchBegun,
    PrefetchEnded,
    StoreChanged,
    Trouble,
    forget,
    recorded,
    recorder,
)
from ckptfs._daemon.control.service import Service
from ckptfs._store.base import Store
from ckptfs.errors import CkptfsError, DaemonError, LimitExceeded, StoreTimeout

log = logging.getLogger(__name__)

_REOPEN_S = 10.0
"""Longest time for opening one store, which asks no server. All readers wait meanwhile, and the
keeper waits for 30 s (``ckptfs._keeper.daemon_process``)."""


class _Last:
    """The last state of the attachment `ordinal`, according to its events. Raises DaemonError.

    Attributes:
        ordinal: The upper half of its inode numbers.
        uid: Its user.
        location: Its location, with the latest credentials.
        prefetches: Its prefetches that have not ended.
    """

    def __init__(self, ordinal: int, events: list[Event]) -> None:
        made = events[0]
        if not isinstance(made, Made):
            raise DaemonError(
                f"the journal of the previous daemon lacks the beginning of attachment {ordinal}; "
                "run ckptfs umount --force, and mount again"
            )
        self.ordinal = ordinal
        self._made = made
        self._events = events
        self.location = made.location
        self.uid = made.uid
        prefetches: dict[int, PrefetchBegun] = {}
        for event in events:
            if isinstance(event, StoreChanged):
                self.location = event.location
            elif isinstance(event, PrefetchBegun):
                prefetches[event.number] = event
            elif isinstance(event, PrefetchEnded):
                prefetches.pop(event.number, None)
        self.prefetches = list(prefetches.values())

    def attachment(self, store: Store) -> Attachment:
        """The attachment, with `store` for its reads. It does not record events yet."""
        made = msgspec.structs.replace(self._made, location=self.location)
        attachment = Attachment(self.ordinal, made, store, self._replay)
        for event in self._events:
            if isinstance(event, PinSet):
                attachment.leases.pinned = event.pinned
            elif isinstance(event, Trouble) and event.index == OWN:
                attachment.own_error = event.error
        return attachment

    def _replay(self, attachment: Attachment) -> None:
        """Bring the snapshot of `attachment` up to date. The journal has these events already."""
        for event in self._events:
            if isinstance(event, FileShown):
                attachment.snapshot.replace(event.file)
            elif isinstance(event, FileHidden):
                attachment.snapshot.hide(event.path)
            elif isinstance(event, EtagLearned):
                attachment.file(event.index).version.restore(event.etag, event.etag_of)
            elif isinstance(event, Trouble) and event.index != OWN:
                health = attachment.file(event.index).health
                health.restore(event.error, changed=event.changed, failing=event.failing)
        self._events.clear()


async def restore(service: Service) -> None:
    """Restore all attachments and prefetches in the journal. A new daemon calls this once, before
    it serves. Raises DaemonError."""
    journal = service.handoff.journal
    found = [_Last(*item) for item in recorded(journal).items()]
    stores: dict[int, Store | CkptfsError] = {}
    async with trio.open_nursery() as nursery:
        for last in found:
            nursery.start_soon(_reopen, service, last, stores)
    for last in found:
        store = stores[last.ordinal]
        if isinstance(store, CkptfsError):
            log.error("%s: cannot be restored: %s", last.location.uri, store)
            forget(journal, last.ordinal)
            continue
        attachment = last.attachment(store)
        attachment.record = recorder(journal, last.ordinal)
        service.attachments.add(attachment, last.location)
        for begun in last.prefetches:
            with suppress(LimitExceeded):
                service.prefetches.begin(attachment, begun.wanted, begun)


async def _reopen(service: Service, last: _Last, stores: dict[int, Store | CkptfsError]) -> None:
    timeout_s = service.current.config.store_timeout_s
    try:
        with trio.fail_after(_REOPEN_S):
            stores[last.ordinal] = await service.offload.control(
                service.open_store, last.location, timeout_s, last.uid
            )
    except CkptfsError as error:
        stores[last.ordinal] = error
    except trio.TooSlowError:
        stores[last.ordinal] = StoreTimeout(f"its store did not open within {_REOPEN_S:g} s")
