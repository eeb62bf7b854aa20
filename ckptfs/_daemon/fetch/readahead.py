"""Readahead: the blocks to fetch before they are asked for. Pure decisions, no IO.

The policy follows cursors, the places at which programs read on. Cursors belong to the file, not to
a handle, because the page faults of a mapping and processes that share a descriptor come through
one handle. An access that touches no cursor starts one, and fetches only its own bytes. So the
first touch of a random place costs one block. When the cursor advances, a window runs ahead of it.
The window depends on what is known:

- If the file's format names its parts (tensors; see `formats`), the window ends with the part that
  is being read, and all of that part is fetched. A cursor that has passed two parts reads on
  through the file. Its window is that of a cursor that began at the start.
- Otherwise, a cursor that began at the start of the file most likely reads all of it. The window is
  as large as the bytes that the cursor has read. After a few blocks it is four times as large, up
  to the maximum. Each step is a round trip or two.
- A cursor that began elsewhere reads one tensor, whose end is unknown. The window is one block and
  a sixteenth of the bytes that the cursor has read, so that few bytes are fetched in vain. From
  `_LONG_BYTES` on it is a quarter of these bytes. If most of the file was read, the rest will be,
  too, so the window is that of a cursor that began at the start.

A file is read *through* when two of its parts were read one after the other, by any cursors. A full
load of mapped tensors does not advance one cursor, because memcpy(3) touches the end of a tensor
before its beginning. From then on one front runs ahead of all accesses that are not far behind or
before it, by the largest window. An *eager* file is read through from its first access at the start
on, because the files beside it were read as a whole just before. So a load of a model's shards, one
after the other, is fast from the second shard on.

Small gaps and small steps back belong to the same cursor, because the kernel's own readahead
arrives out of order, and because a program may walk in strides. In a file of unknown parts the same
holds for an access within `_APART_BYTES` of the cursor that lies in its window, or in the bytes
that it has read. So several processes that read one descriptor in turn are one reader, in any
order. (If the parts are known, an access in a window may be memcpy(3) at the end of a tensor.)
"""

from bisect import bisect_right
from dataclasses import dataclass

from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._model.formats.headers import Parts

CURSORS_MAX = 32
"""The most cursors of a file. The least recently used one is forgotten."""
_REACH_BYTES = 2 * BLOCK_BYTES
"""The largest gap or step back within a cursor: twice the kernel's largest request, as far as the
kernel's own readahead goes."""
_TOUCH_BYTES = _REACH_BYTES + BLOCK_BYTES
"""The bytes that may come with a program's read of a few bytes, so fewer bytes prove nothing. They
are a request of the kernel, or Python's buffer (of st_blksize, see `fuse`), and the kernel's own
readahead behind it."""
_APART_BYTES = 16 * BLOCK_BYTES
"""Twice the distance of eight processes that read 1 MiB each in turn. An access before that is
another reader's. So is one behind it: its bytes may have left the cache."""
_LONG_BYTES = 8 * BLOCK_BYTES
"""Four cursors in turn, in 1 GiB at 20 ms and 90 MB/s per connection, had 0.41 of the rate of one
with a sixteenth for ever, and have 0.84 with a quarter from here on (computed)."""
_PAGE_BYTES = 4096
_STEP_BYTES = 8 * BLOCK_BYTES
"""The bytes that are asked for at once, if the window allows it: one large request. In larger steps
fewer connections would be in use: half as many just before the next step."""


@dataclass(slots=True, eq=False)
class _Cursor:
    """A place at which a program reads on."""

    start: int  # the first byte of all accesses
    anchor: int  # a byte that the program surely asked for with its first access
    position: int  # the first byte after the furthest access
    from_start: bool
    read_bytes: int  # of the accesses that moved it forward
    ahead: int  # the first block that was not yet asked for on its behalf

    def spans(self, offset: int) -> bool:
        """Whether `offset` is in the bytes that the cursor has read, or in its window, or near."""
        return self.start <= offset + _REACH_BYTES and offset <= (
            self.ahead * BLOCK_BYTES + _REACH_BYTES
        )


class Readahead:
    """The cursors of one file of `size` bytes. An `eager` file is most likely read as a whole."""

    def __init__(
        self, size: int, window_bytes_max: int, parts: Parts | None = None, *, eager: bool = False
    ) -> None:
        self.eager = eager
        self._size = size
        self._window_bytes_most = self._window_bytes_max = window_bytes_max
        self._cursors: list[_Cursor] = []  # least recently used first
        self._read_bytes = 0  # of all cursors
        self._parts = parts
        self._part_read: int = -1  # the last part that a program surely read
        self._parts_in_row: int = 0  # the parts that were read one after the other, up to that one
        self._front: int | None = None  # the first block not yet asked for, if it is read through

    def learn_parts(self, parts: Parts) -> None:
        """Use the parts of the file from now on."""
        self._parts = parts

    def limit_window(self, bytes_max: float) -> None:
        """Let no window be longer than `bytes_max` from now on, nor than the first maximum."""
        self._window_bytes_max = int(min(self._window_bytes_most, bytes_max))

    @property
    def is_read_whole(self) -> bool:
        """Whether most of the file was read, piece by piece; always False for a small file."""
        if self._size <= 2 * _TOUCH_BYTES:
            return False
        return self._read_bytes > self._size // 2

    @property
    def is_asked_whole(self) -> bool:
        """Whether the file is read through, and all of it was asked for."""
        return self._front is not None and self._front >= block_count(self._size)

    @property
    def was_eager_in_vain(self) -> bool:
        """Whether the file was begun eagerly, and then not read on."""
        return (
            self.eager
            and bool(self._cursors)
            and not self.is_read_whole
            and (self._size > 2 * _TOUCH_BYTES)
        )

    def access(self, offset: int, length: int) -> range:
        """Follow an access. Returns the blocks to fetch ahead of it (may be empty)."""
        ahead = self._follow(offset, length)
        if self._front is None:
            if self._parts_in_row < 2 and not (self.eager and offset < BLOCK_BYTES):
                return ahead
            self._front = block_count(offset + length)
        if offset > self._front * BLOCK_BYTES + _REACH_BYTES:
            return ahead
        ahead = _blocks_ahead(self._front, offset + length, self._window_bytes_max, self._size)
        self._front = ahead.stop or self._front
        return ahead

    def _follow(self, offset: int, length: int) -> range:
        """Move the cursor of an access, or start one. Returns the blocks ahead of the cursor."""
        stop = offset + length
        cursor = self._find(offset)
        if cursor is None:
            self._start_cursor(offset, length)
            return range(0)
        cursor.start = min(cursor.start, offset)
        cursor.from_start |= offset < BLOCK_BYTES  # its first request may have been overtaken
        if stop <= cursor.position:
            return range(0)
        forward = min(length, stop - cursor.position)
        cursor.read_bytes += forward
        self._read_bytes += forward
        cursor.position = stop
        window, end = self._window(cursor)
        ahead = _blocks_ahead(cursor.ahead, stop, min(window, self._window_bytes_max), end)
        cursor.ahead = ahead.stop or cursor.ahead
        return ahead

    def _start_cursor(self, offset: int, length: int) -> None:
        if len(self._cursors) >= CURSORS_MAX:
            self._read_bytes -= self._cursors.pop(0).read_bytes
        self._read_bytes += length
        stop = offset + length
        self._cursors.append(
            _Cursor(
                start=offset,
                # A page fault comes with as much before as after it, and at the start of its page.
                anchor=offset + min(length // 2 + _PAGE_BYTES, length - 1),
                position=stop,
                from_start=offset < BLOCK_BYTES,
                read_bytes=length,
                ahead=block_count(stop),
            )
        )

    def _find(self, offset: int) -> _Cursor | None:
        """The nearest cursor, if `offset` belongs to it. A plain loop, because every read runs
        it."""
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

    def _window(self, cursor: _Cursor) -> tuple[int, int]:
        """The window of a cursor that has just advanced: its bytes, and the byte at which to
        stop."""
        if self._parts is not None:
            return self._window_in_parts(cursor, self._parts)
        run = cursor.position - cursor.start
        if cursor.from_start or self.is_read_whole:
            return _growing(run), self._size
        return (run // 4 if run >= _LONG_BYTES else _careful(run)), self._size

    def _window_in_parts(self, cursor: _Cursor, parts: Parts) -> tuple[int, int]:
        first = _part_at(parts, cursor.anchor)
        # The kernel's own readahead may have asked for the bytes behind this one.
        sure = cursor.position - _TOUCH_BYTES - 1
        part = max(first, _part_at(parts, sure))
        if part >= first + 2:
            return _growing(cursor.read_bytes), self._size
        if sure < parts.starts[part] or cursor.read_bytes <= _TOUCH_BYTES:
            return _careful(cursor.read_bytes), parts.stops[part]
        self._note_part(part)
        return self._window_bytes_max, parts.stops[part]

    def _note_part(self, part: int) -> None:
        """A program has surely read that part."""
        if part != self._part_read:
            self._parts_in_row = self._parts_in_row + 1 if part == self._part_read + 1 else 1
            self._part_read = part


def _growing(read_bytes: int) -> int:
    """The window of a cursor that most likely reads on to the end of the file."""
    return read_bytes * (4 if read_bytes > _TOUCH_BYTES else 1)


def _careful(read_bytes: int) -> int:
    """The window of a cursor that may stop at any byte."""
    return BLOCK_BYTES + read_bytes // 16


def _part_at(parts: Parts, offset: int) -> int:
    """The index of the part with the byte `offset`; of the first part, if the byte is before it."""
    return max(0, bisect_right(parts.starts, offset) - 1)


def _blocks_ahead(asked: int, position: int, window: int, stop: int) -> range:
    """The blocks to ask for, so that `window` bytes behind `position` are asked for, up to the byte
    `stop`; ``range(0)`` if it is too early. The blocks before `asked` were asked for."""
    end = block_count(stop)
    target = min((position + window) // BLOCK_BYTES, end)
    start = max(asked, block_count(position))  # the first block not touched yet
    # Ask for half of a small window at a time, and for a whole request of a large one.
    step = min(window // 2, _STEP_BYTES)
    if target < end and (target - start) * BLOCK_BYTES < step:
        return range(0)
    return range(start, max(start, target))
