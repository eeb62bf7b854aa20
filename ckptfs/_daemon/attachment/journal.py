"""The events of an attachment in the journal of `handoff`: its beginning, then its changes.

The journal has only facts that the next daemon cannot find out again:

- the snapshot itself, and the credentials that read it;
- the versions of the metadata file in the order in which the attachment showed them, because inode
  numbers follow from it;
- ETags that the listing did not have;
- the pin;
- prefetches that outlive the requesting connection;
- errors.

The journal keeps only the last error of each file, under a key of its own, so a store with repeated
outages does not make it grow.
"""

from collections.abc import Callable

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest
from ckptfs._model.plans.plan import Wanted
from ckptfs._model.volume import Volume
from ckptfs._mount.handoff import Journal
from ckptfs._store.base import TagOf
from ckptfs.errors import DaemonError


class Made(msgspec.Struct, frozen=True, tag="made"):
    """The beginning of an attachment. `location` has the credentials, and `has_saved` says whether
    its scope of the cache is `quotas.saved_scope`."""

    location: Location
    manifest: Manifest
    uid: int
    gid: int
    attached_s: float
    has_saved: bool = False
    volume: Volume | None = None


class StoreChanged(msgspec.Struct, frozen=True, tag="store"):
    """The attachment reads with other credentials from now on."""

    location: Location


class PinSet(msgspec.Struct, frozen=True, tag="pin"):
    """The attachment was pinned or unpinned."""

    pinned: bool


class EtagLearned(msgspec.Struct, frozen=True, tag="etag"):
    """The pinned version of the file at position `index` has this ETag. `etag_of` says which
    answers of the store name it (`Pin.etag_of`)."""

    index: int
    etag: str
    etag_of: TagOf = "answers"


class FileShown(msgspec.Struct, frozen=True, tag="shown"):
    """The attachment shows that version of a file of its root."""

    file: ListedFile


class FileHidden(msgspec.Struct, frozen=True, tag="hidden"):
    """The attachment no longer shows that file of its root."""

    path: str


class PrefetchBegun(msgspec.Struct, frozen=True, tag="prefetch"):
    """A prefetch that belongs to no connection has begun. `number` identifies it."""

    number: int
    wanted: Wanted


class PrefetchEnded(msgspec.Struct, frozen=True, tag="prefetched"):
    """The prefetch with that number has ended."""

    number: int


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """The last error of the file at position `index`, or of the attachment (`OWN`)."""

    index: int
    error: str
    changed: bool = False
    failing: bool = False


OWN = -1
"""Index of the attachment itself, in place of a file's."""

Event = (
    Made
    | StoreChanged
    | PinSet
    | EtagLearned
    | FileShown
    | FileHidden
    | PrefetchBegun
    | PrefetchEnded
    | Trouble
)
Record = Callable[[Event], None]
"""Writes an event of one attachment to the journal."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def unrecorded(event: Event) -> None:
    """The `Record` of an attachment without a journal, or one that has ended."""
    del event


UPLOADS = 1 << 63
"""Keys with this bit belong to uploads in the background (``_daemon.uploads``)."""
_ORDINAL_BITS = 32
"""As in inode numbers (``inodes``)."""


def recorder(journal: Journal, ordinal: int) -> Record:
    """The `Record` of an attachment."""

    def record(event: Event) -> None:
        key = ordinal
        if isinstance(event, Trouble):
            key |= (event.index - OWN + 1) << _ORDINAL_BITS
            journal.forget(key)
        journal.append(key, _encoder.encode(event))

    return record


def forget(journal: Journal, ordinal: int) -> None:
    """Drop all events of an attachment."""
    of_it = [key for key in journal.known() if not key & UPLOADS and _ordinal_of(key) == ordinal]
    for key in sorted(of_it, reverse=True):  # its beginning last
        journal.forget(key)


def _ordinal_of(key: int) -> int:
    return key & ((1 << _ORDINAL_BITS) - 1)


def recorded(journal: Journal) -> dict[int, list[Event]]:
    """The events of all attachments, by ordinal. Raises DaemonError for an unknown event."""
    found: dict[int, list[Event]] = {}
    try:
        for key, data in journal.frames():
            if key & UPLOADS:
                continue
            found.setdefault(_ordinal_of(key), []).append(_decoder.decode(data))
    except msgspec.DecodeError as error:
        raise DaemonError(
            f"this ckptfs cannot read the journal of the previous daemon: {error}; run "
            "ckptfs umount --force, and mount again"
        ) from None
    return found
