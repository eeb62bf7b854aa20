"""Blocks on disk: a limit, eviction and recovery.

The parts of the package:

- `cache_dir`: the directory, and `object_dir`: the folder of an object;
- `cached_object`: the state of an open object;
- `index`: the closed objects, and the count of all bytes;
- `eviction`: room for new bytes;
- `buffer_pool`: the memory for spans, and `writer`: from there to the disk;
- `memory_reads`: reads that never wait for the disk, and `page_copies`: their copies;
- `block_io`: the IO of blocks, and `disk_ops`: all that touches the disk;
- `maintenance`: the `ckptfs cache` commands.

**Ownership of state.** Only the event loop's thread touches the state in memory
(`CachedObject.state`, the index, the byte counts), between two awaits. The functions that say
"blocking" run in a worker thread. They take all that they need as arguments, or from fields that do
not change while the object is open. A caller that hands an object to a worker thread keeps the
object open. A copy out of the page cache (`page_copies`) is the exception: its thread reads
`files` and `generations` at any time.

**The life of a block.**

- ABSENT: `spans` fetches the block into a buffer.
- IN_MEMORY: `keep` has made it readable there. `block_io.write` puts its bytes on the disk, and
  then its checksum into the map.
- VERIFIED: `publish` has taken that in. The buffer stays until its memory is needed. A read needs
  no thread as long as the bytes are in the buffer or in the page cache (`memory_reads`).
- DOUBTED: the pages have left memory, and the kernel may have begun to read them. `load` reads the
  block from the disk, and its checksum makes it VERIFIED again.
- STORED: the block was there when the object was opened. `load` checks it, too. But all blocks are
  VERIFIED at once if they were so at the last close, and no process has written to the file since.
- DYING: `eviction` makes a hole of the block.

**Passthrough**: the kernel reads such an object by itself (see `fuse.passthrough`). All of its
blocks stay VERIFIED until `end_passthrough`. If the object turns out to be damaged or of another
version, it is retired: the kernel keeps the old files, and all others read new ones.

**A disk that fails** is never a reader's error. The daemon fetches bytes that it cannot read, and
does not store bytes that it cannot write. Bytes that it cannot remove stay counted. It tries to
delete the folders in the trash again when it makes room. Other such bytes are `dead_bytes` of their
object, whose folder goes as a whole when it is closed. If another process removes the directory,
the daemon makes it again, and readers continue from the open files.
"""

import contextlib
import errno
import logging
import time
from array import array
from collections.abc import Generator
from pathlib import Path

import msgspec

from ckptfs._daemon.cache import block_io, cache_dir, disk_ops, object_dir
from ckptfs._daemon.cache.buffer_pool import Buffer, Buffers
from ckptfs._daemon.cache.cached_object import (
    ABSENT,
    DOUBTED,
    IN_MEMORY,
    ON_DISK,
    VERIFIED,
    CachedObject,
)
from ckptfs._daemon.cache.eviction import Room
from ckptfs._daemon.cache.index import Index
from ckptfs._daemon.cache.memory_reads import MemoryReads
from ckptfs._daemon.cache.object_dir import NO_FILES, UNKNOWN, About, ObjectKey, Origin, Stored
from ckptfs._model.blocks import (
    BLOCK_BYTES,
    block_count,
    block_length,
    blocks_length,
    runs,
)

log = logging.getLogger(__name__)

SETTLED_S = 900
"""Age after which size and mtime alone identify a version. mtime has whole seconds, so a younger
object may be written again under the same mtime; 15 minutes is also the largest difference between
clocks that S3 accepts (its error RequestTimeTooSkewed)."""


class Cache:
    """The cache in `directory`. Create it before the event loop starts: it reads the index.

    Args:
        directory: The directory, which must belong to this user alone. A missing one is made.
        bytes_max: Most bytes on disk; 0 for no limit.
        free_share_min: Share of the disk to leave free.
        memory_bytes_max: Most bytes of the buffers for spans.
        required: Whether the directory has to be usable now. If not, reads do without until it is.
        idle_memory_bytes_max: Most bytes of these buffers that stay while no object is open.

    Attributes:
        opened: The open objects, by digest.
        buffers: The memory for spans.
        reads: Reads that never wait for the disk.
        index: The closed objects, and the count of all bytes.
        room: Eviction.

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
        idle_memory_bytes_max: int = 0,
    ) -> None:
        self.directory = directory
        self.opened: dict[str, CachedObject] = {}
        self.buffers: Buffers[CachedObject] = Buffers(
            memory_bytes_max, self._forget_buffer, idle_memory_bytes_max
        )
        self.reads = MemoryReads(self.buffers, self.close)
        self.index = Index(
            directory,
            bytes_max,
            free_share_min,
            self.opened,
            self._directory_was_removed,
            required=required,
        )
        self._root = self.index.root
        self.room = Room(self.index, self.opened, self.held)

    def resize(self, bytes_max: int, free_share_min: float, memory_bytes_max: int) -> None:
        """Have other limits from now on, which hold when room is made next."""
        self.index.bytes_max = bytes_max
        self.index.free_share_min = free_share_min
        self.buffers.resize(memory_bytes_max)

    def shut(self) -> None:
        """Close all objects and let another daemon use the directory."""
        for entry in list(self.opened.values()):
            entry.users = 1
            self.close(entry)
        self._root.close()

    # -- open and close

    def stored_bytes(self, digest: str) -> int:
        """Bytes of an object that are on the disk, whether it is open or not."""
        if entry := self.opened.get(digest):
            return entry.stored_bytes()
        stored = self.index.closed.get(digest)
        return stored.data_bytes if stored else 0

    def open(
        self, key: ObjectKey, origin: Origin = UNKNOWN, *, is_passed_through: bool = False
    ) -> CachedObject:
        """The object of `key`. Each call needs a `close`.

        `origin` describes the checkpoint of a new object, which gets its folder with its first
        block. An object that is on the disk costs a little synchronous IO. `is_passed_through` says
        whether the kernel reads it now.
        """
        digest = key.digest()
        entry = self.opened.get(digest)
        if entry is None:
            on_disk = self.index.take(digest)
            entry = self.opened[digest] = self._open_folder(digest, key, origin, on_disk)
            if on_disk and entry.files is not NO_FILES and not is_passed_through:
                block_io.free_unrecorded(entry, on_disk)
            self.index.used_bytes += entry.disk_bytes()
        entry.users += 1
        return entry

    @contextlib.contextmanager
    def held(self, entry: CachedObject) -> Generator[None]:
        """Keep an object open while it is used, even if another user of it closes it meanwhile."""
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
        del self.opened[digest]
        self._drop_memory(entry)
        if not self.opened:
            self.buffers.trim()
            self.reads.trim()
        for files, size, path in entry.retired:
            files.close()
            self.index.used_bytes -= size
            if path is not None:
                self.index.leave(path, size)
        self._note_verified(entry)
        entry.files.close()
        self.index.used_bytes -= on_disk
        if on_disk and not entry.orphaned:
            on_disk = self._close_folder(entry, on_disk)
            if on_disk:
                about = entry.about
                stored = Stored(on_disk, entry.size, time.time(), about.origin)
                self.index.put(digest, stored)

    def _close_folder(self, entry: CachedObject, on_disk: int) -> int:
        """Close the folder of an object, and remove it if it has no use. Returns the bytes that
        stay in the cache."""
        if entry.files is NO_FILES:
            return on_disk
        if entry.dead_bytes:
            return self.index.condemn(entry.digest, on_disk)
        try:
            if entry.stored_bytes():
                disk_ops.touch(self._root.folder(entry.digest))
                return on_disk
            self._root.remove(entry.digest)
        except OSError as error:
            if not self._root.has(entry.digest):  # another process removed it
                return 0
            cache_dir.warn(f"change {entry.about.key.path}", error)
            return on_disk
        return 0

    def _note_verified(self, entry: CachedObject) -> None:
        """Record that all of an object is verified, so that the next open need not check it."""
        if not entry.verified or entry.orphaned:
            return
        with contextlib.suppress(OSError):
            stamp = object_dir.stamp(entry.files)
            if entry.about.verified != stamp:
                about = msgspec.structs.replace(entry.about, verified=stamp)
                object_dir.write_about(self._root.folder(entry.digest), about)

    def learn(self, entry: CachedObject, etag: str) -> None:
        """Take in the ETag that the store has confirmed, and drop blocks of another ETag."""
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
                object_dir.write_about(self._root.folder(entry.digest), entry.about)

    # -- blocks that are only on the disk

    def cold(self, entry: CachedObject, blocks: range) -> list[range]:
        """Those of `blocks` that are only on the disk, in runs. They are DOUBTED from now on,
        because they may come into memory at any time, and are for `block_io.check`."""
        stored = (i for i in blocks if entry.state[i] in ON_DISK and i not in entry.memory)
        found = [
            run
            for run in runs(stored, block_io.CHECK_BLOCKS)
            if not disk_ops.is_cached(
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
        """Make the blocks unreadable that are only in this buffer."""
        entry = buffer.owner
        assert entry is not None
        for index in buffer.blocks:
            if entry.memory.get(index) is buffer:
                del entry.memory[index]
                if entry.state[index] == IN_MEMORY:
                    entry.state[index] = ABSENT

    def _drop_memory(self, entry: CachedObject) -> None:
        """Forget the buffers of an object. A busy one stays its span's."""
        for buffer in set(entry.memory.values()):
            self._forget_buffer(buffer)
        self.buffers.release_of(entry)

    # -- passthrough

    def begin_passthrough(self, entry: CachedObject) -> bool:
        """Let the kernel read the data file, if all blocks are verified. Returns whether they are.

        Each success needs an `end_passthrough`.
        """
        if not entry.verified:
            return False
        self._note_verified(entry)
        entry.users += 1
        entry.passthroughs += 1
        return True

    def restore_passthrough(self, digest: str) -> CachedObject | None:
        """Take in that the kernel reads the object since an earlier daemon, whatever its state.

        None if the cache does not have it any more. The daemon calls this before it opens the
        object in another way. Each success needs an `end_passthrough`.
        """
        entry = self.opened.get(digest)
        if entry is None:
            try:
                key = object_dir.read_about(self._root.folder(digest)).key
            except (OSError, ValueError):
                return None
            entry = self.open(key, is_passed_through=True)
        else:
            entry.users += 1
        entry.passthroughs += 1
        return entry

    def end_passthrough(self, entry: CachedObject) -> None:
        """Undo one `begin_passthrough` or `restore_passthrough`."""
        entry.passthroughs -= 1
        self.close(entry)

    def _retire(self, entry: CachedObject) -> None:
        """Start again with new files, while the kernel reads the old ones."""
        on_disk = entry.disk_bytes()
        entry.oldest.clear()
        for index in range(len(entry.state)):
            entry.renew(index)
            entry.state[index] = ABSENT
            entry.sums[index] = 0
        self._drop_memory(entry)
        files, entry.files = entry.files, NO_FILES
        try:
            path = None if entry.orphaned else self.index.to_trash(entry.digest)
        except OSError:
            entry.retired.append((files, 0, None))
            entry.dead_bytes, entry.unreliable = on_disk, True
            return
        if path is not None and cache_dir.remove(path):
            path = None
        entry.retired.append((files, on_disk, path))
        entry.dead_bytes, entry.orphaned = 0, False

    def contents(self) -> list[tuple[str, Stored]]:
        """The objects on the disk, by digest: closed ones, least recently used first, then open
        ones."""
        now_s = time.time()
        opened = [
            (digest, Stored(entry.disk_bytes(), entry.size, now_s, entry.about.origin))
            for digest, entry in self.opened.items()
            if entry.disk_bytes()
        ]
        return [*self.index.closed.items(), *opened]

    # -- folders

    def _directory_was_removed(self) -> None:
        """Take in that the folders are gone. Readers continue from the open files."""
        for entry in self.opened.values():
            entry.orphaned |= entry.files is not NO_FILES
            if entry.files is NO_FILES:
                self.index.used_bytes -= entry.dead_bytes
                entry.dead_bytes, entry.unreliable = 0, False

    def _open_folder(
        self, digest: str, key: ObjectKey, origin: Origin, on_disk: int
    ) -> CachedObject:
        dead_bytes = 0
        if on_disk:
            try:
                files, about, sums = object_dir.open_existing(self._root.folder(digest), key)
            except (OSError, ValueError) as error:
                dead_bytes = on_disk
                if not isinstance(error, OSError) or error.errno in _NO_FOLDER:
                    log.warning("cache: removing %s: %s", digest, error)
                    dead_bytes = self.index.condemn(digest, on_disk)
                else:  # it may be whole: it is left alone
                    cache_dir.warn(f"open {key.path}", error)
            else:
                entry = CachedObject(digest, about, files, sums)
                with contextlib.suppress(OSError):
                    if 0 not in sums and about.verified == object_dir.stamp(files):
                        entry.state[:] = bytes([VERIFIED]) * len(sums)
                return entry
        about = About(object_dir.FORMAT, key, "", False, origin)
        sums = array("Q", bytes(8 * block_count(key.size)))
        entry = CachedObject(digest, about, NO_FILES, sums)
        entry.dead_bytes, entry.unreliable = dead_bytes, dead_bytes > 0
        return entry

    def _forget(self, entry: CachedObject, index: int) -> None:
        if entry.passthroughs:
            self._retire(entry)
            return
        entry.renew(index)
        entry.state[index] = ABSENT
        entry.sums[index] = 0
        freed = block_io.take_out(entry.files, entry.about, range(index, index + 1))
        self.room.give_back(entry, block_length(index, entry.size), freed)


_NO_FOLDER = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR))
"""Errors of a folder that is not whole. Others say that the disk, or the daemon, cannot read it
now."""
