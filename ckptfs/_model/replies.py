"""What the daemon answers on the control socket (``wire``)."""

from typing import Literal

import msgspec

from ckptfs._model.manifest import Skipped
from ckptfs._model.message import Message
from ckptfs._model.trace import Access, Fetch, TracedFile, TracedProcess


class Attached(Message, frozen=True, tag="attached"):
    """Reply to `Attach`. `mount` is the mount point as the daemon sees it, `name` a directory in
    it. `lacking`: the first of the files that cannot be read now (`Skipped.is_lacking`)."""

    mount: str
    name: str
    uri: str
    version: str
    files: int
    size: int
    skipped: int
    lacking: tuple[Skipped, ...] = ()


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
    errors: list[FileError] = msgspec.field(default_factory=list[FileError])
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
    checkpoints: list[CachedCheckpoint] = msgspec.field(default_factory=list[CachedCheckpoint])
    cached_files: list[CachedFile] = msgspec.field(default_factory=list[CachedFile])
    damaged: list[DamagedFile] = msgspec.field(default_factory=list[DamagedFile])
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
    """Reply to `Status`. Sizes in bytes; what is fetched from stores, taken from other nodes and
    given to them is counted since the daemon started.
    `restarts`: how many daemons have served the mount before this one.
    `workers`: how many processes run libraries of stores for it; `worker_bytes`: their memory.
    `passthrough`: "on", or "off: " and the reason why the kernel reads no cached file itself.
    `left_out`: attachments for which a message has no room.
    `log`: where the daemon's log is to be read: a file, a command, or in words."""

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
    taken_bytes: int = 0
    given_bytes: int = 0
    log: str = ""
    workers: int = 0
    worker_bytes: int = 0


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
