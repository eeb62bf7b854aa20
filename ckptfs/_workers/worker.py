"""The program of a worker; see the package's text.

The main thread reads the control socket and beats, and each channel has a thread. Standard streams
lead nowhere: what a library writes when it ends the process can have URLs and tokens in it.
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
import traceback
from collections.abc import Generator
from typing import TYPE_CHECKING

import msgspec

from ckptfs._model.location import Location
from ckptfs._model.manifest import Listing
from ckptfs._store.base import Pin, Store
from ckptfs._store.deadline import ends_in
from ckptfs._store.progress import Progress
from ckptfs._workers.lifeline import end_with
from ckptfs._workers.messages import (
    BEAT_S,
    LENGTH_BYTES,
    LISTED_AT_ONCE,
    MESSAGE_BYTES_MAX,
    OBJECT_BYTES_MAX,
    OTHER_PROTOCOL_STATUS,
    PROGRESS_S,
    PROTOCOL,
    Call,
    Came,
    Done,
    Failed,
    Part,
    Setup,
    decode_call,
    decode_setup,
    encode,
)
from ckptfs.errors import CkptfsError, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._store.resolve import OpenStore

_OOM_SCORE = "500"
"""The kernel takes a worker rather than the daemon when memory runs out: a worker is replaced."""
_MESSAGE_CHARACTERS_MAX = 4_000
_CLOSED = b""


def main() -> None:
    """Serve until the daemon closes the control socket."""
    control_fd, parent_pid = map(int, sys.argv[1:])
    end_with(parent_pid)
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal: the daemon decides
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)
    control = socket.socket(fileno=control_fd)
    text, fds = _received(control)
    if text != encode(PROTOCOL) or len(fds) != 2:
        sys.exit(OTHER_PROTOCOL_STATUS)
    setup_fd, beat_fd = fds
    with open(setup_fd, "rb", buffering=0) as memory:
        setup = decode_setup(memory.readall())
    serve(control, setup, mmap.mmap(beat_fd, 0))
    os._exit(0)  # threads of a library would keep us


def serve(control: socket.socket, setup: Setup, beat: mmap.mmap) -> None:
    """Serve the channels that arrive on `control`, and beat."""
    directories = Directories(setup)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        beat[:] = struct.pack("d", time.monotonic())
        if not poll.poll(1000 * BEAT_S):
            continue
        text, fds = _received(control)
        if text == _CLOSED:
            return
        if fds:
            sock, memory = socket.socket(fileno=fds[0]), Memory(fds[1])
            threading.Thread(
                target=_serve_channel, args=(sock, memory, directories), daemon=True
            ).start()
        else:
            call = decode_call(text)
            threading.Thread(target=directories.close, args=(call.store,), daemon=True).start()


def _received(control: socket.socket) -> tuple[bytes, list[int]]:
    text, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
    return text, fds


def _serve_channel(sock: socket.socket, memory: "Memory", directories: "Directories") -> None:
    """Answer one call after the other, until the daemon closes the channel."""
    with sock, contextlib.closing(memory), contextlib.suppress(ConnectionError):
        while (text := sock.recv(MESSAGE_BYTES_MAX)) != _CLOSED:
            sock.send(_outcome(decode_call(text), sock, memory, directories))


def _outcome(
    call: Call, sock: socket.socket, memory: "Memory", directories: "Directories"
) -> bytes:
    """The answer to a call. What a library raises that ckptfs does not know is told by its type and
    place only: its text may name secrets."""
    try:
        with ends_in(call.left_s):
            store = directories.store(call)
            answer = encode(_Telling(sock).run(lambda: carry_out(call, store, memory)))
        if len(answer) > MESSAGE_BYTES_MAX:
            raise StoreError(f"{store.name}: the store's answer has {len(answer)} bytes of names")
    except CkptfsError as error:
        retry_after_s = error.retry_after_s if isinstance(error, StoreUnavailable) else 0.0
        text = str(error)[:_MESSAGE_CHARACTERS_MAX]
        answer = encode(Failed(error.code, text, retry_after_s))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        text = f"{call.method}: unexpected {type(error).__name__} at {where}"
        answer = encode(Failed(StoreError.code, text))
    return answer


def carry_out(call: Call, store: Store, memory: "Memory") -> Done:
    """Do what `call` says. Raises what a Store raises."""
    if call.method == "list":
        return Done(size=memory.put_parts(store.list(call.files_max)))
    if call.method == "confirm":
        return Done(pin=store.confirm(_pin_of(call)))
    if call.method == "read_into":
        with memory.view(call.length) as buffer:
            is_confirmed = store.read_into(_pin_of(call), call.offset, buffer)
        return Done(is_true=is_confirmed, size=call.length)
    if call.method == "get":
        data = store.get(call.name)
        if data is not None and len(data) > OBJECT_BYTES_MAX:
            raise StoreError(
                f"{call.name} in {store.name} has {len(data)} bytes, more than {OBJECT_BYTES_MAX}; "
                "read it as a file"
            )
        return Done(is_true=data is not None, size=memory.put(data or b""))
    if call.method == "put":
        with memory.view(call.length) as data:
            store.put(call.name, bytes(data))
        return Done()
    if call.method == "find":
        return Done(file=store.find(call.name))
    raise ValueError(call.method)


def _pin_of(call: Call) -> Pin:
    if call.pin is None:
        raise ValueError("a call without its version")
    return call.pin


class _Telling(Progress):
    """A read that tells the daemon how far it is."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._channel = sock
        self._told = 0
        self._told_s = 0.0

    def came(self, count: int) -> None:
        """See Progress.came."""
        super().came(count)
        now_s = time.monotonic()
        if now_s - self._told_s >= PROGRESS_S:
            self._channel.send(encode(Came(self.count - self._told)))
            self._told, self._told_s = self.count, now_s


class Directories:
    """The directories of the store, which are opened when they are first needed. May be used by
    several threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._lock = threading.Lock()  # guards the two below
        self._opening: dict[int, threading.Lock] = {}  # held while that one is opened
        self._stores: dict[int, Store] = {}

    def store(self, call: Call) -> Store:
        """The store at the directory of `call`. Raises LocationError, AccessDenied."""
        with self._lock:
            lock = self._opening.setdefault(call.store, threading.Lock())
        with lock:
            found = self._stores.get(call.store)
            if found is None:
                location = msgspec.structs.replace(
                    self._setup.location, path=call.path, store=call.named
                )
                found = self._stores[call.store] = self._open(location)
            return found

    def close(self, number: int) -> None:
        """Forget a directory that is not needed any more."""
        with self._lock:
            self._opening.pop(number, None)
            store = self._stores.pop(number, None)
        if store is not None:
            store.close()

    def _open(self, location: Location) -> Store:
        return self._opener(location, self._setup.timeout_s)

    @functools.cached_property
    def _opener(self) -> "OpenStore":
        if self._setup.pickled:
            from ckptfs._store import private

            return private.opener(self._setup.pickled)
        from ckptfs._store.resolve import open_store

        return open_store


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
        self._reserve(length)
        if self._map is None or len(self._map) < length:
            self._map = mmap.mmap(self._fd, length)  # the former one ends with its last view
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
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._fd, rest, offset)
            offset, rest = offset + count, rest[count:]
        return offset

    def put_parts(self, listing: Listing) -> int:
        """Write a listing in parts; returns where they end."""
        end = 0
        longest = max(len(listing.files), len(listing.directories), len(listing.skipped))
        for begin in range(0, longest, LISTED_AT_ONCE):
            at_once = slice(begin, begin + LISTED_AT_ONCE)
            part = Part(
                listing.files[at_once], listing.directories[at_once], listing.skipped[at_once]
            )
            text = encode(part)
            end = self.put(len(text).to_bytes(LENGTH_BYTES, "little") + text, end)
        return end

    def close(self) -> None:
        """Let go of it."""
        self._map = None
        os.close(self._fd)

    def _reserve(self, length: int) -> None:
        if os.fstat(self._fd).st_size < length:
            os.ftruncate(self._fd, length)
