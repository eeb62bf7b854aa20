"""The daemon's replies on the control socket (``wire``).

Some attributes mean the same wherever a struct does not describe them:

- mount: The mount point, as the daemon sees it.
- name: The attachment's directory in the mount.
- uri: The checkpoint's URI, without credentials.
- version: Version of the listing.
- files, size: Number of the checkpoint's files, and bytes of all of them.
- uid: The user who has attached the checkpoint.
- attached: Time of the attach, in seconds since the epoch.
- pinned: Whether the attachment stays until a client detaches it.
- early_code, early_message: The error that has ended the command early; "" without one.
"""

from typing import Literal

import msgspec

from ckptfs._model.counters import Counts, RequestCounts
from ckptfs._model.manifest import Skipped
from ckptfs._model.plans.trace import Access, Fetch, TracedFile, TracedProcess
from ckptfs._model.protocol.message import Message
from ckptfs._model.uploads import UploadStatus


class Reply(Message, frozen=True):
    """Base of all replies."""


class Attached(Reply, frozen=True, tag="attached"):
    """Reply to `Attach`.

    Attributes:
        skipped: Number of objects that the mount does not show.
        lacking: The first files that cannot be read now (`Skipped.is_lacking`).
    """

    mount: str
    name: str
    uri: str
    version: str
    files: int
    size: int
    skipped: int
    lacking: tuple[Skipped, ...] = ()


class Done(Reply, frozen=True, tag="done"):
    """Reply to `Detach`, `MetadataChanged`, `BorrowMemory`, `Restart` and `Stop`."""


class Given(Reply, frozen=True, tag="given"):
    """Reply to `GiveBlocks`.

    Attributes:
        etag: The file's ETag; "" if the store has none.
        sums: Checksums of the blocks, from the cache.
        fetched: Bytes of the blocks that the cache lacked.
    """

    etag: str
    sums: list[int]
    fetched: int = 0


class Found(Reply, frozen=True, tag="found"):
    """Reply to `FindBlocks`.

    Attributes:
        runs: The first block, and the number of blocks, of each run of consecutive blocks.
    """

    runs: list[tuple[int, int]]


class Taken(Reply, frozen=True, tag="taken"):
    """Reply to `TakeBlocks` and `SaveBlocks`.

    Attributes:
        taken: Bytes that this request has added to the cache.
        had: Bytes that were in the cache, or on their way from the store.
    """

    taken: int
    had: int


class Failed(Reply, frozen=True, tag="failed"):
    """Reply to a request that has failed; `code` is one of ``ckptfs.errors.BY_CODE``."""

    code: str
    message: str


class FileError(msgspec.Struct, frozen=True):
    """A file that the daemon could not fetch; `code` is as in `Failed`."""

    path: str
    code: str
    message: str


class Prefetching(Reply, frozen=True, tag="prefetching"):
    """Reply to `StartPrefetch` and `PrefetchProgress`.

    Attributes:
        ended: Whether the prefetch has ended.
        files: Number of files to fetch.
        bytes: Bytes to fetch of these files.
        cached: Bytes that were in the cache already.
        fetched: Bytes that this prefetch has added to the cache.
        errors: The first files that the daemon could not fetch.
        error_count: Number of all files that the daemon could not fetch.
        unmatched: The first globs that match no file.
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
    unmatched: list[str] = msgspec.field(default_factory=list[str])


class Trace(Reply, frozen=True, tag="trace-reply"):
    """Reply to `GetTrace` (``ckptfs._model.plans.trace``).

    Attributes:
        name: The attachment's directory in the mount; "" after its end.
        file_count: Number of the checkpoint's files.
        files: The files that `accesses` and `fetches` refer to.
        processes: The processes that `accesses` refer to.
        accesses: The recorded reads.
        fetches: The recorded fetches.
        left_out: Number of reads and fetches that the trace has no space for.
        passthrough: Positions of files that were complete in the cache when a process opened them.
            The kernel has read them by itself, so the daemon has not seen these reads. The name in
            JSON is ``lent``.
        restarts: Number of daemons that served the mount before this one. The trace has nothing
            from their time.
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
    passthrough: list[int] = msgspec.field(name="lent")
    restarts: int


class Reloaded(Reply, frozen=True, tag="reloaded"):
    """Reply to `Reload`.

    Attributes:
        changed: Settings that have changed.
        unchanged: Settings that differ in the file, but cannot change while the daemon runs.
        ended: URIs of checkpoints whose user has no right to them any more, or whose named store is
            gone or has another place.
    """

    changed: list[str]
    unchanged: list[str]
    ended: list[str]


class Holder(msgspec.Struct, frozen=True):
    """A process that holds an attachment, or has files of it open.

    Attributes:
        pid: The process.
        command: Its command; "" if the process belongs to another user than the client's.
        open_files: Number of its open files.
    """

    pid: int
    command: str
    open_files: int


class CachedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The cached files of a checkpoint that one user has attached, or those that a command has
    removed.

    Attributes:
        name: The checkpoint's directory in the mount, without the user's part.
        files: Number of files that are in the cache, at least in part.
        open_files: Number of these files that are open.
        bytes: Bytes of these files on the disk.
        cached: Bytes of the checkpoint that are in the cache.
        size: Bytes of all files of the checkpoint at its attach.
        used: Time of the last use of one of these files, in seconds since the epoch.
        attached: Whether the checkpoint is attached now, and the client may know it.
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
    """A cached file.

    Attributes:
        path: The file's path in the checkpoint.
        bytes: Bytes on the disk.
        cached: Bytes of the file that are in the cache.
        size: Bytes of the file.
        used: Time of its last use, in seconds since the epoch.
        open: Whether a process has it open.
    """

    uri: str
    uid: int
    path: str
    bytes: int
    cached: int
    size: int
    used: float
    open: bool


class DamagedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A cached file of which a check has removed damaged bytes.

    Attributes:
        path: The file's path in the checkpoint; "" if the check cannot tell.
        blocks: Number of removed blocks; 0 if the check has removed the whole file.
        reason: Description of the damage.
    """

    uri: str
    path: str
    blocks: int
    reason: str


class CacheResults(Reply, frozen=True, tag="cache-news"):
    """Reply to each cache command and to `CacheProgress`: its progress, and the results since the
    last reply.

    Attributes:
        ended: Whether the command has ended.
        done: Checked bytes.
        all: Bytes to check.
        files: Number of files that the command has listed, checked or removed.
        freed: Freed bytes on the disk.
        open_files: Number of files that the command has left alone because they are open.
        open_bytes: Bytes of these files on the disk.
        removed_at_start: Number of objects that the daemon has removed at its start, because they
            were incomplete or of another format.
        checkpoints: Listed or removed checkpoints.
        cached_files: Listed files.
        damaged: Files with damaged bytes.
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
    """State of one attachment.

    Attributes:
        path: Path of its directory, as the daemon sees it.
        state: The most noteworthy state among its files.
        cached: Bytes that are in the cache.
        holders: The first processes that hold its directory.
        open_files: Number of open files.
        error: The newest error, with its time; "" without one.
        skipped: The first objects that the mount does not show.
        skipped_count: Number of all these objects.
        volume: Id of the volume (``ckptfs._model.volume``); "" for another attachment.
        processes: The first processes that hold the attachment, or have files of it open.
        reads_per_s: Reads by the kernel, over the last ten seconds or so.
        read_bytes_per_s: Bytes of these reads.
        fetched_bytes_per_s: Bytes from the store, over the same time.
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
    volume: str = ""
    processes: list[Holder] = []
    reads_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    fetched_bytes_per_s: float = 0.0


class DaemonReply(Reply, frozen=True, kw_only=True):
    """The part that `StatusReply` and `ActivityReply` share. Counters start with the daemon.

    Attributes:
        version: The daemon's release.
        pid: The daemon's process.
        restarts: Number of daemons that served the mount before this one.
        passthrough: "on", or "off: " and the reason why the kernel reads no cached file itself.
        cache_bytes: Bytes of the cache on the disk.
        cache_bytes_max: Limit of the cache; 0 for none.
        fetched_bytes: Bytes that came from stores.
        fetched_spans: Number of spans that brought them.
        workers: Number of processes that read stores for the daemon.
    """

    version: str
    pid: int
    mount: str
    restarts: int
    passthrough: str
    cache_bytes: int
    cache_bytes_max: int
    fetched_bytes: int
    fetched_spans: int
    workers: int = 0


class StatusReply(DaemonReply, frozen=True, tag="status-reply"):
    """Reply to `Status`.

    Attributes:
        cache_dir: The cache's directory.
        attachments: The attachments that the client may see.
        left_out: Number of attachments for which the message has no space.
        taken_bytes: Bytes that came from other nodes.
        given_bytes: Bytes that went to other nodes.
        log: Where the daemon's log is: a file, a command, or a description.
        worker_bytes: Memory of these processes.
        taken_over_s: When the mount was last taken over from another keeper (``--take-over``), in
            seconds since 1970; 0 if it never was.
        host: The host name of the daemon's container, which in Kubernetes is the name of its pod.
        uploads: The uploads in the background that the client may see, without those that are done.
        uploads_left_out: Number of uploads for which the message has no space.
    """

    cache_dir: str
    attachments: list[AttachmentStatus]
    left_out: int = 0
    taken_bytes: int = 0
    given_bytes: int = 0
    log: str = ""
    worker_bytes: int = 0
    taken_over_s: int = 0
    host: str = ""
    uploads: list[UploadStatus] = msgspec.field(default_factory=list[UploadStatus])
    uploads_left_out: int = 0


class ProcessActivity(msgspec.Struct, frozen=True):
    """The activity of one process in a checkpoint.

    Attributes:
        pid: The process; 0 for reads of several processes, and for prefetches.
        command: The command that the process runs, or a description where `pid` is 0.
        counts: Its counters.
        ended: Whether the process has ended, as far as the daemon can see.
    """

    pid: int
    command: str
    counts: Counts
    ended: bool = False


class CheckpointActivity(msgspec.Struct, frozen=True, kw_only=True):
    """The activity in one attachment.

    Attributes:
        in_flight: Requests for data that are under way or wait.
        queued: Requests for data that wait.
        counts: The sum over all processes.
        processes: The busiest processes.
        processes_left_out: Number of further processes.
        retries, failures: As in `counts`, for clients of the previous release.
    """

    name: str
    uri: str
    in_flight: int
    queued: int
    counts: Counts
    processes: list[ProcessActivity]
    processes_left_out: int
    retries: int = 0
    failures: dict[str, int] = {}


class ActivityReply(DaemonReply, frozen=True, tag="activity-reply"):
    """Reply to `Activity`: the daemon's counters, and its state at this moment.

    Attributes:
        at_s: Time of the reply, on a clock that runs evenly and starts again with each daemon.
        started: Start of the daemon and of its counters, in seconds since the epoch.
        evicted_bytes: Bytes that the cache evicted to make space.
        evicted_objects: Files that the cache evicted completely.
        hedged: Second requests beside one that took long.
        running: Transfers that are under way now.
        in_flight_bytes: Bytes of these transfers, and bytes that are not on the disk yet.
        queue: Number of transfers that wait for a connection now, by priority.
        counts: Counters of the whole node.
        requests: Requests to stores, one entry per kind.
        checkpoints: The busiest of the checkpoints that the user may see, as many as fit.
        checkpoints_left_out: Number of further checkpoints.
        attachments: Number of attached checkpoints, of all users.
        threads: Threads of the daemon that work or wait for others.
        worker_memory_bytes: Memory of these processes.
        worker_starts: Number of such processes that the daemon has started.
        worker_ends: Number of such processes that have ended, by reason.
        retries, failures: As in `counts`, for clients of the previous release.
        uploads: Number of uploads in the background, by state; of all users.
        uploads_bytes: Bytes of the files that they keep on the disk.
        uploaded_bytes: Bytes that they have brought to stores.
        uploads_ended: Number of uploads that have ended, by result (done, failed, dropped).
    """

    at_s: float
    started: float
    evicted_bytes: int
    evicted_objects: int
    hedged: int
    running: int
    in_flight_bytes: int
    queue: dict[str, int]
    counts: Counts
    requests: list[RequestCounts]
    checkpoints: list[CheckpointActivity]
    checkpoints_left_out: int
    attachments: int = 0
    threads: int = 0
    worker_memory_bytes: int = 0
    worker_starts: int = 0
    worker_ends: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    retries: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    uploads: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    uploads_bytes: int = 0
    uploaded_bytes: int = 0
    uploads_ended: dict[str, int] = msgspec.field(default_factory=dict[str, int])
