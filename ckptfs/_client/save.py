"""Gives an uploaded checkpoint to the node's daemon, so that a restore on this node reads none of
its bytes from the store.

The daemon attaches the checkpoint as for any program, and saves a block only if the store has the
version that was uploaded. So a program that replaces an object meanwhile does no harm. Bytes go
through shared memory, a piece at a time.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from ckptfs._client import client
from ckptfs._config.load import load_config
from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import PIECE_BLOCKS_MAX, SaveBlocks
from ckptfs._store.directory_upload import Content
from ckptfs._store.worker_threads import WorkerThreads
from ckptfs.errors import CkptfsError, ObjectChanged

_THREADS = 4
"""Reading a piece and saving it are two steps, and the daemon writes to one disk."""
_PIECE_BYTES = PIECE_BLOCKS_MAX * BLOCK_BYTES
_ANSWER_S = 150.0
"""Longest wait for an answer of the daemon, more than twice its default read deadline."""


class Saved(NamedTuple):
    """The bytes that the cache has now, and the error because of which it has no more."""

    bytes: int
    error: CkptfsError | OSError | None


def save(location: Location, contents: Sequence[Content]) -> Saved:
    """Have the daemon's cache hold what was uploaded to `location`.

    It holds no file without an ETag, and none whose object is another one meanwhile. There is an
    error if the machine cannot mount, if the daemon does not take blocks from this user, if the
    cache is full, or if a file or its object changes.
    """
    known = [content for content in contents if content.etag and content.source.size]
    saved_bytes = 0
    changed: list[CkptfsError | OSError] = []

    def count(length: int) -> None:
        nonlocal saved_bytes
        saved_bytes += length

    def works(seats: "SimpleQueue[_Seat]") -> "Iterator[Callable[[], int]]":
        for content in known:
            for first in range(0, block_count(content.source.size), PIECE_BLOCKS_MAX):
                yield partial(_save_piece, content, first, seats, changed)

    try:
        if known:
            with client.leased(location) as path, contextlib.ExitStack() as stack:
                seats: SimpleQueue[_Seat] = SimpleQueue()
                for _ in range(_THREADS):
                    seat = _Seat(os.path.basename(path))
                    seats.put(stack.enter_context(contextlib.closing(seat)))
                WorkerThreads(_THREADS).work(works(seats), count)
    except (CkptfsError, OSError) as error:
        changed.insert(0, error)
    return Saved(saved_bytes, next(iter(changed), None))


def _save_piece(
    content: Content,
    first: int,
    seats: "SimpleQueue[_Seat]",
    changed: list[CkptfsError | OSError],
) -> int:
    seat = seats.get()
    try:
        return seat.save(content, first)
    except ObjectChanged as error:
        changed.append(error)
        return 0
    finally:
        seats.put(seat)


class _Seat:
    """A connection to the daemon, with memory for a piece."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd = os.memfd_create("ckptfs-save", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, _PIECE_BYTES)  # it counts as this process's memory
            self._memory = memoryview(mmap.mmap(self._fd, _PIECE_BYTES))
            self._connection = client.connect(load_config(), _ANSWER_S)
        except BaseException:
            os.close(self._fd)
            raise

    def save(self, content: Content, first: int) -> int:
        """Save the piece of a file that begins with the block `first`. Returns its bytes."""
        source = content.source
        start = first * BLOCK_BYTES
        length = min(_PIECE_BYTES, source.size - start)
        source.read_into(start, self._memory[:length])
        request = SaveBlocks(
            name=self._name,
            path=source.path,
            first=first,
            count=block_count(length),
            etag=content.etag,
        )
        self._connection.ask(request, self._fd)
        return length

    def close(self) -> None:
        """Close the connection, and give the memory back."""
        self._connection.close()
        self._memory.release()
        os.close(self._fd)
