"""Passthrough: the kernel itself reads files that are complete in the cache (Linux >= 6.9).

Such a file is served from its `data` file in the cache without asking the daemon: at the speed of
the disk's file system, and its bytes stand in memory once. What the kernel demands (fs/fuse:
iomode.c, backing.c, passthrough.c), and what follows from it:

- An inode is open either in the ordinary way or by passthrough; an open that mixes them fails with
  EIO. So the first open decides, until the last handle is gone. A mapping keeps its handle.
- All opens of an inode at the same time name the same backing file.
- The reply to an open must not ask for FOPEN_KEEP_CACHE; the kernel drops the pages that it has.
- Registering a backing file needs CAP_SYS_ADMIN, and its file system must not be stacked as deep as
  the mount may be (see `session.answer_init`).

An open by passthrough drops what the page cache of the mount has of the file, so one that was just
read through the daemon stays ordinary: it is in memory (`Vfs.lend`).

What ckptfs adds: only a file whose version is confirmed and whose blocks all are verified is lent
(holes would read as zeros), and a file that is lent keeps its blocks (`Cache.lend`).
"""

import errno
import fcntl
import logging
import os
import struct
from typing import Protocol

log = logging.getLogger(__name__)

_BACKING_OPEN = 0x4010E501  # FUSE_DEV_IOC_BACKING_OPEN, linux/fuse.h
_BACKING_CLOSE = 0x4004E502
_BACKING_MAP = struct.Struct("<iIQ")  # struct fuse_backing_map: fd, flags, padding
_BACKING_ID = struct.Struct("<I")

ON = "on"
"""What `why_not` says where it works."""


class Lender(Protocol):
    """Who has the files."""

    def lend(self, inode: int) -> int:
        """Descriptor of the complete, verified content of an open file, which stays as it is until
        `take_back`; -1 if it is not that."""
        ...

    def take_back(self, inode: int) -> None:
        """Undo `lend` or `lend_again`."""
        ...

    def digest_of_lent(self, inode: int) -> str:
        """What `lend_again` needs to know."""
        ...

    def lend_again(self, inode: int, digest: str) -> None:
        """What an earlier daemon has lent still is."""
        ...


def why_not(fuse_fd: int, wanted: bool, negotiated: bool, cache_fd: int) -> str:
    """`ON`, or why files cannot be passed through.

    Args:
        fuse_fd: The session.
        wanted: Whether the configuration allows it.
        negotiated: Whether the kernel agreed to it in FUSE_INIT.
        cache_fd: A file in the cache's directory, to try it out; -1: it cannot be used now.
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
    return fcntl.ioctl(fuse_fd, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0)), True)


def _unregister(fuse_fd: int, backing_id: int) -> None:
    fcntl.ioctl(fuse_fd, _BACKING_CLOSE, _BACKING_ID.pack(backing_id))


class _OpenInode:
    def __init__(self, backing_id: int) -> None:
        self.backing_id = backing_id  # 0: opened in the ordinary way
        self.opens = 0


class Passthrough:
    """Which open inodes the kernel reads by itself."""

    def __init__(self, fuse_fd: int, lender: Lender, *, on: bool) -> None:
        self._fuse_fd = fuse_fd
        self._lender = lender
        self._on = on
        self._open: dict[int, _OpenInode] = {}

    def restore(self, inode: int, backing_id: int, digest: str) -> None:
        """An earlier daemon has opened the inode so, and the kernel goes by that."""
        known = self._open.setdefault(inode, _OpenInode(backing_id))
        known.opens += 1
        if backing_id:
            self._lender.lend_again(inode, digest)

    def opened(self, inode: int) -> tuple[int, str]:
        """An open is about to succeed. The backing id to answer with, and the digest that `restore`
        will need; 0: open it in the ordinary way."""
        known = self._open.get(inode)
        if known is None:
            known = self._open[inode] = _OpenInode(self._lend(inode) if self._on else 0)
        known.opens += 1
        digest = self._lender.digest_of_lent(inode) if known.backing_id else ""
        return known.backing_id, digest

    def released(self, inode: int) -> None:
        """The kernel has let go of one handle."""
        known = self._open.get(inode)
        if known is None:
            return
        known.opens -= 1
        if known.opens:
            return
        del self._open[inode]
        if known.backing_id:
            self._lender.take_back(inode)
            _unregister(self._fuse_fd, known.backing_id)

    def _lend(self, inode: int) -> int:
        fd = self._lender.lend(inode)
        if fd < 0:
            return 0
        try:
            return _register(self._fuse_fd, fd)
        except OSError as error:
            log.info("passthrough: inode %d: %s; reading it in the ordinary way", inode, error)
            self._lender.take_back(inode)
            return 0
