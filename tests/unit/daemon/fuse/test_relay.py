"""The relay between the kernel (a socket here, with whole messages as on /dev/fuse) and libfuse."""

import errno
import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.fakes import MIB, FakeStore, pattern
from support.rig import View, view_in

from ckptfs._daemon.attachment.inodes import MOUNT_ROOT
from ckptfs._daemon.cache.page_copies import PageCopy
from ckptfs._daemon.fuse import passthrough, reply_threads
from ckptfs._daemon.fuse.operations import errno_of
from ckptfs._daemon.fuse.passthrough import Passthrough
from ckptfs._daemon.fuse.relay import Relay
from ckptfs._daemon.fuse.reply_threads import ReplyThreads, threads_for
from ckptfs.errors import AccessDenied

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, OPENDIR = 1, 2, 3, 14, 15, 18, 25, 27
STATFS, REMOVEXATTR, INTERRUPT, BATCH_FORGET, READDIRPLUS = 17, 24, 36, 42, 44
KEEP_CACHE, CACHE_DIR, PASSTHROUGH = 2, 8, 128
SIZE = 2 * MIB + 77
CONTENT = pattern(SIZE)


def request(opcode: int, unique: int, inode: int = 1, body: bytes = b"") -> bytes:
    """A message of the kernel: fuse_in_header and its body (linux/fuse.h)."""
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, inode, *[0] * 5) + body


def read_request(unique: int, handle: int, offset: int, length: int) -> bytes:
    return request(READ, unique, handle, struct.pack("<QQIIQII", handle, offset, length, *[0] * 4))


def reply(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    """A message of libfuse: fuse_out_header and its body."""
    return struct.pack("<IiQ", 16 + len(body), -error, unique) + body


def open_out(handle: int, flags: int = 0, backing_id: int = 0) -> bytes:
    return struct.pack("<QIi", handle, flags, backing_id)


class Ends:
    """The kernel's end and libfuse's end of a relay."""

    def __init__(self, view: View, reply_threads: int = 0) -> None:
        self.view = view
        self.kernel_handles: list[int] = []
        self._kernel, self._session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._libfuse, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._session, ours):
            end.setblocking(False)
        for end in (self._kernel, self._libfuse):
            end.settimeout(0)
        self.passthrough = Passthrough(self._session.fileno(), view.vfs, view.rig.cache, on=True)
        handles = view.handoff.handles
        fd = self._session.fileno()
        self.threads = ReplyThreads(fd, reply_threads, view.rig.cache.reads)
        self.relay = Relay(fd, ours, view.vfs, self.passthrough, handles, errno_of, self.threads)

    def ask(self, message: bytes) -> None:
        """Send a message as the kernel."""
        self._kernel.send(message)

    def say(self, message: bytes) -> None:
        """Send a message as libfuse."""
        self._libfuse.send(message)

    async def answer(self) -> bytes:
        """The next message to the kernel."""
        return await self._next(self._kernel)

    async def asked(self) -> bytes:
        """The next message to libfuse."""
        return await self._next(self._libfuse)

    async def _next(self, end: socket.socket) -> bytes:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(end)
            return end.recv(4 * MIB)

    async def nothing(self) -> bool:
        """Whether neither end gets a message."""
        await trio.testing.wait_all_tasks_blocked(0.05)
        return not any(_has_message(end) for end in (self._kernel, self._libfuse))

    def close(self) -> None:
        for end in (self._kernel, self._session, self._libfuse):
            end.close()


def _has_message(end: socket.socket) -> bool:
    try:
        end.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def relay_in(
    directory: Path, store: FakeStore, reply_threads: int = 0, **settings: Any
) -> AsyncIterator[Ends]:
    async with view_in(directory, **settings) as view, trio.open_nursery() as nursery:
        view.attach(store)
        ends = Ends(view, reply_threads)
        nursery.start_soon(ends.relay.run)
        yield ends
        nursery.cancel_scope.cancel()
    ends.close()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore({"a.bin": CONTENT, "below/b.bin": b"b"})


@pytest.fixture
async def ends(tmp_path: Path, store: FakeStore) -> AsyncIterator[Ends]:
    async with relay_in(tmp_path, store) as ends:
        yield ends


def _open(ends: Ends, path: str = "a.bin") -> int:
    return ends.view.vfs.open(ends.view.stat(ends.view.attachments[0], path).inode)


async def test_relay_answers_reads_without_libfuse(ends: Ends) -> None:
    handle = _open(ends)
    k = 100 << 10
    places = [(0, 4096), (MIB - 5, 10), (MIB - 5, k), (2 * MIB, k), (SIZE, 1), (SIZE + MIB, k)]
    for _ in ("fetched", "from memory"):
        for unique, (offset, length) in enumerate(places, 1):
            ends.ask(read_request(unique, handle, offset, length))
            assert await ends.answer() == reply(unique, CONTENT[offset : offset + length])
    assert await ends.nothing()


async def test_relay_waiting_read_does_not_delay_other_reads(ends: Ends, store: FakeStore) -> None:
    handle = _open(ends)
    ends.ask(read_request(1, handle, 0, 10))
    assert await ends.answer() == reply(1, CONTENT[:10])
    ends.ask(read_request(2, handle, 2 * MIB, 10))
    ends.ask(read_request(3, handle, 5, 10))
    answers = {await ends.answer(), await ends.answer()}
    assert answers == {reply(2, CONTENT[2 * MIB : 2 * MIB + 10]), reply(3, CONTENT[5:15])}


async def test_relay_answers_attributes_of_the_root_without_libfuse(ends: Ends) -> None:
    ends.ask(request(GETATTR, 9, MOUNT_ROOT, b"\0" * 16))
    answer = await ends.answer()
    assert answer[:16] == struct.pack("<IiQ", 16 + 104, 0, 9)
    valid_s, valid_ns, inode = struct.unpack_from("<QI4xQ", answer, 16)
    assert (valid_s, valid_ns, inode) == (0, 0, MOUNT_ROOT)
    assert await ends.nothing()
    other = request(GETATTR, 10, ends.view.attachments[0].snapshot.tree.root.inode, b"\0" * 16)
    ends.ask(other)
    assert await ends.asked() == other


async def test_relay_answers_the_space_of_an_attachment(ends: Ends) -> None:
    [attachment] = ends.view.attachments
    inode = attachment.snapshot.tree.root.inode
    ends.ask(request(STATFS, 11, inode))
    answer = await ends.answer()
    assert answer[:16] == struct.pack("<IiQ", 16 + 80, 0, 11)
    space = struct.unpack_from("<5Q3I", answer, 16)
    assert space == (-(-SIZE // 4096), 0, 0, len(attachment.manifest.files), 0, 4096, 255, 4096)
    assert await ends.nothing()
    ends.view.vfs.remove(attachment)
    ends.ask(request(STATFS, 12, inode))
    assert await ends.answer() == reply(12, error=errno.ESTALE)


async def test_relay_answers_failed_reads_with_errnos(ends: Ends, store: FakeStore) -> None:
    ends.ask(read_request(1, 12345 << 32, 0, 10))
    assert await ends.answer() == reply(1, error=errno.ESTALE)
    store.fail_always("confirm", AccessDenied("expired"))
    ends.ask(read_request(2, _open(ends), 0, 10))
    assert await ends.answer() == reply(2, error=errno.EACCES)


async def test_relay_passes_other_requests_and_replies_on(ends: Ends) -> None:
    message = request(LOOKUP, 7, 1, b"name\0")
    ends.ask(message)
    assert await ends.asked() == message
    ends.say(reply(7, b"entry" * 20))
    assert await ends.answer() == reply(7, b"entry" * 20)


async def test_relay_answers_forget_and_flush_without_libfuse(ends: Ends) -> None:
    for opcode in (FORGET, BATCH_FORGET, INTERRUPT):
        ends.ask(request(opcode, 3, body=b"\0" * 16))
    assert await ends.nothing()
    ends.ask(request(FLUSH, 4, body=b"\0" * 24))
    assert await ends.answer() == reply(4, error=errno.ENOSYS)


async def test_relay_requests_listings_that_fit_a_socket(ends: Ends) -> None:
    body = struct.pack("<QQIIQII", 5, 9, 4 * MIB, *[0] * 4)
    ends.ask(request(READDIRPLUS, 8, 1, body))
    asked = await ends.asked()
    assert struct.unpack_from("<QQI", asked, 40) == (5, 9, 128 << 10)
    ends.say(reply(8, b"x" * (128 << 10)))
    assert len(await ends.answer()) == 16 + (128 << 10)


async def test_relay_replies_never_fill_the_socket(ends: Ends) -> None:
    """libfuse replies in the same thread: its adapter delivers before each reply."""
    large = b"x" * (128 << 10)
    for unique in range(20):
        ends.relay.deliver()
        ends.say(reply(unique, large))
        assert await ends.answer() == reply(unique, large)


async def test_relay_lets_the_kernel_cache_constant_listings(ends: Ends) -> None:
    attachment = ends.view.attachments[0]
    below = ends.view.stat(attachment, "below").inode
    expected = {1: 0, ends.view.stat(attachment, "").inode: 0, below: CACHE_DIR | KEEP_CACHE}
    for unique, (inode, flags) in enumerate(expected.items(), 1):
        ends.ask(request(OPENDIR, unique, inode, b"\0" * 8))
        await ends.asked()
        ends.say(reply(unique, open_out(99)))
        assert await ends.answer() == reply(unique, open_out(99, flags))


# -- replies by threads

LONG = 150 << 10
"""A reply that a thread copies, and that fits the socket."""


class Gate:
    """Holds the threads that write long replies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = 0
        self._let_go = threading.Semaphore(0)
        self._write = reply_threads.write_message
        monkeypatch.setattr(reply_threads, "write_message", self._write_later)

    def _write_later(self, fuse_fd: int, parts: reply_threads.Parts) -> bool:
        self.held += 1
        assert self._let_go.acquire(timeout=20)
        return self._write(fuse_fd, parts)

    async def holds(self, count: int) -> None:
        """Wait until so many replies are held."""
        with trio.fail_after(20):
            while self.held < count:  # noqa: ASYNC110 - threads change it
                await trio.sleep(0.002)

    def let_go(self) -> None:
        """Let a thread write one reply. The socket has no room for two."""
        self._let_go.release()


async def test_relay_lends_the_buffer_of_a_long_reply_until_it_is_written(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with relay_in(tmp_path, store, 1, in_flight_bytes_max=MIB, window_bytes_max=0) as ends:
        handle = _open(ends)
        ends.ask(read_request(1, handle, 0, LONG))
        await gate.holds(1)
        for unique, offset in enumerate((MIB, 2 * MIB), 2):  # there is memory for one block
            ends.ask(read_request(unique, handle, offset, 10))
            assert await ends.answer() == reply(unique, CONTENT[offset : offset + 10])
        gate.let_go()
        assert await ends.answer() == reply(1, CONTENT[:LONG])
        ends.ask(read_request(4, handle, MIB, LONG))
        gate.let_go()
        assert await ends.answer() == reply(4, CONTENT[MIB : MIB + LONG])


async def test_relay_lends_what_it_has_read_from_the_page_cache(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _fill_cache(tmp_path, store)
    gate = Gate(monkeypatch)
    monkeypatch.setattr(reply_threads, "_WAITING_MAX", 4)
    async with relay_in(tmp_path, store, 1) as ends:
        handle = _open(ends)
        await _read_blocks(ends, handle)
        offsets = [0, MIB, MIB + LONG, 2 * MIB - LONG]
        for unique, offset in enumerate(offsets, 1):
            ends.ask(read_request(unique, handle, offset, LONG))
        await trio.testing.wait_all_tasks_blocked(0.05)
        ends.ask(read_request(9, handle, 0, LONG))  # the relay's own, because the thread is busy
        assert await ends.answer() == reply(9, CONTENT[:LONG])
        for unique, offset in enumerate(offsets, 1):
            gate.let_go()
            assert await ends.answer() == reply(unique, CONTENT[offset : offset + LONG])


async def test_relay_reads_again_what_a_thread_could_not_copy(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _fill_cache(tmp_path, store)
    async with relay_in(tmp_path, store, 1) as ends:
        handle = _open(ends)
        await _read_blocks(ends, handle)
        usage = ends.view.vfs._open[handle].usage
        before = usage.read_bytes
        run, here = PageCopy.run, threading.current_thread()
        monkeypatch.setattr(
            PageCopy, "run", lambda copy: threading.current_thread() is here and run(copy)
        )
        ends.ask(read_request(1, handle, MIB, LONG))
        assert await ends.answer() == reply(1, CONTENT[MIB : MIB + LONG])
        assert usage.read_bytes == before + LONG


async def _fill_cache(directory: Path, store: FakeStore) -> None:
    """Have all blocks on the disk, for the next daemon."""
    async with relay_in(directory, store) as ends:
        await _read_blocks(ends, _open(ends))
        await ends.view.rig.quiet()


async def _read_blocks(ends: Ends, handle: int) -> None:
    for offset in range(0, SIZE, MIB):
        ends.ask(read_request(1, handle, offset, 10))
        await ends.answer()


async def test_relay_writes_what_its_threads_have_before_it_ends(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with relay_in(tmp_path, store, 2) as ends:
        ends.ask(read_request(1, _open(ends), 0, LONG))
        await gate.holds(1)
        gate.let_go()
        ends.threads.close()
        assert await ends.answer() == reply(1, CONTENT[:LONG])
        names = {thread.name for thread in threading.enumerate()}
        assert "ckptfs-reply" not in names


def test_small_nodes_have_no_threads_for_replies() -> None:
    found = {cores: threads_for("auto", cores) for cores in (1, 2, 3, 4, 8, 16, 24, 200)}
    assert found == {1: 0, 2: 0, 3: 0, 4: 1, 8: 2, 16: 3, 24: 4, 200: 4}
    assert threads_for(7, 1) == 7


class Ioctl:
    """Replaces the kernel's registration of backing files."""

    def __init__(self) -> None:
        self.error = 0
        self.registered: dict[int, int] = {}
        self._serial = 0

    def __call__(self, _: int, code: int, argument: bytes, *__: object) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if code == 0x4010E501:
            self._serial += 1
            self.registered[self._serial] = struct.unpack_from("<i", argument)[0]
            return self._serial
        assert code == 0x4004E502
        del self.registered[struct.unpack("<I", argument)[0]]
        return 0


@pytest.fixture
def ioctl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ioctl]:
    ioctl = Ioctl()
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    yield ioctl
    assert not ioctl.registered


async def _kernel_opens(ends: Ends, unique: int) -> bytes:
    """Open a.bin as the kernel does. Returns the reply, with 0 for the handle."""
    inode = ends.view.stat(ends.view.attachments[0], "a.bin").inode
    ends.ask(request(OPEN, unique, inode, b"\0" * 8))
    await ends.asked()
    handle = _open(ends)
    ends.kernel_handles.append(handle)
    ends.say(reply(unique, open_out(handle, KEEP_CACHE)))
    answered = (await ends.answer())[16:]
    assert answered[:8] == struct.pack("<Q", handle)
    return open_out(0)[:8] + answered[8:]


async def _kernel_releases(ends: Ends) -> None:
    inode = ends.view.stat(ends.view.attachments[0], "a.bin").inode
    handle = ends.kernel_handles.pop()
    ends.ask(request(RELEASE, 90, inode, struct.pack("<QIIQ", handle, 0, 0, 0)))
    assert await ends.answer() == reply(90)


async def _cache_whole(ends: Ends) -> None:
    file = ends.view.attachments[0].file(0)
    await ends.view.rig.fetcher.fetch(file, range(3))


async def test_passthrough_of_a_complete_file_begins_at_its_next_first_open(
    ends: Ends, ioctl: Ioctl
) -> None:
    ordinary = open_out(0, KEEP_CACHE)
    assert await _kernel_opens(ends, 1) == ordinary
    await _cache_whole(ends)
    assert await _kernel_opens(ends, 2) == ordinary  # beside a handle that is ordinary
    await _kernel_releases(ends)
    assert await _kernel_opens(ends, 3) == ordinary
    await _kernel_releases(ends)
    await _kernel_releases(ends)
    assert not ioctl.registered
    assert await _kernel_opens(ends, 4) == open_out(0, PASSTHROUGH, 1)
    assert await _kernel_opens(ends, 5) == open_out(0, PASSTHROUGH, 1)
    [fd] = ioctl.registered.values()
    assert os.pread(fd, SIZE + 1, 0) == CONTENT
    await _kernel_releases(ends)
    assert ioctl.registered
    await _kernel_releases(ends)
    assert not ioctl.registered


async def test_passthrough_refused_by_the_kernel_falls_back_to_reads(
    ends: Ends, ioctl: Ioctl
) -> None:
    await _kernel_opens(ends, 1)
    await _cache_whole(ends)
    await _kernel_releases(ends)
    ioctl.error = errno.ENFILE
    assert await _kernel_opens(ends, 2) == open_out(0, KEEP_CACHE)
    assert not ends.view.attachments[0].file(0).entry.passthroughs
    await _kernel_releases(ends)


async def test_passthrough_after_a_failed_open_counts_no_open(ends: Ends, ioctl: Ioctl) -> None:
    inode = ends.view.stat(ends.view.attachments[0], "a.bin").inode
    ends.ask(request(OPEN, 1, inode, b"\0" * 8))
    await ends.asked()
    ends.say(reply(1, error=errno.EROFS))
    assert await ends.answer() == reply(1, error=errno.EROFS)
    await _kernel_opens(ends, 2)
    await _cache_whole(ends)
    await _kernel_releases(ends)
    assert await _kernel_opens(ends, 3) == open_out(0, PASSTHROUGH, 1)
    await _kernel_releases(ends)


# -- after another daemon


async def _next(ends: Ends) -> Ends:
    """The relay of the next daemon, on the same memory and with the same attachment."""
    old = ends.view
    view = View(old.rig, old.fds)
    attachment = old.attachments[0]
    old.vfs.remove(attachment)  # it is dead
    attachment.leases.open_handles = 0
    view.attachments.append(attachment)
    view.vfs.add(attachment)
    after = Ends(view)
    after.relay.take_over()
    return after


async def test_relay_after_a_restart_accepts_repeated_requests(ends: Ends) -> None:
    again = 1 << 63
    attachment = ends.view.attachments[0]
    inode = ends.view.stat(attachment, "a.bin").inode
    handles = ends.view.handoff.handles
    known, unheard, gone = _open(ends), _open(ends), _open(ends)
    handles.replying(known, 1)
    handles.replied(known)
    handles.replying(unheard, 2)  # killed before, or after, the kernel got the reply
    assert handles.free(gone)  # killed before it could answer to the release
    after = await _next(ends)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.relay.run)
        assert await after.answer() == struct.pack("<IiQ", 16, 7, 0)  # FUSE_NOTIFY_RESEND
        after.ask(read_request(5 | again, known, 3, 10))
        assert await after.answer() == reply(5 | again, CONTENT[3:13])
        assert after.view.attachments[0].leases.open_handles == 2
        after.ask(request(OPEN, 2 | again, inode, b"\0" * 8))
        await after.asked()
        opened = _open(after)
        after.say(reply(2 | again, open_out(opened)))
        assert await after.answer() == reply(2 | again, open_out(opened))
        assert after.view.attachments[0].leases.open_handles == 2
        kept = {handle for handle, _ in after.view.handoff.handles.open_handles()}
        assert kept == {known, opened}
        for handle in (gone, unheard):
            after.ask(request(RELEASE, 7 | again, inode, struct.pack("<QIIQ", handle, 0, 0, 0)))
            assert await after.answer() == reply(7 | again)
        assert after.view.attachments[0].leases.open_handles == 2
        for error, told in ((errno.ENODATA, 0), (errno.EROFS, errno.EROFS), (0, 0)):
            after.ask(request(REMOVEXATTR, 8 | again, inode, b"user.ckptfs.meta.a\0"))
            await after.asked()
            after.say(reply(8 | again, error=error))
            assert await after.answer() == reply(8 | again, error=told)
        after.ask(request(REMOVEXATTR, 9, inode, b"user.ckptfs.meta.a\0"))
        await after.asked()
        after.say(reply(9, error=errno.ENODATA))
        assert await after.answer() == reply(9, error=errno.ENODATA)
        nursery.cancel_scope.cancel()
    after.close()


async def test_relay_after_a_restart_closes_handles_of_killed_processes(
    tmp_path: Path, store: FakeStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with relay_in(tmp_path, store) as ends:
        inode = ends.view.stat(ends.view.attachments[0], "a.bin").inode
        handles = ends.view.handoff.handles
        with subprocess.Popen(["true"]) as dead:
            dead.wait()
        dead_ones, living = (
            ends.view.vfs.open(inode, dead.pid),
            ends.view.vfs.open(inode, os.getpid()),
        )
        for handle in (dead_ones, living):
            handles.replying(handle, 1 + handle % 2)
        after = await _next(ends)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(after.relay.run)
            assert after.view.attachments[0].leases.open_handles == 2
            await trio.sleep(6)
            [(kept, slot)] = after.view.handoff.handles.open_handles()
            assert (kept, slot.request) == (living, 0)
            assert after.view.attachments[0].leases.open_handles == 1
            nursery.cancel_scope.cancel()
        after.close()


async def test_passthrough_after_a_restart_keeps_the_kernels_files(
    ends: Ends, ioctl: Ioctl
) -> None:
    await _kernel_opens(ends, 1)
    await _cache_whole(ends)
    await _kernel_releases(ends)
    assert await _kernel_opens(ends, 2) == open_out(0, PASSTHROUGH, 1)
    [handle] = ends.kernel_handles
    ends.view.rig.cache.end_passthrough(ends.view.attachments[0].file(0).entry)  # it is dead
    after = await _next(ends)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.relay.run)
        await after.answer()
        file = after.view.attachments[0].file(0)
        assert file.entry.passthroughs == 1
        assert await _kernel_opens(after, 3) == open_out(0, PASSTHROUGH, 1)
        await _kernel_releases(after)
        assert file.entry.passthroughs == 1
        after.kernel_handles.append(handle)
        await _kernel_releases(after)
        assert not after.passthrough._open
        assert not ioctl.registered
        nursery.cancel_scope.cancel()
    after.close()


@pytest.mark.parametrize(
    ("wanted", "negotiated", "error", "text"),
    [
        (True, True, 0, "on"),
        (False, True, 0, "off: passthrough = false in the configuration"),
        (True, False, 0, "off: the kernel .* has no FUSE passthrough; Linux 6.9 has it"),
        (True, True, errno.EPERM, "off: not permitted; it needs CAP_SYS_ADMIN"),
        (True, True, errno.ELOOP, "off: the cache is on a stacked file system; .*cache_dir.*"),
        (True, True, errno.EOPNOTSUPP, "off: the cache's file system cannot: .*"),
    ],
)
def test_passthrough_why_not_names_the_reason(
    ioctl: Ioctl, wanted: bool, negotiated: bool, error: int, text: str
) -> None:
    ioctl.error = error
    assert re.fullmatch(text, passthrough.why_not(3, wanted, negotiated, 4))


async def test_relay_ends_with_the_session(tmp_path: Path, store: FakeStore) -> None:
    async with view_in(tmp_path) as view:
        view.attach(store)
        ends = Ends(view)
        ends._kernel.close()  # a socket says "end of file" where the device says ENODEV
        with trio.fail_after(10):
            await ends.relay.run()
        ends.close()
