"""The control protocol: one JSON object per line, a request and then its reply, on a unix socket.

The socket is a trust border. Unknown fields, unknown operations and other protocol versions are
refused, and a line is at most `LINE_BYTES_MAX` long. While a connection is open it holds what it
attached, so that a client can take its own lease (an open directory) before it hangs up.
"""

from typing import Annotated, Literal, TypeVar

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.manifest import Skipped
from ckptfs._model.plan import Plan
from ckptfs._model.trace import Access, Fetch, TracedFile, TracedProcess
from ckptfs._model.units import AGE_S_MAX, RATE_MAX
from ckptfs.errors import ProtocolError

LINE_BYTES_MAX = 1 << 20
"""Longest message: a location is below 64 KiB, a status of 1,000 attachments below 1 MiB."""
PIECE_BLOCKS_MAX = 16
"""Most blocks that one message is about: 16 MiB, so that the round trip counts for little."""
GLOBS_MAX = 10_000
"""Most globs of one prefetch: each is compared with each file."""
REQUEST_ID = r"^[A-Za-z0-9_.-]{0,64}\Z"
"""What the id of a request may look like: it goes into logs and headers."""
_Glob = Annotated[str, msgspec.Meta(max_length=4096)]

_Rank = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]

Version = Annotated[int, msgspec.Meta(ge=1, le=1)]


class Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="op"
):
    """Base of all messages; `v` is the protocol's version."""

    v: Version = 1


class Asked(Message, frozen=True, kw_only=True):
    """Base of all requests; `request` is an id for logs, see ``ckptfs._requestid``."""

    request: Annotated[str, msgspec.Meta(pattern=REQUEST_ID)] = ""


class Attach(Asked, frozen=True, tag="attach"):
    """Attach a checkpoint. `pinned`: it stays until it is detached, though nobody holds it.
    `prefetch`: globs of files to fetch in the background, in that order; `plan`: what else to
    fetch. `rank`: of the process in its job, -1: unknown; of a plan, it is the part for that."""

    location: Location
    pinned: bool = False
    plan: Plan | None = None
    rank: _Rank = -1
    prefetch: Annotated[list[_Glob], msgspec.Meta(max_length=GLOBS_MAX)] = []


class Detach(Asked, frozen=True, tag="detach"):
    """End an attachment, named by its directory inside the mount or by its location."""

    name: str = ""
    location: Location | None = None
    force: bool = False


class Status(Asked, frozen=True, tag="status"):
    """Ask for the daemon's state."""


class Activity(Asked, frozen=True, tag="activity"):
    """Ask for what has been read and fetched since the daemon started. Reply: `ActivityReply`."""


class MetadataChanged(Asked, frozen=True, tag="metadata-changed"):
    """The metadata of a checkpoint was changed at the store. Reply: `Done`, when attachments of it
    show that."""

    location: Location


class StartPrefetch(Asked, frozen=True, tag="prefetch"):
    """Begin to fetch the files of the attachment with the directory `name` that match the globs, in
    their order, or what `plan` names (for `rank`; -1: for all), with at most `rate` bytes per
    second (0: no limit). Reply: `Prefetching`. It ends with the connection, which holds the
    attachment as `Attach` does. A connection has one at a time."""

    name: str
    globs: Annotated[list[_Glob], msgspec.Meta(max_length=GLOBS_MAX)] = []
    plan: Plan | None = None
    rank: _Rank = -1
    rate: Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)] = 0

    def __post_init__(self) -> None:
        if not self.globs and self.plan is None:
            raise ValueError("a prefetch needs globs or a plan")


class PrefetchProgress(Asked, frozen=True, tag="prefetch-progress"):
    """Ask for the connection's prefetch. Reply: `Prefetching`, after a moment, or as soon as it has
    ended."""


class GiveBlocks(Asked, frozen=True, tag="give-blocks"):
    """Write `count` blocks from `first` on of the file `path` of the attachment `name` to the
    memfd that is passed along (SCM_RIGHTS), from byte `at` on. Reply: `Given`."""

    name: str
    path: Annotated[str, msgspec.Meta(max_length=4096)]
    first: Annotated[int, msgspec.Meta(ge=0)]
    count: Annotated[int, msgspec.Meta(ge=1, le=PIECE_BLOCKS_MAX)]
    at: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0


class TakeBlocks(Asked, frozen=True, tag="take-blocks"):
    """Take consecutive blocks from `first` on of such a file into the cache. Their bytes are in the
    memfd that is passed along, from byte `at` on; `etag` and `sums` are those of `Given`. Reply:
    `Taken`."""

    name: str
    path: Annotated[str, msgspec.Meta(max_length=4096)]
    first: Annotated[int, msgspec.Meta(ge=0)]
    etag: Annotated[str, msgspec.Meta(max_length=4096)]
    sums: Annotated[list[int], msgspec.Meta(min_length=1, max_length=PIECE_BLOCKS_MAX)]
    at: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0


class GetTrace(Asked, frozen=True, tag="trace"):
    """Ask how a checkpoint was read, named by its directory inside the mount or by its location; by
    its location also when nobody holds it any more. Reply: `Trace`."""

    name: str = ""
    location: Location | None = None


_Checkpoint = Annotated[str, msgspec.Meta(max_length=512)]
"""A checkpoint in the cache by its name, or by its directory's in the mount; "": all of them."""
_Size = Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)]


class ListCache(Asked, frozen=True, tag="cache-ls"):
    """What is in the cache, of what this user has attached (root: of all): the checkpoints, or the
    files of one. Replies: see `CacheProgress`."""

    checkpoint: _Checkpoint = ""


class CollectCache(Asked, frozen=True, tag="cache-gc"):
    """Take out what was used least recently and nobody has open: `free` bytes of it, or so much
    that `keep` bytes stay, or what was not used for `older_s` seconds. One of these at most; none:
    down to the configured limits. Replies: see `CacheProgress`."""

    free: _Size | None = None
    keep: _Size | None = None
    older_s: Annotated[float, msgspec.Meta(ge=0, le=AGE_S_MAX)] | None = None


class VerifyCache(Asked, frozen=True, tag="cache-verify"):
    """Read what is in the cache, at most `rate` bytes per second (0: no limit), and take out what
    its checksums do not fit. Replies: see `CacheProgress`."""

    checkpoint: _Checkpoint = ""
    rate: Annotated[int, msgspec.Meta(ge=0, le=RATE_MAX)] = 0


class ClearCache(Asked, frozen=True, tag="cache-clear"):
    """Take out all that nobody has open. Replies: see `CacheProgress`."""

    checkpoint: _Checkpoint = ""


class CacheProgress(Asked, frozen=True, tag="cache-progress"):
    """Ask for the connection's task on the cache, that one of the messages above has begun and that
    ends with the connection, which has one at a time. Reply to all of them: `CacheNews`, after a
    moment, or as soon as there is any."""


CacheRequest = ListCache | CollectCache | VerifyCache | ClearCache


class Restart(Asked, frozen=True, tag="restart"):
    """End the daemon, and have it followed by another, also of another version, that goes on with
    everything. The program of its keeper is replaced, too."""


class Reload(Asked, frozen=True, tag="reload"):
    """Read the configuration anew. Reply: `Reloaded`, when it counts."""


class Stop(Asked, frozen=True, tag="stop"):
    """End the daemon and its mount. Refused while something is held, unless `force`."""

    force: bool = False


Request = (
    Attach
    | Detach
    | Status
    | Activity
    | MetadataChanged
    | StartPrefetch
    | PrefetchProgress
    | GiveBlocks
    | TakeBlocks
    | GetTrace
    | CacheRequest
    | CacheProgress
    | Reload
    | Restart
    | Stop
)


class Attached(Message, frozen=True, tag="attached"):
    """Reply to `Attach`. `mount` is the mount point as the daemon sees it, `name` a directory in
    it."""

    mount: str
    name: str
    uri: str
    version: str
    files: int
    size: int
    skipped: int


class Done(Message, frozen=True, tag="done"):
    """Reply to `Detach`, `MetadataChanged`, `Restart` and `Stop`."""


class Given(Message, frozen=True, tag="given"):
    """Reply to `GiveBlocks`: the file's ETag ("": the store has none), and the blocks' checksums as
    the cache has them."""

    etag: str
    sums: list[int]


class Taken(Message, frozen=True, tag="taken"):
    """Reply to `TakeBlocks`: how many bytes came into the cache, and how many were there, or on
    their way from the store."""

    taken: int
    had: int


class Failed(Message, frozen=True, tag="failed"):
    """The request failed; `code` is one of ``ckptfs.errors.BY_CODE``."""

    code: str
    message: str


class FileError(msgspec.Struct, frozen=True):
    """A file that could not be fetched; `code` as in `Failed`."""

    path: str
    code: str
    message: str


class Prefetching(Message, frozen=True, tag="prefetching"):
    """Reply to `StartPrefetch` and `PrefetchProgress`: how far it is.

    Attributes:
        ended: It has ended; then `early_code` and `early_message` say why that was before it was
            done with all files ("": it was not).
        files: How many match.
        bytes: Of all of them.
        cached: Of these, what was in the cache already.
        fetched: What was not, and is there now.
        errors: The first of the files that could not be fetched; `error_count`: how many these are.
    """

    ended: bool
    files: int
    bytes: int
    cached: int
    fetched: int
    errors: list[FileError] = []
    error_count: int = 0
    early_code: str = ""
    early_message: str = ""


class Trace(Message, frozen=True, tag="trace-reply"):
    """Reply to `GetTrace`; see ``_model.trace``.

    Attributes:
        mount, name: As in `Attached`; `name` is "" where it is attached no more.
        uri, version, attached, file_count, size: As in `AttachmentStatus`.
        files, processes: What `accesses` and `fetches` name.
        left_out: How many reads and fetches there was no room for.
        lent: Positions of files that were complete in the cache when they were opened, so that the
            kernel has read them by itself, unseen.
        restarts: How many daemons have served the mount before this one, which knows of nothing
            that was before it.
    """

    mount: str
    name: str
    uri: str
    version: str
    attached: float
    file_count: int
    size: int
    files: list[TracedFile]
    processes: list[TracedProcess]
    accesses: list[Access]
    fetches: list[Fetch]
    left_out: int
    lent: list[int]
    restarts: int


class Reloaded(Message, frozen=True, tag="reloaded"):
    """Reply to `Reload`: the settings that have changed, and those that are others in the file but
    cannot change while the daemon runs. `ended`: the URIs of checkpoints whose users have no right
    to them any more, or whose named store is gone or elsewhere."""

    changed: list[str]
    unchanged: list[str]
    ended: list[str]


class Holder(msgspec.Struct, frozen=True):
    """A process that holds an attachment, or has files of it open. `command`: what it runs; "":
    it is none of the user who asks."""

    pid: int
    command: str
    open_files: int


class CachedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in the cache, as one user had it attached; or what of it was taken out.

    Attributes:
        name: Its directory in the mount, without what tells users apart.
        uri: Where it is, without credentials.
        uid: The user.
        files: How many are in the cache, at least in part; `open_files`: of these are open.
        bytes: That these take on the disk.
        cached: Bytes of them that are there; `size`: of all its files, when it was attached.
        used: When one of them was used last, seconds since the epoch.
        attached: Whether it is attached now, and the asking user may know; `pinned`: until it is
            detached.
    """

    name: str
    uri: str
    uid: int
    files: int
    open_files: int
    bytes: int
    cached: int
    size: int
    used: float
    attached: bool
    pinned: bool


class CachedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the cache; as `CachedCheckpoint`, of one file. `path`: within the checkpoint."""

    uri: str
    uid: int
    path: str
    bytes: int
    cached: int
    size: int
    used: float
    open: bool


class DamagedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of which something was taken out because it is damaged: `blocks` blocks, or (0) all of
    it. `path`: within the checkpoint; "": it cannot be read any more."""

    uri: str
    path: str
    blocks: int
    reason: str


class CacheNews(Message, frozen=True, tag="cache-news"):
    """How far a task on the cache is, and what it has found since the last news.

    Attributes:
        ended: There is no more; then `early_code` and `early_message` say why that was before it
            was done ("": it was not).
        done: Bytes that were checked, of `all`.
        files: That were listed, checked or taken out.
        freed: Bytes on the disk.
        open_files: That nothing was done to, as they are open; `open_bytes`: on the disk.
        removed_at_start: Objects that were not whole, or of another format, when the cache was
            opened.
    """

    ended: bool
    done: int = 0
    all: int = 0
    files: int = 0
    freed: int = 0
    open_files: int = 0
    open_bytes: int = 0
    removed_at_start: int = 0
    checkpoints: list[CachedCheckpoint] = []
    cached_files: list[CachedFile] = []
    damaged: list[DamagedFile] = []
    early_code: str = ""
    early_message: str = ""


class AttachmentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of one attachment. Sizes in bytes, `attached` in seconds since the epoch.

    Attributes:
        holders: The processes that hold its directory, the first of them.
        processes: The first of those that hold it, or have files of it open.
        reads_per_s, read_bytes_per_s, fetched_bytes_per_s: What the kernel was given, and what came
            from the store, in the last ten seconds or so.
    """

    name: str
    path: str
    uri: str
    version: str
    state: Literal["lazy", "fetching", "cached", "changed", "failing"]
    files: int
    size: int
    cached: int
    holders: list[int]
    open_files: int
    pinned: bool
    attached: float
    uid: int
    error: str = ""
    skipped: list[Skipped] = []
    skipped_count: int = 0
    processes: list[Holder] = []
    reads_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    fetched_bytes_per_s: float = 0.0


class StatusReply(Message, frozen=True, tag="status-reply"):
    """Reply to `Status`. Sizes in bytes; the two counters run since the daemon started.
    `restarts`: how many daemons have served the mount before this one.
    `passthrough`: "on", or "off: " and the reason why the kernel reads no cached file itself.
    `left_out`: attachments for which a message has no room."""

    version: str
    pid: int
    mount: str
    cache_dir: str
    cache_bytes: int
    cache_bytes_max: int
    fetched_bytes: int
    fetched_spans: int
    passthrough: str
    restarts: int
    attachments: list[AttachmentStatus]
    left_out: int = 0


class Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was read, since the daemon started.

    Attributes:
        opens: Files that were opened; `kernel_opens`: those that the kernel reads by itself, of
            whose reads nobody knows.
        open_files: That are open now; `waiting`: reads that wait now.
        reads, read_bytes: That the kernel was given; `misses`, `missed_bytes`: the part of these
            that had to wait for the store.
        errors: Reads that failed, by the error's code.
        fetches, fetched_bytes: Requests for data that came of these reads, and what they brought.
        latency_ns: How many reads took less than 2**i nanoseconds, and not less than half of it, at
            position i; zeros at its end are left out.
    """

    opens: int = 0
    kernel_opens: int = 0
    open_files: int = 0
    waiting: int = 0
    reads: int = 0
    read_bytes: int = 0
    misses: int = 0
    missed_bytes: int = 0
    errors: dict[str, int] = {}
    fetches: int = 0
    fetched_bytes: int = 0
    latency_ns: list[int] = []


class ProcessActivity(msgspec.Struct, frozen=True):
    """What one process did with a checkpoint; `pid` 0: no single one, and `command` says what it
    is."""

    pid: int
    command: str
    counts: Counts


class CheckpointActivity(msgspec.Struct, frozen=True, kw_only=True):
    """What happened in one attachment. `in_flight`: requests for data that are under way or wait;
    `queued`: those that wait; `retries`, `failures`: attempts after one that failed, and those that
    did, by the error's code."""

    name: str
    uri: str
    in_flight: int
    queued: int
    retries: int
    failures: dict[str, int]
    counts: Counts
    processes: list[ProcessActivity]
    processes_left_out: int


class RequestActivity(msgspec.Struct, frozen=True):
    """Requests to stores of one kind: how many had which outcome; `latency_ns` as in `Counts`."""

    kind: str
    outcomes: dict[str, int]
    latency_ns: list[int]


class ActivityReply(Message, frozen=True, tag="activity-reply"):
    """Reply to `Activity`. `at_s`: when it was, of a clock that runs evenly and begins anew with
    each daemon; `started`: since when it counts, in seconds since the epoch. `counts` are those of
    the whole node; of the checkpoints there are those that the user may see, and that a message has
    room for, the busiest ones first.

    Attributes:
        retries: Attempts after one that had failed; `hedged`: second requests beside one that took
            long.
        running, in_flight_bytes: Transfers that are under way now, and their bytes.
        queue: Transfers that wait for a place now, by priority.
    """

    version: str
    pid: int
    mount: str
    at_s: float
    started: float
    restarts: int
    passthrough: str
    cache_bytes: int
    cache_bytes_max: int
    evicted_bytes: int
    evicted_objects: int
    fetched_bytes: int
    fetched_spans: int
    retries: int
    hedged: int
    failures: dict[str, int]
    running: int
    in_flight_bytes: int
    queue: dict[str, int]
    counts: Counts
    requests: list[RequestActivity]
    checkpoints: list[CheckpointActivity]
    checkpoints_left_out: int


Reply = (
    Attached
    | Done
    | Failed
    | Given
    | Prefetching
    | CacheNews
    | Reloaded
    | StatusReply
    | ActivityReply
    | Taken
    | Trace
)

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_Decoded = TypeVar("_Decoded")


def encode(message: Request | Reply) -> bytes:
    """`message` as one line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """The request in `line`. Raises ProtocolError for everything else."""
    return _decode(_requests, line)


def decode_reply(line: bytes) -> Reply:
    """The reply in `line`. Raises ProtocolError for everything else."""
    return _decode(_replies, line)


def _decode(decoder: "msgspec.json.Decoder[_Decoded]", line: bytes) -> _Decoded:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Of the decoder's text only: the line itself may hold credentials.
        raise ProtocolError(
            f"malformed control message: {error}; client and daemon must be of the same version"
        ) from None
