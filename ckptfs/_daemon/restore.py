"""An attachment of an earlier daemon, as its records say that it was in the end."""

from ckptfs._daemon.attachment import Attachment, new_attachment
from ckptfs._daemon.records import (
    EtagLearned,
    Event,
    FileHidden,
    FileShown,
    Made,
    PinSet,
    PrefetchBegun,
    PrefetchEnded,
    StoreChanged,
)
from ckptfs._store.base import Store
from ckptfs.errors import DaemonError


class Last:
    """What the events of the attachment `ordinal` come to. Raises DaemonError.

    Attributes:
        location: Where it is, with the credentials that were given last.
        prefetches: Those that have not ended.
    """

    def __init__(self, ordinal: int, events: list[Event]) -> None:
        made = events[0]
        if not isinstance(made, Made):
            raise DaemonError(f"the records of attachment {ordinal} have no beginning")
        self._ordinal = ordinal
        self._made = made
        self._events = events
        self.location = made.location
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
        """Blocking. The attachment, which reads from `store`. It records nothing yet."""
        made = self._made
        owner = made.uid, made.gid
        attachment = new_attachment(
            self._ordinal, self.location, store, made.manifest, *owner, made.attached_s
        )
        for event in self._events:
            if isinstance(event, PinSet):
                attachment.pin(event.pinned)
            elif isinstance(event, FileShown):
                attachment.replace(event.file)
            elif isinstance(event, FileHidden):
                attachment.hide(event.path)
            elif isinstance(event, EtagLearned):
                attachment.file(event.index).pin_etag(event.etag)
        return attachment
