# Ray is not installed where the package is type-checked: its classes are of unknown type.
# pyright: reportMissingImports=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
"""One node's end of a broadcast: an actor that has the checkpoint attached, and carries blocks
between the node's daemon and Ray's object store.
"""

import contextlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from ckptfs import _client, _connection, _plans, xattrs
from ckptfs._config import load_config
from ckptfs._model import attributes
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._model.plan import Plan, Wanted
from ckptfs._model.requests import GiveBlocks, TakeBlocks
from ckptfs._store.describe import describe
from ckptfs._store.filesystems import FileSystem
from ckptfs.errors import CkptfsError
from ckptfs.ray._course import Chunk, Piece

_THREADS = 16
"""Messages to the daemon at the same time: as many as it has requests to a store."""
_ANSWER_S = 150.0
"""Longest wait for an answer of the daemon: more than twice its default read deadline."""

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What went wrong: `code` is that of a ``CkptfsError``, or "ray"."""

    code: str
    message: str


@dataclass(frozen=True)
class Joined:
    """The checkpoint as a node sees it. `cached`: bytes of it that are there already."""

    version: str
    cached: int


Sums = tuple[str, list[int]]
"""Of a piece: ETag and checksums of the blocks, as the giving daemon says."""


@dataclass(frozen=True)
class Gave:
    """What belongs to a chunk: `sums` of each piece, and a reference to the bytes of all of them,
    one after the other, as an array of uint8; None if they are not to be carried."""

    sums: list[Sums]
    data: Any


class Peer:
    """Used through Ray, by several threads. Expected errors are returned as `Failure`."""

    def __init__(self, filesystem: FileSystem, path: str, chunk_bytes: int) -> None:
        self._filesystem = filesystem
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._memory: queue.SimpleQueue[_Memory] = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(_THREADS)
        self._local = threading.local()
        self._mounted = ""

    def join(self) -> Joined | Failure:
        """Attach the checkpoint; it is held until the actor ends."""
        try:
            location = describe(self._filesystem, self._path)
            self._mounted = self._stack.enter_context(_client.leased(location))
            version = xattrs.get(self._mounted, attributes.VERSION)
            return Joined(version or "", self._cached(self._mounted))
        except (CkptfsError, OSError) as error:
            return _failure(error)

    def files(self) -> list[tuple[str, int]]:
        """Path and size of all files but the one that is in no version, sorted by path."""
        found: list[tuple[str, int]] = []
        for folder, _, names in os.walk(self._mounted):
            for name in names:
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, self._mounted), os.stat(path).st_size))
        return sorted(file for file in found if file[0] != METADATA_NAME)

    def cached(self, files: Sequence[tuple[str, int]]) -> list[bool]:
        """Of which of these all bytes are on this node."""
        return [self._cached(os.path.join(self._mounted, path)) == size for path, size in files]

    @staticmethod
    def _cached(path: str) -> int:
        return int(xattrs.get(path, attributes.CACHED) or 0)

    def give(self, chunk: Chunk, carried: bool) -> Gave | Failure:
        """Have the daemon read a chunk, from its cache or the store, and put it into Ray's object
        store if it is to be carried."""
        with self._room() as memory:
            try:
                sums = self._for_each(chunk, lambda i, at: self._give(chunk[i], memory, at))
                return Gave(sums, ray.put(memory.array[: _length(chunk)]) if carried else None)
            except (ObjectStoreFullError, OutOfDiskError) as error:
                return Failure("ray", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            except (CkptfsError, OSError) as error:
                return _failure(error)

    def take(
        self, chunk: Chunk, sums: list[Sums], data: "np.ndarray[Any, np.dtype[np.uint8]]"
    ) -> int | Failure:
        """Put a chunk that another node gave into the cache; returns the bytes that were new."""
        with self._room() as memory:
            try:
                memory.array[: len(data)] = data
                return sum(
                    self._for_each(chunk, lambda i, at: self._take(chunk[i], sums[i], memory, at))
                )
            except (CkptfsError, OSError, ValueError) as error:
                return _failure(error)

    def kept_plan(self) -> Plan | Failure | None:
        """The plan that this node's user keeps for the checkpoints beside this one."""
        try:
            return _plans.kept(describe(self._filesystem, self._path))
        except (CkptfsError, OSError) as error:
            return _failure(error)

    def prefetch(self, wanted: Wanted) -> tuple[int, int] | Failure:
        """Fetch from the store; returns when it is there: bytes there, and of all."""
        try:
            with _connect() as connection:
                done = connection.prefetch(self._name, wanted, _ignore)
        except (CkptfsError, OSError) as error:
            return _failure(error)
        if done.early_code:
            return Failure(done.early_code, done.early_message)
        if done.errors:
            return Failure(done.errors[0].code, done.errors[0].message)
        return done.cached + done.fetched, done.bytes

    # -- pieces

    def _for_each(self, chunk: Chunk, do: Callable[[int, int], T]) -> list[T]:
        """Run `do` for the position of each piece and of its bytes in the chunk, in parallel;
        raises the first error, when all have ended."""
        at, calls = 0, list[tuple[int, int]]()
        for index, piece in enumerate(chunk):
            calls.append((index, at))
            at += piece.length
        futures = [self._pool.submit(do, *call) for call in calls]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def _give(self, piece: Piece, memory: "_Memory", at: int) -> Sums:
        request = GiveBlocks(
            name=self._name, path=piece.path, first=piece.first, count=piece.count, at=at
        )
        given = self._ask(lambda connection: connection.give(request, memory.fd))
        return given.etag, given.sums

    def _take(self, piece: Piece, sums: Sums, memory: "_Memory", at: int) -> int:
        request = TakeBlocks(
            name=self._name, path=piece.path, first=piece.first, etag=sums[0], sums=sums[1], at=at
        )
        return self._ask(lambda connection: connection.take(request, memory.fd)).taken

    def _ask(self, question: Callable[[_connection.Connection], T]) -> T:
        """On this thread's connection. One that the daemon has closed, because nothing was asked
        for long, is followed by another one; after an error it is not used again."""
        connection: _connection.Connection = getattr(self._local, "connection", None) or _connect()
        self._local.connection = None
        try:
            answer = question(connection)
        except BaseException:
            connection.close()
            raise
        self._local.connection = connection
        return answer

    @property
    def _name(self) -> str:
        return os.path.basename(self._mounted)

    # -- memory

    @contextlib.contextmanager
    def _room(self) -> "Generator[_Memory]":
        """Memory for a chunk. There is as much of it as calls have run at the same time."""
        try:
            memory = self._memory.get_nowait()
        except queue.Empty:
            memory = _Memory(self._chunk_bytes)
        try:
            yield memory
        finally:
            self._memory.put(memory)


class _Memory:
    """Bytes that this process and the daemon can reach."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("ckptfs-chunk", os.MFD_CLOEXEC)
        os.posix_fallocate(self.fd, 0, size)  # it is our memory, not the daemon's
        self.array = np.frombuffer(mmap.mmap(self.fd, size), np.uint8)


def _ignore(done: int, total: int) -> None:
    pass


def _connect() -> _connection.Connection:
    return _client.connect(load_config(), _ANSWER_S)


def _length(chunk: Chunk) -> int:
    return sum(piece.length for piece in chunk)


def _failure(error: Exception) -> Failure:
    code = error.code if isinstance(error, CkptfsError) else "error"
    return Failure(code, str(error) or type(error).__name__)
