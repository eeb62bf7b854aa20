"""Gives an uploaded checkpoint to the node's daemon, so that a restore on this node reads none of
its bytes from the store.

The daemon attaches the checkpoint as for any program, and saves a block only if the store has the
version that was uploaded. So a program that replaces an object meanwhile does no harm. Bytes go
through memory that the daemon lends, a piece at a time.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from ckptfs._client import blocks, client
from ckptfs._client.connection import TRIES
from ckptfs._config.load import load_config
from ckptfs._config.paths import chosen, fault_of, make_folder, runtime_places
from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import PIECE_BLOCKS_MAX, SaveBlocks
from ckptfs._os.filelock import locked
from ckptfs._store.directory_upload import Content
from ckptfs._store.worker_threads import WorkerThreads
from ckptfs.errors import CkptfsError, DaemonError, ObjectChanged

_THREADS = 4
"""Reading a piece and saving it are two steps, and the daemon writes to one disk."""
_PIECE_BYTES = PIECE_BLOCKS_MAX * BLOCK_BYTES
_TURN_S = 600.0
"""Longest wait for other programs that save. Several hundred GB take that long."""


class Saved(NamedTuple):
    """The bytes that the cache has now, and the error because of which it has no more."""

    bytes: int
    error: CkptfsError | OSError | None


def save(location: Location, contents: Sequence[Content]) -> Saved:
    """Have the daemon's cache hold what was uploaded to `location`.

    It holds no file without an ETag, and none whose object is another one meanwhile. If the daemon
    serves other users, too, then what it holds is for this user only. There is an error if the
    machine cannot mount, if the cache is full, or if a file or its object changes.
    """
    known = [content for content in contents if content.etag and content.source.size]
    saved_bytes = 0
    errors: list[CkptfsError | OSError] = []

    def count(length: int) -> None:
        nonlocal saved_bytes
        saved_bytes += length

    def works(seats: "SimpleQueue[_Seat]") -> "Iterator[Callable[[], int]]":
        for content in known:
            for first in range(0, block_count(content.source.size), PIECE_BLOCKS_MAX):
                yield partial(_save_piece, content, first, seats, errors)

    try:
        if known:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_turn())
                path = stack.enter_context(client.leased(location, saves=True))
                seats: SimpleQueue[_Seat] = SimpleQueue()
                interrupts = contextlib.ExitStack()
                for _ in range(_THREADS):
                    seat = _Seat(os.path.basename(path))
                    seats.put(stack.enter_context(contextlib.closing(seat)))
                    interrupts.callback(seat.interrupt)
                WorkerThreads(_THREADS, interrupt=interrupts.close).work(works(seats), count)
    except (CkptfsError, OSError) as error:
        errors.insert(0, error)
    return Saved(saved_bytes, next(iter(errors), None))


@contextlib.contextmanager
def _turn() -> Generator[None]:
    """Wait for this program's turn among those of the user that save.

    Programs that merge their files into one checkpoint would share an attachment otherwise, and its
    listing would lack the files of those that have finished later. Raises DaemonError.
    """
    path = _lock_path()
    make_folder(path.parent)
    try:
        with locked(str(path), _TURN_S):
            yield
    except TimeoutError:
        raise DaemonError(
            f"another program has been saving for {_TURN_S:g} s ({path}); upload again if this "
            "node shall have the checkpoint"
        ) from None


def _lock_path() -> Path:
    """The lock of `_turn`: beside the socket, or if that is in another user's directory, in this
    user's own."""
    path = Path(f"{load_config().socket}.save")
    if fault_of(path.parent, full_is_fine=True):
        return chosen(runtime_places(os.environ)) / "save"
    return path


def _save_piece(
    content: Content,
    first: int,
    seats: "SimpleQueue[_Seat]",
    errors: list[CkptfsError | OSError],
) -> int:
    seat = seats.get()
    try:
        return seat.save(content, first)
    except ObjectChanged as error:
        errors.append(error)
        return 0
    finally:
        seats.put(seat)


class _Seat:
    """A connection to the daemon, with memory of the daemon for a piece."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_interrupted = False
        self._open()

    def _open(self) -> None:
        self._connection = blocks.connect()
        try:
            if self._is_interrupted:
                raise DaemonError("the user has interrupted the upload")
            fd = self._connection.borrow_memory()
            self._shared = blocks.SharedMemory(_PIECE_BYTES, fd)
        except BaseException:
            self._connection.close()
            raise
        self._memory = memoryview(self._shared.memory)

    def save(self, content: Content, first: int) -> int:
        """Save the piece of a file that begins with the block `first`. Returns its bytes. If the
        daemon dies, the next one lends other memory."""
        for _ in range(TRIES):
            with contextlib.suppress(ConnectionResetError):
                return self._save(content, first)
            self.close()
            self._open()
        return self._save(content, first)

    def _save(self, content: Content, first: int) -> int:
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
        self._connection.ask_once(request)
        return length

    def interrupt(self) -> None:
        """End the `save` of another thread, which raises DaemonError."""
        self._is_interrupted = True  # first, because the thread may open another connection now
        self._connection.interrupt()

    def close(self) -> None:
        """Close the connection, and give the memory back."""
        self._connection.close()
        self._memory.release()
        self._shared.close()
