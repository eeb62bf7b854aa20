"""Replies that the relay makes itself, beside reads, because libfuse or pyfuse3 lacks them."""

import stat

from ckptfs._daemon.fs.stats import Stat
from ckptfs._mount import fuse_abi

_BLOCK_BYTES = 4096


def attributes_once(found: Stat) -> bytes:
    """Attributes of a directory, valid for one request only."""
    at_s, at_ns = divmod(found.mtime_ns, 10**9)
    return fuse_abi.ATTR_OUT.pack(
        *(0, 0),  # validity
        *(found.inode, 0, 0),  # inode, size, blocks
        *(at_s, at_s, at_s, at_ns, at_ns, at_ns),
        *(stat.S_IFDIR | found.mode, found.nlink, found.uid, found.gid),
        *(0, 1 << 20, 0),  # rdev, size of a block, flags
    )


def space(size: int, files: int) -> bytes:
    """A full file system of `size` bytes in so many files. pyfuse3 does not pass on the inode that
    a program asks about."""
    return fuse_abi.STATFS_OUT.pack(
        *(-(-size // _BLOCK_BYTES), 0, 0),  # blocks, and those that are free
        *(files, 0),
        *(_BLOCK_BYTES, 255, _BLOCK_BYTES),  # size of a block, longest name, size of a fragment
    )
