"""What the daemon remembers of how a checkpoint was read: who read which bytes, and what was
fetched for that. Plain data; ``ckptfs report`` shows it.

All times are seconds since the checkpoint was attached.
"""

from typing import Literal

import msgspec

Purpose = Literal["demand", "readahead", "prefetch"]
"""Why bytes were fetched: a reader waited for them, will want them, or somebody asked for all."""


class Access(msgspec.Struct, array_like=True):
    """Reads of one process in one file that followed one another, without a gap and soon.

    Attributes:
        file: Position in the manifest.
        pid: The process that has opened the file; 0: one of another pid namespace.
        start: Of its bytes.
        stop: Of its bytes.
        reads: How many requests of the kernel these were: of up to 1 MiB each, its own readahead
            included.
        waits: How many of them had to wait for bytes that were not in the cache's memory or files.
        waited_s: How long all of these together have waited.
        began_s: When the first one came.
        ended_s: When the last one was answered.
    """

    file: int
    pid: int
    start: int
    stop: int
    reads: int
    waits: int
    waited_s: float
    began_s: float
    ended_s: float


class Fetch(msgspec.Struct, array_like=True, frozen=True):
    """One span of bytes that was asked of the store.

    Attributes:
        file: Position in the manifest.
        start: Of its bytes.
        stop: Of its bytes.
        purpose: The most urgent one that it had.
        tries: Requests that it took.
        error: Why it failed; "": it did not.
        wanted_s: When it was decided to fetch it.
        began_s: When its last request was sent.
        ended_s: When its bytes were there.
    """

    file: int
    start: int
    stop: int
    purpose: Purpose
    tries: int
    error: str
    wanted_s: float
    began_s: float
    ended_s: float


class TracedFile(msgspec.Struct, array_like=True, frozen=True):
    """A file that entries of a trace name by `index`; `path` is relative to the checkpoint."""

    index: int
    path: str
    size: int


class TracedProcess(msgspec.Struct, array_like=True, frozen=True):
    """A process that has opened files.

    Attributes:
        pid: Its id.
        command: Its name, as far as the daemon could see it.
        rank: In its job, if it has told; -1.
    """

    pid: int
    command: str
    rank: int = -1
