"""What clients ask on the control socket (``wire``)."""

from typing import Annotated

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.message import Asked
from ckptfs._model.plan import Plan
from ckptfs._model.units import AGE_S_MAX, RATE_MAX

PIECE_BLOCKS_MAX = 16
"""Most blocks that one message is about: 16 MiB, so that the round trip counts for little."""
GLOBS_MAX = 10_000
"""Most globs of one prefetch: each is compared with each file."""

_Glob = Annotated[str, msgspec.Meta(max_length=4096)]
_Rank = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]


class Attach(Asked, frozen=True, tag="attach"):
    """Attach a checkpoint. `pinned`: it stays until it is detached, though nobody holds it.
    `prefetch`: globs of files to fetch in the background, in that order; `plan`: what else to
    fetch. `rank`: of the process in its job, -1: unknown; of a plan, it is the part for that."""

    location: Location
    pinned: bool = False
    plan: Plan | None = None
    rank: _Rank = -1
    prefetch: Annotated[list[_Glob], msgspec.Meta(max_length=GLOBS_MAX)] = msgspec.field(
        default_factory=list[_Glob]
    )


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
    globs: Annotated[list[_Glob], msgspec.Meta(max_length=GLOBS_MAX)] = msgspec.field(
        default_factory=list[_Glob]
    )
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
