"""Readahead: which blocks to fetch before they are asked for. Pure decisions, no IO.

The policy follows cursors, places where somebody reads on. Cursors belong to the file, not to a
handle: page faults of a mapping and processes that share a descriptor come through one handle. An
access that touches no cursor starts one, and fetches no more than itself: the first touch of a
random place costs one block. When the cursor goes on, a window runs ahead of it:

- where the file's format says what its parts are (tensors; see `formats`), the part that is being
  read is fetched to its end, and only it; a cursor that has passed two parts reads on through the
  file, and its window is as large as what it has read;
- otherwise, a cursor that began at the start of the file most likely reads all of it: the window is
  as large as what it has read, and four times that when it has read a few blocks, up to the
  maximum: each step is a round trip or two;
- a cursor that began elsewhere reads one tensor, and where that ends we do not know: the window is
  one block and a sixteenth of what it has read, so that little is fetched in vain.

A file is read *eagerly* if files beside it were read as a whole just before, as when a model's
shards are loaded one after the other: the first access at its start has the largest window at once.

Small gaps and small steps back (the kernel's own readahead arrives out of order; a strided walk)
belong to the same cursor.
"""

from bisect import bisect_right
from dataclasses import dataclass

from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._model.formats import Parts

CURSORS_MAX = 32
"""Cursors per file; the least recently used one is forgotten."""
_REACH_BYTES = 2 * BLOCK_BYTES
"""Largest gap or step back within a cursor: twice the kernel's largest request, as far as the
kernel's own readahead goes."""
_TOUCH_BYTES = _REACH_BYTES + BLOCK_BYTES
"""As much may come with a program's read of a few bytes, so less proves nothing: a request of the
kernel, or Python's buffer (of st_blksize, see `fuse`), and the kernel's own readahead behind it."""
_PAGE_BYTES = 4096


@dataclass(slots=True)
class _Cursor:
    anchor: int  # a byte that the program surely asked for with its first access
    position: int  # first byte after the furthest access
    from_start: bool
    read_bytes: int  # by accesses that moved it forward
    ahead: int  # first block that was not yet asked for on its behalf


class Readahead:
    """The cursors of one file of `size` bytes; a window is at most `window_bytes_max`.

    `eager`: it will most likely be read as a whole.
    """

    def __init__(
        self,
        size: int,
        window_bytes_max: int,
        parts: Parts | None = None,
        *,
        eager: bool = False,
    ) -> None:
        self.eager = eager
        self._size = size
        self._window_bytes_max = window_bytes_max
        self._cursors: list[_Cursor] = []  # least recently used first
        self._parts = parts

    def learn_parts(self, parts: Parts) -> None:
        """Take in what the file consists of."""
        self._parts = parts

    @property
    def is_read_whole(self) -> bool:
        """Whether most of it was read, piece by piece; never so of a small file."""
        if self._size <= _TOUCH_BYTES:
            return False
        return sum(cursor.read_bytes for cursor in self._cursors) > self._size // 2

    @property
    def is_asked_whole(self) -> bool:
        """Whether it is read eagerly, and all of it was asked for."""
        return self.eager and any(c.ahead >= block_count(self._size) for c in self._cursors)

    @property
    def was_eager_in_vain(self) -> bool:
        """Whether it was begun eagerly, and then not read on."""
        return (
            self.eager
            and bool(self._cursors)
            and not self.is_read_whole
            and (self._size > _TOUCH_BYTES)
        )

    def access(self, offset: int, length: int) -> range:
        """Take in an access; returns the blocks to fetch ahead of it (may be empty)."""
        stop = offset + length
        cursor = self._find(offset, stop)
        if cursor is None:
            if len(self._cursors) >= CURSORS_MAX:
                del self._cursors[0]
            first_after = block_count(stop)
            # A page fault comes with as much before as after it, and at the start of its page.
            anchor = offset + min(length // 2 + _PAGE_BYTES, length - 1)
            from_start = offset < BLOCK_BYTES
            cursor = _Cursor(anchor, stop, from_start, length, first_after)
            self._cursors.append(cursor)
            return self._advance(cursor) if self.eager and from_start else range(0)
        cursor.from_start |= offset < BLOCK_BYTES  # its first request may have been overtaken
        if stop <= cursor.position:
            return range(0)
        cursor.read_bytes += min(length, stop - cursor.position)
        cursor.position = stop
        return self._advance(cursor)

    def _find(self, offset: int, stop: int) -> _Cursor | None:
        near = [
            c
            for c in self._cursors
            if c.position - _REACH_BYTES <= offset <= c.position + _REACH_BYTES
        ]
        if not near:
            return None
        cursor = min(near, key=lambda c: abs(c.position - offset))
        self._cursors.remove(cursor)
        self._cursors.append(cursor)
        return cursor

    def _advance(self, cursor: _Cursor) -> range:
        window, limit = self._window(cursor)
        window = min(window, self._window_bytes_max)
        end = block_count(limit)
        current = block_count(cursor.position)  # first block not touched yet
        target = min((cursor.position + window) // BLOCK_BYTES, end)
        start = max(cursor.ahead, current)
        # Ask for half of the window at a time: fewer and larger requests.
        if target < end and (target - start) * BLOCK_BYTES * 2 < window:
            return range(0)
        cursor.ahead = max(start, target)
        return range(start, cursor.ahead)

    def _window(self, cursor: _Cursor) -> tuple[int, int]:
        """How many bytes to run ahead of the cursor, and the byte at which to stop."""
        if self.eager and cursor.from_start:
            return self._window_bytes_max, self._size
        careful = BLOCK_BYTES + cursor.read_bytes // 16
        growing = cursor.read_bytes * (4 if cursor.read_bytes > _TOUCH_BYTES else 1)
        if self._parts is None:
            return growing if cursor.from_start else careful, self._size
        first = self._part(self._parts, cursor.anchor)
        # The furthest byte that is not just the kernel's readahead, and the part that it is in.
        sure = cursor.position - _TOUCH_BYTES - 1
        part = max(first, self._part(self._parts, sure))
        if part >= first + 2:
            return growing, self._size
        is_sure = sure >= self._parts.starts[part] and cursor.read_bytes > _TOUCH_BYTES
        return self._window_bytes_max if is_sure else careful, self._parts.stops[part]

    @staticmethod
    def _part(parts: Parts, offset: int) -> int:
        """Index of the part that holds `offset`; of the first one for what is before it."""
        return max(0, bisect_right(parts.starts, offset) - 1)
