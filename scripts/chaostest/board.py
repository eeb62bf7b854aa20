"""Messages of a run's processes to each other in shared memory, which make no process wait.

The run writes the latest version of each file. Each reader writes its current operation, so that
the run sees one that hangs. Times are of the monotonic clock, which all processes of a machine
share.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

SLOTS = 32
"""Most readers of a run."""

_NOTE = struct.Struct("<dQ")  # since when, and which value
_SLOT = struct.Struct("<dI24s")  # since when (0: nothing), bytes that it may wait for, what
_VERSION = struct.Struct("<I")


class Doing(NamedTuple):
    """A reader's operation, its start, and the number of bytes that it wants."""

    since_s: float
    bytes: int
    operation: str


class Board:
    """The memory, a file at `path` that is made if it is not there."""

    def __init__(self, path: Path, files: int) -> None:
        self._slots_at = _NOTE.size
        self._versions_at = self._slots_at + SLOTS * _SLOT.size
        length = self._versions_at + files * _VERSION.size
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(fd, length)
        self._memory = mmap.mmap(fd, length)
        os.close(fd)

    def version(self, index: int) -> int:
        """The latest version of a file that a reader may see."""
        (found,) = _VERSION.unpack_from(self._memory, self._versions_at + index * _VERSION.size)
        return found

    def set_version(self, index: int, version: int) -> None:
        """To be called before the version is at the store."""
        _VERSION.pack_into(self._memory, self._versions_at + index * _VERSION.size, version)

    def note(self) -> tuple[float, int]:
        """The last note of other programs in a checkpoint's metadata: its time and value."""
        since_s, value = _NOTE.unpack_from(self._memory)
        return since_s, value

    def set_note(self, value: int) -> None:
        """To be called when it is at the store."""
        _NOTE.pack_into(self._memory, 0, time.monotonic(), value)

    def begin(self, slot: int, operation: str, length: int) -> None:
        """The reader begins an operation."""
        place = self._slots_at + slot * _SLOT.size
        _SLOT.pack_into(self._memory, place, time.monotonic(), length, operation.encode())

    def end(self, slot: int) -> None:
        """It has ended."""
        _SLOT.pack_into(self._memory, self._slots_at + slot * _SLOT.size, 0.0, 0, b"")

    def doing(self, slot: int) -> Doing | None:
        """The reader's current operation."""
        place = self._slots_at + slot * _SLOT.size
        since_s, length, operation = _SLOT.unpack_from(self._memory, place)
        return Doing(since_s, length, operation.rstrip(b"\0").decode()) if since_s else None
