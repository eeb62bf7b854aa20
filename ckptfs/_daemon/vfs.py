"""File system operations in plain types: no FUSE, no errno. What the kernel sees is decided here.

All of a checkpoint is a snapshot, so names and attributes never change while it is attached. The
mount point itself lists the attachments. An attachment that ends leaves its numbers unknown:
`StaleInode`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ckptfs._daemon.attachment import Attachment
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.fetch import Fetcher, RemoteFile
from ckptfs._daemon.tree import MOUNT_ROOT, Node, ordinal_of
from ckptfs._model import attributes as names
from ckptfs._model.location import Location


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


class NoAttribute(VfsError):
    """The file has no such extended attribute."""


class Stat(NamedTuple):
    """Attributes of a file or directory; `mtime_ns` since the epoch, `size` in bytes."""

    inode: int
    is_directory: bool
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int


class Space(NamedTuple):
    """Sizes for statfs(2)."""

    total_bytes: int
    files: int


class Vfs:
    """The tree of all attachments.

    Args:
        fetcher: Reads the files.
        cache: Asked for what is cached.
        uid: Owner of the mount point; so is `gid`.
        released: Called when a handle of an attachment was closed.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        cache: Cache,
        uid: int,
        gid: int,
        released: Callable[[Attachment], None],
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._owner = (uid, gid)
        self._released = released
        self._by_ordinal: dict[int, Attachment] = {}
        self._by_name: dict[bytes, Attachment] = {}
        self._open: dict[int, RemoteFile] = {}  # open files by inode, which is also their handle
        self._directories: dict[int, tuple[int, list[tuple[bytes, Stat]] | None]] = {}
        self._serial = 0

    # -- attachments

    def add(self, attachment: Attachment) -> None:
        """Show an attachment."""
        self._by_ordinal[attachment.ordinal] = attachment
        self._by_name[attachment.name.encode()] = attachment

    def remove(self, attachment: Attachment) -> None:
        """Stop to show an attachment. Handles that are still open in it become stale."""
        del self._by_ordinal[attachment.ordinal]
        del self._by_name[attachment.name.encode()]
        for inode, file in list(self._open.items()):
            if ordinal_of(inode) == attachment.ordinal:
                del self._open[inode]
                while file.opens:
                    self._fetcher.close(file)

    def _find(self, inode: int) -> tuple[Attachment, Node]:
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
        return _stat(*self._find(inode))

    def lookup(self, parent: int, name: bytes) -> Stat:
        """Attributes of `name` in the directory `parent`."""
        if parent == MOUNT_ROOT:
            attachment = self._by_name.get(name)
            if attachment is None:
                raise NoEntry(name)
            return _stat(attachment, attachment.tree.root)
        attachment, node = self._find(parent)
        child = node.children.get(name)
        if child is None:
            raise NoEntry(name)
        return _stat(attachment, child)

    def is_snapshot(self, inode: int) -> bool:
        """Whether names in this directory never change, so that their absence can be remembered."""
        return inode != MOUNT_ROOT

    def opendir(self, inode: int, pid: int) -> int:
        """Open a directory; returns its handle. An open root is a lease on the attachment."""
        self._serial += 1
        if inode == MOUNT_ROOT:
            self._directories[self._serial] = inode, None
            return self._serial
        attachment, node = self._find(inode)
        if not node.is_directory:
            raise NotDirectory(inode)
        handle = attachment.ordinal << 32 | self._serial & 0xFFFFFFFF
        self._directories[handle] = inode, None
        if node is attachment.tree.root:
            attachment.directories[handle] = pid
        else:
            attachment.open_handles += 1
        return handle

    def readdir(self, handle: int, start: int) -> Iterator[tuple[bytes, Stat, int]]:
        """Entries from position `start` on: name, attributes and the position after it."""
        inode, entries = self._directories[handle]
        if entries is None or start == 0:
            if inode == MOUNT_ROOT:
                entries = [(n, _stat(a, a.tree.root)) for n, a in self._by_name.items()]
            else:
                attachment, node = self._find(inode)
                entries = [(n, _stat(attachment, child)) for n, child in node.children.items()]
            self._directories[handle] = inode, entries
        for position in range(start, len(entries)):
            yield *entries[position], position + 1

    def releasedir(self, handle: int) -> None:
        """Close a directory."""
        inode, _ = self._directories.pop(handle)
        attachment = self._by_ordinal.get(ordinal_of(inode))
        if attachment is None:
            return
        if attachment.directories.pop(handle, None) is None:
            attachment.open_handles -= 1
        self._released(attachment)

    # -- files

    def open(self, inode: int) -> int:
        """Open a file for reading; returns its handle, which is its inode number."""
        attachment, node = self._find(inode)
        if node.is_directory:
            raise IsDirectory(inode)
        file = attachment.file(node.index)
        self._fetcher.open(file)
        self._open[inode] = file
        attachment.open_handles += 1
        return inode

    def release(self, handle: int) -> None:
        """Close a file."""
        attachment = self._by_ordinal.get(ordinal_of(handle))
        file = self._open.get(handle)
        if attachment is None or file is None:
            return
        self._fetcher.close(file)
        if not file.opens:
            del self._open[handle]
        attachment.open_handles -= 1
        self._released(attachment)

    async def read(self, handle: int, offset: int, length: int) -> "memoryview | bytes":
        """Bytes of an open file; fewer than `length` only at its end. Valid until the next read.

        Raises StaleInode, and what `Fetcher.read` raises.
        """
        file = self._open.get(handle)
        if file is None:
            raise StaleInode(handle)
        length = min(length, file.pin.size - offset)
        if length <= 0:
            return b""
        self._fetcher.access(file, offset, length)
        data = self._fetcher.read_now(file, offset, length)
        if data is None:
            data = await self._fetcher.read(file, offset, length)
        return data

    def statfs(self) -> Space:
        """What all attachments hold together."""
        manifests = [attachment.manifest for attachment in self._by_ordinal.values()]
        return Space(sum(m.size for m in manifests), sum(len(m.files) for m in manifests))

    # -- extended attributes

    def getxattr(self, inode: int, name: str) -> bytes:
        """The value of an extended attribute."""
        value = self._xattrs(inode).get(name)
        if value is None:
            raise NoAttribute(name)
        raw = value().encode()
        if len(raw) > names.VALUE_BYTES_MAX:  # cut at a line: these are lists
            raw = raw[: names.VALUE_BYTES_MAX].rpartition(b"\n")[0]
        if not raw and name in (names.ERROR, names.SKIPPED):
            raise NoAttribute(name)
        return raw

    def listxattr(self, inode: int) -> list[str]:
        """Names of the attributes that the file has now."""
        optional = (names.ERROR, names.SKIPPED)
        return [n for n, value in self._xattrs(inode).items() if n not in optional or value()]

    def _xattrs(self, inode: int) -> dict[str, Callable[[], str]]:
        if inode == MOUNT_ROOT:
            return {}
        attachment, node = self._find(inode)
        uri = _uri(attachment.location, node)
        if node is attachment.tree.root:
            return self._root_xattrs(attachment, uri)
        if node.is_directory:
            return {names.URI: lambda: uri}
        return self._file_xattrs(attachment, node, uri)

    def _root_xattrs(self, attachment: Attachment, uri: str) -> dict[str, Callable[[], str]]:
        manifest = attachment.manifest

        def cached() -> int:
            return attachment.cached_bytes(self._cache)

        return {
            names.URI: lambda: uri,
            names.VERSION: lambda: manifest.version,
            names.SIZE: lambda: str(manifest.size),
            names.CACHED: lambda: str(cached()),
            names.STATE: lambda: attachment.state(cached()),
            names.ERROR: lambda: attachment.error,
            names.SKIPPED: lambda: "".join(f"{s.name}\t{s.reason}\n" for s in manifest.skipped),
        }

    def _file_xattrs(
        self, attachment: Attachment, node: Node, uri: str
    ) -> dict[str, Callable[[], str]]:
        file = attachment.peek(node.index)
        digest = attachment.digests[node.index]

        def cached() -> int:
            return self._cache.stored_bytes(digest, node.size)

        def version() -> str:
            return file.pin.etag.strip('"') or f"{file.pin.size}-{file.pin.mtime_ns}"

        return {
            names.URI: lambda: uri,
            names.VERSION: version,
            names.SIZE: lambda: str(node.size),
            names.CACHED: lambda: str(cached()),
            names.STATE: lambda: file.state(cached()),
            names.ERROR: lambda: file.error,
        }


def _stat(attachment: Attachment, node: Node) -> Stat:
    owner = attachment.uid, attachment.gid
    if node.is_directory:
        links = 2 + node.subdirectories
        return Stat(node.inode, True, 0o500, links, *owner, 0, node.mtime_ns)
    return Stat(node.inode, False, 0o400, 1, *owner, node.size, node.mtime_ns)


def _uri(location: Location, node: Node) -> str:
    parts: list[str] = []
    while node.parent is not None:
        parts.append(node.name.decode())
        node = node.parent
    path = "/".join([location.path, *reversed(parts)])
    return Location(location.kind, path, location.options).uri
