"""Reads that never wait for the disk: from the buffers of spans, and from the page cache.

All blocks of a read must be `readable`. All methods belong to the event loop. A thread may run the
copies of what was found, and then write it to the kernel, as long as it is lent.
"""

import errno
import mmap
import os
from collections.abc import Callable

from ckptfs._daemon.cache import disk_ops
from ckptfs._daemon.cache.buffer_pool import Buffers
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.page_copies import Found, Loan, PageCopy, Views
from ckptfs._model.blocks import BLOCK_BYTES, block_length

_READ_BYTES_MAX = 2 << 20
"""Size of a reused buffer for bytes of the page cache; the kernel asks for at most 1 MiB (256
pages)."""


class MemoryReads:
    """The reads of one cache. `close` undoes one use of an object."""

    def __init__(
        self, buffers: Buffers[CachedObject], close: Callable[[CachedObject], None]
    ) -> None:
        self._buffers = buffers
        self._close = close
        self._pages = [mmap.mmap(-1, _READ_BYTES_MAX)]
        self._nowait = os.RWF_NOWAIT

    def read_now(self, entry: CachedObject, offset: int, length: int) -> Views | None:
        """Bytes that are in memory; None if some are not in memory. They are valid until the next
        call, or as long as they are lent."""
        found = self._find(entry, offset, length)
        return found.views if found is not None and self._copied(found) else None

    def find_now(self, entry: CachedObject, offset: int, length: int) -> Found | None:
        """As `read_now`, but the copies out of the page cache may have still to run. If one of them
        fails, `note_failed_copy` has to follow.

        Without the kernel's word on what is in memory, they have run already. Any of them may then
        begin to read the disk, and the next one of that block must know of it.
        """
        found = self._find(entry, offset, length)
        if found is None or not found.copies or disk_ops.knows_cached():
            return found
        return Found(found.views) if self._copied(found) else None

    def _copied(self, found: Found) -> bool:
        """Run the copies. Returns whether all of them have succeeded."""
        for copy in found.copies:
            if not copy.run():
                self.note_failed_copy(copy)
                return False
        return True

    def _find(self, entry: CachedObject, offset: int, length: int) -> Found | None:
        """Where the bytes are; None if a copy out of the page cache is not possible."""
        if length > _READ_BYTES_MAX:
            return None
        views: Views = []
        copies: list[PageCopy] = []
        pages = self._unlent_pages()
        start, end = offset, offset + length
        while start < end:
            index, inside = divmod(start, BLOCK_BYTES)
            stop = min(end, (index + 1) * BLOCK_BYTES) if entry.memory else end
            view = self.in_buffer(entry, index)
            if view is not None:
                view = view[inside : inside + stop - start]
            elif not self._nowait:
                return None
            else:
                view = pages[start - offset : stop - offset]
                copies.append(PageCopy(entry, start, view, self._nowait))
            views.append(view)
            start = stop
        return Found(views, copies)

    def in_buffer(self, entry: CachedObject, index: int) -> memoryview | None:
        """The bytes of a block that are in a buffer, valid until a buffer is taken, unless they are
        lent."""
        buffer = entry.memory.get(index)
        if buffer is None:
            return None
        start = (index - buffer.blocks.start) * BLOCK_BYTES
        return buffer.view[start : start + block_length(index, entry.size)]

    def note_failed_copy(self, copy: PageCopy) -> None:
        """Have the blocks checked again whose pages a copy has not found in memory."""
        if copy.error is not None and copy.error.errno == errno.EOPNOTSUPP:
            self._nowait = 0  # a file system without it: every read takes a thread
        if copy.is_short:
            copy.entry.doubt(copy.blocks)

    # -- loans

    def lend(self, found: Found) -> Loan:
        """Keep what was found as it is until it is taken back, for a thread that copies it."""
        entries = [copy.entry for copy in found.copies]
        for entry in entries:
            entry.users += 1
        return Loan(self._buffers.lend(found.views), entries)

    def take_back(self, loan: Loan) -> None:
        """End a loan."""
        self._buffers.take_back(loan.memory)
        for entry in loan.entries:
            self._close(entry)

    def _unlent_pages(self) -> memoryview:
        """A buffer for bytes of the page cache, which no thread copies from."""
        memory = next((m for m in self._pages if not self._buffers.is_lent(m)), None)
        if memory is None:
            memory = mmap.mmap(-1, _READ_BYTES_MAX)
            self._pages.append(memory)
        return memoryview(memory)

    def trim(self) -> None:
        """Give back the memory that only several loans at once need."""
        del self._pages[1:]
