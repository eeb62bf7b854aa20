"""What outlives a daemon: memory that the keeper made, and each daemon leaves to the next one.

The keeper makes it once (`create`), never looks into it but for the heartbeat, and passes its
descriptors to every daemon that it starts. A daemon writes down there what the kernel and the users
will expect of the next one, as it happens: the next one gets no warning, and no farewell. It is
memory (memfd_create(2)): credentials are in it, and none of it ever reaches a file.

**The table** has a header and a slot of fixed size for each open handle. What is on it is written
so that the daemon may be killed between any two steps:

1. `reserve`: the slot is taken, but the kernel does not know the handle; after a kill it is free.
2. `replying`: it is about to. After a kill that is open: if the kernel did not get the reply it
   sends the request again, with the same number, which is why the slot has it.
3. `replied`: the kernel has it, and will release it.

A handle has the slot's number and its generation, so it is never the name of two openings, and a
release that comes a second time finds nothing.

**The journal** has frames, each of them for a key (see ``records``) that can be forgotten.
There are two logs, one of which is in use; to drop what is forgotten the rest is copied to the
other one, and then the header names that. A frame counts when the header says that the log is so
long, so that half of one is never read.

All of it belongs to the event loop's thread.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ckptfs.errors import DaemonError, LimitExceeded

HANDLES_MAX = 1 << 20
"""Most handles that can be open: as many as one process may have (fs.nr_open, proc(5))."""

BEAT_S = 1.0
"""Time between two beats of a daemon's heart."""
RESTART_STATUS = 75
"""Exit status of a daemon that wants to be followed by another (EX_TEMPFAIL, sysexits.h)."""

_MAGIC = int.from_bytes(b"ckptfs\x00\x01", "big")
"""Also the version of the layout."""
_HEADER_BYTES = 4096
_U64 = struct.Struct("<Q")
_AT_MAGIC, _AT_BEAT, _AT_ORDINAL, _AT_TOP, _AT_LOG = 0, 8, 16, 24, 32
_AT_END = 40, 48
"""Lengths of the two logs."""
_AT_RESTARTS = 56
_SLOT = struct.Struct("<BBxxIIiQQ16s")
"""State, whether it is a directory, process, generation, backing id, inode, request, digest."""
_FREE, _RESERVED, _REPLYING, _OPEN = range(4)
_FRAME = struct.Struct("<QQ")
"""Key, and the length of what follows."""
_GARBAGE_BYTES_MAX = 64 << 10
"""What is forgotten may take this beside as much as what is not."""


class Fds(NamedTuple):
    """Descriptors of the table and of the two logs."""

    table: int
    logs: tuple[int, int]

    def all(self) -> tuple[int, ...]:
        """To pass them on."""
        return self.table, *self.logs


def create() -> Fds:
    """Make the memory, for the first daemon of a mount."""
    table, *logs = (os.memfd_create(f"ckptfs-{name}") for name in ("table", "log0", "log1"))
    os.ftruncate(table, _HEADER_BYTES + HANDLES_MAX * _SLOT.size)  # with holes: nothing is used yet
    os.pwrite(table, _U64.pack(_MAGIC), _AT_MAGIC)
    return Fds(table, (logs[0], logs[1]))


def beats(fds: Fds) -> int:
    """How often the daemons' hearts have beaten so far."""
    (count,) = _U64.unpack(os.pread(fds.table, _U64.size, _AT_BEAT))
    return count


class Handle(NamedTuple):
    """An open handle. `request`: the number of the request whose reply the kernel may not have got;
    0: it has. `backing_id` and `digest`: of the object of the cache that the kernel reads itself;
    0: none."""

    number: int
    inode: int
    is_directory: bool
    pid: int
    request: int
    backing_id: int
    digest: str


class Handoff:
    """The memory, as a daemon sees it. Raises DaemonError for one of another version."""

    def __init__(self, fds: Fds) -> None:
        self._table = mmap.mmap(fds.table, 0)
        if self._get(_AT_MAGIC) != _MAGIC:
            raise DaemonError(
                "this ckptfs does not know what the daemon before it has left; "
                "ckptfs umount --force, and mount again"
            )
        self.handles = Handles(self._table)
        self.journal = Journal(fds.logs, self._table)

    def beat(self) -> None:
        """Say that the event loop is alive."""
        self._set(_AT_BEAT, self._get(_AT_BEAT) + 1)

    def restarted(self) -> None:
        """Count that a daemon has followed another one."""
        self._set(_AT_RESTARTS, self.restarts + 1)

    @property
    def restarts(self) -> int:
        """How many daemons there were before this one."""
        return self._get(_AT_RESTARTS)

    def next_ordinal(self) -> int:
        """A number for an attachment that no other one ever had in this mount, from 1 on."""
        self._set(_AT_ORDINAL, self._get(_AT_ORDINAL) + 1)
        return self._get(_AT_ORDINAL)

    def _get(self, at: int) -> int:
        return _U64.unpack_from(self._table, at)[0]

    def _set(self, at: int, value: int) -> None:
        _U64.pack_into(self._table, at, value)


class Handles:
    """The open handles; see the module's text."""

    def __init__(self, table: mmap.mmap) -> None:
        self._table = table
        self._free: list[int] = []
        for index in range(self._top):
            if self._slot(index)[0] == _RESERVED:
                self._set_state(index, _FREE)
            if self._slot(index)[0] == _FREE:
                self._free.append(index)

    def reserve(self, inode: int, pid: int, *, is_directory: bool) -> int:
        """A handle for an opening that is under way. Raises LimitExceeded."""
        if self._free:
            index = self._free.pop()
        else:
            index = self._top
            if index == HANDLES_MAX:
                raise LimitExceeded(f"{HANDLES_MAX} files and directories of the mount are open")
            _U64.pack_into(self._table, _AT_TOP, index + 1)
        generation = (self._slot(index)[3] + 1) & 0xFFFFFFFF
        slot = _FREE, is_directory, pid, generation, 0, inode, 0, b""
        _SLOT.pack_into(self._table, _at(index), *slot)
        self._set_state(index, _RESERVED)
        return generation << 32 | index

    def replying(self, handle: int, request: int, backing_id: int = 0, digest: str = "") -> None:
        """The reply to the request that opened it is about to be written."""
        index = handle & 0xFFFFFFFF
        _, is_directory, pid, generation, _, inode, _, _ = self._slot(index)
        raw = bytes.fromhex(digest)
        slot = _RESERVED, is_directory, pid, generation, backing_id, inode, request, raw
        _SLOT.pack_into(self._table, _at(index), *slot)
        self._set_state(index, _REPLYING)

    def replied(self, handle: int) -> None:
        """The kernel has the reply."""
        self._set_state(handle & 0xFFFFFFFF, _OPEN)

    def free(self, handle: int) -> bool:
        """The handle is no longer open. Returns whether it was."""
        index = handle & 0xFFFFFFFF
        if index >= self._top:
            return False
        state, _, _, generation, *_ = self._slot(index)
        if state == _FREE or generation != handle >> 32:
            return False
        self._set_state(index, _FREE)
        self._free.append(index)
        return True

    def open_handles(self) -> Iterator[Handle]:
        """All that the kernel has, or may have."""
        for index in range(self._top):
            slot = self._slot(index)
            state, is_directory, pid, generation, backing_id, inode, request, digest = slot
            if state in (_REPLYING, _OPEN):
                yield Handle(
                    generation << 32 | index,
                    inode,
                    bool(is_directory),
                    pid,
                    request if state == _REPLYING else 0,
                    backing_id,
                    digest.hex() if backing_id else "",
                )

    @property
    def _top(self) -> int:
        """Slots that were ever used."""
        return _U64.unpack_from(self._table, _AT_TOP)[0]

    def _slot(self, index: int) -> tuple[int, int, int, int, int, int, int, bytes]:
        return _SLOT.unpack_from(self._table, _at(index))

    def _set_state(self, index: int, state: int) -> None:
        self._table[_at(index)] = state


def _at(index: int) -> int:
    return _HEADER_BYTES + index * _SLOT.size


class Journal:
    """The frames; see the module's text."""

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
        """Add a frame; `data` is not empty."""
        at = self._end
        _write(self._log, at, _FRAME.pack(key, len(data)) + data)
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
        """The keys that are not forgotten."""
        return list(self._live)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Key and content of all frames that are not forgotten, those of a key in their order."""
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
                _write(new, end, _read(old, at, _FRAME.size + length))
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


def _write(fd: int, at: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _read(fd: int, at: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        data = os.pread(fd, length - len(found), at + len(found))
        if not data:
            raise DaemonError("the memory that the daemon before this one has left is cut off")
        found += data
    return bytes(found)
