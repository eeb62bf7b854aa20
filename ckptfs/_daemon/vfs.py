"""File system operations in plain types: no FUSE, no errno. What the kernel sees is decided here.

All of a checkpoint but its metadata file is a snapshot, so names and attributes never change while
it is attached. The mount point itself lists the attachments. An attachment that ends leaves its
numbers unknown: `StaleInode`.

Modes let the owner write, because setting an attribute needs that permission; all that would change
a file or directory is refused (`fuse.Operations`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ckptfs._daemon.activity import Usage
from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache, Views
from ckptfs._daemon.fetch import Fetcher, RemoteFile
from ckptfs._daemon.handoff import Handle, Handles
from ckptfs._daemon.recognise import Recogniser
from ckptfs._daemon.tree import MOUNT_ROOT, Node, ordinal_of
from ckptfs._model.manifest import METADATA_NAME

if TYPE_CHECKING:
    from ckptfs._daemon.cached import CachedObject


class VfsError(Exception):
    """Base of the errors that the file system itself states."""


class NoEntry(VfsError):
    """There is no such name."""


class NotDirectory(VfsError):
    """A directory was expected."""


class IsDirectory(VfsError):
    """A file was expected."""


class StaleInode(VfsError):
    """The attachment has ended."""


class Overshoot(Exception):
    """Readahead of the kernel, over the edge of what will be read. It asks again, page by page, for
    what a program needs of it."""


class Stat(NamedTuple):
    """Attributes of a file or directory; `mtime_ns` since the epoch, `size` in bytes. `volatile`:
    the name may soon lead to another inode, so nobody may remember it."""

    inode: int
    is_directory: bool
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    volatile: bool = False


class Space(NamedTuple):
    """Sizes for statfs(2)."""

    total_bytes: int
    files: int


class Vfs:
    """The tree of all attachments.

    Args:
        fetcher: Reads the files.
        recogniser: Told of accesses to files whose parts are not known.
        cache: Asked for what is cached.
        handles: Numbers what is opened, and keeps it for the next daemon.
        uid: Owner of the mount point; so is `gid`.
        released: Called when a handle of an attachment was closed.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        recogniser: Recogniser,
        cache: Cache,
        handles: Handles,
        uid: int,
        gid: int,
        released: Callable[[Attachment], None],
    ) -> None:
        self._fetcher = fetcher
        self._recogniser = recogniser
        self._cache = cache
        self._handles = handles
        self._owner = (uid, gid)
        self._released = released
        self._by_ordinal: dict[int, Attachment] = {}
        self._by_name: dict[bytes, Attachment] = {}
        self._open: dict[int, tuple[RemoteFile, int, Usage]] = {}  # by handle; its inode
        self._lent: dict[int, CachedObject] = {}  # those that the kernel reads itself, by inode
        self._directories: dict[int, tuple[int, list[bytes] | None]] = {}  # inode and names

    # -- attachments

    def add(self, attachment: Attachment) -> None:
        """Show an attachment."""
        self._by_ordinal[attachment.ordinal] = attachment
        self._by_name[attachment.name.encode()] = attachment

    def remove(self, attachment: Attachment) -> None:
        """Stop to show an attachment. Handles that are still open in it become stale."""
        del self._by_ordinal[attachment.ordinal]
        del self._by_name[attachment.name.encode()]
        for handle, (file, inode, usage) in list(self._open.items()):
            if ordinal_of(inode) == attachment.ordinal:
                del self._open[handle]
                attachment.activity.closed(usage)
                while file.opens:
                    self._fetcher.close(file)

    def find(self, inode: int) -> tuple[Attachment, Node]:
        """The attachment and the node of an inode. Raises StaleInode."""
        attachment = self._by_ordinal.get(ordinal_of(inode))
        node = attachment.tree.node(inode) if attachment else None
        if attachment is None or node is None:
            raise StaleInode(inode)
        return attachment, node

    # -- names and attributes

    def getattr(self, inode: int) -> Stat:
        """Attributes of an inode."""
        if inode == MOUNT_ROOT:
            times = [int(a.attached_s * 1e9) for a in self._by_ordinal.values()]
            links = 2 + len(times)
            # Not readable by others: the names say what somebody trains.
            return Stat(inode, True, 0o711, links, *self._owner, 0, max(times, default=0))
        return _stat(*self.find(inode))

    def lookup(self, parent: int, name: bytes) -> Stat:
        """Attributes of `name` in the directory `parent`."""
        if parent == MOUNT_ROOT:
            attachment = self._by_name.get(name)
            if attachment is None:
                raise NoEntry(name)
            return _stat(attachment, attachment.tree.root)
        attachment, node = self.find(parent)
        child = node.children.get(name)
        if child is None:
            raise NoEntry(name)
        return _stat(attachment, child)

    def is_lasting(self, parent: int, name: bytes) -> bool:
        """Whether the absence of `name` in that directory can be remembered."""
        return parent != MOUNT_ROOT and name != METADATA_NAME.encode()

    def is_listing_lasting(self, inode: int) -> bool:
        """Whether the entries of that directory never change."""
        if inode == MOUNT_ROOT:
            return False
        attachment = self._by_ordinal.get(ordinal_of(inode))
        return attachment is not None and inode != attachment.tree.root.inode  # it has the metadata

    def opendir(self, inode: int, pid: int) -> int:
        """Open a directory; returns its handle. An open root is a lease on the attachment."""
        if inode != MOUNT_ROOT and not self.find(inode)[1].is_directory:
            raise NotDirectory(inode)
        handle = self._handles.reserve(inode, pid, is_directory=True)
        self._add_directory(handle, inode, pid)
        return handle

    def _add_directory(self, handle: int, inode: int, pid: int) -> None:
        self._directories[handle] = inode, None
        if inode == MOUNT_ROOT:
            return
        attachment, node = self.find(inode)
        if node is attachment.tree.root:
            attachment.directories[handle] = pid
            attachment.activity.holds(pid)
        else:
            attachment.open_handles += 1

    def readdir(self, handle: int, start: int) -> Iterator[tuple[bytes, Stat, int]]:
        """Entries from position `start` on: name, attributes and the position after it. Names are
        those of when it was read from the start; one that is gone since is left out."""
        inode, names = self._directories.get(handle, (0, None))
        within = self._by_name if inode == MOUNT_ROOT else self.find(inode)[1].children
        if names is None or start == 0:
            names = list(within)
            self._directories[handle] = inode, names
        for position in range(start, len(names)):
            if names[position] in within:
                yield names[position], self.lookup(inode, names[position]), position + 1

    def _close_directory(self, handle: int) -> None:
        inode, _ = self._directories.pop(handle, (0, None))
        attachment = self._by_ordinal.get(ordinal_of(inode))
        if attachment is None:
            return
        if attachment.directories.pop(handle, None) is None:
            attachment.open_handles -= 1
        self._released(attachment)

    # -- files

    def open(self, inode: int, pid: int = 0) -> int:
        """Open a file for reading; returns its handle. `pid`: of the process that opens it; 0:
        nobody knows."""
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
        self._fetcher.open(file)
        self._open[handle] = file, inode, attachment.activity.opened(pid)
        attachment.open_handles += 1

    def _close_file(self, handle: int) -> None:
        opened = self._open.pop(handle, None)
        if opened is None:
            return
        file, inode, usage = opened
        attachment = self._by_ordinal[ordinal_of(inode)]
        attachment.activity.closed(usage)
        if not file.recognised and file.pin.size:
            self._recogniser.look_at_head(file)
        self._fetcher.close(file)
        attachment.open_handles -= 1
        self._released(attachment)

    # -- both

    def release(self, handle: int) -> bool:
        """Close a file or directory. False: it is closed already, or never was open."""
        if not self._handles.free(handle):
            return False
        if handle in self._directories:
            self._close_directory(handle)
        else:
            self._close_file(handle)
        return True

    def restore(self, handle: Handle) -> None:
        """Open again what an earlier daemon had opened. What belongs to an attachment that has
        ended stays stale."""
        with contextlib.suppress(StaleInode):
            if handle.is_directory:
                self._add_directory(handle.number, handle.inode, handle.pid)
            else:
                self._add_file(handle.number, handle.inode, handle.pid)
                self._open[handle.number][2].opens -= 1  # it was one of an earlier daemon's

    # -- reading

    def read_now(
        self, handle: int, offset: int, length: int, *, is_exact: bool = True
    ) -> Views | None:
        """Take in a read of an open file: its bytes, if they are there without waiting, fewer than
        `length` only at its end. None: `read` has to follow. Valid until the next read.

        `is_exact`: nothing of it is the kernel's readahead. Raises StaleInode and Overshoot.
        """
        file, inode, usage, length = self._within(handle, offset, length)
        if not length:
            return []
        if not is_exact and file.is_planned and self._fetcher.overshoots(file, offset, length):
            raise Overshoot
        file.served_bytes += length
        if not file.recognised:
            self._recogniser.look(*self.find(inode))
        self._fetcher.access(file, offset, length, usage)
        if not file.handed_on and file.readahead and file.readahead.is_asked_whole:
            file.handed_on = True
            if not file.is_planned:
                self._recogniser.begin_next(*self.find(inode))
        return self._fetcher.read_now(file, offset, length)

    async def read(self, handle: int, offset: int, length: int) -> Views:
        """The same, waiting for the bytes. Raises also what `Fetcher.read` raises."""
        file, _, usage, length = self._within(handle, offset, length)
        if not length:
            return []
        is_miss = self._fetcher.lacks(file, offset, length)
        usage.waiting += 1
        try:
            views = await self._fetcher.read(file, offset, length)
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
        waited: bool = False,
    ) -> None:
        """A read that the daemon saw at `began_ns` (`time.perf_counter_ns`) was answered with
        `length` bytes, or with an error. `waited`: not at once. The one place that learns of
        each."""
        opened = self._open.get(handle)
        if opened is None:
            return
        file, _, usage = opened
        usage.read_bytes += length
        now_ns = time.perf_counter_ns()
        usage.read_ns += now_ns - began_ns
        usage.latency_ns[(now_ns - began_ns).bit_length()] += 1
        if error is not None:
            usage.failed(error)
        elif length and file.trace is not None:
            ended_s = now_ns / 1e9 if waited else 0.0
            place = file.index, usage.pid, offset, offset + length
            file.trace.read(*place, began_ns / 1e9, ended_s)

    def note_kernel_open(self, handle: int) -> None:
        """The kernel reads what was opened so by itself: nobody will tell us of its reads."""
        if opened := self._open.get(handle):
            opened[2].kernel_opens += 1

    def _within(self, handle: int, offset: int, length: int) -> tuple[RemoteFile, int, Usage, int]:
        """An open file, its inode, whose reads these are, and how many of the bytes lie in it."""
        opened = self._open.get(handle)
        if opened is None:
            raise StaleInode(handle)
        file, inode, usage = opened
        return file, inode, usage, max(0, min(length, file.pin.size - offset))

    # -- lending

    async def before_lending(self, handle: int) -> None:
        """Have the version of an open file checked, if that is all that `lend` would miss."""
        if opened := self._open.get(handle):
            await self._fetcher.before_lending(opened[0])

    def lend(self, inode: int) -> int:
        """See passthrough.Lender. A file that the kernel most likely has in its page cache is not
        lent, because an open by passthrough drops it from there."""
        attachment, node = self.find(inode)
        file = attachment.file(node.index)
        if not file.opens or 1 / 2 <= file.served_bytes / (file.pin.size or 1) <= 3 / 2:
            return -1
        entry = self._fetcher.lend(file)
        if entry is None:
            return -1
        file.served_bytes = 0
        if file.trace is not None:
            file.trace.lend(file.index)
        self._lent[inode] = entry
        return entry.files.data

    def take_back(self, inode: int) -> None:
        """See passthrough.Lender."""
        if entry := self._lent.pop(inode, None):
            self._cache.take_back(entry)

    def digest_of_lent(self, inode: int) -> str:
        """What the cache calls the object that `lend` has lent; "": none."""
        entry = self._lent.get(inode)
        return entry.digest if entry else ""

    def lend_again(self, inode: int, digest: str) -> None:
        """The kernel still reads that object of the cache for `inode`, as an earlier daemon has
        told it to. Needs a `take_back`."""
        if inode not in self._lent and (entry := self._cache.lend_again(digest)):
            self._lent[inode] = entry

    def statfs(self) -> Space:
        """What all attachments hold together."""
        manifests = [attachment.manifest for attachment in self._by_ordinal.values()]
        return Space(sum(m.size for m in manifests), sum(len(m.files) for m in manifests))


def _stat(attachment: Attachment, node: Node) -> Stat:
    owner = attachment.uid, attachment.gid
    if node.is_directory:
        links = 2 + node.subdirectories
        return Stat(node.inode, True, 0o700, links, *owner, 0, node.mtime_ns)
    return Stat(node.inode, False, 0o600, 1, *owner, node.size, node.mtime_ns, is_metadata(node))


def is_metadata(node: Node) -> bool:
    """Whether it is (a version of) the file with the checkpoint's own metadata."""
    top = node.parent is not None and node.parent.parent is None
    return top and node.name == METADATA_NAME.encode() and not node.is_directory
