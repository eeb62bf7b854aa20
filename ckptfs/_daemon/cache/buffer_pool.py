"""Memory for spans: reused buffers, whose bytes stay readable until the room is needed.

Each span is read from the store into a buffer of its own. Readers are served from there, so a byte
that is fetched shortly before it is read never comes back from the disk, and writes to the disk go
past the page cache (`object_dir.write`). Fresh memory costs a page fault for every 4 KiB, which
took up to half of the throughput. So buffers are used again, the oldest first, whose bytes were
most likely read already. Huge pages make that cheaper still: there are fewer page faults, and the
disk gets few large segments instead of 4 KiB each. A cold read of 1 GiB on a virtual machine took
1.6 to 2.0 s with them and 2.5 to 2.8 s without.

A buffer is *busy* (being filled or written to the disk), *kept* (its blocks are readable, and it
can be taken when there is no other room) or *free*. Sizes are powers of two, so that they fit
again.

The memory of a reply is *lent* while a thread copies it to the kernel (``fuse.reply_threads``). A
lent buffer may be busy, kept or free: a reply may be decided just when the last file is closed that
keeps its buffer. No span gets a lent buffer before it is taken back. All methods belong to the
event loop.
"""

import contextlib
import mmap
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, TypeAlias, TypeVar

from ckptfs._model.blocks import BLOCK_BYTES

Owner = TypeVar("Owner")
Lent: TypeAlias = list[mmap.mmap]
"""Memory that is lent, as `Buffers.take_back` needs it."""


def capacity_of(length: int) -> int:
    """Bytes of the buffer for a span of `length` bytes."""
    return max(BLOCK_BYTES, 1 << (length - 1).bit_length())


class Buffer(Generic[Owner]):
    """One span's memory, page-aligned. `owner` and `blocks` say whose bytes are kept in it."""

    def __init__(self, capacity: int) -> None:
        # Private: what is shared is tmpfs to the kernel, mostly without huge pages.
        memory = mmap.mmap(-1, capacity, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memory
        self.view = memoryview(memory)
        self.owner: Owner | None = None
        self.blocks = range(0)


class Buffers(Generic[Owner]):
    """All buffers, at most `bytes_max` together, unless more than that is busy or lent.

    `forget` is called with a kept buffer before it is taken for something else. `trim` leaves
    `idle_bytes_max` of free buffers.
    """

    def __init__(
        self, bytes_max: int, forget: Callable[[Buffer[Owner]], None], idle_bytes_max: int = 0
    ) -> None:
        self._bytes_max = bytes_max
        self._idle_bytes_max = idle_bytes_max
        self._forget = forget
        self._kept: OrderedDict[Buffer[Owner], None] = OrderedDict()  # oldest first
        self._free: dict[int, list[Buffer[Owner]]] = {}
        self._loans: Counter[mmap.mmap] = Counter()
        self.total_bytes = 0

    def resize(self, bytes_max: int) -> None:
        """Have at most so many bytes from now on; what is too much goes as it is needed again."""
        self._bytes_max = bytes_max

    def take(self, length: int) -> Buffer[Owner]:
        """A busy buffer of at least `length` bytes."""
        capacity = capacity_of(length)
        while True:
            free = self._free.get(capacity, [])
            if buffer := next(filter(self._is_available, reversed(free)), None):
                free.remove(buffer)
                return buffer
            if self.total_bytes + capacity <= self._bytes_max or not self._make_room():
                self.total_bytes += capacity
                return Buffer(capacity)

    def _make_room(self) -> bool:
        """Drop a free buffer (of another size), or free a kept one; False: there is none."""
        if self._drop_free(self._is_available):
            return True
        buffer = next(filter(self._is_available, self._kept), None)
        if buffer is None:
            return False
        self._forget(buffer)
        self.release(buffer)
        return True

    def _is_available(self, buffer: Buffer[Owner]) -> bool:
        return buffer.memory not in self._loans

    def _drop_free(self, may_drop: "Callable[[Buffer[Owner]], bool]" = lambda _: True) -> bool:
        """Drop one free buffer; False: there is none. The memory of a lent one stays until it is
        taken back."""
        for free in self._free.values():
            for buffer in filter(may_drop, free):
                free.remove(buffer)
                self.total_bytes -= len(buffer.view)
                return True
        return False

    def keep(self, buffer: Buffer[Owner]) -> None:
        """Have a busy buffer kept: its blocks stay readable."""
        self._kept[buffer] = None

    def release(self, buffer: Buffer[Owner]) -> None:
        """Free a buffer whose bytes are no longer needed, or drop it if there are too many."""
        self._kept.pop(buffer, None)
        buffer.owner = None
        if self.total_bytes > self._bytes_max:
            self.total_bytes -= len(buffer.view)
        else:
            self._free.setdefault(len(buffer.view), []).append(buffer)

    def release_of(self, owner: Owner) -> None:
        """Free all buffers that are kept for `owner`."""
        for buffer in [buffer for buffer in self._kept if buffer.owner is owner]:
            self.release(buffer)

    def abandon(self, buffer: Buffer[Owner]) -> None:
        """Stop counting a buffer that an abandoned thread may still write into."""
        self.total_bytes -= len(buffer.view)

    def trim(self) -> None:
        """Give the memory of free buffers back, but for `idle_bytes_max`."""
        while self.total_bytes > self._idle_bytes_max and self._drop_free():
            pass

    # -- memory that a thread copies from

    def lend(self, parts: "Iterable[bytes | memoryview]") -> Lent:
        """Keep the memory of `parts` as it is until it is taken back. It may be a buffer's, or any
        other mapping."""
        lent = [
            memory
            for part in parts
            if isinstance(part, memoryview) and isinstance(memory := part.obj, mmap.mmap)
        ]
        self._loans.update(lent)
        return lent

    def take_back(self, lent: Lent) -> None:
        """End a loan."""
        for memory in lent:
            self._loans[memory] -= 1
            if not self._loans[memory]:
                del self._loans[memory]

    def is_lent(self, memory: mmap.mmap) -> bool:
        """Whether a thread may still copy from `memory`."""
        return memory in self._loans
