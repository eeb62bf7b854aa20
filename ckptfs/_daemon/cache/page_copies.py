"""Bytes that a read has found, and copies out of the page cache that a thread may make for it.

The event loop decides where the bytes of a read are. Those of a span's buffer are there already.
Those of the data file are one copy away, 0.1 s per GiB, which needs neither the event loop nor the
interpreter's lock. So a thread of ``fuse.reply_threads`` may make that copy later.

Blocks may be dropped meanwhile: eviction makes holes of them, and a hole reads as zeros. Or their
pages leave memory, and come back unchecked. The event loop gives a block a new number before it
does either (`CachedObject.renew`). So a copy whose blocks have the same numbers at its end has the
right bytes. Another copy counts as failed, and its read begins again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ckptfs._daemon.cache import disk_ops
from ckptfs._daemon.cache.buffer_pool import Lent
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._model.blocks import blocks_of

if TYPE_CHECKING:
    from array import array

Views: TypeAlias = list[memoryview]
"""Consecutive bytes, in parts."""


class PageCopy:
    """One copy of bytes of `entry` from `offset` on into `view`. The event loop makes it, and any
    thread may run it once.

    `flags` are those of preadv2(2) for a read that never waits for the disk.

    Attributes:
        blocks: The blocks that the bytes are in.
        is_short: Whether the copy has run and did not find all pages in memory.
        error: The error of the system, or None.
    """

    def __init__(self, entry: CachedObject, offset: int, view: memoryview, flags: int) -> None:
        self.entry = entry
        self.blocks = blocks_of(offset, len(view))
        self.is_short = False
        self.error: OSError | None = None
        self._offset = offset
        self._view = view
        self._flags = flags
        self._generations = self._generations_now()

    def _generations_now(self) -> "array[int]":
        return self.entry.generations[self.blocks.start : self.blocks.stop]

    def run(self) -> bool:
        """Make the copy. Returns whether `view` has all of the bytes. Never waits for the disk."""
        fd = self.entry.files.data
        try:
            # A short read is not the end of the file (see RWF_NOWAIT, preadv(2)): the kernel may
            # have begun to read the rest, which is not checked then.
            count = disk_ops.read_cached(fd, self._view, self._offset, self._flags)
        except OSError as error:
            self.error, count = error, 0
        self.is_short = count < len(self._view)
        return not self.is_short and self._generations_now() == self._generations


class Found(NamedTuple):
    """Bytes that need no wait. `views` have them after all of `copies` have run."""

    views: Views
    copies: Sequence[PageCopy] = ()


class Loan(NamedTuple):
    """Memory that is lent to a thread, and the objects that stay open for its copies."""

    memory: Lent
    entries: list[CachedObject]
