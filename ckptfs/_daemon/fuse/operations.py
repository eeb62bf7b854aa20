# pyfuse3's types are those of a C extension; they are converted here and go no further.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
"""The FUSE adapter: maps pyfuse3's callbacks to `vfs`, and errors to errnos. It decides nothing.

The relay handles reads and releases itself (`relay`).

**Users.** Requests of a session with ALLOW_IDMAP name no user, because an idmapped mount maps
owners and not the users of requests. Nothing here may then depend on the user of a request, except
in two places:

- Setting an attribute. The kernel has checked by owner and mode that the user may write
  (``default_permissions``, without which it fails a session with ALLOW_IDMAP). That includes root
  of a user namespace on an idmapped mount, so `xattrs` refuses to set any attribute of a volume.
- Listing attributes, for which the kernel checks nothing. The request names the thread, which waits
  for the reply, so its user is looked up (`procfs.user_of`). An unknown user gets an empty list.
"""

import contextlib
import errno
import functools
import logging
import os
import socket
import stat
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ModeT, RequestContext, XAttrNameT

from ckptfs import errors
from ckptfs._daemon.attachment import inodes
from ckptfs._daemon.attachment.inodes import MOUNT_ROOT, OUTSIDE
from ckptfs._daemon.attachment.metadata import MetadataKeeper
from ckptfs._daemon.fs import xattrs
from ckptfs._daemon.fs.stats import Stat
from ckptfs._daemon.fs.vfs import Vfs
from ckptfs._daemon.fuse.relay import Relay
from ckptfs._daemon.usage.procfs import process_of, user_of
from ckptfs._mount import fuse_abi, session

log = logging.getLogger(__name__)

_FOREVER_S = 86400.0
"""Validity of names and attributes of a snapshot, in the kernel's caches."""
_TASKS_MAX = 2000
"""Requests handled at the same time. A request that waits for a store (for metadata) takes one of
them."""

ERRNOS: dict[type, int] = {
    inodes.NoEntry: errno.ENOENT,
    inodes.NotDirectory: errno.ENOTDIR,
    inodes.IsDirectory: errno.EISDIR,
    inodes.ReadOnly: errno.EROFS,
    inodes.StaleInode: errno.ESTALE,
    xattrs.NoAttribute: errno.ENODATA,
    xattrs.AttributeStated: errno.EROFS,
    xattrs.NotSupported: errno.ENOTSUP,
    xattrs.InvalidValue: errno.EINVAL,
    xattrs.NotPermitted: errno.EPERM,
    errors.ObjectChanged: errno.ESTALE,
    errors.StoreTimeout: errno.ETIMEDOUT,
    errors.AccessDenied: errno.EACCES,
    errors.NotAttached: errno.ESTALE,
    errors.Busy: errno.EBUSY,
    errors.LimitExceeded: errno.ENFILE,
    errors.CkptfsError: errno.EIO,
}
"""The errno of each error and its subclasses, for programs that read the mount. No other module has
such a table."""


def errno_of(error: Exception) -> int:
    """The errno of an error, for a program that reads the mount."""
    for kind in type(error).__mro__:
        if kind in ERRNOS:
            return ERRNOS[kind]
    log.error("unexpected error in a file system operation", exc_info=error)
    return errno.EIO


class Operations(pyfuse3.Operations):
    """pyfuse3's operations on the mount.

    Attributes:
        handshake: Cancelled at the end of libfuse's handshake (see `take_session`).
        before_reply: Called before libfuse replies.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, vfs: Vfs, xattrs: xattrs.Xattrs, metadata: MetadataKeeper) -> None:
        super().__init__()
        self._vfs = vfs
        self._xattrs = xattrs
        self._metadata = metadata
        self.handshake: trio.CancelScope | None = None
        self.before_reply: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def _replying(self) -> Generator[None]:
        """Turn exceptions into errnos. libfuse replies right after this context."""
        try:
            yield
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error)) from None
        finally:
            self.before_reply()

    def init(self) -> None:
        """End the handshake. libfuse calls this after its FUSE_INIT (see `take_session`)."""
        if self.handshake is not None:
            self.handshake.cancel()

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        with self._replying():
            try:
                return _entry(self._vfs.lookup(parent_inode, name))
            except inodes.NoEntry:
                if parent_inode in OUTSIDE:
                    raise
                if not self._vfs.is_lasting(parent_inode, name):
                    attachment, parent = self._vfs.find(parent_inode)
                    await self._metadata.before_absence(attachment, parent, name)
                    return _entry(self._vfs.lookup(parent_inode, name))
                absent = pyfuse3.EntryAttributes()
                absent.st_ino = 0  # the kernel remembers the absence
                absent.entry_timeout = _FOREVER_S
                return absent

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        with self._replying():
            return _entry(self._vfs.getattr(inode))

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        with self._replying():  # the kernel asks only if it does not decide by the modes
            return self._vfs.access(inode, mode)

    async def forget(self, inode_list: object) -> None:
        """Do nothing, because the daemon does not count references (see `inodes`)."""

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        with self._replying():
            return self._vfs.opendir(inode, process_of(ctx.pid))

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        with self._replying():
            for name, found, position in self._vfs.readdir(fh, start_id):
                if not pyfuse3.readdir_reply(token, name, _entry(found), position):
                    return

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        with self._replying():
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise pyfuse3.FUSEError(errno.EROFS)
            attachment, node = self._vfs.find(inode)
            await self._metadata.before_open(attachment, node)
            handle = self._vfs.open(inode, process_of(ctx.pid))
            await self._vfs.before_passthrough(handle)
            return pyfuse3.FileInfo(fh=handle, keep_cache=True)  # an inode's bytes never change

    # -- extended attributes

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if not name.startswith(b"user."):  # ls asks for security attributes with each file
            raise pyfuse3.FUSEError(errno.ENODATA)
        with self._replying():
            return await self._xattrs.get(inode, name.decode("utf-8", "replace"))

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> "list[XAttrNameT]":
        with self._replying():
            return [name.encode() for name in await self._xattrs.list(inode, _lister(ctx))]

    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        with self._replying():
            await self._xattrs.set(inode, _text(name), value, _writer(ctx))

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        with self._replying():
            await self._xattrs.remove(inode, _text(name), _writer(ctx))

    # -- writing

    async def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    create = link = mkdir = mknod = rename = rmdir = setattr = symlink = unlink = write = _refuse


def _lister(ctx: RequestContext) -> int:
    """The user who lists attributes; -1 if unknown. The kernel checks no permission for a list, so
    the daemon looks the user up if the request does not name them."""
    return user_of(ctx.pid) if ctx.uid == fuse_abi.INVALID_UID else ctx.uid


def _writer(ctx: RequestContext) -> int | None:
    """The user who sets an attribute, or None if the request does not name them. Then the session
    has ``default_permissions``, and the kernel has checked that the mode lets the user write."""
    return None if ctx.uid == fuse_abi.INVALID_UID else ctx.uid


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise xattrs.NotSupported(repr(name)) from None


def _entry(found: Stat) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = found.inode
    kind = stat.S_IFDIR if found.is_directory else stat.S_IFREG
    entry.st_mode = kind | found.mode
    entry.st_nlink = found.nlink
    entry.st_uid, entry.st_gid = found.uid, found.gid
    entry.st_size = found.size
    entry.st_blksize = 1 << 20
    entry.st_blocks = -(-found.size // 512)
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = found.mtime_ns
    entry.entry_timeout = 0 if found.volatile else _FOREVER_S
    entry.attr_timeout = 0 if found.volatile or found.inode == MOUNT_ROOT else _FOREVER_S
    return entry


async def take_session(operations: Operations) -> socket.socket:
    """Make libfuse serve one end of a socket pair, and return the other end for the relay.

    libfuse initialises itself by a FUSE_INIT made here. The keeper has answered the kernel's.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pyfuse3.init(operations, f"/dev/fd/{theirs.detach()}", set())
    ours.send(session.made_init())
    with trio.CancelScope() as operations.handshake:
        await pyfuse3.main()
    operations.handshake = None
    ours.recv(4096)
    ours.setblocking(False)
    return ours


async def serve(relay: Relay) -> None:
    """Handle the kernel's requests until the session ends (the mount is gone)."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(pyfuse3.main, min_tasks=4, max_tasks=_TASKS_MAX))
        await relay.run()
        nursery.cancel_scope.cancel()
