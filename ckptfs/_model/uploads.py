"""Uploads in the background as plain data: their options, states and results, and the record on the
disk."""

from typing import Annotated, Literal, TypeAlias

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.units import RATE_MAX

State: TypeAlias = Literal["staging", "waiting", "running", "failed", "done"]
"""The state of an upload. `staging`: the caller still hands the files over. `waiting`: the daemon
has all of them. `done`: the store has all of them."""

_Path = Annotated[str, msgspec.Meta(max_length=4096)]
ID_BYTES = 6
"""The length of an id. Its text has two hex digits for each byte."""


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    """The result of an upload, as ``ckptfs upload --json`` prints it.

    Attributes:
        uri: The target without credentials.
        files, bytes: All files.
        skipped_files, skipped_bytes: Those among them that were at the store already.
        cached_bytes: The bytes in the cache of this node.
        cache_error: The error because of which the cache has no more; "" without one.
    """

    uri: str
    files: int
    bytes: int
    skipped_files: int
    skipped_bytes: int
    cached_bytes: int
    cache_error: str


class UploadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an upload that count when it is sent.

    Attributes:
        overwrite: Whether other content at the target is replaced.
        merge: Whether other files at the target stay, which other uploads may write.
        cache: Whether the cache of this node gets the files.
        rate: The most bytes per second; 0 for no limit.
        left_out: The paths in the caller's directory that are not uploaded. They may be at the
            target.
    """

    overwrite: bool = False
    merge: bool = False
    cache: bool = True
    rate: Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)] = 0
    left_out: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=10_000)] = ()


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted upload, as the disk has it. It has no secrets.

    Attributes:
        id: The id, which is also the name of its directory.
        uid, gid: The user who has asked for it.
        location: The target without its secrets, as the client names it.
        place: The identity of the target (`Location.identity`), as the daemon opens it.
        had_secrets: Whether the target had secrets.
        options: See `UploadOptions`.
        files, bytes: The number and the bytes of the staged files.
        order: A number that grows from each accepted upload to the next.
        accepted, ended: Times in seconds since the epoch; 0 before the end.
        state: `waiting` also stands for an upload that is running.
        sent: The result, once it is done.
        code, message: The error of the last attempt; "" without one.
    """

    id: str
    uid: int
    gid: int
    location: Location
    place: str
    had_secrets: bool
    options: UploadOptions
    files: int
    bytes: int
    order: int
    accepted: float
    ended: float = 0.0
    state: Literal["waiting", "failed", "done"] = "waiting"
    sent: Sent | None = None
    code: str = ""
    message: str = ""


class UploadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of an upload in the background.

    Attributes:
        id: Its id.
        uri: The target's URI, without credentials.
        state: See `State`.
        files, bytes: Number of its files, and their bytes.
        sent: Bytes that are at the store.
        begun: Time when the daemon accepted it, in seconds since the epoch; 0 before.
        attempts: Attempts since the last one that has sent something.
        code, message: The error of the last attempt, as in ``replies.Failed``; "" without one.
        cached: Bytes that the cache got.
        cache_error: The error because of which the cache got no more; "" without one.
    """

    id: str
    uri: str
    uid: int
    state: State
    files: int
    bytes: int
    sent: int
    begun: float = 0.0
    attempts: int = 0
    code: str = ""
    message: str = ""
    cached: int = 0
    cache_error: str = ""
