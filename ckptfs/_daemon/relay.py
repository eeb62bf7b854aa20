"""Between the kernel and libfuse: reads are answered here, nearly all other requests by libfuse.

The relay owns /dev/fuse. libfuse (pyfuse3) serves one end of a SEQPACKET socket pair, one message
each as on the device, and the relay passes on what is not a read. What that brings:

- a read that hits is one readv(2) and one writev(2), with no task of its own, no copy into a
  message, and no call into libfuse;
- so are the attributes of the mount's root, which the kernel asks for with every path that leads
  through it;
- replies of libfuse can be completed with what it does not know: an open gets its backing id
  (`passthrough`), the listing of a directory that never changes may be remembered by the kernel;
- /dev/fuse is read without blocking. (libfuse would block in read(2) for a request that is aborted
  after the poll.)

All of it runs in the event loop, in one thread. So a reply of libfuse must never wait for room in
the socket, because nobody else would make room: `deliver` empties it before each reply
(`fuse.Operations` calls it), and listings, the only replies that could be larger than a socket's
buffer, are made shorter than that; the kernel asks for the rest.

**After another daemon.** The relay writes down (`Handles`) which handles the kernel has got. When a
daemon dies, the kernel keeps what it has asked for, and `take_over` has it ask again
(FUSE_NOTIFY_RESEND, Linux >= 6.9), with the same numbers and one bit more. A request that was
carried out already, but not answered, then comes a second time:

- an open has a handle that nobody knows: it is closed before the new one is opened;
- a release finds nothing to close, and an attribute that is to be removed is gone: no error;
- everything else can be done twice.

An opener that was killed meanwhile does not ask again; what it had opened is closed after
`_ASKED_AGAIN_WITHIN_S`.

Reads that wait are bounded by the kernel: `session` sets how many it sends ahead of the programs,
and beyond those each is a thread that sleeps. When a reply finds no request (ENOENT), somebody has
aborted it; that is no error.

Message layouts: linux/fuse.h.
"""

import errno
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable

import trio

from ckptfs._daemon import session
from ckptfs._daemon.cache import Views
from ckptfs._daemon.handoff import Handle, Handles
from ckptfs._daemon.passthrough import Passthrough
from ckptfs._daemon.tree import MOUNT_ROOT
from ckptfs._daemon.vfs import Overshoot, Vfs

log = logging.getLogger(__name__)

_FORGET, _GETATTR, _OPEN, _READ, _RELEASE = 2, 3, 14, 15, 18
_REMOVEXATTR, _FLUSH, _OPENDIR, _RELEASEDIR = 24, 25, 27, 29
_INTERRUPT, _BATCH_FORGET, _READDIRPLUS = 36, 42, 44
_ASKED_AGAIN = 1 << 63
"""FUSE_UNIQUE_RESEND: in the number of a request that the kernel sends again."""
_ASKED_AGAIN_WITHIN_S = 5.0
"""Such requests come before all others."""
_READ_IN = struct.Struct("<QQI")  # struct fuse_read_in: fh, offset, size, ... (also of listings)
_ATTR_OUT = struct.Struct("<QI4x6Q10I")  # struct fuse_attr_out: validity (s, ns), struct fuse_attr
_READ_REQUEST = struct.Struct("<4xIQ24xQQI12xI")
"""With its header: opcode, unique; fh, offset, size, flags of the open file."""
_RELEASE_IN = struct.Struct("<Q")  # struct fuse_release_in: fh, ...
_OPEN_OUT = struct.Struct("<QIi")  # struct fuse_open_out: fh, open_flags, backing_id
_KEEP_CACHE, _CACHE_DIR, _PASSTHROUGH = 1 << 1, 1 << 3, 1 << 7  # FOPEN_*

_REQUEST_BYTES_MAX = session.MAX_WRITE + 4096
"""The kernel refuses a buffer that could not take the largest request and its header."""
_LISTING_BYTES_MAX = 128 << 10
"""A socket's buffer has 208 KiB (net.core.wmem_default), for one message and what the kernel adds.
Attributes have 64 KiB at most."""
_BATCH = 16
"""Requests that are handled before other tasks get their turn."""
_TRIES = 8
"""How often the next request is looked for after a small read that hit, 3 µs each: a program that
reads on asks again at once, and to be woken up by the event loop would cost more than the answer.
Not after a miss or a request for libfuse: that is for other tasks."""
_SMALL_BYTES = 128 << 10
"""Who gets more takes longer than all tries for copying it."""


class Relay:
    """Serves the session `fuse_fd`.

    Args:
        fuse_fd: An initialised session, not blocking.
        libfuse: Our end of the socket pair whose other end libfuse serves, not blocking.
        vfs: Answers reads.
        passthrough: Knows which files the kernel reads itself.
        handles: Where the next daemon finds which handles are open.
        errno_of: What an exception of `vfs` is for a program.
    """

    def __init__(
        self,
        fuse_fd: int,
        libfuse: socket.socket,
        vfs: Vfs,
        passthrough: Passthrough,
        handles: Handles,
        errno_of: Callable[[Exception], int],
    ) -> None:
        self._fd = fuse_fd
        self._libfuse = libfuse
        self._vfs = vfs
        self._passthrough = passthrough
        self._handles = handles
        self._errno_of = errno_of
        self._opening: dict[int, tuple[int, int]] = {}  # request -> opcode, inode
        self._removing: set[int] = set()  # requests that may have been carried out already
        self._doubtful: dict[int, Handle] = {}  # request -> what a daemon before had opened for it
        self._reply = bytearray(_LISTING_BYTES_MAX + 4096)

    async def run(self) -> None:
        """Serve until the mount is gone."""
        with self._libfuse:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._replies)
                if self._doubtful:
                    nursery.start_soon(self._forget_doubtful)
                await self._requests(nursery)
                nursery.cancel_scope.cancel()

    # -- after another daemon

    def take_over(self) -> None:
        """Before `run`: go on with what an earlier daemon has served. The files that the kernel
        reads come first: nobody may have touched the cache's files of these before."""
        known = list(self._handles.open_handles())
        for handle in known:
            if not handle.is_directory:
                self._passthrough.restore(handle.inode, handle.backing_id, handle.digest)
        for handle in known:
            self._vfs.restore(handle)
            if handle.request:
                self._doubtful[handle.request] = handle
        header = session.OUT_HEADER
        self._write([header.pack(header.size, session.NOTIFY_RESEND_CODE, 0)])

    async def _forget_doubtful(self) -> None:
        await trio.sleep(_ASKED_AGAIN_WITHIN_S)
        for handle in self._doubtful.values():
            if handle.pid and not _exists(handle.pid):
                self._release(handle.inode, handle.number)
            else:
                self._handles.replied(handle.number)  # that was all which was missing
        self._doubtful.clear()

    def _before_again(self, opcode: int, unique: int) -> None:
        if opcode in (_OPEN, _OPENDIR):
            if handle := self._doubtful.pop(unique & ~_ASKED_AGAIN, None):
                self._release(handle.inode, handle.number)
        elif opcode == _REMOVEXATTR:
            self._removing.add(unique)

    # -- from the kernel

    async def _requests(self, nursery: trio.Nursery) -> None:
        buffer = bytearray(_REQUEST_BYTES_MAX)
        view = memoryview(buffer)
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            tries = 1
            for _ in range(_BATCH):
                length = self._receive(buffer, tries)
                if length is None:
                    break
                if not length:
                    return
                opcode, unique, handle, offset, size, flags = _READ_REQUEST.unpack_from(buffer)
                if opcode == _READ:
                    place = handle, offset, size
                    hit = self._read(unique, *place, bool(flags & os.O_DIRECT), nursery)
                    tries = _TRIES if hit and size <= _SMALL_BYTES else 1
                else:
                    tries = 1  # libfuse has its turn first
                    await self._request(view[:length])

    def _receive(self, buffer: bytearray, tries: int) -> int | None:
        """Read a request; returns its length. None: there is none; 0: the session has ended."""
        while tries:
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                tries -= 1
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # it was aborted meanwhile
                    continue
                if error.errno != errno.ENODEV:
                    log.error("the session has ended: %s", error)
                return 0
        return None

    async def _request(self, message: memoryview) -> None:
        _, opcode, unique, inode, *_ = session.IN_HEADER.unpack_from(message)
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return  # numbers are not counted, and reads end within their deadline
        if opcode == _FLUSH:
            self._fail(unique, errno.ENOSYS)  # nothing to write; the kernel does not ask again
            return
        if opcode == _GETATTR and inode == MOUNT_ROOT:
            self._answer(unique, [self._attributes_of_root()])
            return
        if opcode in (_RELEASE, _RELEASEDIR):
            self._release(inode, *_RELEASE_IN.unpack_from(message, session.IN_HEADER.size))
            self._answer(unique, [])
            return
        if unique & _ASKED_AGAIN:
            self._before_again(opcode, unique)
        if opcode in (_OPEN, _OPENDIR):
            self._opening[unique] = opcode, inode
        elif opcode == _READDIRPLUS:
            place = message, session.IN_HEADER.size
            handle, offset, size = _READ_IN.unpack_from(*place)
            _READ_IN.pack_into(*place, handle, offset, min(size, _LISTING_BYTES_MAX))
        while True:
            try:
                self._libfuse.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._libfuse)

    def _release(self, inode: int, handle: int) -> None:
        if self._vfs.release(handle):
            # Last: a daemon that dies in between leaves a backing id that nobody needs, not a
            # handle without one.
            self._passthrough.released(inode)

    def _read(
        self,
        unique: int,
        handle: int,
        offset: int,
        length: int,
        is_direct: bool,
        nursery: trio.Nursery,
    ) -> bool:
        """Answer at once, or start a task for it: False."""
        began_ns = time.perf_counter_ns()
        try:
            views = self._vfs.read_now(handle, offset, length, is_exact=is_direct)
        except Overshoot:
            self._fail(unique, errno.EAGAIN)
            return True
        except Exception as error:
            self._fail(unique, self._errno_of(error))
            self._vfs.note_read(handle, offset, 0, began_ns, error)
            return True
        if views is None:
            nursery.start_soon(self._read_later, unique, handle, offset, length, began_ns)
            return False
        self._vfs.note_read(handle, offset, self._answer(unique, views), began_ns)
        return True

    def _attributes_of_root(self) -> memoryview:
        """They are valid for this once: attachments come and go, and a mount whose daemon is dead
        has to look so."""
        found = self._vfs.getattr(MOUNT_ROOT)
        at_s, at_ns = divmod(found.mtime_ns, 10**9)
        times = at_s, at_s, at_s, at_ns, at_ns, at_ns
        owned = stat.S_IFDIR | found.mode, found.nlink, found.uid, found.gid
        return memoryview(_ATTR_OUT.pack(0, 0, MOUNT_ROOT, 0, 0, *times, *owned, 0, 1 << 20, 0))

    async def _read_later(
        self, unique: int, handle: int, offset: int, length: int, began_ns: int
    ) -> None:
        try:
            views = await self._vfs.read(handle, offset, length)
        except Exception as error:
            self._fail(unique, self._errno_of(error))
            self._vfs.note_read(handle, offset, 0, began_ns, error)
        else:
            length = self._answer(unique, views)
            self._vfs.note_read(handle, offset, length, began_ns, waited=True)

    # -- from libfuse

    async def _replies(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._libfuse)
            self.deliver()

    def deliver(self) -> None:
        """Pass on all replies that libfuse has written."""
        reply = memoryview(self._reply)
        while True:
            try:
                length = self._libfuse.recv_into(reply)
            except BlockingIOError:
                return
            if not length:
                return
            _, error, unique = session.OUT_HEADER.unpack_from(reply)
            opening = self._opening.pop(unique, None)
            if opening is not None and not error:
                self._reply_to_open(unique, *opening, reply[:length])
            elif unique in self._removing:
                self._removing.remove(unique)
                if error == -errno.ENODATA:
                    self._answer(unique, [])
                else:
                    self._write([reply[:length]])
            else:
                self._write([reply[:length]])

    def _reply_to_open(self, unique: int, opcode: int, inode: int, reply: memoryview) -> None:
        """Pass it on with what libfuse does not know."""
        place = self._reply, session.OUT_HEADER.size
        handle, flags, _ = _OPEN_OUT.unpack_from(*place)
        backing_id, digest = 0, ""
        if opcode == _OPENDIR:
            if self._vfs.is_listing_lasting(inode):
                _OPEN_OUT.pack_into(*place, handle, flags | _CACHE_DIR | _KEEP_CACHE, 0)
        else:
            backing_id, digest = self._passthrough.opened(inode)
            if backing_id:
                _OPEN_OUT.pack_into(*place, handle, _PASSTHROUGH, backing_id)
                self._vfs.note_kernel_open(handle)
        self._handles.replying(handle, unique & ~_ASKED_AGAIN, backing_id, digest)
        if self._write([reply]):
            self._handles.replied(handle)
        else:  # whoever asked is gone
            self._release(inode, handle)

    # -- to the kernel

    def _answer(self, unique: int, views: Views) -> int:
        """Returns how many bytes these are."""
        length = sum(map(len, views))
        header = session.OUT_HEADER
        self._write([header.pack(header.size + length, 0, unique), *views])
        return length

    def _fail(self, unique: int, code: int) -> None:
        self._write([session.OUT_HEADER.pack(session.OUT_HEADER.size, -code, unique)])

    def _write(self, parts: "list[bytes | memoryview]") -> bool:
        """Whether the kernel has taken it."""
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("cannot answer a request: %s", error)
            return False
        return True

    def forget_name(self, parent: int, name: bytes) -> None:
        """Blocking: not in the event loop, because the kernel may wait for an answer of ours first.
        Let the kernel forget the entry `name` of a directory."""
        body = session.NOTIFY_INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
        length = session.OUT_HEADER.size + len(body)
        header = session.OUT_HEADER.pack(length, session.NOTIFY_INVAL_ENTRY_CODE, 0)
        self._write([header, body])


def _exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
