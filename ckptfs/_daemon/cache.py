"""Blocks on disk: a limit, eviction and recovery.

The directory is described in ``cacheroot``, the folder of an object in ``cachedir``, its state in
memory in ``cached``, what nobody has open in ``ledger``, how room is made in ``room``, the IO of
blocks in ``blockio``; ``disk`` is all that touches the disk. What `ckptfs cache` does to all of it
is in ``upkeep``.

**Who may touch what.** State in memory (`CachedObject.state`, the indices, the byte counts) is
touched only in the event loop's thread, between two awaits. The functions that say "blocking" run
in a worker thread, take everything they need as arguments or from fields that do not change while
the object is open, and leave the state alone. Whoever hands an object to a worker thread holds an
`open` of it.

**Life of a block.** ABSENT; `spans` fetches it into a buffer, sees to it that nobody else does,
and makes it readable with `keep`: IN_MEMORY. Then `write` (blocking) puts its bytes on the
disk, and after them its checksum into the map, and `publish` makes it VERIFIED; the buffer stays
until its memory is needed. Whether these bytes also reached the disk is what the checksum finds
out: a block that was there when the object is opened is STORED, and is checked by `load` when it is
first used; but if all of the object was VERIFIED at its last close, and its file was not written
since, all of it is VERIFIED. A VERIFIED block is read without a thread as long as its bytes are in
a buffer or its pages in memory (`read_now`); when they are not, it is DOUBTED, because the kernel
may have begun to read these pages, until `load` has read it from the disk and checked it again.
DYING blocks are being punched out by `make_room` (blocking): they cannot be read, nor fetched again
before the hole is made.

**Lent** objects are read by the kernel itself (see `passthrough`): all of their blocks are
VERIFIED, and stay as they are until they are taken back. One that turns out damaged, or another
version, is retired: the kernel keeps the old files, everybody else starts anew.

**A disk that fails** is never a reader's error. What cannot be read is fetched; what cannot be
written is not stored. What cannot be removed stays counted, and is tried again with the next
reservation: folders in the trash are the ledger's, blocks stay in the cache, and the rest are
`dead_bytes` of their object, whose folder goes as a whole when it is closed. Where the directory
was removed, it is made again, and what is open is read on from its open files.
"""

import contextlib
import errno
import logging
import mmap
import os
import time
from array import array
from collections.abc import Generator
from pathlib import Path

import msgspec

from ckptfs._daemon import blockio, cachedir, disk
from ckptfs._daemon.buffers import Buffer, Buffers
from ckptfs._daemon.cached import (
    ABSENT,
    DOUBTED,
    IN_MEMORY,
    ON_DISK,
    VERIFIED,
    CachedObject,
)
from ckptfs._daemon.cachedir import (
    NO_FILES,
    UNKNOWN,
    About,
    ObjectKey,
    Origin,
    Stored,
)
from ckptfs._daemon.cacheroot import warn
from ckptfs._daemon.ledger import Ledger
from ckptfs._daemon.room import Room
from ckptfs._model.blocks import (
    BLOCK_BYTES,
    block_count,
    block_length,
    blocks_length,
    blocks_of,
    runs,
)

log = logging.getLogger(__name__)

SETTLED_S = 900
"""Age after which size and mtime alone identify a version. mtime has whole seconds, so a younger
object may be written again under the same mtime; 15 minutes is also the largest difference between
clocks that S3 accepts (its error RequestTimeTooSkewed)."""
_READ_BYTES_MAX = 2 << 20
"""Size of the reused buffer of `read_now`; the kernel asks for at most 1 MiB (256 pages)."""
_CHECK_BLOCKS = 8
"""Of a run whose pages are asked about, and read, together."""
Views = list[memoryview]
"""Consecutive bytes, in parts."""


class Cache:
    """The cache in `directory`. Create it before the event loop starts: it reads the index.

    Args:
        directory: Made if it is missing; must belong to this user alone.
        bytes_max: Most bytes on disk; 0: no limit of its own.
        memory_bytes_max: Most bytes of the buffers for spans.
        free_share_min: Share of the disk to leave free.
        required: Whether the directory has to be usable now. If not, reads do without until it is.

    Raises:
        ConfigError: The directory cannot be used, or another daemon uses it.
    """

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        free_share_min: float,
        memory_bytes_max: int,
        *,
        required: bool = True,
    ) -> None:
        self.directory = directory
        self._open: dict[str, CachedObject] = {}
        self.buffers: Buffers[CachedObject] = Buffers(memory_bytes_max, self._forget_buffer)
        self._buffer = memoryview(mmap.mmap(-1, _READ_BYTES_MAX))
        self._lent_before: set[str] = set()  # being opened: the kernel reads them all the time
        self._nowait = os.RWF_NOWAIT
        self._ledger = Ledger(
            *(directory, bytes_max, free_share_min, self.is_open, self._directory_was_removed),
            required=required,
        )
        self._root = self._ledger.root
        self.room = Room(self._ledger, self._open)

    def resize(self, bytes_max: int, free_share_min: float, memory_bytes_max: int) -> None:
        """Have other limits from now on, which hold with the next `reserve`."""
        self._ledger.bytes_max = bytes_max
        self._ledger.free_share_min = free_share_min
        self.buffers.resize(memory_bytes_max)

    # -- start and end

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, those included that are reserved."""
        return self._ledger.used_bytes

    @property
    def bytes_max(self) -> int:
        """The limit; 0: none."""
        return self._ledger.bytes_max

    @property
    def evicted(self) -> tuple[int, int]:
        """Bytes that went because there was no room, also of objects that are in use; and how many
        objects went as a whole."""
        return self._ledger.evicted_bytes, self._ledger.evicted_objects

    def capacity_bytes(self) -> int:
        """How many bytes it could hold now, if nothing else were in it."""
        return self._ledger.capacity_bytes()

    @property
    def lock_fd(self) -> int:
        """A file in the directory; -1: it cannot be used."""
        return self._root.lock_fd if self._root.is_claimed else -1

    def shut(self) -> None:
        """Close all objects and let another daemon use the directory."""
        for entry in list(self._open.values()):
            entry.users = 1
            self.close(entry)
        self._root.close()

    # -- open and close

    def stored_bytes(self, digest: str, size: int) -> int:
        """Bytes on disk of an object of `size` bytes, whether it is open or not."""
        if entry := self._open.get(digest):
            return entry.stored_bytes()
        stored = self._ledger.stored(digest)
        return stored.data_bytes if stored else 0

    def open(self, key: ObjectKey, origin: Origin = UNKNOWN) -> CachedObject:
        """The object of `key`; `origin` is what it is cached for, if it is not yet. Each call needs
        a `close`.

        Small synchronous IO if it is on disk. A new object gets its folder with its first block.
        Raises LimitExceeded where the process has no descriptors left for it.
        """
        digest = key.digest()
        entry = self._open.get(digest)
        if entry is None:
            on_disk = self._ledger.take(digest)
            entry = self._open[digest] = self._open_folder(digest, key, origin, on_disk)
            self._ledger.used_bytes += entry.disk_bytes()
        entry.users += 1
        return entry

    @contextlib.contextmanager
    def held(self, entry: CachedObject) -> Generator[None]:
        """Keep an object open while it is used, whoever closes it meanwhile."""
        entry.users += 1
        try:
            yield
        finally:
            self.close(entry)

    def close(self, entry: CachedObject) -> None:
        """Undo one `open`."""
        entry.users -= 1
        if entry.users:
            return
        digest, on_disk = entry.digest, entry.disk_bytes()
        del self._open[digest]
        self._drop_memory(entry)
        if not self._open:
            self.buffers.trim()
        for files, size, path in entry.retired:
            files.close()
            self._ledger.used_bytes -= size
            if path is not None:
                self._ledger.leave(path, size)
        self._note_verified(entry)
        entry.files.close()
        self._ledger.used_bytes -= on_disk
        if on_disk and not entry.orphaned:
            on_disk = self._close_folder(entry, on_disk)
            if on_disk:
                about = entry.about
                stored = Stored(on_disk, entry.size, time.time(), about.origin)
                self._ledger.put(digest, stored)

    def _close_folder(self, entry: CachedObject, on_disk: int) -> int:
        """See what becomes of a folder; bytes of it that stay in the cache."""
        if entry.files is NO_FILES:
            return on_disk
        if entry.dead_bytes:
            return self._ledger.condemn(entry.digest, on_disk)
        try:
            if entry.stored_bytes():
                disk.touch(self._root.folder(entry.digest))
                return on_disk
            self._root.remove(entry.digest)
        except OSError as error:
            if not self._root.has(entry.digest):  # somebody has removed it
                return 0
            warn(f"change {entry.about.key.path}", error)
            return on_disk
        return 0

    def _note_verified(self, entry: CachedObject) -> None:
        """So that the next open, perhaps by another daemon, need not check it all again."""
        if not entry.verified or entry.orphaned:
            return
        with contextlib.suppress(OSError):
            stamp = cachedir.stamp(entry.files)
            if entry.about.verified != stamp:
                about = msgspec.structs.replace(entry.about, verified=stamp)
                cachedir.write_about(self._root.folder(entry.digest), about)

    def learn(self, entry: CachedObject, etag: str) -> None:
        """Take in the ETag that the store confirmed; blocks of another ETag are dropped."""
        mtime_ns = entry.about.key.mtime_ns  # 0: the store has none, so it identifies nothing
        settled = mtime_ns > 0 and time.time() - mtime_ns / 1e9 > SETTLED_S
        if entry.about.etag != etag and (entry.about.etag or any(entry.sums) or entry.memory):
            if entry.about.etag:
                path = entry.about.key.path
                log.warning("cache: %s was written twice in one second: dropped", path)
            self._drop_memory(entry)
            for index, state in enumerate(entry.state):
                if state in ON_DISK:
                    self._forget(entry, index)
        elif (entry.about.etag, entry.about.settled) == (etag, settled):
            return
        entry.about = msgspec.structs.replace(entry.about, etag=etag, settled=settled)
        if entry.files is not NO_FILES and not entry.orphaned:
            with contextlib.suppress(OSError):
                cachedir.write_about(self._root.folder(entry.digest), entry.about)

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
            # A short read is not the end of the file (see RWF_NOWAIT, preadv(2)): the kernel may
            # have begun to read the rest, which is not checked then.
            if disk.read_cached(entry.files.data, view, offset, self._nowait) == len(view):
                return True
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0  # a file system without it: every read takes a thread
        entry.doubt(blocks_of(offset, len(view)))
        return False

    def cold(self, entry: CachedObject, blocks: range) -> list[range]:
        """Those of `blocks` that are on the disk alone, in runs. From now on they are believed only
        when they were checked, because they may come into memory at any time (`blockio.check`)."""
        stored = (i for i in blocks if entry.state[i] in ON_DISK and i not in entry.memory)
        found = [
            run
            for run in runs(stored, _CHECK_BLOCKS)
            if not disk.is_cached(
                entry.files.data, run.start * BLOCK_BYTES, blocks_length(run, entry.size)
            )
        ]
        for run in found:
            entry.doubt(run)
        return found

    def loaded(self, entry: CachedObject, index: int, checksum: int, good: bool) -> None:
        """Take in the outcome of `load`, unless the block is another one by now."""
        if entry.state[index] not in ON_DISK or entry.sums[index] != checksum:
            return
        if good:
            entry.state[index] = VERIFIED
            return
        log.warning("cache: block %d of %s is damaged: dropped", index, entry.about.key.path)
        entry.unreliable |= entry.state[index] in (VERIFIED, DOUBTED)
        self._forget(entry, index)

    # -- writing

    def keep(self, entry: CachedObject, blocks: range, buffer: "Buffer[CachedObject]") -> None:
        """Make blocks readable whose bytes are in a busy buffer, and whose version is confirmed."""
        buffer.owner, buffer.blocks = entry, blocks
        for index in blocks:
            entry.memory[index] = buffer
            entry.state[index] = IN_MEMORY

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
                key = cachedir.read_about(self._root.folder(digest)).key
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
        on_disk = entry.disk_bytes()
        entry.oldest.clear()
        for index in range(len(entry.state)):
            entry.state[index] = ABSENT
            entry.sums[index] = 0
        self._drop_memory(entry)
        files, entry.files = entry.files, NO_FILES
        path = None if entry.orphaned else self._ledger.to_trash(entry.digest)
        if isinstance(path, OSError):
            entry.retired.append((files, 0, None))
            entry.dead_bytes, entry.unreliable = on_disk, True
            return
        if path is not None and Ledger.delete(path):
            path = None
        entry.retired.append((files, on_disk, path))
        entry.dead_bytes, entry.orphaned = 0, False

    def is_open(self, digest: str) -> bool:
        """Whether somebody reads or fetches the object."""
        return digest in self._open

    # -- all of it

    @property
    def removed_at_start(self) -> int:
        """How many objects were not whole, or of another format."""
        return self._ledger.removed

    def contents(self) -> list[tuple[str, Stored]]:
        """All that is on the disk, by digest: least recently used first, and then what is open."""
        now_s = time.time()
        opened = [
            (digest, Stored(entry.disk_bytes(), entry.size, now_s, entry.about.origin))
            for digest, entry in self._open.items()
            if entry.disk_bytes()
        ]
        return self._ledger.closed() + opened

    def closed(self, digest: str) -> Stored | None:
        """What is on the disk of an object that nobody has open."""
        return self._ledger.stored(digest)

    def opened(self, digest: str) -> CachedObject | None:
        """The object, if somebody has it open."""
        return self._open.get(digest)

    def folder(self, digest: str) -> Path:
        """Where an object is. Only as long as the cache is in use."""
        return self._root.folder(digest)

    def surplus_bytes(self, bytes_max: int) -> int:
        """How many bytes are too many for that limit (0: none), and for the share of the disk that
        is to be left free."""
        spare = self._ledger.spare_bytes()
        over = self.used_bytes - bytes_max if bytes_max else 0
        return max(0, over, -spare if spare is not None else 0)

    # -- what is dropped

    def evict(self, digest: str) -> Path | None:
        """Drop an object that is not open; returns the folder to `delete`, if it was there. Raises
        OSError where the disk refuses."""
        return self._ledger.evict(digest)

    @staticmethod
    def delete(folder: Path) -> bool:
        """Blocking. Delete what `evict` returned; False: the disk refuses."""
        return Ledger.delete(folder)

    def deleted(self, folder: Path, gone: bool) -> None:
        """Take in the outcome of `delete`."""
        self._ledger.deleted(folder, gone)

    # -- folders

    def _directory_was_removed(self) -> None:
        """The folders went with it. What is open is read on from its open files."""
        for entry in self._open.values():
            entry.orphaned |= entry.files is not NO_FILES
            if entry.files is NO_FILES:
                self._ledger.used_bytes -= entry.dead_bytes
                entry.dead_bytes, entry.unreliable = 0, False

    def _open_folder(
        self, digest: str, key: ObjectKey, origin: Origin, on_disk: int
    ) -> CachedObject:
        dead_bytes = 0
        if on_disk:
            try:
                files, about, sums = cachedir.open_existing(self._root.folder(digest), key)
            except (OSError, ValueError) as error:
                dead_bytes = on_disk
                if not isinstance(error, OSError) or error.errno in _NO_FOLDER:
                    log.warning("cache: removing %s: %s", digest, error)
                    dead_bytes = self._ledger.condemn(digest, on_disk)
                else:  # it may be whole: it is left alone
                    warn(f"open {key.path}", error)
            else:
                entry = CachedObject(digest, about, files, sums)
                with contextlib.suppress(OSError):
                    if 0 not in sums and about.verified == cachedir.stamp(files):
                        entry.state[:] = bytes([VERIFIED]) * len(sums)
                if digest not in self._lent_before:
                    blockio.free_unrecorded(entry, on_disk)
                return entry
        about = About(cachedir.FORMAT, key, "", False, origin)
        sums = array("Q", bytes(8 * block_count(key.size)))
        entry = CachedObject(digest, about, NO_FILES, sums)
        entry.dead_bytes, entry.unreliable = dead_bytes, dead_bytes > 0
        return entry

    def _forget(self, entry: CachedObject, index: int) -> None:
        if entry.lent:
            self._retire(entry)
            return
        entry.state[index] = ABSENT
        entry.sums[index] = 0
        freed = blockio.take_out(entry, range(index, index + 1))
        self.room.give_back(entry, block_length(index, entry.size), freed)


_NO_FOLDER = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR))
"""Errors of a folder that is not whole. Others say that the disk, or the daemon, cannot read it
now."""
