"""The program of a worker; see the package's docstring.

The main thread reads the control socket and beats, and each channel has a thread. If the daemon
closes a channel, the main thread gives the channel's call up: our own clients then end their
request at once. The standard streams are /dev/null, because the last words of a library can contain
URLs and tokens.
"""

import contextlib
import functools
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import msgspec

from ckptfs._model.manifest import Listing
from ckptfs._model.request_id import request_id
from ckptfs._os.write_all import pwrite_all
from ckptfs._store.base import HasWholeAnswers, Pin, Store
from ckptfs._store.request_context import Progress, ends_in
from ckptfs._workers import messages
from ckptfs._workers.lifeline import end_before_others, end_with
from ckptfs.errors import StoreError

if TYPE_CHECKING:
    from ckptfs._store.resolve import OpenStore

_CLOSED = b""
_CLOSED_MAX = 1000
"""The closed directories that a worker remembers. A call can arrive after the close of its
directory, because the channels and the control socket have no common order, and because a detach
does not wait for reads that begin. So the last ones suffice."""


def main() -> None:
    """Serve until the daemon closes the control socket."""
    control_fd, parent_pid = map(int, sys.argv[1:])
    end_with(parent_pid)
    for number in (signal.SIGINT, signal.SIGHUP):  # from a terminal; the daemon decides
        signal.signal(number, signal.SIG_IGN)
    end_before_others()
    control = socket.socket(fileno=control_fd)
    text, fds = _received(control)
    if text != messages.encode(messages.PROTOCOL) or len(fds) != 2:
        sys.exit(messages.OTHER_PROTOCOL_STATUS)
    setup_fd, beat_fd = fds
    with open(setup_fd, "rb", buffering=0) as memory:
        setup = messages.decode_setup(memory.readall())
    serve(control, setup, mmap.mmap(beat_fd, 0))
    os._exit(0)  # threads of a library would keep the process alive


def serve(control: socket.socket, setup: messages.Setup, beat: mmap.mmap) -> None:
    """Serve the channels that arrive on `control`, and beat. The first beat says that it serves."""
    directories = Directories(setup)
    channels: dict[int, tuple[socket.socket, Progress]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        beat[:] = struct.pack("d", time.monotonic())
        ready = [fd for fd, _ in poll.poll(1000 * messages.BEAT_S)]
        for fd in channels.keys() & ready:
            poll.unregister(fd)
            sock, progress = channels.pop(fd)
            sock.close()
            progress.give_up()
        if control.fileno() not in ready:
            continue
        text, fds = _received(control)
        if text == _CLOSED:
            return
        if fds:
            sock, memory = socket.socket(fileno=fds[0]), Memory(fds[1])
            watched, progress = sock.dup(), _Telling(sock)
            channels[watched.fileno()] = watched, progress
            poll.register(watched, 0)  # its end
            threading.Thread(
                target=_serve_channel, args=(sock, memory, directories, progress), daemon=True
            ).start()
        else:
            call = messages.decode_call(text)
            threading.Thread(target=directories.close, args=(call.store,), daemon=True).start()


def _received(control: socket.socket) -> tuple[bytes, list[int]]:
    text, fds, _, _ = socket.recv_fds(control, messages.MESSAGE_BYTES_MAX, 2)
    for fd in fds:  # recv_fds of Python ignores its flags
        os.set_inheritable(fd, False)
    return text, fds


def _serve_channel(
    sock: socket.socket, memory: "Memory", directories: "Directories", progress: "_Telling"
) -> None:
    with sock, contextlib.closing(memory), contextlib.suppress(ConnectionError):
        while (text := sock.recv(messages.MESSAGE_BYTES_MAX)) != _CLOSED:
            call = messages.decode_call(text)
            request_id.set(call.request)
            progress.begin()
            answer = _outcome(call, progress, memory, directories)
            directories.leave(call)
            sock.send(answer)


def _outcome(
    call: messages.Call, progress: Progress, memory: "Memory", directories: "Directories"
) -> bytes:
    """The answer to a call."""
    try:
        with ends_in(call.left_s):
            store = directories.store(call)
            answer = messages.encode(progress.run(lambda: carry_out(call, store, memory)))
        if len(answer) > messages.MESSAGE_BYTES_MAX:
            raise StoreError(f"{store.name}: the store's answer has {len(answer)} bytes of names")
    except Exception as error:
        answer = messages.encode(messages.failed(error, call.method))
    return answer


def carry_out(call: messages.Call, store: Store, memory: "Memory") -> messages.Done:
    """Make a call. Raises the errors of a Store."""
    if call.method == "list":
        return messages.Done(size=memory.put_parts(store.list(call.files_max)))
    if call.method == "confirm":
        return messages.Done(pin=store.confirm(_pin_of(call)))
    if call.method == "read_into":
        if call.answers_are_whole and isinstance(store, HasWholeAnswers):
            store.answers_are_whole = True
        with memory.view(call.length) as buffer:
            is_confirmed = store.read_into(_pin_of(call), call.offset, buffer)
        return messages.Done(is_true=is_confirmed, size=call.length)
    if call.method == "get":
        data = store.get(call.name)
        if data is not None and len(data) > messages.OBJECT_BYTES_MAX:
            raise StoreError(
                f"{call.name} in {store.name} has {len(data)} bytes, more than "
                f"{messages.OBJECT_BYTES_MAX}; read it as a file"
            )
        return messages.Done(is_true=data is not None, size=memory.put(data or b""))
    if call.method == "put":
        with memory.view(call.length) as data:
            store.put(call.name, bytes(data))
        return messages.Done()
    if call.method == "find":
        return messages.Done(file=store.find(call.name))
    raise ValueError(call.method)


def _pin_of(call: messages.Call) -> Pin:
    if call.pin is None:
        raise ValueError("a call without its version")
    return call.pin


class _Telling(Progress):
    """The progress of a channel's calls, which the worker reports to the daemon."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._channel = sock
        self._told = 0
        self._told_s = 0.0

    def begin(self) -> None:
        """Begin a call. Its first bytes are reported at once."""
        self._told, self._told_s = self.body_count, 0.0
        self.is_in_head = False

    def came(self, count: int) -> None:
        """See Progress.came."""
        super().came(count)
        now_s = time.monotonic()
        if self.body_count > self._told and now_s - self._told_s >= messages.PROGRESS_S:
            try:
                self._channel.send(messages.encode(messages.Came(self.body_count - self._told)))
            except ConnectionError:
                self.give_up()  # the daemon has closed the channel
            self._told, self._told_s = self.body_count, now_s


class Directories:
    """The directories of the store, each opened at its first use. Several threads may use it."""

    def __init__(self, setup: messages.Setup) -> None:
        self._setup = setup
        self._open = _opener(setup)
        self._lock = threading.Lock()  # guards the rest
        self._closed: dict[int, None] = {}  # the last one at the end
        self._opening: dict[int, threading.Lock] = {}  # held while that one is opened
        self._stores: dict[int, Store] = {}

    def store(self, call: messages.Call) -> Store:
        """The store at the directory of `call`. Raises LocationError, AccessDenied."""
        with self._lock:
            lock = self._opening.setdefault(call.store, threading.Lock())
        with lock:
            found = self._stores.get(call.store)
            if found is None:
                location = msgspec.structs.replace(
                    self._setup.location, path=call.path, store=call.named
                )
                found = self._open(location, self._setup.timeout_s)
                self._stores[call.store] = found
            return found

    def close(self, number: int) -> None:
        """Forget a directory that is no longer used."""
        with self._lock:
            self._closed[number] = None
            if len(self._closed) > _CLOSED_MAX:
                del self._closed[next(iter(self._closed))]
            self._opening.pop(number, None)
            store = self._stores.pop(number, None)
        if store is not None:
            store.close()

    def leave(self, call: messages.Call) -> None:
        """Forget the directory of an ended call again if the call came when it was closed."""
        with self._lock:
            is_closed = call.store in self._closed
        if is_closed:
            self.close(call.store)


def _opener(setup: messages.Setup) -> "OpenStore":
    """The function that opens the directories of a worker. Calls of it may raise LocationError."""
    if setup.pickled:

        @functools.cache
        def unpickled() -> "OpenStore":
            from ckptfs._store import private

            return private.opener(setup.pickled)

        return lambda location, timeout_s: unpickled()(location, timeout_s)
    from ckptfs._store.resolve import open_store

    return functools.partial(open_store, credentials=setup.credentials)


class Memory:
    """The worker's end of a channel's memory. It only grows."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None

    @contextlib.contextmanager
    def view(self, length: int) -> Generator[memoryview]:
        """The first `length` bytes."""
        if not length:
            yield memoryview(b"")
            return
        if os.fstat(self._fd).st_size < length:
            os.ftruncate(self._fd, length)
        if self._map is None or len(self._map) < length:
            self._map = mmap.mmap(self._fd, length)  # the former map ends with its last view
        whole = memoryview(self._map)
        part = whole[:length]
        try:
            yield part
        finally:
            with contextlib.suppress(BufferError):  # a library has kept it
                part.release()
                whole.release()

    def put(self, data: bytes, offset: int = 0) -> int:
        """Write `data` at `offset`; returns where they end."""
        pwrite_all(self._fd, data, offset)
        return offset + len(data)

    def put_parts(self, listing: Listing) -> int:
        """Write a listing in parts; returns where they end."""
        end = 0
        longest = max(len(listing.files), len(listing.directories), len(listing.skipped))
        for begin in range(0, longest, messages.LISTED_AT_ONCE):
            at_once = slice(begin, begin + messages.LISTED_AT_ONCE)
            part = messages.Part(
                listing.files[at_once], listing.directories[at_once], listing.skipped[at_once]
            )
            text = messages.encode(part)
            end = self.put(len(text).to_bytes(messages.LENGTH_BYTES, "little") + text, end)
        return end

    def close(self) -> None:
        """Close the memory."""
        self._map = None
        os.close(self._fd)
