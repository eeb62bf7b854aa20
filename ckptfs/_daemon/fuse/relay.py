"""The relay between the kernel and libfuse: it answers reads, and libfuse nearly everything else.

The relay owns /dev/fuse. libfuse (pyfuse3) serves one end of a SEQPACKET socket pair, with one
message per request as on the device. The relay passes every request on that is not a read. The
reasons:

- A read that hits is one readv(2) and one writev(2). It needs no task of its own, no copy into a
  message, and no call into libfuse.
- The same holds for the attributes of the mount's root. The kernel asks for them with every path
  that leads through it.
- The relay completes replies of libfuse with facts that libfuse does not know. An open gets its
  backing id (`passthrough`). The kernel may cache the listing of a directory that never changes.
- The relay reads /dev/fuse without blocking. libfuse would block in read(2) if a request were
  aborted after the poll.

All of it runs in the event loop, in one thread, except the copying of long replies where the node
has cores for that (`reply_threads`). So a reply of libfuse must never wait for room in
the socket, because no other thread would make room. Therefore `deliver` empties the socket before
each reply (`fuse.Operations` calls it). Only listings could be larger than a socket's buffer, so
the relay asks for shorter ones, and the kernel asks for the rest.

**After another daemon.** The relay writes down (`Handles`) the handles that the kernel has. When a
daemon dies, the kernel keeps its requests, and `take_over` makes it repeat them
(FUSE_NOTIFY_RESEND, Linux >= 6.9) with the same numbers and one more bit. A request that the dead
daemon had carried out without an answer then comes a second time:

- An open has left a handle that the kernel does not know. The relay closes it before the new open.
- A release finds nothing to close, and a removal finds no attribute. Neither is an error.
- Everything else can be done twice.

A process that was killed meanwhile does not repeat its open. The relay closes the handle of that
open after `_RESENT_WITHIN_S`.

The kernel bounds the number of waiting reads: `session` sets how many it sends ahead of the
programs, and each further one is a sleeping thread. If the kernel rejects a reply with ENOENT, the
request was aborted, which is no error.
"""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import trio

from ckptfs._daemon.attachment.inodes import MOUNT_ROOT
from ckptfs._daemon.cache.page_copies import Found, Views
from ckptfs._daemon.fs.vfs import Overshoot, Vfs
from ckptfs._daemon.fuse import replies
from ckptfs._daemon.fuse.passthrough import Passthrough
from ckptfs._daemon.fuse.reply_threads import Parts, ReplyThreads, write_message
from ckptfs._mount import fuse_abi, session
from ckptfs._mount.fuse_abi import IN_HEADER, OPEN_OUT, OUT_HEADER, READ, READ_REQUEST
from ckptfs._mount.handoff import Handles, Slot

log = logging.getLogger(__name__)

_RESENT_WITHIN_S = 5.0
"""Repeated requests come before all others."""
_REQUEST_BYTES_MAX = session.MAX_WRITE + 4096
"""The kernel refuses a buffer that could not take the largest request and its header."""
_LISTING_BYTES_MAX = 128 << 10
"""A socket's buffer has 208 KiB (net.core.wmem_default), for one message and the kernel's overhead.
Attributes have 64 KiB at most."""
_BATCH = 16
"""Requests that the relay handles before other tasks get their turn."""
_TRIES = 8
"""How often the relay looks for the next request after a small read that hit, 3 µs each. A program
that reads on asks again at once, and a wakeup by the event loop would cost more than the answer.
After a miss or a request for libfuse the relay looks once, because other tasks have work then."""
_SMALL_BYTES = 128 << 10
"""Copying a longer reply takes longer than all `_TRIES`, and than waking up a thread for it."""


class _Read(NamedTuple):
    """A read that could not be answered at once."""

    unique: int
    thread: int
    handle: int
    offset: int
    length: int
    began_ns: int


class Relay:
    """Serves one session.

    `fuse_fd` is an initialised session, and `libfuse` the end of a socket pair whose other end
    libfuse serves. Neither blocks. `errno_of` returns the errno for an exception of `vfs`.
    `reply_threads` write to the same session, and end with it.
    """

    def __init__(
        self,
        fuse_fd: int,
        libfuse: socket.socket,
        vfs: Vfs,
        passthrough: Passthrough,
        handles: Handles,
        errno_of: Callable[[Exception], int],
        reply_threads: ReplyThreads,
    ) -> None:
        self._fd = fuse_fd
        self._libfuse = libfuse
        self._vfs = vfs
        self._passthrough = passthrough
        self._handles = handles
        self._errno_of = errno_of
        self.reply_threads = reply_threads
        self._opening: dict[int, tuple[int, int]] = {}  # opcode and inode, by request
        self._removing: set[int] = set()  # repeated requests that may have been carried out already
        self._doubtful: dict[int, tuple[int, Slot]] = {}  # of an earlier daemon, by request
        self._reply = bytearray(_LISTING_BYTES_MAX + 4096)
        self._has_ended = False

    async def run(self) -> None:
        """Serve until the mount is gone."""
        with self._libfuse, contextlib.closing(self.reply_threads):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._replies)
                if self._doubtful:
                    nursery.start_soon(self._forget_doubtful)
                try:
                    await self._requests(nursery)
                finally:
                    self._has_ended = True
                nursery.cancel_scope.cancel()

    # -- after another daemon

    def take_over(self) -> None:
        """Take over the handles of an earlier daemon, before `run`.

        The files that the kernel reads by itself come first, before any other use of their files in
        the cache.
        """
        known = list(self._handles.open_handles())
        for _, slot in known:
            if not slot.is_directory:
                self._passthrough.restore(slot.inode, slot.backing_id, slot.digest.hex())
        for handle, slot in known:
            self._vfs.restore(handle, slot)
            if slot.request:
                self._doubtful[slot.request] = handle, slot
        self._write([OUT_HEADER.pack(OUT_HEADER.size, fuse_abi.NOTIFY_RESEND, 0)])

    async def _forget_doubtful(self) -> None:
        await trio.sleep(_RESENT_WITHIN_S)
        for handle, slot in self._doubtful.values():
            if slot.pid and not _exists(slot.pid):
                self._release(slot.inode, handle)
            else:
                self._handles.replied(handle)  # the kernel has the reply
        self._doubtful.clear()

    def _before_resent(self, opcode: int, unique: int) -> None:
        if opcode in (fuse_abi.OPEN, fuse_abi.OPENDIR):
            if opened := self._doubtful.pop(unique & ~fuse_abi.UNIQUE_RESEND, None):
                handle, slot = opened
                self._release(slot.inode, handle)
        elif opcode == fuse_abi.REMOVEXATTR:
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
                opcode, unique, thread, handle, offset, size, flags = READ_REQUEST.unpack_from(
                    buffer
                )
                if opcode == READ:
                    is_direct = bool(flags & os.O_DIRECT)
                    hit = self._read(unique, thread, handle, offset, size, is_direct, nursery)
                    tries = _TRIES if hit and size <= _SMALL_BYTES else 1
                else:
                    tries = 1  # libfuse has its turn first
                    await self._request(view[:length])

    def _receive(self, buffer: bytearray, tries: int) -> int | None:
        """Read a request, and return its length. None: no request has come. 0: the session has
        ended."""
        while tries:
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                tries -= 1
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # the request was aborted
                    continue
                if error.errno != errno.ENODEV:
                    log.error("the FUSE session has ended: %s", error)
                return 0
        return None

    async def _request(self, message: memoryview) -> None:
        """Answer a request that is not a read, or pass it on to libfuse."""
        _, opcode, unique, inode, *_ = IN_HEADER.unpack_from(message)
        if opcode in (fuse_abi.FORGET, fuse_abi.BATCH_FORGET, fuse_abi.INTERRUPT):
            return  # the daemon does not count lookups, and reads end within their deadline
        if opcode == fuse_abi.FLUSH:
            self._fail(unique, errno.ENOSYS)  # nothing to write; the kernel does not ask again
        elif opcode == fuse_abi.GETATTR and inode == MOUNT_ROOT:
            # Attachments come and go, and the mount of a dead daemon has to look dead.
            self._reply_with(unique, lambda: replies.attributes_once(self._vfs.getattr(inode)))
        elif opcode == fuse_abi.STATFS:
            self._reply_with(unique, lambda: replies.space(*self._vfs.statfs(inode)))
        elif opcode in (fuse_abi.RELEASE, fuse_abi.RELEASEDIR):
            (handle,) = fuse_abi.RELEASE_IN.unpack_from(message, IN_HEADER.size)
            self._release(inode, handle)
            self._answer(unique, [])
        else:
            if unique & fuse_abi.UNIQUE_RESEND:
                self._before_resent(opcode, unique)
            if opcode in (fuse_abi.OPEN, fuse_abi.OPENDIR):
                self._opening[unique] = opcode, inode
            elif opcode == fuse_abi.READDIRPLUS:
                handle, offset, size = fuse_abi.READ_IN.unpack_from(message, IN_HEADER.size)
                size = min(size, _LISTING_BYTES_MAX)
                fuse_abi.READ_IN.pack_into(message, IN_HEADER.size, handle, offset, size)
            await self._pass_on(message)

    def _reply_with(self, unique: int, made: Callable[[], bytes]) -> None:
        try:
            reply = made()
        except Exception as error:
            self._fail(unique, self._errno_of(error))
            return
        self._answer(unique, [memoryview(reply)])

    async def _pass_on(self, message: memoryview) -> None:
        while True:
            try:
                self._libfuse.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._libfuse)

    def _release(self, inode: int, handle: int) -> None:
        self.reply_threads.take_back()
        if self._vfs.release(handle):
            # Last, because a daemon that dies in between must not leave a handle without its
            # backing id. A backing id without a handle does no harm.
            self._passthrough.released(inode)

    def _read(
        self,
        unique: int,
        thread: int,
        handle: int,
        offset: int,
        length: int,
        is_direct: bool,
        nursery: trio.Nursery,
    ) -> bool:
        """Answer the read at once, or start a task for it and return False.

        The arguments stay single, because a tuple for them would cost each hit a tenth of its time.
        """
        began_ns = time.perf_counter_ns()
        goes_to_thread = length > _SMALL_BYTES and self._has_thread()
        try:
            found = self._vfs.read_now(
                handle, offset, length, is_exact=is_direct, may_copy_later=goes_to_thread
            )
        except Overshoot:
            self._fail(unique, errno.EAGAIN)
            return True
        except Exception as error:
            self._fail_read(_Read(unique, thread, handle, offset, length, began_ns), error)
            return True
        if found is not None and not goes_to_thread:
            self._vfs.note_read(handle, offset, self._answer(unique, found.views), began_ns)
            return True
        read = _Read(unique, thread, handle, offset, length, began_ns)
        if found is None:
            nursery.start_soon(self._read_later, read)
            return False
        count = self._send(unique, found, partial(self._read_again, read, nursery))
        self._vfs.note_read(handle, offset, count, began_ns)
        return True

    def _has_thread(self) -> bool:
        """Whether a thread has time for a reply. May close objects, so bytes are found after it."""
        self.reply_threads.take_back()
        return self.reply_threads.has_time

    def _read_again(self, read: _Read, nursery: trio.Nursery) -> None:
        """Begin a read again that is counted already, because its bytes went meanwhile."""
        if not self._has_ended:
            nursery.start_soon(partial(self._read_later, read, is_counted=True))

    async def _read_later(self, read: _Read, *, is_counted: bool = False) -> None:
        try:
            views = await self._vfs.read(read.handle, read.offset, read.length)
        except Exception as error:
            self._fail_read(read, error)
            return
        if read.length > _SMALL_BYTES and self.reply_threads.has_time:
            length = self._send(read.unique, Found(views), _nothing)
        else:
            length = self._answer(read.unique, views)
        if not is_counted:
            self._vfs.note_read(read.handle, read.offset, length, read.began_ns, waited=True)

    def _fail_read(self, read: _Read, error: Exception) -> None:
        """Note the error, then answer. The answer may end the reading process by SIGBUS."""
        code = self._errno_of(error)
        self._vfs.note_read(read.handle, read.offset, 0, read.began_ns, error, thread=read.thread)
        self._fail(read.unique, code)

    # -- from libfuse

    async def _replies(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._libfuse)
            self.deliver()

    def deliver(self) -> None:
        """Pass on all replies that libfuse has written."""
        buffer = memoryview(self._reply)
        while True:
            try:
                length = self._libfuse.recv_into(buffer)
            except BlockingIOError:
                return
            if not length:
                return
            _, error, unique = OUT_HEADER.unpack_from(buffer)
            opening = self._opening.pop(unique, None)
            was_removing = unique in self._removing
            self._removing.discard(unique)
            if opening is not None and not error:
                self._reply_to_open(unique, *opening, buffer[:length])
            elif was_removing and error == -errno.ENODATA:
                self._answer(unique, [])
            else:
                self._write([buffer[:length]])

    def _reply_to_open(self, unique: int, opcode: int, inode: int, reply: memoryview) -> None:
        """Pass on libfuse's reply to an open, with the flags and the backing id."""
        handle, flags, _ = OPEN_OUT.unpack_from(reply, OUT_HEADER.size)
        backing_id, digest = 0, ""
        if opcode == fuse_abi.OPENDIR:
            if self._vfs.is_listing_lasting(inode):
                flags |= fuse_abi.FOPEN_CACHE_DIR | fuse_abi.FOPEN_KEEP_CACHE
                OPEN_OUT.pack_into(reply, OUT_HEADER.size, handle, flags, 0)
        else:
            backing_id, digest = self._passthrough.opened(inode)
            if backing_id:
                flags = fuse_abi.FOPEN_PASSTHROUGH
                OPEN_OUT.pack_into(reply, OUT_HEADER.size, handle, flags, backing_id)
                self._vfs.note_kernel_open(handle)
        self._handles.replying(handle, unique & ~fuse_abi.UNIQUE_RESEND, backing_id, digest)
        if self._write([reply]):
            self._handles.replied(handle)
        else:  # the opening process is gone
            self._release(inode, handle)

    # -- to the kernel

    def _answer(self, unique: int, views: Views) -> int:
        """Write a reply with these bytes, and return their number."""
        length = sum(map(len, views))
        self._write([OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique), *views])
        return length

    def _send(self, unique: int, found: Found, read_again: Callable[[], None]) -> int:
        """Have a thread reply with the bytes, and return their number."""
        length = sum(map(len, found.views))
        header = OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique)
        self.reply_threads.send(header, found, read_again)
        return length

    def _fail(self, unique: int, code: int) -> None:
        self._write([OUT_HEADER.pack(OUT_HEADER.size, -code, unique)])

    def _write(self, parts: Parts) -> bool:
        """Write a message. Returns whether the kernel has taken it."""
        return write_message(self._fd, parts)

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel forget the entry `name` of a directory.

        Blocking. It must not run in the event loop, because the kernel may wait for an answer of
        the event loop first.
        """
        body = fuse_abi.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 0) + name + b"\0"
        length = OUT_HEADER.size + len(body)
        self._write([OUT_HEADER.pack(length, fuse_abi.NOTIFY_INVAL_ENTRY, 0), body])


def _nothing() -> None:
    """For replies without copies, which cannot fail."""


def _exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
