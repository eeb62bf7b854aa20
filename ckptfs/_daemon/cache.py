"""Blocks on disk: a limit, eviction and recovery.

``<cache>/objects/<2 hex>/<digest>/`` holds one version of one object (format: ``cachedir``).

**Who may touch what.** State in memory (`CachedObject.state`, the indices, the byte counts) is
touched only in the event loop's thread, between two awaits. The functions that say "blocking" run
in a worker thread, take everything they need as arguments or from fields that do not change while
the object is open, and leave the state alone. Whoever hands an object to a worker thread holds an
`open` of it.

**Life of a block.** ABSENT; `fetch` reads it into a buffer, sees to it that nobody else fetches
it, and makes it readable with `keep`: IN_MEMORY. Then `write` (blocking) puts its bytes on the
disk, and after them its checksum into the map, and `publish` makes it VERIFIED; the buffer stays
until its memory is needed. Because the map is written last, after a crash it never names a block
whose bytes were not written; that they also reached the disk is what the checksum finds out: a
block that was there when the object is opened is STORED, and is checked by `load` when it is first
used; but if all of the object was VERIFIED at its last close, and its file was not written since,
all of it is VERIFIED. A VERIFIED block is read without a thread as long as its bytes are in a
buffer or its pages in memory (`read_now`); when they are not, `load` reads it from the disk, and
checks it again. DYING blocks are being punched out by `make_room` (blocking): they cannot be read,
nor fetched again before the hole is made.

**Lent** objects are read by the kernel itself (see `passthrough`): all of their blocks are
VERIFIED, and stay as they are until they are taken back. One that turns out damaged, or another
version, is retired: the kernel keeps the old files, everybody else starts anew.

**Room.** `reserve` decides, without IO, what has to go so that the limit holds *before* a write,
and the bytes that go are counted until `make_room` (blocking) has removed them. Whole objects that
nobody has open go first, least recently used first; then the oldest blocks of open objects. Where
that is not enough, the bytes are not stored: a buffer is all that has them, and readers advance
without a disk. One reservation at a time: `fetch` holds a lock from `reserve` to `settle`.
"""

import contextlib
import errno
import fcntl
import logging
import math
import mmap
import os
import shutil
import time
from array import array
from collections import OrderedDict, deque
from pathlib import Path

import msgspec

from ckptfs._daemon import cachedir
from ckptfs._daemon.buffers import Buffer, Buffers
from ckptfs._daemon.cachedir import NO_FILES, About, Files, ObjectKey
from ckptfs._model.blocks import (
    BLOCK_BYTES,
    block_count,
    block_length,
    blocks_length,
    blocks_of,
    runs,
)
from ckptfs.errors import ConfigError

log = logging.getLogger(__name__)

ABSENT, STORED, VERIFIED, IN_MEMORY, DYING = range(5)
_READABLE = frozenset((VERIFIED, IN_MEMORY))

SETTLED_S = 900
"""Age after which size and mtime alone identify a version. mtime has whole seconds, so a younger
object may be written again under the same mtime; 15 minutes is also the largest difference between
clocks that S3 accepts (its error RequestTimeTooSkewed)."""
_READ_BYTES_MAX = 2 << 20
"""Size of the reused buffer of `read_now`; the kernel asks for at most 1 MiB (256 pages)."""
Views = list[memoryview]
"""Consecutive bytes, in parts."""
_PAGE_BYTES = 4096
"""Unit in which file systems give out space."""
_FOLDER_BYTES = 6 * _PAGE_BYTES
"""What an object costs beside its blocks, a page each: folder and its parent, map, description and
the one that replaces it, and the block that lists the extents of a file with holes. (A map outgrows
its page at 512 MiB, by one part in 131,072 of the data.)"""


def disk_bytes(size: int) -> int:
    """Bytes that an object of `size` bytes takes on disk when all of it is cached."""
    return _pages(size) + _FOLDER_BYTES if size else 0


class CachedObject:
    """One open object. `data` of a block is at its own offset in `files.data`."""

    def __init__(self, digest: str, about: About, files: Files, sums: "array[int]") -> None:
        self.digest = digest
        self.about = about
        self.size = about.key.size
        self.files = files  # NO_FILES until the first block is stored
        self.sums = sums
        self.state = bytearray(STORED if s else ABSENT for s in sums)
        self.oldest = deque(i for i, s in enumerate(sums) if s)  # stored blocks, oldest first
        self.memory: dict[int, Buffer[CachedObject]] = {}  # blocks whose bytes are in a buffer
        self.users = 0
        self.lent = 0
        self.retired: list[Files] = []
        self.unreliable = False  # its disk lost a block that was good: keep no more there

    def stored_bytes(self) -> int:
        """Bytes of the blocks that are on disk."""
        count = self.state.count(STORED) + self.state.count(VERIFIED)
        if count and self.state[-1] in (STORED, VERIFIED):
            return (count - 1) * BLOCK_BYTES + block_length(len(self.state) - 1, self.size)
        return count * BLOCK_BYTES

    def disk_bytes(self) -> int:
        """Bytes that the folder takes on disk."""
        return 0 if self.files is NO_FILES else _pages(self.stored_bytes()) + _FOLDER_BYTES

    @property
    def verified(self) -> bool:
        """Whether all of it is on the disk and verified."""
        return self.files is not NO_FILES and self.state.count(VERIFIED) == len(self.state)

    def readable(self, blocks: range) -> bool:
        """Whether all of `blocks` can be read with no check and no fetch."""
        return _READABLE.issuperset(self.state[blocks.start : blocks.stop])

    def absent(self, blocks: range) -> list[int]:
        """Those of `blocks` that are nowhere here."""
        if self.state.find(ABSENT, blocks.start, blocks.stop) < 0:
            return []
        return [index for index in blocks if self.state[index] == ABSENT]


class Reservation:
    """Room for one write to `entry`, and what `reserve` decided to remove for it.

    Attributes:
        bytes: What was reserved on disk, the object's folder included where it has none yet.
        freed_bytes: What is free once `make_room` has ended.
        stores: Whether the write may go to the disk. `settle` has the last word.
    """

    def __init__(self, entry: CachedObject, length: int) -> None:
        self.entry = entry
        self.creates = entry.files is NO_FILES
        self.bytes = _pages(length) + (_FOLDER_BYTES if self.creates else 0)
        self.freed_bytes = 0
        self.stores = True
        self.folders: list[Path] = []
        self.blocks: list[tuple[CachedObject, int]] = []

    @property
    def needs_work(self) -> bool:
        """Whether `make_room` and `settle` have anything to do."""
        return self.creates or bool(self.folders or self.blocks)

    def refuse(self) -> None:
        """There is no room."""
        self.bytes = 0
        self.creates = self.stores = False


class Cache:
    """The cache in `directory`. Create it before the event loop starts: it reads the index.

    Args:
        directory: Made if it is missing; must belong to this user alone.
        bytes_max: Most bytes on disk; 0: no limit of its own.
        memory_bytes_max: Most bytes of the buffers for spans.
        free_share_min: Share of the disk to leave free.

    Raises:
        ConfigError: The directory cannot be used, or another daemon uses it.
    """

    def __init__(
        self, directory: Path, bytes_max: int, free_share_min: float, memory_bytes_max: int
    ) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self._free_share_min = free_share_min
        self._open: dict[str, CachedObject] = {}
        self._closed: OrderedDict[str, int] = OrderedDict()  # digest -> bytes on disk, LRU first
        self.buffers: Buffers[CachedObject] = Buffers(memory_bytes_max, self._forget_buffer)
        self._buffer = memoryview(mmap.mmap(-1, _READ_BYTES_MAX))
        self._lent_before: set[str] = set()  # being opened: the kernel reads them all the time
        self._trash_serial = 0
        self._nowait = os.RWF_NOWAIT
        self.lock_fd = self._claim()
        self.used_bytes = self._recover()

    # -- start and end

    def _claim(self) -> int:
        remedy = "set cache_dir (CKPTFS_CACHE_DIR) to another directory"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = self.directory.stat()
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise ConfigError(
                    f"cache directory {self.directory} must belong to this user and be writable by "
                    f"nobody else; {remedy}"
                )
            lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cache directory {self.directory}: {error.strerror}; {remedy}"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigError(
                f"cache directory {self.directory} is in use by another ckptfs daemon; {remedy}"
            ) from None
        return lock

    def _recover(self) -> int:
        """Index what an earlier daemon left; remove what is not whole. Returns bytes on disk."""
        shutil.rmtree(self.directory / "trash", ignore_errors=True)
        for name in ("trash", "objects"):
            try:
                (self.directory / name).mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{self.directory / name}: {error.strerror}; remove it") from None
        found: list[tuple[float, str, int]] = []
        for folder in self.directory.glob("objects/*/*"):
            try:
                cachedir.read_about(folder)
                data = (folder / "data").stat()
                # Its list of extents is counted there, too, and is part of what a folder costs.
                blocks_bytes = min(data.st_blocks * 512, _pages(data.st_size))
                found.append((folder.stat().st_mtime, folder.name, blocks_bytes + _FOLDER_BYTES))
            except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
                log.info("cache: removing %s: %s", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        for _, digest, size in sorted(found):
            self._closed[digest] = size
        return sum(size for _, _, size in found)

    def shut(self) -> None:
        """Close all objects and let another daemon use the directory."""
        for entry in list(self._open.values()):
            entry.users = 1
            self.close(entry)
        os.close(self.lock_fd)

    # -- open and close

    def stored_bytes(self, digest: str, size: int) -> int:
        """Bytes on disk of an object of `size` bytes, whether it is open or not."""
        if entry := self._open.get(digest):
            return entry.stored_bytes()
        return min(size, max(0, self._closed.get(digest, 0) - _FOLDER_BYTES))

    def open(self, key: ObjectKey) -> CachedObject:
        """The object of `key`. Each call needs a `close`.

        Small synchronous IO if it is on disk. A new object gets its folder with its first block.
        """
        digest = key.digest()
        entry = self._open.get(digest)
        if entry is None:
            on_disk = self._closed.pop(digest, 0)
            entry = self._open_folder(digest, key, on_disk > 0)
            self.used_bytes += entry.disk_bytes() - on_disk
            self._open[digest] = entry
        entry.users += 1
        return entry

    def close(self, entry: CachedObject) -> None:
        """Undo one `open`."""
        entry.users -= 1
        if entry.users:
            return
        del self._open[entry.digest]
        self._drop_memory(entry)
        if not self._open:
            self.buffers.trim()
        for files in entry.retired:
            files.close()
        if entry.files is NO_FILES:
            return
        on_disk = entry.disk_bytes()
        self._note_verified(entry)
        entry.files.close()
        if entry.stored_bytes():
            self._closed[entry.digest] = on_disk
            with contextlib.suppress(OSError):
                os.utime(self._folder(entry.digest))
        else:
            self.used_bytes -= on_disk
            shutil.rmtree(self._folder(entry.digest), ignore_errors=True)

    def _note_verified(self, entry: CachedObject) -> None:
        """So that the next open, perhaps by another daemon, need not check it all again."""
        if not entry.verified:
            return
        with contextlib.suppress(OSError):
            stamp = cachedir.stamp(entry.files)
            if entry.about.verified != stamp:
                about = msgspec.structs.replace(entry.about, verified=stamp)
                cachedir.write_about(self._folder(entry.digest), about)

    def learn(self, entry: CachedObject, etag: str) -> None:
        """Take in the ETag that the store confirmed; blocks of another ETag are dropped."""
        mtime_ns = entry.about.key.mtime_ns  # 0: the store has none, so it identifies nothing
        settled = mtime_ns > 0 and time.time() - mtime_ns / 1e9 > SETTLED_S
        if entry.about.etag not in ("", etag):
            log.warning("cache: %s was written twice in one second: dropped", entry.about.key.path)
            self._drop_memory(entry)
            for index, state in enumerate(entry.state):
                if state in (STORED, VERIFIED):
                    self._forget(entry, index)
        elif (entry.about.etag, entry.about.settled) == (etag, settled):
            return
        entry.about = msgspec.structs.replace(entry.about, etag=etag, settled=settled)
        if entry.files is not NO_FILES:
            with contextlib.suppress(OSError):
                cachedir.write_about(self._folder(entry.digest), entry.about)

    # -- reading

    def read_now(self, entry: CachedObject, offset: int, length: int) -> Views | None:
        """Bytes that are in memory, valid until the next call; None: they are not.

        All blocks must be `readable`. Runs in the event loop: it never waits for the disk.
        """
        if length > _READ_BYTES_MAX:
            return None
        if not entry.memory:
            view = self._buffer[:length]
            return [view] if self._read_pages(entry, offset, view) else None
        views: Views = []
        for index in blocks_of(offset, length):
            base = index * BLOCK_BYTES
            start, stop = max(offset, base), min(offset + length, base + BLOCK_BYTES)
            view = self.in_memory(entry, index)
            if view is not None:
                views.append(view[start - base : stop - base])
                continue
            view = self._buffer[start - offset : stop - offset]
            if not self._read_pages(entry, start, view):
                return None
            views.append(view)
        return views

    def in_memory(self, entry: CachedObject, index: int) -> memoryview | None:
        """The bytes of a block that are in a buffer, valid until a buffer is taken."""
        buffer = entry.memory.get(index)
        if buffer is None:
            return None
        start = (index - buffer.blocks.start) * BLOCK_BYTES
        return buffer.view[start : start + block_length(index, entry.size)]

    def _read_pages(self, entry: CachedObject, offset: int, view: memoryview) -> bool:
        """Fill `view` from the page cache; False: not all of it is there."""
        if not self._nowait:
            return False
        try:
            # A short read is not the end of the file: see RWF_NOWAIT, preadv(2).
            while count := os.preadv(entry.files.data, [view], offset, self._nowait):
                if count == len(view):
                    return True
                view = view[count:]
                offset += count
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0  # a file system without it: every read takes a thread
        return False

    @staticmethod
    def load(entry: CachedObject, index: int, checksum: int) -> bytes | None:
        """Blocking. The bytes of a block, read from the disk and checked; None: they are wrong."""
        try:
            data = os.pread(entry.files.data, block_length(index, entry.size), index * BLOCK_BYTES)
        except OSError as error:
            log.warning("cache: cannot read a block of %s: %s", entry.about.key.path, error)
            return None
        return data if cachedir.checksum(data) == checksum else None

    def loaded(self, entry: CachedObject, index: int, checksum: int, good: bool) -> None:
        """Take in the outcome of `load`, unless the block is another one by now."""
        if entry.state[index] not in (STORED, VERIFIED) or entry.sums[index] != checksum:
            return
        if good:
            entry.state[index] = VERIFIED
            return
        log.warning("cache: block %d of %s is damaged: dropped", index, entry.about.key.path)
        entry.unreliable |= entry.state[index] == VERIFIED
        self._forget(entry, index)

    # -- writing

    def keep(self, entry: CachedObject, blocks: range, buffer: "Buffer[CachedObject]") -> None:
        """Make blocks readable whose bytes are in a busy buffer, and whose version is confirmed."""
        buffer.owner, buffer.blocks = entry, blocks
        for index in blocks:
            entry.memory[index] = buffer
            entry.state[index] = IN_MEMORY

    @staticmethod
    def write(entry: CachedObject, first: int, data: memoryview) -> "array[int] | None":
        """Blocking. Write consecutive blocks from `first` on, and then their checksums to the map.

        Returns the checksums; None if the disk refuses: the blocks on it are then as absent as
        before.
        """
        sums = cachedir.checksums(data)
        try:
            cachedir.write(entry.files, first * BLOCK_BYTES, data)
        except OSError as error:
            _warn_of_disk(error)
            Cache.discard(entry, first, len(data))
            return None
        Cache.record(entry, first, sums)
        return sums

    @staticmethod
    def discard(entry: CachedObject, first: int, length: int) -> None:
        """Blocking. Free the space of blocks that were written and will not be published."""
        with contextlib.suppress(OSError):
            cachedir.punch(entry.files, first * BLOCK_BYTES, length)

    @staticmethod
    def take_out(entry: CachedObject, blocks: range) -> None:
        """Blocking. Remove stored blocks from map and disk."""
        Cache.record(entry, blocks.start, array("Q", bytes(8 * len(blocks))))
        Cache.discard(entry, blocks.start, blocks_length(blocks, entry.size))

    @staticmethod
    def record(entry: CachedObject, first: int, sums: "array[int]") -> None:
        """Blocking. Put checksums into the map, so that the blocks survive a restart."""
        try:
            cachedir.write_sums(entry.files, first, sums)
        except OSError as error:  # they are fetched again after a restart
            log.warning("cache: cannot write the map of %s: %s", entry.about.key.path, error)

    def publish(self, entry: CachedObject, first: int, sums: "array[int]") -> None:
        """Take in that `write` has stored kept blocks."""
        for index, checksum in enumerate(sums, first):
            entry.sums[index] = checksum
            entry.state[index] = VERIFIED
            entry.oldest.append(index)

    def _forget_buffer(self, buffer: "Buffer[CachedObject]") -> None:
        """Its memory is needed for something else."""
        entry = buffer.owner
        assert entry is not None
        for index in buffer.blocks:
            if entry.memory.get(index) is buffer:
                del entry.memory[index]
                if entry.state[index] == IN_MEMORY:
                    entry.state[index] = ABSENT

    def _drop_memory(self, entry: CachedObject) -> None:
        """Forget what of an object is in buffers. Busy ones stay their span's."""
        for buffer in set(entry.memory.values()):
            self._forget_buffer(buffer)
        self.buffers.release_of(entry)

    # -- lending

    def lend(self, entry: CachedObject) -> bool:
        """Let somebody else read the data file itself; False: not all of it is there and verified.

        Each success needs a `take_back`.
        """
        if not entry.verified:
            return False
        self._note_verified(entry)
        entry.users += 1
        entry.lent += 1
        return True

    def lend_again(self, digest: str) -> CachedObject | None:
        """What an earlier daemon has lent still is, whatever state it is in; None: it is no longer
        in the cache. To be called before anybody opens the object. Each success needs a
        `take_back`."""
        entry = self._open.get(digest)
        if entry is None:
            try:
                key = cachedir.read_about(self._folder(digest)).key
            except (OSError, ValueError):
                return None
            self._lent_before.add(digest)
            entry = self.open(key)
            self._lent_before.discard(digest)
        else:
            entry.users += 1
        entry.lent += 1
        return entry

    def take_back(self, entry: CachedObject) -> None:
        """Undo one `lend` or `lend_again`."""
        entry.lent -= 1
        self.close(entry)

    def _retire(self, entry: CachedObject) -> None:
        """Start anew beside the files that are lent."""
        self.used_bytes -= entry.disk_bytes()
        entry.oldest.clear()
        for index in range(len(entry.state)):
            entry.state[index] = ABSENT
            entry.sums[index] = 0
        self._drop_memory(entry)
        entry.retired.append(entry.files)
        entry.files = NO_FILES
        self.delete(self._to_trash(entry.digest))

    # -- room

    def reserve(self, entry: CachedObject, length: int) -> Reservation:
        """Decide what goes so that `length` more bytes of `entry` can be stored, and count them.

        Run `make_room` (blocking) with the result and then `settle`. If the result still `stores`,
        write, and then `unreserve` what was not published; otherwise the bytes can only be kept in
        memory.
        """
        result = Reservation(entry, length)
        goal = self._excess(result.bytes)
        if entry.unreliable or goal is None:
            result.refuse()
            return result
        while result.freed_bytes < goal and self._closed:
            digest, size = self._closed.popitem(last=False)
            result.folders.append(self._to_trash(digest))
            result.freed_bytes += size
        while result.freed_bytes < goal and (victim := self._fullest_open()) is not None:
            index = victim.oldest.popleft()
            if victim.state[index] in (STORED, VERIFIED):
                victim.state[index] = DYING
                victim.memory.pop(index, None)
                result.blocks.append((victim, index))
                result.freed_bytes += _pages(block_length(index, victim.size))
        if result.freed_bytes < goal:
            result.refuse()
        self.used_bytes += result.bytes
        return result

    def make_room(self, reservation: Reservation) -> Files:
        """Blocking. Free the space; returns the files of the new folder, if there is one."""
        for folder in reservation.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for entry, index in reservation.blocks:
            self.record(entry, index, array("Q", [0]))
            try:
                length = block_length(index, entry.size)
                cachedir.punch(entry.files, index * BLOCK_BYTES, length)
            except OSError as error:
                log.warning("cache: cannot free a block of %s: %s", entry.about.key.path, error)
        if not reservation.creates:
            return NO_FILES
        folder = self._folder(reservation.entry.digest)
        try:
            return cachedir.create(folder, reservation.entry.about)
        except OSError as error:
            log.warning("cache: cannot make %s: %s; reading without it", folder, error)
            return NO_FILES

    def settle(self, reservation: Reservation, files: Files) -> None:
        """Take in that `make_room` has ended, with its result."""
        self.used_bytes -= reservation.freed_bytes
        for entry, index in reservation.blocks:
            entry.state[index] = ABSENT
            entry.sums[index] = 0
        if reservation.creates:
            reservation.entry.files = files
            if files is NO_FILES:
                self.used_bytes -= reservation.bytes
                reservation.stores = False

    def unreserve(self, length: int) -> None:
        """Give back the room of blocks of `length` bytes together that were not published."""
        self.used_bytes -= _pages(length)

    def _fullest_open(self) -> CachedObject | None:
        candidates = (entry for entry in self._open.values() if not entry.lent)
        fullest = max(candidates, key=lambda entry: len(entry.oldest), default=None)
        return fullest if fullest and fullest.oldest else None

    def is_open(self, digest: str) -> bool:
        """Whether somebody reads or fetches the object."""
        return digest in self._open

    def evict(self, digest: str) -> Path | None:
        """Drop an object that is not open; returns the folder to `delete`, if it was there."""
        on_disk = self._closed.pop(digest, 0)
        if not on_disk:
            return None
        self.used_bytes -= on_disk
        return self._to_trash(digest)

    @staticmethod
    def delete(folder: Path) -> None:
        """Blocking. Delete what `evict` returned."""
        shutil.rmtree(folder, ignore_errors=True)

    def capacity_bytes(self) -> int:
        """How many bytes it could hold now, if nothing else were in it."""
        spare = self._spare_bytes()
        if spare is None:
            return 0
        on_disk = max(0, spare + self.used_bytes)
        return min(on_disk, self.bytes_max) if self.bytes_max else on_disk

    def _excess(self, length: int) -> int | None:
        """Bytes that have to go before `length` more can be stored; None: the disk is gone."""
        excess = self.used_bytes + length - self.bytes_max if self.bytes_max else 0
        spare = self._spare_bytes()
        return None if spare is None else max(excess, length - spare)

    def _spare_bytes(self) -> int | None:
        """Bytes of the disk that are free and need not be left free (below 0: more are needed);
        None: the disk is gone."""
        try:
            disk = os.statvfs(self.directory)
        except OSError:
            return None
        leave = int(self._free_share_min * disk.f_blocks * disk.f_frsize)
        return disk.f_bavail * disk.f_frsize - leave

    # -- folders

    def _folder(self, digest: str) -> Path:
        return self.directory / "objects" / digest[:2] / digest

    def _to_trash(self, digest: str) -> Path:
        """Move a folder out of the way at once, so that the object can be opened anew."""
        self._trash_serial += 1
        target = self.directory / "trash" / str(self._trash_serial)
        with contextlib.suppress(OSError):
            self._folder(digest).rename(target)
        return target

    def _open_folder(self, digest: str, key: ObjectKey, on_disk: bool) -> CachedObject:
        if on_disk:
            folder = self._folder(digest)
            try:
                files, about, sums = cachedir.open_existing(folder, key)
                entry = CachedObject(digest, about, files, sums)
                if 0 not in sums and about.verified == cachedir.stamp(files):
                    entry.state[:] = bytes([VERIFIED]) * len(sums)
                if digest not in self._lent_before:
                    self._free_unrecorded(entry)
                return entry
            except (OSError, ValueError) as error:
                log.warning("cache: removing %s: %s", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        about = About(cachedir.FORMAT, key, "", settled=False)
        sums = array("Q", bytes(8 * block_count(key.size)))
        return CachedObject(digest, about, NO_FILES, sums)

    def _free_unrecorded(self, entry: CachedObject) -> None:
        """Free what a daemon that died had written but not recorded: nobody counts it."""
        taken = os.fstat(entry.files.data).st_blocks * 512
        if taken > _pages(entry.stored_bytes()) + _PAGE_BYTES:  # a page for the file system's own
            absent = (index for index, s in enumerate(entry.sums) if not s)
            for run in runs(absent, len(entry.sums)):
                self.discard(entry, run.start, blocks_length(run, entry.size))

    def _forget(self, entry: CachedObject, index: int) -> None:
        if entry.lent:
            self._retire(entry)
            return
        entry.state[index] = ABSENT
        entry.sums[index] = 0
        self.unreserve(block_length(index, entry.size))
        self.take_out(entry, range(index, index + 1))


_warned_s = -math.inf


def _warn_of_disk(error: OSError) -> None:
    """One line a minute: a full disk refuses every span."""
    global _warned_s
    if time.monotonic() - _warned_s > 60:
        _warned_s = time.monotonic()
        log.warning("cache: cannot write: %s; reading without storing", error)


def _pages(length: int) -> int:
    return -(-length // _PAGE_BYTES) * _PAGE_BYTES
