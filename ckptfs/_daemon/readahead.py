"""Readahead: which blocks to fetch before they are asked for. Pure decisions, no IO.

The policy follows cursors, places where somebody reads on. Cursors belong to the file, not to a
handle: page faults of a mapping and processes that share a descriptor come through one handle. An
access that touches no cursor starts one, and fetches no more than itself: the first touch of a
random place costs one block. When the cursor goes on, a window runs ahead of it:

- where the file's format says what its parts are (tensors; see `formats`), the part that is being
  read is fetched to its end, and only it; a cursor that has passed two parts reads on through the
  file, and its window is that of one that began at the start;
- otherwise, a cursor that began at the start of the file most likely reads all of it: the window is
  as large as what it has read, and four times that when it has read a few blocks, up to the
  maximum: each step is a round trip or two;
- a cursor that began elsewhere reads one tensor, and where that ends we do not know: the window is
  one block and a sixteenth of what it has read, so that little is fetched in vain, and from
  `_LONG_BYTES` on a quarter of that; where most of the file was read, the rest will be, too, and
  the window is that of one that began at the start.

A file is read *through* when two of its parts were read one after the other, by whatever cursors:
memcpy(3) looks at the end of a tensor before its beginning, so that a full load of mapped tensors
is no cursor that goes on. From then on one front runs ahead of all accesses that are not far behind
or before it, by the largest window. A file that is *eager* is read through from its first access at
the start on: files beside it were read as a whole just before, as when a model's shards are loaded
one after the other.

Small gaps and small steps back (the kernel's own readahead arrives out of order; a strided walk)
belong to the same cursor. In a file of unknown parts so does what lies within `_APART_BYTES` of it
and in its window, or in what it has read: several processes that read one descriptor in turn are
one reader, in whichever order they come. (Where the parts are known, who is in a window may be
memcpy(3) at the end of a tensor.)
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
_APART_BYTES = 16 * BLOCK_BYTES
"""Twice as far apart as eight who read 1 MiB each in turn. One in front of that is another reader,
and so is one behind: what he reads may have left the cache."""
_LONG_BYTES = 8 * BLOCK_BYTES
"""Four cursors in turn, in 1 GiB at 20 ms and 90 MB/s per connection, had 0.41 of the rate of one
with a sixteenth for ever, and have 0.84 with a quarter from here on (computed)."""
_PAGE_BYTES = 4096
_STEP_BYTES = 8 * BLOCK_BYTES
"""As much is asked for at once, if the window allows it: one large request. In larger steps fewer
connections would be in use: half as many just before the next step."""


@dataclass(slots=True, eq=False)
class _Cursor:
    start: int  # first byte of all accesses
    anchor: int  # a byte that the program surely asked for with its first access
    position: int  # first byte after the furthest access
    from_start: bool
    read_bytes: int  # by accesses that moved it forward
    ahead: int  # first block that was not yet asked for on its behalf

    def spans(self, offset: int) -> bool:
        """Whether `offset` is in what it has read, or in its window, or nearly so."""
        return self.start <= offset + _REACH_BYTES and offset <= (
            self.ahead * BLOCK_BYTES + _REACH_BYTES
        )


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
        self._window_bytes_most = self._window_bytes_max = window_bytes_max
        self._cursors: list[_Cursor] = []  # least recently used first
        self._read_bytes = 0  # by all of them
        self._parts = parts
        self._part_read: int = -1  # the last part that somebody surely read, and how many in a row
        self._parts_in_row: int = 0
        self._front: int | None = None  # read through: first block that was not yet asked for

    def learn_parts(self, parts: Parts) -> None:
        """Take in what the file consists of."""
        self._parts = parts

    def limit_window(self, bytes_max: float) -> None:
        """Let a window be no longer than `bytes_max` from now on, nor than the first maximum."""
        self._window_bytes_max = int(min(self._window_bytes_most, bytes_max))

    @property
    def is_read_whole(self) -> bool:
        """Whether most of it was read, piece by piece; never so of a small file."""
        if self._size <= 2 * _TOUCH_BYTES:
            return False
        return self._read_bytes > self._size // 2

    @property
    def is_asked_whole(self) -> bool:
        """Whether it is read through, and all of it was asked for."""
        return self._front is not None and self._front >= block_count(self._size)

    @property
    def was_eager_in_vain(self) -> bool:
        """Whether it was begun eagerly, and then not read on."""
        return (
            self.eager
            and bool(self._cursors)
            and not self.is_read_whole
            and (self._size > 2 * _TOUCH_BYTES)
        )

    def access(self, offset: int, length: int) -> range:
        """Take in an access; returns the blocks to fetch ahead of it (may be empty)."""
        ahead = self._follow(offset, length)
        if self._front is None:
            if self._parts_in_row < 2 and not (self.eager and offset < BLOCK_BYTES):
                return ahead
            self._front = block_count(offset + length)
        if offset > self._front * BLOCK_BYTES + _REACH_BYTES:
            return ahead
        ahead = _ahead(self._front, offset + length, self._window_bytes_max, self._size)
        self._front = ahead.stop or self._front
        return ahead

    def _follow(self, offset: int, length: int) -> range:
        stop = offset + length
        cursor = self._find(offset)
        if cursor is None:
            if len(self._cursors) >= CURSORS_MAX:
                self._read_bytes -= self._cursors.pop(0).read_bytes
            self._read_bytes += length
            first_after = block_count(stop)
            # A page fault comes with as much before as after it, and at the start of its page.
            anchor = offset + min(length // 2 + _PAGE_BYTES, length - 1)
            from_start = offset < BLOCK_BYTES
            self._cursors.append(_Cursor(offset, anchor, stop, from_start, length, first_after))
            return range(0)
        cursor.start = min(cursor.start, offset)
        cursor.from_start |= offset < BLOCK_BYTES  # its first request may have been overtaken
        if stop <= cursor.position:
            return range(0)
        forward = min(length, stop - cursor.position)
        cursor.read_bytes += forward
        self._read_bytes += forward
        cursor.position = stop
        return self._advance(cursor)

    def _find(self, offset: int) -> _Cursor | None:
        """The nearest cursor, if `offset` belongs to it. A plain loop: every read runs it."""
        nearest = None
        distance_max = _REACH_BYTES
        is_unknown = self._parts is None
        for cursor in reversed(self._cursors):
            distance = abs(cursor.position - offset)
            if is_unknown and _REACH_BYTES < distance <= _APART_BYTES and cursor.spans(offset):
                distance = _REACH_BYTES
            if distance <= distance_max:
                nearest, distance_max = cursor, distance - 1
        if nearest is not None and nearest is not self._cursors[-1]:
            self._cursors.remove(nearest)
            self._cursors.append(nearest)
        return nearest

    def _advance(self, cursor: _Cursor) -> range:
        window, limit = self._window(cursor)
        ahead = _ahead(cursor.ahead, cursor.position, min(window, self._window_bytes_max), limit)
        cursor.ahead = ahead.stop or cursor.ahead
        return ahead

    def _window(self, cursor: _Cursor) -> tuple[int, int]:
        """How many bytes to run ahead of the cursor, and the byte at which to stop."""
        careful = BLOCK_BYTES + cursor.read_bytes // 16
        growing = cursor.read_bytes * (4 if cursor.read_bytes > _TOUCH_BYTES else 1)
        if self._parts is None:
            return self._window_of_unknown(cursor), self._size
        first = self._part(self._parts, cursor.anchor)
        # The furthest byte that is not just the kernel's readahead, and the part that it is in.
        sure = cursor.position - _TOUCH_BYTES - 1
        part = max(first, self._part(self._parts, sure))
        if part >= first + 2:
            return growing, self._size
        is_sure = sure >= self._parts.starts[part] and cursor.read_bytes > _TOUCH_BYTES
        if is_sure and part != self._part_read:
            self._parts_in_row = self._parts_in_row + 1 if part == self._part_read + 1 else 1
            self._part_read = part
        return self._window_bytes_max if is_sure else careful, self._parts.stops[part]

    def _window_of_unknown(self, cursor: _Cursor) -> int:
        run = cursor.position - cursor.start
        if cursor.from_start or self.is_read_whole:
            return run * (4 if run > _TOUCH_BYTES else 1)
        return run // 4 if run >= _LONG_BYTES else BLOCK_BYTES + run // 16

    @staticmethod
    def _part(parts: Parts, offset: int) -> int:
        """Index of the part that holds `offset`; of the first one for what is before it."""
        return max(0, bisect_right(parts.starts, offset) - 1)


def _ahead(asked: int, position: int, window: int, limit: int) -> range:
    """The blocks to ask for so that `window` bytes are asked for behind `position`, up to the byte
    `limit`, where those before the block `asked` were; range(0): it is too early."""
    end = block_count(limit)
    target = min((position + window) // BLOCK_BYTES, end)
    start = max(asked, block_count(position))  # the first block not touched yet
    # Ask for half of a small window at a time, and for a whole request of a large one.
    step = min(window // 2, _STEP_BYTES)
    if target < end and (target - start) * BLOCK_BYTES < step:
        return range(0)
    return range(start, max(start, target))
