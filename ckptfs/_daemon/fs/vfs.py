"""File system operations in plain types, without FUSE and errnos. This module decides what programs
see.

A checkpoint is a snapshot except for its metadata file, so names and attributes never change while
it is attached. The mount point itself lists the attachments. At the end of an attachment its inodes
become unknown (`StaleInode`).

A volume (``ckptfs._model.volume``) is in a directory that only the mount's owner can enter, because
its pod sees it by a bind mount. All users of the pod can read it, or one group.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.format_detection import FormatDetector
from ckptfs._daemon.attachment.inodes import (
    MOUNT_ROOT,
    OUTSIDE,
    VOLUMES_ROOT,
    IsDirectory,
    Node,
    NoEntry,
    NotDirectory,
    ReadOnly,
    StaleInode,
    entry_of,
    ordinal_of,
)
from ckptfs._daemon.cache.page_copies import Found, Views
from ckptfs._daemon.fetch.fetcher import Fetcher, RemoteFile
from ckptfs._daemon.fs.stats import Stat, stat_of
from ckptfs._daemon.usage.counters import Usage, count_failed_read
from ckptfs._model.blocks import blocks_of
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._model.volume import FOLDER
from ckptfs._mount.handoff import Handles, Slot
from ckptfs.errors import LimitExceeded, StoreTimeout

if TYPE_CHECKING:
    from ckptfs._daemon.cache.cached_object import CachedObject


class Overshoot(Exception):
    """Readahead of the kernel beyond the bytes that will be read. The kernel asks again, page by
    page, for the bytes that a program needs."""


@dataclass(slots=True)
class OpenFile:
    """An open handle of a file, with the counters of the process that opened it. It has slots,
    because each read needs its fields, and slots are the fastest to read."""

    file: RemoteFile
    inode: int
    usage: Usage


@dataclass(slots=True)
class OpenDirectory:
    """An open handle of a directory, with the names at the last begin of a listing."""

    inode: int
    names: list[bytes] | None = None


class Vfs:
    """The tree of all attachments.

    `uid` and `gid` own the mount point. The tree calls `released` after it has closed a handle of
    an attachment.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        formats: FormatDetector,
        handles: Handles,
        uid: int,
        gid: int,
        released: Callable[[Attachment], None],
    ) -> None:
        self._fetcher = fetcher
        self._formats = formats
        self._handles = handles
        self._uid = uid
        self._gid = gid
        self._released = released
        self._by_ordinal: dict[int, Attachment] = {}
        self._entries: dict[int, dict[bytes, Attachment]] = {inode: {} for inode in OUTSIDE}
        self._open: dict[int, OpenFile] = {}  # by handle
        self._directories: dict[int, OpenDirectory] = {}  # by handle

    # -- attachments

    def add(self, attachment: Attachment) -> None:
        """Show an attachment."""
        self._by_ordinal[attachment.ordinal] = attachment
        folder, name = entry_of(attachment.name)
        self._entries[folder][name] = attachment

    def remove(self, attachment: Attachment) -> None:
        """Stop showing an attachment. Handles that are still open in it become stale."""
        del self._by_ordinal[attachment.ordinal]
        folder, name = entry_of(attachment.name)
        del self._entries[folder][name]
        for handle, opened in list(self._open.items()):
            if ordinal_of(opened.inode) == attachment.ordinal:
                del self._open[handle]
                opened.usage.open_files -= 1
                while opened.file.opened.count:
                    self._fetcher.close(opened.file)

    def find(self, inode: int) -> tuple[Attachment, Node]:
        """The attachment and the node of an inode. Raises StaleInode."""
        attachment = self._by_ordinal.get(ordinal_of(inode))
        node = attachment.snapshot.tree.node(inode) if attachment else None
        if attachment is None or node is None:
            raise StaleInode(inode)
        return attachment, node

    # -- names and attributes

    def getattr(self, inode: int) -> Stat:
        """Attributes of an inode."""
        if inode == MOUNT_ROOT:
            times = [int(a.attached_s * 1e9) for a in self._entries[MOUNT_ROOT].values()]
            links = 2 + len(times)
            mode = 0o711  # not readable by others, because names tell what a user trains
            newest_ns = max(times, default=0)
            return Stat(inode, True, mode, links, self._uid, self._gid, 0, newest_ns)
        if inode == VOLUMES_ROOT:
            return Stat(inode, True, 0o700, 2, self._uid, self._gid, 0, 0)
        attachment, node = self.find(inode)
        return stat_of(attachment, node)

    def access(self, inode: int, mask: int) -> bool:
        """Whether the mount's user has the access in `mask` (of `os.R_OK`, `os.W_OK`, `os.X_OK`).
        Raises ReadOnly for `os.W_OK`, and StaleInode."""
        is_directory = self.getattr(inode).is_directory
        if mask & os.W_OK:
            raise ReadOnly(inode)
        return is_directory or not mask & os.X_OK

    def lookup(self, parent: int, name: bytes) -> Stat:
        """Attributes of `name` in the directory `parent`."""
        if parent == MOUNT_ROOT and name == FOLDER.encode():
            return self.getattr(VOLUMES_ROOT)
        if parent in OUTSIDE:
            attachment = self._entries[parent].get(name)
            if attachment is None:
                raise NoEntry(name)
            return stat_of(attachment, attachment.snapshot.tree.root)
        attachment, node = self.find(parent)
        child = node.children.get(name)
        if child is None:
            raise NoEntry(name)
        return stat_of(attachment, child)

    def is_lasting(self, parent: int, name: bytes) -> bool:
        """Whether the kernel may remember that the directory has no such name."""
        return parent not in OUTSIDE and name != METADATA_NAME.encode()

    def is_listing_lasting(self, inode: int) -> bool:
        """Whether the entries of that directory never change."""
        if inode in OUTSIDE:
            return False
        attachment = self._by_ordinal.get(ordinal_of(inode))  # its root has the metadata
        return attachment is not None and inode != attachment.snapshot.tree.root.inode

    def opendir(self, inode: int, pid: int) -> int:
        """Open a directory, and return its handle. An open root is a lease on the attachment."""
        if inode not in OUTSIDE and not self.find(inode)[1].is_directory:
            raise NotDirectory(inode)
        handle = self._handles.reserve(inode, pid, is_directory=True)
        self._add_directory(handle, inode, pid)
        return handle

    def _add_directory(self, handle: int, inode: int, pid: int) -> None:
        self._directories[handle] = OpenDirectory(inode)
        if inode in OUTSIDE:
            return
        attachment, node = self.find(inode)
        if node is attachment.snapshot.tree.root:
            attachment.leases.directories[handle] = pid
            attachment.activity.usage_of(pid)
        else:
            attachment.leases.open_handles += 1

    def readdir(self, handle: int, start: int) -> Iterator[tuple[bytes, Stat, int]]:
        """Entries from position `start` on, each with its name, its attributes and the position
        after it. The names are those at the last call with `start` 0, without names that are gone
        since. Raises StaleInode."""
        opened = self._directories.get(handle)
        if opened is None:
            raise StaleInode(handle)
        inode = opened.inode
        within = self._entries[inode] if inode in OUTSIDE else self.find(inode)[1].children
        if opened.names is None or start == 0:
            opened.names = list(within)
        names = opened.names
        for position in range(start, len(names)):
            if names[position] in within:
                yield names[position], self.lookup(inode, names[position]), position + 1

    def _close_directory(self, handle: int) -> None:
        opened = self._directories.pop(handle)
        attachment = self._by_ordinal.get(ordinal_of(opened.inode))
        if attachment is None:
            return
        if attachment.leases.directories.pop(handle, None) is None:
            attachment.leases.open_handles -= 1
        self._released(attachment)

    # -- files

    def open(self, inode: int, pid: int = 0) -> int:
        """Open a file for reading, and return its handle. `pid` is the opening process; 0 if it is
        unknown."""
        if self.find(inode)[1].is_directory:
            raise IsDirectory(inode)
        handle = self._handles.reserve(inode, pid, is_directory=False)
        try:
            self._add_file(handle, inode, pid)
        except BaseException:
            self._handles.free(handle)
            raise
        return handle

    def _add_file(self, handle: int, inode: int, pid: int) -> None:
        attachment, node = self.find(inode)
        file = attachment.file(node.index)
        try:
            self._fetcher.open(file)
        except LimitExceeded as error:
            attachment.note(error)
            raise
        self._open[handle] = OpenFile(file, inode, attachment.activity.opened(pid))
        attachment.leases.open_handles += 1

    def _close_file(self, handle: int) -> None:
        opened = self._open.pop(handle, None)
        if opened is None:
            return
        file = opened.file
        attachment = self._by_ordinal[ordinal_of(opened.inode)]
        opened.usage.open_files -= 1
        if not file.format.is_final and file.size:
            self._formats.detect_by_head(file)
        self._fetcher.close(file)
        attachment.leases.open_handles -= 1
        self._released(attachment)

    # -- both

    def release(self, handle: int) -> bool:
        """Close a file or directory. False if the handle is not open."""
        if not self._handles.free(handle):
            return False
        if handle in self._directories:
            self._close_directory(handle)
        else:
            self._close_file(handle)
        return True

    def restore(self, handle: int, slot: Slot) -> None:
        """Open a handle of an earlier daemon again. Handles of an ended attachment stay stale."""
        with contextlib.suppress(StaleInode):
            if slot.is_directory:
                self._add_directory(handle, slot.inode, slot.pid)
            else:
                self._add_file(handle, slot.inode, slot.pid)
                self._open[handle].usage.opens -= 1  # the earlier daemon counted it

    # -- reading

    def read_now(
        self,
        handle: int,
        offset: int,
        length: int,
        *,
        is_exact: bool = True,
        may_copy_later: bool = False,
    ) -> Found | None:
        """Begin a read of an open file, and return its bytes if they are there without waiting.
        They are fewer than `length` only at the file's end, and valid until the next read. After
        None, `read` has to follow.

        `is_exact` says that no part of the request is the kernel's readahead, so the kernel does
        not ask again by itself. `may_copy_later` says that the caller runs the copies of what was
        found. Raises StaleInode, Overshoot, and the StoreTimeout of a read of the
        same bytes that has just failed.
        """
        opened = self._open.get(handle)
        if opened is None:
            raise StaleInode(handle)
        file = opened.file
        length = min(length, file.size - offset)
        if length <= 0:
            return Found([])
        if not is_exact and file.is_planned and self._fetcher.overshoots(file, offset, length):
            raise Overshoot
        if file.failed_reads and not is_exact:
            self._fetcher.fail_again(file, offset, length)
        file.reader.served_bytes += length
        if not file.format.is_final:
            attachment, node = self.find(opened.inode)
            self._formats.detect(attachment, node)
        self._fetcher.access(file, offset, length, opened.usage)
        readahead = file.opened.readahead
        if not file.reader.began_next and readahead and readahead.is_asked_whole:
            file.reader.began_next = True
            if not file.is_planned:
                attachment, node = self.find(opened.inode)
                self._formats.fetch_next_head(attachment, node)
        if may_copy_later:
            return self._fetcher.find_now(file, offset, length)
        views = self._fetcher.read_now(file, offset, length)
        return None if views is None else Found(views)

    async def read(self, handle: int, offset: int, length: int) -> Views:
        """The bytes of a read that `read_now` has begun. Raises StaleInode, and what `Fetcher.read`
        raises."""
        opened = self._open.get(handle)
        if opened is None:
            raise StaleInode(handle)
        file, usage = opened.file, opened.usage
        length = min(length, file.size - offset)
        if length <= 0:
            return []
        blocks = blocks_of(offset, length)
        is_miss = bool(file.entry.absent(blocks))
        usage.waiting += 1
        try:
            views = await self._fetcher.read(file, offset, length)
        except StoreTimeout as error:
            file.failed_reads.add(blocks, error)
            raise
        finally:
            usage.waiting -= 1
            usage.misses += is_miss
        usage.missed_bytes += is_miss * length
        return views

    def note_read(
        self,
        handle: int,
        offset: int,
        length: int,
        began_ns: int,
        error: Exception | None = None,
        *,
        thread: int = 0,
        waited: bool = False,
    ) -> None:
        """Count an answered read of `length` bytes, which the daemon received at `began_ns`
        (`time.perf_counter_ns`). Each read passes here once.

        A failed read has an `error`, which the program gets after this call, and the `thread` that
        reads. `waited` says that the read had to wait for bytes.
        """
        opened = self._open.get(handle)
        if opened is None:
            return
        file, usage = opened.file, opened.usage
        usage.read_bytes += length
        now_ns = time.perf_counter_ns()
        took_ns = now_ns - began_ns
        usage.read_ns += took_ns
        usage.latency_ns[took_ns.bit_length()] += 1
        if error is not None:
            count_failed_read(usage, error)
            file.note_reader(thread, error)
        elif length and file.trace is not None:
            ended_s = now_ns / 1e9 if waited else 0.0
            began_s = began_ns / 1e9
            file.trace.read(file.index, usage.pid, offset, offset + length, began_s, ended_s)

    def note_kernel_open(self, handle: int) -> None:
        """Count an open by passthrough. The daemon does not see the reads of such a handle."""
        if opened := self._open.get(handle):
            opened.usage.kernel_opens += 1

    # -- passthrough

    async def before_passthrough(self, handle: int) -> None:
        """Check the version of an open file, if it lacks only that for `begin_passthrough`."""
        if opened := self._open.get(handle):
            await self._fetcher.before_passthrough(opened.file)

    def begin_passthrough(self, inode: int) -> "CachedObject | None":
        """The cached object of an open file, if the kernel can read it by itself from now on. Each
        one needs a `Cache.end_passthrough`.

        A file that the kernel most likely has in its page cache stays ordinary, because an open by
        passthrough would drop it from there.
        """
        attachment, node = self.find(inode)
        file = attachment.file(node.index)
        if not file.opened.count or 1 / 2 <= file.reader.served_bytes / (file.size or 1) <= 3 / 2:
            return None
        entry = self._fetcher.begin_passthrough(file)
        if entry is not None:
            file.reader.served_bytes = 0
            if file.trace is not None:
                file.trace.note_passthrough(file.index)
        return entry

    # -- all together

    def statfs(self, inode: int = MOUNT_ROOT) -> tuple[int, int]:
        """Bytes and number of the files of the attachment with that inode, or of all attachments,
        if it is outside of them. Raises StaleInode."""
        among = self._by_ordinal.values() if inode in OUTSIDE else [self.find(inode)[0]]
        manifests = [attachment.manifest for attachment in among]
        return sum(m.size for m in manifests), sum(len(m.files) for m in manifests)
