"""An attachment of an earlier daemon, as its records say that it was in the end.

Who reads from one of a thousand attachments does not wait for the others: most of an attachment is
made when somebody first needs it (`Attachment.snapshot`).
"""

import msgspec

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.records import (
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
)
from ckptfs._daemon.users import cache_scope
from ckptfs._store.base import Store
from ckptfs.errors import DaemonError


class Last:
    """What the events of the attachment `ordinal` come to. Raises DaemonError.

    Attributes:
        ordinal: Of the attachment; `uid`: its user.
        location: Where it is, with the credentials that were given last.
        prefetches: Those that have not ended.
    """

    def __init__(self, ordinal: int, events: list[Event]) -> None:
        made = events[0]
        if not isinstance(made, Made):
            raise DaemonError(f"the records of attachment {ordinal} have no beginning")
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
        """The attachment, which reads from `store`. It records nothing yet."""
        made = self._made
        attachment = Attachment(
            self.ordinal,
            msgspec.structs.replace(self.location, secrets={}),
            store,
            made.manifest,
            made.uid,
            made.gid,
            made.attached_s,
            self._go_through,
            cache_scope=cache_scope(made.uid, self.location),
        )
        for event in self._events:
            if isinstance(event, PinSet):
                attachment.pinned = event.pinned
            elif isinstance(event, Trouble) and event.index == OWN:
                attachment.own_error = event.error
        return attachment

    def _go_through(self, attachment: Attachment) -> None:
        """What has happened since the manifest of `attachment`; nothing of it is new."""
        for event in self._events:
            if isinstance(event, FileShown):
                attachment.snapshot.replace(event.file)
            elif isinstance(event, FileHidden):
                attachment.snapshot.hide(event.path)
            elif isinstance(event, EtagLearned):
                file = attachment.file(event.index)
                about = {"etag": event.etag, "etag_of": event.etag_of}
                file.pin = msgspec.structs.replace(file.pin, **about)
            elif isinstance(event, Trouble) and event.index != OWN:
                file = attachment.file(event.index)
                file.error, file.changed, file.failing = event.error, event.changed, event.failing
        self._events.clear()
