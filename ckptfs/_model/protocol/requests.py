"""The requests that clients send on the control socket (``wire``).

Each request type names the type of its reply, as the parameter of its base class `Request`.
"""

from typing import Annotated, ClassVar, Generic, TypeVar, get_args

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.plans.plan import Plan
from ckptfs._model.protocol import replies
from ckptfs._model.protocol.message import Message
from ckptfs._model.units import AGE_S_MAX, RATE_MAX
from ckptfs._model.volume import Volume

PIECE_BLOCKS_MAX = 16
"""Most blocks in one message. They are 16 MiB, so the round trip counts for little."""
GLOBS_MAX = 10_000
"""Most globs of one prefetch, because the daemon compares each glob with each file."""
REQUEST_ID = r"^[A-Za-z0-9_.-]{0,64}\Z"
"""Pattern of a request's id, which goes into logs and headers."""

R = TypeVar("R", bound=replies.Reply)
_Path = Annotated[str, msgspec.Meta(max_length=4096)]
_Globs = Annotated[list[_Path], msgspec.Meta(max_length=GLOBS_MAX)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)]
_Rank = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]


class Request(Message, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all requests, whose parameter is the type of the reply.

    Attributes:
        request: An id for logs (``ckptfs._model.request_id``).
        needs_secrets: Whether the daemon opens a store for it, so that the client has to send the
            location's credentials.
    """

    needs_secrets: ClassVar[bool] = False
    request: Annotated[str, msgspec.Meta(pattern=REQUEST_ID)] = ""


def reply_type(request: Request[R]) -> type[R]:
    """The type of the reply to a request that succeeds."""
    [base] = type(request).__orig_bases__  # type: ignore[attr-defined]
    return get_args(base)[0]


class Attach(Request[replies.Attached], frozen=True, tag="attach", omit_defaults=True):
    """Attach a checkpoint. Fields with their defaults are not sent, so daemons of older releases
    understand it.

    Attributes:
        location: The checkpoint, with credentials.
        pinned: Whether the attachment stays until a client detaches it.
        plan: Ranges to fetch in the background, in the plan's order.
        rank: Rank of the process in its job, which chooses its part of the plan; -1 if unknown.
        prefetch: Globs of files to fetch in the background, in that order.
        saves: Whether the client will save blocks that it has uploaded (`SaveBlocks`).
        volume: The volume that gets an attachment of its own; only root and the daemon's own user
            may name one.
    """

    needs_secrets: ClassVar[bool] = True
    location: Location
    pinned: bool = False
    saves: bool = False
    volume: Volume | None = None
    plan: Plan | None = None
    rank: _Rank = -1
    prefetch: _Globs = msgspec.field(default_factory=list[str])


class Detach(Request[replies.Done], frozen=True, tag="detach"):
    """End an attachment, which its directory inside the mount or its location names."""

    name: str = ""
    location: Location | None = None
    force: bool = False


class Status(Request[replies.StatusReply], frozen=True, tag="status", omit_defaults=True):
    """Return the daemon's state, of all attachments or of the one with that name."""

    name: str = ""


class Activity(Request[replies.ActivityReply], frozen=True, tag="activity"):
    """Return the counters of reads and fetches since the daemon started."""


class MetadataChanged(Request[replies.Done], frozen=True, tag="metadata-changed"):
    """Refresh the metadata of a checkpoint, which the client has changed at the store. The reply
    comes when attachments of the checkpoint show the change."""

    location: Location


class StartPrefetch(Request[replies.Prefetching], frozen=True, tag="prefetch"):
    """Begin to fetch files of an attachment.

    The prefetch ends with the connection, which holds the attachment as `Attach` does. A connection
    runs one prefetch at a time.

    Attributes:
        name: The attachment's directory in the mount.
        globs, plan, rank, rate, keep: See `plan.Wanted`.
    """

    name: str
    globs: _Globs = msgspec.field(default_factory=list[str])
    plan: Plan | None = None
    rank: _Rank = -1
    rate: _Size = 0
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.globs and self.plan is None:
            raise ValueError("a prefetch needs globs or a plan")


class PrefetchProgress(Request[replies.Prefetching], frozen=True, tag="prefetch-progress"):
    """Return the progress of the connection's prefetch. The reply comes after a moment, or as soon
    as the prefetch has ended."""


class GiveBlocks(Request[replies.Given], frozen=True, tag="give-blocks"):
    """Write blocks of a file to the memfd that the client passes along (SCM_RIGHTS).

    Attributes:
        name: The attachment's directory in the mount.
        path: The file's path in the checkpoint.
        first: Number of the first block.
        count: Number of blocks.
        at: Offset in the memfd, in bytes.
    """

    name: str
    path: _Path
    first: Annotated[int, msgspec.Meta(ge=0)]
    count: Annotated[int, msgspec.Meta(ge=1, le=PIECE_BLOCKS_MAX)]
    at: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0


class FindBlocks(Request[replies.Found], frozen=True, tag="find-blocks"):
    """Return which blocks of a file are in the cache, in the version that the store has.

    Attributes:
        name, path: See `GiveBlocks`.
    """

    name: str
    path: _Path


class TakeBlocks(Request[replies.Taken], frozen=True, tag="take-blocks"):
    """Insert consecutive blocks of a file into the cache, from the memfd that the client passes
    along (SCM_RIGHTS).

    Attributes:
        name, path, first, at: See `GiveBlocks`.
        etag, sums: See `Given`.
    """

    name: str
    path: _Path
    first: Annotated[int, msgspec.Meta(ge=0)]
    etag: Annotated[str, msgspec.Meta(max_length=4096)]
    sums: Annotated[list[int], msgspec.Meta(min_length=1, max_length=PIECE_BLOCKS_MAX)]
    at: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0


class BorrowMemory(Request[replies.Done], frozen=True, tag="borrow-memory"):
    """Lend the connection memory for `PIECE_BLOCKS_MAX` blocks. The reply brings its descriptor
    (SCM_RIGHTS). A connection has one such memory."""


class SaveBlocks(Request[replies.Taken], frozen=True, tag="save-blocks"):
    """Insert consecutive blocks of a file that the client has uploaded into the cache, from the
    start of the memory that the connection has borrowed.

    Attributes:
        name, path, first, count: See `GiveBlocks`.
        etag: The ETag of the object that the client has uploaded.
    """

    name: str
    path: _Path
    first: Annotated[int, msgspec.Meta(ge=0)]
    count: Annotated[int, msgspec.Meta(ge=1, le=PIECE_BLOCKS_MAX)]
    etag: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class GetTrace(Request[replies.Trace], frozen=True, tag="trace"):
    """Return how processes have read a checkpoint. Its directory inside the mount names an
    attached checkpoint, and its location also names one that was attached earlier."""

    name: str = ""
    location: Location | None = None


_Checkpoint = Annotated[str, msgspec.Meta(max_length=8448)]
"""A checkpoint in the cache: its name, its directory's name in the mount, or its URI in a named
store (the length of a location's path and of a store's name); "" for all checkpoints."""


class ListCache(Request[replies.CacheResults], frozen=True, tag="cache-ls"):
    """List the cached checkpoints that this user has attached, or the cached files of one. Root
    sees the checkpoints of all users."""

    checkpoint: _Checkpoint = ""


class CollectCache(Request[replies.CacheResults], frozen=True, tag="cache-gc"):
    """Remove the least recently used files that no process has open. A request has at most one
    goal; without a goal, the cache shrinks to the configured limits.

    Attributes:
        free: Bytes to remove.
        keep: Bytes to keep.
        older_s: Age of the files to remove, in seconds since their last use.
    """

    free: _Size | None = None
    keep: _Size | None = None
    older_s: Annotated[float, msgspec.Meta(ge=0, le=AGE_S_MAX)] | None = None


class VerifyCache(Request[replies.CacheResults], frozen=True, tag="cache-verify"):
    """Read the cached files, and remove the blocks that do not match their checksums. `rate` is the
    most bytes per second; 0 for no limit."""

    checkpoint: _Checkpoint = ""
    rate: _Size = 0


class ClearCache(Request[replies.CacheResults], frozen=True, tag="cache-clear"):
    """Remove all cached files that no process has open."""

    checkpoint: _Checkpoint = ""


class CacheProgress(Request[replies.CacheResults], frozen=True, tag="cache-progress"):
    """Return the progress of the connection's cache command, which one of the four messages above
    has begun. The command ends with the connection, and a connection runs one at a time. The reply
    comes after a moment, or as soon as there are results."""


CacheRequest = ListCache | CollectCache | VerifyCache | ClearCache


class Restart(Request[replies.Done], frozen=True, tag="restart"):
    """End the daemon, and start another, perhaps of another version, which takes over all
    attachments. The keeper's program is replaced, too."""


class Reload(Request[replies.Reloaded], frozen=True, tag="reload"):
    """Read the configuration again. The reply comes when the new configuration is in force."""


class Stop(Request[replies.Done], frozen=True, tag="stop"):
    """End the daemon and its mount. Without `force`, the daemon refuses while a process uses a
    checkpoint."""

    force: bool = False
