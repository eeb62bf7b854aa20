"""What all messages on the control socket have in common (``wire``)."""

from typing import Annotated

import msgspec

LINE_BYTES_MAX = 1 << 20
"""Longest message: a location is below 64 KiB, a status of 1,000 attachments below 1 MiB."""
REQUEST_ID = r"^[A-Za-z0-9_.-]{0,64}\Z"
"""What the id of a request may look like: it goes into logs and headers."""

Version = Annotated[int, msgspec.Meta(ge=1, le=1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Base of all messages; `v` is the protocol's version.

    A client may ask the daemon of another release, as `ckptfs restart` does after an upgrade: what
    is new in a reply has a default, and what a client does not know of one it ignores. Of a request
    a daemon ignores nothing.
    """

    v: Version = 1


class Asked(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all requests; `request` is an id for logs, see ``ckptfs._requestid``."""

    request: Annotated[str, msgspec.Meta(pattern=REQUEST_ID)] = ""
