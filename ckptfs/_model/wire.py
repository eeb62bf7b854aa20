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
from ckptfs._model.units import RATE_MAX
from ckptfs.errors import ProtocolError

LINE_BYTES_MAX = 1 << 20
"""Longest message: a location is below 64 KiB, a status of 1,000 attachments below 1 MiB."""
GLOBS_MAX = 10_000
"""Most globs of one prefetch: each is compared with each file."""
REQUEST_ID = "^[A-Za-z0-9_.-]{0,64}$"
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


class GetTrace(Asked, frozen=True, tag="trace"):
    """Ask how a checkpoint was read, named by its directory inside the mount or by its location; by
    its location also when nobody holds it any more. Reply: `Trace`."""

    name: str = ""
    location: Location | None = None


class Restart(Asked, frozen=True, tag="restart"):
    """End the daemon, and have it followed by another, also of another version, that goes on with
    everything. The program of its keeper is replaced, too."""


class Stop(Asked, frozen=True, tag="stop"):
    """End the daemon and its mount. Refused while something is held, unless `force`."""

    force: bool = False


Request = (
    Attach
    | Detach
    | Status
    | MetadataChanged
    | StartPrefetch
    | PrefetchProgress
    | GetTrace
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


class AttachmentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of one attachment. Sizes in bytes, `attached` in seconds since the epoch."""

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


class StatusReply(Message, frozen=True, tag="status-reply"):
    """Reply to `Status`. Sizes in bytes; the two counters run since the daemon started.
    `restarts`: how many daemons have served the mount before this one.
    `passthrough`: "on", or "off: " and the reason why the kernel reads no cached file itself."""

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


Reply = Attached | Done | Failed | Prefetching | StatusReply | Trace

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
