"""Bytes that a read has found, and copies out of the page cache that a thread may make for it.

The event loop decides where the bytes of a read are. Those of a span's buffer are there already.
Those of the data file are one copy away, 0.1 s per GiB, which needs neither the event loop nor the
interpreter's lock. So a thread of ``fuse.reply_threads`` may make that copy later.

Blocks may be dropped meanwhile: eviction makes holes of them, and a hole reads as zeros. Or their
pages leave memory, and come back unchecked. Each of these begins with a new
`CachedObject.generation`. So a copy that ends in the generation in which it was decided has the
right bytes. Another copy counts as failed, and its read begins again.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ckptfs._daemon.cache import disk_ops
from ckptfs._daemon.cache.buffer_pool import Lent
from ckptfs._daemon.cache.cached_object import CachedObject

Views: TypeAlias = list[memoryview]
"""Consecutive bytes, in parts."""


class PageCopy:
    """One copy of bytes of `entry` from `offset` on into `view`. The event loop makes it, and any
    thread may run it.

    `nowait` are the flags of preadv2(2) for a read that never waits for the disk.

    Attributes:
        error: What the system said about the copy, or None.
    """

    __slots__ = ("_generation", "_nowait", "entry", "error", "offset", "view")

    def __init__(self, entry: CachedObject, offset: int, view: memoryview, nowait: int) -> None:
        self.entry = entry
        self.offset = offset
        self.view = view
        self.error: OSError | None = None
        self._nowait = nowait
        self._generation = entry.generation

    def run(self) -> bool:
        """Make the copy. Returns whether `view` has all of the bytes. Never waits for the disk."""
        fd = self.entry.files.data
        try:
            # A short read is not the end of the file (see RWF_NOWAIT, preadv(2)): the kernel may
            # have begun to read the rest, which is not checked then.
            count = disk_ops.read_cached(fd, self.view, self.offset, self._nowait)
        except OSError as error:
            self.error = error
            return False
        return count == len(self.view) and self.entry.generation == self._generation


class Found(NamedTuple):
    """Bytes that need no wait. `views` have them after all of `copies` have run."""

    views: Views
    copies: Sequence[PageCopy] = ()


class Loan(NamedTuple):
    """Memory that is lent to a thread, and the objects that stay open for its copies."""

    memory: Lent
    entries: list[CachedObject]
