"""The messages between the daemon and the process that sends (``ckptfs._upload_process``)."""

from typing import TypeAlias

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.named_store import Credentials
from ckptfs._model.uploads import Sent, UploadOptions


class Progressed(msgspec.Struct, frozen=True, tag="progressed"):
    """The bytes that are at the store so far."""

    bytes: int


class NotSent(msgspec.Struct, frozen=True, tag="not-sent"):
    """The error that has ended an attempt; `code` is one of ``ckptfs.errors.BY_CODE``.

    `retry_after_s` is the time that the store asks clients to wait, in seconds.
    """

    code: str
    message: str
    retry_after_s: float = 0.0


Told: TypeAlias = Sent | Progressed | NotSent
"""A line from the process that sends."""


class Setup(msgspec.Struct, frozen=True):
    """The task of the process that sends. It has secrets, so it only travels through memory.

    Attributes:
        directory: The staged files.
        files, bytes: The number and the bytes of these files.
        location: The target, as the daemon opens it.
        credentials: Those of its named store.
        asked: The target, as a client names it to the daemon.
        options: See `UploadOptions`.
        store_timeout_s: Longest silence of the store within a request.
        socket: The daemon's control socket.
    """

    directory: str
    files: int
    bytes: int
    location: Location
    credentials: Credentials
    asked: Location
    options: UploadOptions
    store_timeout_s: float
    socket: str
