"""One node's end of a broadcast: an actor that has the checkpoint attached, and carries blocks
between the node's daemon and Ray's object store."""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from ckptfs import xattrs
from ckptfs._client import client, plans
from ckptfs._client.blocks import SharedMemory, connect
from ckptfs._model import attributes
from ckptfs._model.manifest import METADATA_NAME
from ckptfs._model.plans.plan import Plan, Wanted
from ckptfs._model.protocol.replies import Given
from ckptfs._model.protocol.requests import FindBlocks, GiveBlocks, R, Request, TakeBlocks
from ckptfs._store.describe import describe
from ckptfs._store.filesystems import FileSystem
from ckptfs.errors import CkptfsError
from ckptfs.ray._schedule import Chunk, Piece, Runs, length_of

if TYPE_CHECKING:
    from ckptfs._client.connection import Connection

log = logging.getLogger(__name__)

_THREADS = 16
"""Number of concurrent messages to the daemon, which has as many requests to a store."""

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An error. `code` is that of a ``CkptfsError``, or "ray" or "lost" for an error of Ray."""

    code: str
    message: str


@dataclass(frozen=True)
class Joined:
    """The checkpoint as a node sees it. `cached` is the number of its bytes in the node's cache."""

    version: str
    cached: int


Sums = tuple[str, list[int]]
"""The ETag of a piece, and the checksums of its blocks, as the giving daemon states them."""


@dataclass(frozen=True)
class Gave:
    """A given chunk.

    Attributes:
        sums: The checksums of each piece.
        fetched: Bytes that the daemon has read from the store for it.
        data: A reference to the bytes of all pieces, one after the other, as an array of uint8;
            None if no other node needs them.
    """

    sums: list[Sums]
    fetched: int
    data: Any


class Peer:
    """The actor. Ray calls it from several threads. It returns expected errors as `Failure`."""

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
        """Attach the checkpoint, and hold it until the actor ends."""
        try:
            location = describe(self._filesystem, self._path)
            self._mounted = self._stack.enter_context(client.leased(location))
            version = xattrs.get(self._mounted, attributes.VERSION)
            return Joined(version or "", self._cached(self._mounted))
        except (CkptfsError, OSError) as error:
            return _failure(error)

    def files(self) -> list[tuple[str, int]]:
        """Paths and sizes of all files, sorted by path, without the metadata's file, which belongs
        to no version."""
        found: list[tuple[str, int]] = []
        for folder, _, names in os.walk(self._mounted):
            for name in names:
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, self._mounted), os.stat(path).st_size))
        return sorted(file for file in found if file[0] != METADATA_NAME)

    def cached(self, files: Sequence[tuple[str, int]]) -> dict[str, Runs] | Failure:
        """The blocks of these files that are in the node's cache, in the version of the store."""
        try:
            known = [p for p, _ in files if self._cached(os.path.join(self._mounted, p))]
        except (CkptfsError, OSError) as error:
            return _failure(error)
        runs = self._pool.map(self._blocks_of, known)
        return {path: each for path, each in zip(known, runs, strict=True) if each}

    def _blocks_of(self, path: str) -> Runs:
        try:
            return self._ask(FindBlocks(name=self._name, path=path)).runs
        except (CkptfsError, OSError) as error:
            log.info("broadcast: %s of this node does not count: %s", path, error)
            return []

    @staticmethod
    def _cached(path: str) -> int:
        return int(xattrs.get(path, attributes.CACHED) or 0)

    def give(self, chunk: Chunk, carried: bool) -> Gave | Failure:
        """Have the daemon read a chunk, from its cache or the store. If the chunk is `carried` to
        other nodes, put it into Ray's object store."""
        with self._room() as memory:
            try:
                given = self._for_each(chunk, lambda i, at: self._give(chunk[i], memory, at))
                data = ray.put(memory.array[: length_of(chunk)]) if carried else None
                sums = [(each.etag, each.sums) for each in given]
                return Gave(sums, sum(each.fetched for each in given), data)
            except (ObjectStoreFullError, OutOfDiskError) as error:
                return Failure("ray", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            except (CkptfsError, OSError) as error:
                return _failure(error)

    def take(
        self, chunk: Chunk, sums: list[Sums], data: "np.ndarray[Any, np.dtype[np.uint8]]"
    ) -> int | Failure:
        """Put a chunk from another node into the cache. Return the number of new bytes."""
        with self._room() as memory:
            try:
                memory.array[: len(data)] = data
                return sum(
                    self._for_each(chunk, lambda i, at: self._take(chunk[i], sums[i], memory, at))
                )
            except (CkptfsError, OSError, ValueError) as error:
                return _failure(error)

    def kept_plan(self) -> Plan | Failure | None:
        """The plan that this node's user has for the checkpoints beside this one."""
        try:
            return plans.kept(describe(self._filesystem, self._path))
        except (CkptfsError, OSError) as error:
            return _failure(error)

    def prefetch(self, wanted: Wanted) -> tuple[int, int] | Failure:
        """Fetch from the store, and wait for the end. Return the bytes in the cache and of all."""
        try:
            with connect() as connection:
                done = connection.prefetch(self._name, wanted, lambda done, total: None)
        except (CkptfsError, OSError) as error:
            return _failure(error)
        if done.early_code:
            return Failure(done.early_code, done.early_message)
        if done.errors:
            return Failure(done.errors[0].code, done.errors[0].message)
        return done.cached + done.fetched, done.bytes

    # -- pieces

    def _for_each(self, chunk: Chunk, do: Callable[[int, int], T]) -> list[T]:
        """Run `do` in parallel for the position of each piece, and of its bytes in the chunk. When
        all calls have ended, raise the first error."""
        starts = accumulate((piece.length for piece in chunk[:-1]), initial=0)
        futures = [self._pool.submit(do, index, at) for index, at in enumerate(starts)]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def _give(self, piece: Piece, memory: "_Memory", at: int) -> Given:
        request = GiveBlocks(
            name=self._name, path=piece.path, first=piece.first, count=piece.count, at=at
        )
        return self._ask(request, memory)

    def _take(self, piece: Piece, sums: Sums, memory: "_Memory", at: int) -> int:
        request = TakeBlocks(
            name=self._name, path=piece.path, first=piece.first, etag=sums[0], sums=sums[1], at=at
        )
        return self._ask(request, memory).taken

    def _ask(self, request: Request[R], memory: "_Memory | None" = None) -> R:
        """Ask on this thread's connection. `Connection.ask` replaces a connection that the daemon
        has closed because it was idle. After an error this thread makes a new one."""
        connection: Connection = getattr(self._local, "connection", None) or connect()
        self._local.connection = None
        try:
            reply = connection.ask(request, -1 if memory is None else memory.fd)
        except BaseException:
            connection.close()
            raise
        self._local.connection = connection
        return reply

    @property
    def _name(self) -> str:
        return os.path.basename(self._mounted)

    # -- memory

    @contextlib.contextmanager
    def _room(self) -> "Generator[_Memory]":
        """Memory for a chunk. Calls that run at the same time have their own."""
        try:
            memory = self._memory.get_nowait()
        except queue.Empty:
            memory = _Memory(self._chunk_bytes)
        try:
            yield memory
        finally:
            self._memory.put(memory)


class _Memory(SharedMemory):
    """Memory that this process shares with the daemon. `array` has its bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.array = np.frombuffer(self.memory, np.uint8)


def _failure(error: Exception) -> Failure:
    code = error.code if isinstance(error, CkptfsError) else "error"
    return Failure(code, str(error) or type(error).__name__)
