"""The attributes of files and directories: owners, modes, sizes and times.

`fuse.Operations` refuses every change of a file or directory, and access(2) reports that
(`Vfs.access`). Modes let the owner write nevertheless, as on a disk that is mounted read-only. The
first reason is that copies get these modes. The second is that with `allow_other` the kernel checks
that permission before it lets the owner set an attribute (see `session.mount`).

A volume (``ckptfs._model.volume``) can be read by all users of its pod, or by one group. Its modes
let no user write, because its bind mount is read-only for the kernel, too.
"""

from typing import NamedTuple

from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.inodes import Node, is_metadata

_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600
"""Copies take these modes over. With fewer bits their owner could not overwrite or delete them."""
_VOLUME_DIRECTORY_MODE, _VOLUME_FILE_MODE = 0o555, 0o444


class Stat(NamedTuple):
    """Attributes of a file or directory, `mtime_ns` since the epoch, `size` in bytes.

    Attributes:
        volatile: Whether the kernel has to ask each time. The name of the metadata may soon lead to
            another inode. A path through a checkpoint's directory must fail when the mount has no
            daemon any more, although the kernel remembers all names and attributes below it.
    """

    inode: int
    is_directory: bool
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    volatile: bool = False


def stat_of(attachment: Attachment, node: Node) -> Stat:
    """The attributes of a node of an attachment."""
    uid, gid = attachment.uid, attachment.gid
    directory_mode, file_mode = _DIRECTORY_MODE, _FILE_MODE
    if (volume := attachment.volume) is not None:
        directory_mode, file_mode = _VOLUME_DIRECTORY_MODE, _VOLUME_FILE_MODE
        if volume.gid is not None:
            gid = volume.gid
            directory_mode, file_mode = directory_mode & 0o770, file_mode & 0o770
    if node.is_directory:
        links = 2 + node.subdirectories
        is_root = node is attachment.snapshot.tree.root
        return Stat(node.inode, True, directory_mode, links, uid, gid, 0, node.mtime_ns, is_root)
    volatile = is_metadata(node)
    return Stat(node.inode, False, file_mode, 1, uid, gid, node.size, node.mtime_ns, volatile)
