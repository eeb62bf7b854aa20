"""The targets of uploads with their credentials, in the journal of ``handoff``: in memory only, and
for the next daemon of this mount."""

import msgspec

from ckptfs._daemon.attachment.journal import UPLOADS
from ckptfs._model.location import Location
from ckptfs._mount.handoff import Journal

_decoder = msgspec.msgpack.Decoder(Location)


def keep(journal: Journal, upload: str, location: Location) -> None:
    """Keep the target of an upload, in place of the one before."""
    forget(journal, upload)
    journal.append(_key_of(upload), msgspec.msgpack.encode(location))


def forget(journal: Journal, upload: str) -> None:
    """Drop the target of an upload."""
    journal.forget(_key_of(upload))


def kept(journal: Journal) -> dict[str, Location]:
    """All targets, by the ids of their uploads. Raises DecodeError for those of another version."""
    return {
        f"{key & ~UPLOADS:012x}": _decoder.decode(data)
        for key, data in journal.frames()
        if key & UPLOADS
    }


def _key_of(upload: str) -> int:
    return UPLOADS | int(upload, 16)
