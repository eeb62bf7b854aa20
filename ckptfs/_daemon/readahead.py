"""Readahead: which blocks to fetch before they are asked for. Pure decisions, no IO.

The policy follows cursors, places where somebody reads on. Cursors belong to the file, not to a
handle: page faults of a mapping and processes that share a descriptor come through one handle. An
access that touches no cursor starts one, and fetches no more than itself: the first touch of a
random place costs one block. When the cursor goes on, a window runs ahead of it:

- a cursor that began at the start of the file most likely reads all of it: the window is as large
  as what it has read (it doubles), up to the maximum;
- a cursor that began elsewhere reads one tensor, and where that ends we do not know: the window is
  one block and a sixteenth of what it has read, so that the waste stays below a tenth of what was
  needed.

Small gaps and small steps back (the kernel's own readahead arrives out of order; a strided walk)
belong to the same cursor.
"""

from dataclasses import dataclass

from ckptfs._model.blocks import BLOCK_BYTES, block_count

CURSORS_MAX = 32
"""Cursors per file; the least recently used one is forgotten."""
_REACH_BYTES = 2 * BLOCK_BYTES
"""Largest gap or step back within a cursor: twice the kernel's largest request."""


@dataclass(slots=True)
class _Cursor:
    position: int  # first byte after the furthest access
    from_start: bool
    read_bytes: int  # by accesses that moved it forward
    ahead: int  # first block that was not yet asked for on its behalf


class Readahead:
    """The cursors of one file of `size` bytes; a window is at most `window_bytes_max`."""

    def __init__(self, size: int, window_bytes_max: int) -> None:
        self._blocks = block_count(size)
        self._window_bytes_max = window_bytes_max
        self._cursors: list[_Cursor] = []  # least recently used first

    def access(self, offset: int, length: int) -> range:
        """Take in an access; returns the blocks to fetch ahead of it (may be empty)."""
        stop = offset + length
        cursor = self._find(offset, stop)
        if cursor is None:
            if len(self._cursors) >= CURSORS_MAX:
                del self._cursors[0]
            first_after = (stop - 1) // BLOCK_BYTES + 1
            self._cursors.append(_Cursor(stop, offset < BLOCK_BYTES, length, first_after))
            return range(0)
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
        doubled, careful = cursor.read_bytes, BLOCK_BYTES + cursor.read_bytes // 16
        window = doubled if cursor.from_start else careful
        window = min(window, self._window_bytes_max)
        current = (cursor.position - 1) // BLOCK_BYTES + 1  # first block not touched yet
        target = min((cursor.position + window) // BLOCK_BYTES, self._blocks)
        start = max(cursor.ahead, current)
        # Ask for half of the window at a time: fewer and larger requests.
        if target < self._blocks and (target - start) * BLOCK_BYTES * 2 < window:
            return range(0)
        cursor.ahead = max(start, target)
        return range(start, cursor.ahead)
