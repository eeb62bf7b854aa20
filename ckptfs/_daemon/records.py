"""What is written to the journal of `handoff` about an attachment: what it is, then what changes.

Only what cannot be learned anew is recorded: the snapshot itself, whose credentials read it, the
order in which versions of the metadata file were shown (inode numbers follow from it), ETags that
the listing did not have, the pin, prefetches that outlive who asked for them, and what went wrong.

Of that, the last word on each file is kept, under a key of its own: a store that comes and goes
must not make the journal grow.
"""

from collections.abc import Callable

import msgspec

from ckptfs._daemon.handoff import Journal
from ckptfs._model.location import Location
from ckptfs._model.manifest import ListedFile, Manifest
from ckptfs._model.plan import Wanted
from ckptfs._store.base import TagOf
from ckptfs.errors import DaemonError


class Made(msgspec.Struct, frozen=True, tag="made"):
    """An attachment, as it begins. `location` has the credentials."""

    location: Location
    manifest: Manifest
    uid: int
    gid: int
    attached_s: float


class StoreChanged(msgspec.Struct, frozen=True, tag="store"):
    """It reads with other credentials from now on."""

    location: Location


class PinSet(msgspec.Struct, frozen=True, tag="pin"):
    """It stays without a holder, or no longer."""

    pinned: bool


class EtagLearned(msgspec.Struct, frozen=True, tag="etag"):
    """The pinned version of the file at `index` of those it lists has this ETag, which those
    answers of the store name (`Pin.etag_of`)."""

    index: int
    etag: str
    etag_of: TagOf = "answers"


class FileShown(msgspec.Struct, frozen=True, tag="shown"):
    """It shows that version of a file of its root."""

    file: ListedFile


class FileHidden(msgspec.Struct, frozen=True, tag="hidden"):
    """It shows that file of its root no more."""

    path: str


class PrefetchBegun(msgspec.Struct, frozen=True, tag="prefetch"):
    """A prefetch of nobody's connection; `number` is its own."""

    number: int
    wanted: Wanted


class PrefetchEnded(msgspec.Struct, frozen=True, tag="prefetched"):
    """That prefetch has ended."""

    number: int


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """What is said of errors of the file at `index`, or of the attachment (`OWN`) from now on."""

    index: int
    error: str
    changed: bool = False
    failing: bool = False


OWN = -1
"""In the place of a file's index."""

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
"""Writes an event of one attachment down."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encoded(event: Event) -> bytes:
    """`event` for `Journal.append`."""
    return _encoder.encode(event)


def unrecorded(event: Event) -> None:
    """A `Record` for an attachment that has no journal, or has ended."""
    del event


_ORDINAL_BITS = 32
"""As in inode numbers (``tree``)."""


def recorder(journal: Journal, ordinal: int) -> Record:
    """The `Record` of an attachment."""

    def record(event: Event) -> None:
        key = ordinal
        if isinstance(event, Trouble):
            key |= (event.index - OWN + 1) << _ORDINAL_BITS
            journal.forget(key)
        journal.append(key, encoded(event))

    return record


def forget(journal: Journal, ordinal: int) -> None:
    """Drop all that is recorded of an attachment."""
    of_it = [key for key in journal.known() if _ordinal_of(key) == ordinal]
    for key in sorted(of_it, reverse=True):  # its beginning last: without it, the rest is nothing
        journal.forget(key)


def _ordinal_of(key: int) -> int:
    return key & ((1 << _ORDINAL_BITS) - 1)


def recorded(journal: Journal) -> dict[int, list[Event]]:
    """The events of all attachments, by ordinal. Raises DaemonError for what is none."""
    found: dict[int, list[Event]] = {}
    try:
        for key, data in journal.frames():
            found.setdefault(_ordinal_of(key), []).append(_decoder.decode(data))
    except msgspec.DecodeError as error:
        raise DaemonError(
            f"this ckptfs cannot read what the daemon before it has left: {error}; "
            "ckptfs umount --force, and mount again"
        ) from None
    return found
