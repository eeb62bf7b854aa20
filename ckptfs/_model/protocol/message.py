"""The base of all messages on the control socket (``wire``)."""

from typing import Annotated

import msgspec

LINE_BYTES_MAX = 1 << 20
"""Longest message. A location is below 64 KiB, and a status of 1,000 attachments below 1 MiB."""

Version = Annotated[int, msgspec.Meta(ge=1, le=1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Base of all messages; `v` is the protocol's version.

    Client and daemon may be of different releases, for example when `ckptfs restart` runs after an
    upgrade. So each new field of a reply has a default, and a client ignores fields of a reply that
    it does not know. A daemon rejects a request with a field that it does not know.
    """

    v: Version = 1
