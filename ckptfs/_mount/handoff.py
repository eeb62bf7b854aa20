"""The handoff: memory that outlives a daemon, with the facts that the next daemon needs.

The keeper creates the memory once (`create`), reads only the heartbeat in it, and passes its
descriptors to every daemon that it starts. A daemon writes down the kernel's and the users' facts
as they arise, because its death gives no warning. It is memory (memfd_create(2)), because it has
credentials, which must never reach a file.

**The table** has a header, and a slot of fixed size for each open handle. The order of its writes
lets the daemon be killed between any two steps:

1. `reserve`: The slot is taken, but the kernel does not know the handle. After a kill it is free.
2. `replying`: The daemon is about to reply. After a kill it is unknown whether the kernel has the
   reply. If not, the kernel sends the request again with the same number, so the slot has that
   number.
3. `replied`: The kernel has the handle, and will release it.

A handle consists of the slot's number and its generation. So it never names two opens, and a second
release of it finds nothing.

**The journal** has frames. Each frame belongs to a key that can be forgotten
(``_daemon.attachment.journal``). There are two logs, and one of them is in use. To drop forgotten
frames, the daemon copies the rest to the other log, and then writes the other log's number into the
header. A frame counts when the header's length of the log includes it, so a torn frame is never
read.

All of it belongs to the event loop's thread.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from ckptfs._os.write_all import pwrite_all
from ckptfs.errors import DaemonError, LimitExceeded

HANDLES_MAX = 1 << 20
"""Most open handles, as many as one process may have (fs.nr_open, proc(5))."""

BEAT_S = 1.0
"""Time between two heartbeats of a daemon."""
RESTART_STATUS = 75
"""Exit status by which a daemon requests a restart (EX_TEMPFAIL, sysexits.h)."""

_MAGIC = int.from_bytes(b"ckptfs\x00\x01", "big")
"""Its last bytes are the version of the layout."""
_HEADER_BYTES = 4096
_U64 = struct.Struct("<Q")
_AT_MAGIC, _AT_BEAT, _AT_ORDINAL, _AT_TOP, _AT_LOG = 0, 8, 16, 24, 32
_AT_END = 40, 48
"""Lengths of the two logs."""
_AT_RESTARTS = 56
_AT_TAKEN_OVER = 64
_SLOT = struct.Struct("<BBxxIIiQQ16s")
"""The fields of `Slot`."""
_FREE, _RESERVED, _REPLYING, _OPEN = range(4)
_FRAME = struct.Struct("<QQ")
"""Key, and the length of the content behind it."""
_GARBAGE_BYTES_MAX = 64 << 10
"""Forgotten frames may take as much as the others, and this in addition."""


class Fds(NamedTuple):
    """Descriptors of the table and of the two logs."""

    table: int
    logs: tuple[int, int]

    def all(self) -> tuple[int, ...]:
        """All descriptors, for a child process."""
        return self.table, *self.logs


def create() -> Fds:
    """Make the memory, for the first daemon of a mount."""
    table, *logs = (os.memfd_create(f"ckptfs-{name}") for name in ("table", "log0", "log1"))
    os.ftruncate(table, _HEADER_BYTES + HANDLES_MAX * _SLOT.size)  # sparse
    os.pwrite(table, _U64.pack(_MAGIC), _AT_MAGIC)
    return Fds(table, (logs[0], logs[1]))


def beats(fds: Fds) -> int:
    """The number of heartbeats so far, of all daemons."""
    (count,) = _U64.unpack(os.pread(fds.table, _U64.size, _AT_BEAT))
    return count


def has_this_layout(fds: Fds) -> bool:
    """Whether a daemon of this release can use the memory."""
    return os.pread(fds.table, _U64.size, _AT_MAGIC) == _U64.pack(_MAGIC)


def note_takeover(fds: Fds) -> None:
    """Record that another keeper owns the mount from now on."""
    os.pwrite(fds.table, _U64.pack(int(time.time())), _AT_TAKEN_OVER)


class Slot(NamedTuple):
    """A slot of the table, for an open handle.

    Attributes:
        state: Free, reserved, replying or open (see the module's text).
        is_directory: Whether the handle is one of a directory.
        pid: The process that opened it.
        generation: The upper half of the handle.
        backing_id: The kernel's number for the cached object that it reads by itself; 0 if it reads
            none.
        inode: The open file or directory.
        request: The request whose reply the kernel may not have; 0 if the kernel has it.
        digest: The cache's digest of that object.
    """

    state: int
    is_directory: int
    pid: int
    generation: int
    backing_id: int
    inode: int
    request: int
    digest: bytes


class Handoff:
    """The memory, as a daemon sees it. Raises DaemonError for the layout of another version."""

    def __init__(self, fds: Fds) -> None:
        self._table = mmap.mmap(fds.table, 0)
        if self._get(_AT_MAGIC) != _MAGIC:
            raise DaemonError(
                "the previous daemon's state has the layout of another ckptfs version; run "
                "ckptfs umount --force, and mount again"
            )
        self.handles = Handles(self._table)
        self.journal = Journal(fds.logs, self._table)

    def beat(self) -> None:
        """Record that the event loop is alive."""
        self._set(_AT_BEAT, self._get(_AT_BEAT) + 1)

    def restarted(self) -> None:
        """Count a daemon that follows another one."""
        self._set(_AT_RESTARTS, self.restarts + 1)

    @property
    def restarts(self) -> int:
        """The number of daemons before this one."""
        return self._get(_AT_RESTARTS)

    @property
    def taken_over_s(self) -> int:
        """When a keeper took the mount over, in seconds since 1970; 0 if none has."""
        return self._get(_AT_TAKEN_OVER)

    def next_ordinal(self) -> int:
        """The number for a new attachment, from 1 on. It is unique for the life of the mount."""
        self._set(_AT_ORDINAL, self._get(_AT_ORDINAL) + 1)
        return self._get(_AT_ORDINAL)

    def _get(self, at: int) -> int:
        return _U64.unpack_from(self._table, at)[0]

    def _set(self, at: int, value: int) -> None:
        _U64.pack_into(self._table, at, value)


class Handles:
    """The open handles (see the module's text)."""

    def __init__(self, table: mmap.mmap) -> None:
        self._table = table
        self._free: list[int] = []
        for index in range(self._top):
            if self._slot(index).state == _RESERVED:
                self._set_state(index, _FREE)
            if self._slot(index).state == _FREE:
                self._free.append(index)

    def reserve(self, inode: int, pid: int, *, is_directory: bool) -> int:
        """A handle for an open that is under way. Raises LimitExceeded."""
        if self._free:
            index = self._free.pop()
        else:
            index = self._top
            if index == HANDLES_MAX:
                raise LimitExceeded(
                    f"{HANDLES_MAX} files and directories of the mount are open; close some"
                )
            _U64.pack_into(self._table, _AT_TOP, index + 1)
        generation = (self._slot(index).generation + 1) & 0xFFFFFFFF
        self._put(index, Slot(_FREE, is_directory, pid, generation, 0, inode, 0, b""))
        self._set_state(index, _RESERVED)
        return generation << 32 | index

    def replying(self, handle: int, request: int, backing_id: int = 0, digest: str = "") -> None:
        """Record that the daemon is about to reply to the request that opened it."""
        index = handle & 0xFFFFFFFF
        raw = bytes.fromhex(digest)
        slot = self._slot(index)._replace(backing_id=backing_id, request=request, digest=raw)
        self._put(index, slot._replace(state=_RESERVED))
        self._set_state(index, _REPLYING)

    def replied(self, handle: int) -> None:
        """Record that the kernel has the reply."""
        self._set_state(handle & 0xFFFFFFFF, _OPEN)

    def free(self, handle: int) -> bool:
        """Free a handle that is no longer open. Returns whether it was open."""
        index = handle & 0xFFFFFFFF
        if index >= self._top:
            return False
        slot = self._slot(index)
        if slot.state == _FREE or slot.generation != handle >> 32:
            return False
        self._set_state(index, _FREE)
        self._free.append(index)
        return True

    def open_handles(self) -> Iterator[tuple[int, Slot]]:
        """All handles that the kernel has or may have."""
        for index in range(self._top):
            slot = self._slot(index)
            if slot.state in (_REPLYING, _OPEN):
                request = slot.request if slot.state == _REPLYING else 0
                yield slot.generation << 32 | index, slot._replace(request=request)

    @property
    def _top(self) -> int:
        return _U64.unpack_from(self._table, _AT_TOP)[0]

    def _slot(self, index: int) -> Slot:
        return Slot(*_SLOT.unpack_from(self._table, _at(index)))

    def _put(self, index: int, slot: Slot) -> None:
        _SLOT.pack_into(self._table, _at(index), *slot)

    def _set_state(self, index: int, state: int) -> None:
        self._table[_at(index)] = state


def _at(index: int) -> int:
    return _HEADER_BYTES + index * _SLOT.size


class Journal:
    """The frames (see the module's text)."""

    def __init__(self, logs: tuple[int, int], table: mmap.mmap) -> None:
        self._logs = logs
        self._table = table
        self._live: dict[int, list[tuple[int, int]]] = {}  # offset and length of frames, by key
        self._live_bytes = 0
        at = 0
        while at < self._end:
            key, length = _FRAME.unpack(os.pread(self._log, _FRAME.size, at))
            self._note(key, at, length)
            at += _FRAME.size + length

    def append(self, key: int, data: bytes) -> None:
        """Add a frame. `data` must not be empty."""
        at = self._end
        pwrite_all(self._log, _FRAME.pack(key, len(data)) + data, at)
        self._note(key, at, len(data))
        self._set_end(self._current, at + _FRAME.size + len(data))

    def forget(self, key: int) -> None:
        """Drop all frames of `key`."""
        if key not in self._live:
            return
        self.append(key, b"")
        if self._end > 2 * self._live_bytes + _GARBAGE_BYTES_MAX or not self._live:
            self._compact()

    def known(self) -> list[int]:
        """The keys that have frames."""
        return list(self._live)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Key and content of all frames, those of one key in their order."""
        for key, places in self._live.items():
            for at, length in places:
                yield key, _read(self._log, at + _FRAME.size, length)

    def _note(self, key: int, at: int, length: int) -> None:
        if length:
            self._live.setdefault(key, []).append((at, length))
            self._live_bytes += _FRAME.size + length
        else:
            self._live_bytes -= sum(_FRAME.size + n for _, n in self._live.pop(key, []))

    def _compact(self) -> None:
        old, new = self._log, self._logs[1 - self._current]
        os.ftruncate(new, 0)
        end = 0
        moved: dict[int, list[tuple[int, int]]] = {}
        for key, places in self._live.items():
            for at, length in places:
                pwrite_all(new, _read(old, at, _FRAME.size + length), end)
                moved.setdefault(key, []).append((end, length))
                end += _FRAME.size + length
        self._set_end(1 - self._current, end)
        _U64.pack_into(self._table, _AT_LOG, 1 - self._current)
        self._live = moved
        os.ftruncate(old, 0)

    @property
    def _current(self) -> int:
        return _U64.unpack_from(self._table, _AT_LOG)[0]

    @property
    def _log(self) -> int:
        return self._logs[self._current]

    @property
    def _end(self) -> int:
        return _U64.unpack_from(self._table, _AT_END[self._current])[0]

    def _set_end(self, log: int, end: int) -> None:
        _U64.pack_into(self._table, _AT_END[log], end)


def _read(fd: int, at: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        data = os.pread(fd, length - len(found), at + len(found))
        if not data:
            raise DaemonError(
                "the previous daemon's state ends in the middle of a record; run "
                "ckptfs umount --force, and mount again"
            )
        found += data
    return bytes(found)
