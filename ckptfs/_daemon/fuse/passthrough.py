"""Passthrough: the kernel reads files by itself that are complete in the cache (Linux >= 6.9).

The kernel serves such a file from its `data` file in the cache without asking the daemon. Reads
have the speed of the disk's file system, and the bytes stand in memory once. The kernel's rules
(fs/fuse: iomode.c, backing.c, passthrough.c) and their consequences:

- An inode is open either in the ordinary way or by passthrough. An open that mixes them fails with
  EIO, so the first open decides until the last handle is closed. A mapping keeps its handle.
- All simultaneous opens of an inode name the same backing file.
- The reply to an open must not ask for FOPEN_KEEP_CACHE, and the kernel drops the pages that it
  has.
- Registering a backing file needs CAP_SYS_ADMIN. Its file system must not be stacked as deep as the
  mount may be (see `session.answer_init`).

An open by passthrough drops the file from the mount's page cache. So a file that was just read
through the daemon stays ordinary, because it is in memory (`Vfs.begin_passthrough`).

The daemon adds two rules. It passes only a file through whose version is confirmed and whose blocks
are all verified, because holes would read as zeros. The cache keeps the blocks of such a file
(`Cache.begin_passthrough`).
"""

import errno
import fcntl
import logging
import os

from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._mount import fuse_abi

log = logging.getLogger(__name__)

ON = "on"
"""Result of `why_not` where passthrough works."""


def why_not(fuse_fd: int, wanted: bool, negotiated: bool, cache_fd: int) -> str:
    """`ON`, or the reason why files cannot be passed through.

    Args:
        fuse_fd: The session.
        wanted: Whether the configuration allows it.
        negotiated: Whether the kernel agreed to it in FUSE_INIT.
        cache_fd: A file in the cache's directory, to try passthrough with; -1 if the cache cannot
            be used now.
    """
    if not wanted:
        return "off: passthrough = false in the configuration"
    if not negotiated:
        return f"off: the kernel ({os.uname().release}) has no FUSE passthrough; Linux 6.9 has it"
    if cache_fd < 0:
        return "off: the cache could not be used when this daemon started"
    try:
        _unregister(fuse_fd, _register(fuse_fd, cache_fd))
    except OSError as error:
        if error.errno == errno.EPERM:
            return "off: not permitted; it needs CAP_SYS_ADMIN"
        if error.errno == errno.ELOOP:
            return "off: the cache is on a stacked file system; set cache_dir to one on a disk"
        return f"off: the cache's file system cannot: {error.strerror}"
    return ON


def _register(fuse_fd: int, fd: int) -> int:
    # A bytearray, and True: with anything else ioctl() loses its return value, which is the id.
    request = bytearray(fuse_abi.BACKING_MAP.pack(fd, 0, 0))
    return fcntl.ioctl(fuse_fd, fuse_abi.DEV_IOC_BACKING_OPEN, request, True)


def _unregister(fuse_fd: int, backing_id: int) -> None:
    fcntl.ioctl(fuse_fd, fuse_abi.DEV_IOC_BACKING_CLOSE, fuse_abi.BACKING_ID.pack(backing_id))


class _OpenInode:
    """An inode that the kernel has open: by passthrough, with `entry` as its content and the
    kernel's number for that, or in the ordinary way (0 and None)."""

    def __init__(self, backing_id: int, entry: CachedObject | None) -> None:
        self.backing_id = backing_id
        self.entry = entry
        self.opens = 0


class Passthrough:
    """The open inodes, and which of them the kernel reads by itself."""

    def __init__(self, fuse_fd: int, vfs: Vfs, cache: Cache, *, on: bool) -> None:
        self._fuse_fd = fuse_fd
        self._vfs = vfs
        self._cache = cache
        self._on = on
        self._open: dict[int, _OpenInode] = {}

    def restore(self, inode: int, backing_id: int, digest: str) -> None:
        """Take in that an earlier daemon has opened the inode in this way."""
        if inode not in self._open:
            entry = self._cache.restore_passthrough(digest) if backing_id else None
            self._open[inode] = _OpenInode(backing_id, entry)
        self._open[inode].opens += 1

    def opened(self, inode: int) -> tuple[int, str]:
        """Decide how an open that is about to succeed has to be answered.

        Returns the kernel's number for the backing file (0 for an ordinary open), and the digest
        that `restore` needs.
        """
        if inode not in self._open:
            self._open[inode] = self._begin(inode) if self._on else _OpenInode(0, None)
        known = self._open[inode]
        known.opens += 1
        return known.backing_id, known.entry.digest if known.entry else ""

    def released(self, inode: int) -> None:
        """Take in that the kernel has closed one handle."""
        known = self._open.get(inode)
        if known is None:
            return
        known.opens -= 1
        if known.opens:
            return
        del self._open[inode]
        if known.entry:
            self._cache.end_passthrough(known.entry)
        if known.backing_id:
            _unregister(self._fuse_fd, known.backing_id)

    def _begin(self, inode: int) -> _OpenInode:
        entry = self._vfs.begin_passthrough(inode)
        if entry is None:
            return _OpenInode(0, None)
        try:
            return _OpenInode(_register(self._fuse_fd, entry.files.data), entry)
        except OSError as error:
            log.info("passthrough: inode %d: %s; reading it in the ordinary way", inode, error)
            self._cache.end_passthrough(entry)
            return _OpenInode(0, None)
