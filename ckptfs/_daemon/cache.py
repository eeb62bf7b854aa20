"""Blocks on disk: a limit, eviction and recovery.

``<cache>/objects/<2 hex>/<digest>/`` holds one version of one object (format: ``cachedir``).

**Who may touch what.** State in memory (`CachedObject.state`, the indices, the byte counts) is
touched only in the event loop's thread, between two awaits. The functions that say "blocking" run
in a worker thread, take everything they need as arguments or from fields that do not change while
the object is open, and leave the state alone. Whoever hands an object to a worker thread holds an
`open` of it.

**Life of a block.** ABSENT; its bytes are written (`write`, blocking) while the state stays ABSENT
and `fetch` sees to it that nobody else writes it; then `publish` makes it VERIFIED and `record`
(blocking) puts the checksum into the map. The map is written last, so after a crash it never names
a block whose bytes were not written; that they also reached the disk is what the checksum finds
out: a block that was there at start is STORED, and is checked by `load` when it is first used. A
VERIFIED block is read without a thread as long as its pages are in memory (`read_now`); when they
are not, `load` reads it from the disk, and checks it again. DYING blocks are being punched out by
`make_room` (blocking): they cannot be read, nor fetched again before the hole is made.

**Room.** `reserve` decides, without IO, what has to go so that the limit holds *before* a write,
and the bytes that go are counted until `make_room` (blocking) has removed them. Whole objects that
nobody has open go first, least recently used first; then the oldest blocks of open objects. Where
that is not enough, the bytes are not stored: `keep_in_memory` holds a few blocks, so that readers
advance without a disk. One reservation at a time: `fetch` holds a lock from `reserve` to `settle`.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import time
from array import array
from collections import OrderedDict, deque
from pathlib import Path

import msgspec

from ckptfs._daemon import cachedir
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

SETTLED_S = 900
"""Age after which size and mtime alone identify a version. mtime has whole seconds, so a younger
object may be written again under the same mtime; 15 minutes is also the largest difference between
clocks that S3 accepts (its error RequestTimeTooSkewed)."""
_MEMORY_BLOCKS_MAX = 32
"""Blocks kept in memory when they cannot be stored: a span or two for each of a few readers."""
_READ_BYTES_MAX = 2 << 20
"""Size of the reused buffer of `read_now`; the kernel asks for at most 1 MiB (256 pages)."""
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
        self.users = 0
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

    def readable(self, blocks: range) -> bool:
        """Whether all of `blocks` can be read with no check and no fetch."""
        state = self.state
        return all(state[i] in (VERIFIED, IN_MEMORY) for i in blocks)


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

    def refuse(self) -> None:
        """There is no room."""
        self.bytes = 0
        self.creates = self.stores = False


class Cache:
    """The cache in `directory`. Create it before the event loop starts: it reads the index.

    Args:
        directory: Made if it is missing; must belong to this user alone.
        bytes_max: Most bytes on disk; 0: no limit of its own.
        free_share_min: Share of the disk to leave free.

    Raises:
        ConfigError: The directory cannot be used, or another daemon uses it.
    """

    def __init__(self, directory: Path, bytes_max: int, free_share_min: float) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self._free_share_min = free_share_min
        self._open: dict[str, CachedObject] = {}
        self._closed: OrderedDict[str, int] = OrderedDict()  # digest -> bytes on disk, LRU first
        self._memory: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._buffer = memoryview(mmap.mmap(-1, _READ_BYTES_MAX))
        self._trash_serial = 0
        self._nowait = os.RWF_NOWAIT
        self._lock_fd = self._claim()
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
                found.append(
                    (folder.stat().st_mtime, folder.name, data.st_blocks * 512 + _FOLDER_BYTES)
                )
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
        os.close(self._lock_fd)

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
        for index, state in enumerate(entry.state):
            if state == IN_MEMORY:
                del self._memory[entry.digest, index]
        if entry.files is NO_FILES:
            return
        on_disk = entry.disk_bytes()
        entry.files.close()
        if entry.stored_bytes():
            self._closed[entry.digest] = on_disk
            with contextlib.suppress(OSError):
                os.utime(self._folder(entry.digest))
        else:
            self.used_bytes -= on_disk
            shutil.rmtree(self._folder(entry.digest), ignore_errors=True)

    def learn(self, entry: CachedObject, etag: str) -> None:
        """Take in the ETag that the store confirmed; blocks of another ETag are dropped."""
        mtime_ns = entry.about.key.mtime_ns  # 0: the store has none, so it identifies nothing
        settled = mtime_ns > 0 and time.time() - mtime_ns / 1e9 > SETTLED_S
        if entry.about.etag not in ("", etag):
            log.warning("cache: %s was written twice in one second: dropped", entry.about.key.path)
            for index, state in enumerate(entry.state):
                if state in (STORED, VERIFIED):
                    self._forget(entry, index)
                elif state == IN_MEMORY:
                    del self._memory[entry.digest, index]
                    entry.state[index] = ABSENT
        elif (entry.about.etag, entry.about.settled) == (etag, settled):
            return
        entry.about = msgspec.structs.replace(entry.about, etag=etag, settled=settled)
        if entry.files is not NO_FILES:
            with contextlib.suppress(OSError):
                cachedir.write_about(self._folder(entry.digest), entry.about)

    # -- reading

    def read_now(self, entry: CachedObject, offset: int, length: int) -> memoryview | None:
        """Bytes that are in memory, as a view that is valid until the next call; None: they are
        not.

        All blocks must be `readable`. Runs in the event loop: it never waits for the disk.
        """
        if length > _READ_BYTES_MAX:
            return None
        view = self._buffer[:length]
        if self._memory:
            blocks = blocks_of(offset, length)
            in_memory = [entry.state[i] == IN_MEMORY for i in blocks]
            if any(in_memory):  # such a block is a hole in the file
                return self._from_memory(entry, blocks, offset, view) if all(in_memory) else None
        if not self._nowait:
            return None
        done = 0
        try:
            # A short read is not the end of the file: see RWF_NOWAIT, preadv(2).
            while done < length:
                count = os.preadv(entry.files.data, [view[done:]], offset + done, self._nowait)
                if count == 0:
                    return None
                done += count
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0  # a file system without it: every read takes a thread
            return None
        return view

    def _from_memory(
        self, entry: CachedObject, blocks: range, offset: int, view: memoryview
    ) -> memoryview:
        for index in blocks:
            base = index * BLOCK_BYTES
            start, stop = max(offset, base), min(offset + len(view), base + BLOCK_BYTES)
            data = memoryview(self._memory[entry.digest, index])
            view[start - offset : stop - offset] = data[start - base : stop - base]
            self._memory.move_to_end((entry.digest, index))
        return view

    def block_in_memory(self, entry: CachedObject, index: int) -> bytes | None:
        """The bytes of an IN_MEMORY block; None for others."""
        return self._memory.get((entry.digest, index))

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

    @staticmethod
    def write(entry: CachedObject, first: int, data: memoryview) -> "array[int]":
        """Blocking. Write consecutive blocks from `first` on; returns their checksums.

        Raises OSError if the disk refuses; the blocks are then as absent as before.
        """
        sums = cachedir.checksums(data)
        done, offset = 0, first * BLOCK_BYTES
        while done < len(data):
            done += os.pwrite(entry.files.data, data[done:], offset + done)
        return sums

    @staticmethod
    def discard(entry: CachedObject, first: int, length: int) -> None:
        """Blocking. Free the space of blocks that were written and will not be published."""
        with contextlib.suppress(OSError):
            cachedir.punch(entry.files, first * BLOCK_BYTES, length)

    def publish(self, entry: CachedObject, first: int, sums: "array[int]") -> None:
        """Make blocks readable whose bytes are written and whose version is confirmed."""
        for index, checksum in enumerate(sums, first):
            entry.sums[index] = checksum
            entry.state[index] = VERIFIED
            entry.oldest.append(index)

    @staticmethod
    def record(entry: CachedObject, first: int, sums: "array[int]") -> None:
        """Blocking. Note published blocks in the map, so that they survive a restart."""
        try:
            cachedir.write_sums(entry.files, first, sums)
        except OSError as error:  # they are fetched again after a restart
            log.warning("cache: cannot write the map of %s: %s", entry.about.key.path, error)

    def keep_in_memory(self, entry: CachedObject, first: int, data: bytes) -> None:
        """Make blocks readable that could not be stored, for a short while."""
        for start in range(0, len(data), BLOCK_BYTES):
            index = first + start // BLOCK_BYTES
            self._memory[entry.digest, index] = data[start : start + BLOCK_BYTES]
            entry.state[index] = IN_MEMORY
        while len(self._memory) > _MEMORY_BLOCKS_MAX:
            (digest, index), _ = self._memory.popitem(last=False)
            self._open[digest].state[index] = ABSENT

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
        fullest = max(self._open.values(), key=lambda entry: len(entry.oldest), default=None)
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
        try:
            disk = os.statvfs(self.directory)
        except OSError:
            return 0
        free = disk.f_bavail * disk.f_frsize
        leave = int(self._free_share_min * disk.f_blocks * disk.f_frsize)
        on_disk = max(0, free + self.used_bytes - leave)
        return min(on_disk, self.bytes_max) if self.bytes_max else on_disk

    def _excess(self, length: int) -> int | None:
        """Bytes that have to go before `length` more can be stored; None: the disk is gone."""
        excess = self.used_bytes + length - self.bytes_max if self.bytes_max else 0
        try:
            disk = os.statvfs(self.directory)
        except OSError:
            return None
        free = disk.f_bavail * disk.f_frsize
        leave = int(self._free_share_min * disk.f_blocks * disk.f_frsize)
        return max(excess, leave + length - free)

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
        entry.state[index] = ABSENT
        entry.sums[index] = 0
        length = block_length(index, entry.size)
        self.unreserve(length)
        self.record(entry, index, array("Q", [0]))
        self.discard(entry, index, length)


def _pages(length: int) -> int:
    return -(-length // _PAGE_BYTES) * _PAGE_BYTES
