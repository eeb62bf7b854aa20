"""The progress and the results of one command on the whole cache.

Results wait in a queue of a few items until the client asks for progress. A client that does not
ask holds up its job and takes no memory.
"""

import contextlib
from collections.abc import Awaitable, Callable

import msgspec
import trio

from ckptfs._model.protocol.replies import CachedCheckpoint, CachedFile, CacheResults, DamagedFile
from ckptfs.errors import CkptfsError

Item = CachedCheckpoint | CachedFile | DamagedFile

_QUEUE_MAX = 64
_NEWS_BYTES_MAX = 512 << 10
"""Most bytes of the items in one reply, without its last item. The reply stays below the longest
message (1 MiB), because a path and a URI have at most 100 KiB each."""
_PROGRESS_S = 0.2
"""Longest wait for an item before a progress reply: five replies a second look live."""


class CacheJob:
    """A command that has begun.

    Attributes:
        has_ended: Whether the last results have gone out.
        done, all, files, freed, open_files, open_bytes, removed_at_start: As in `CacheResults`.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.done = self.all = self.files = self.freed = 0
        self.open_files = self.open_bytes = self.removed_at_start = 0
        self._scope = trio.CancelScope()
        self._early: CkptfsError | None = None
        self._send, self._receive = trio.open_memory_channel[Item](_QUEUE_MAX)

    def cancel(self) -> None:
        """End the job."""
        self._scope.cancel()

    async def run(self, body: Callable[["CacheJob"], Awaitable[None]]) -> None:
        """Run the job, and return when it has ended. Only an unexpected error is raised."""
        try:
            with self._scope:
                await body(self)
        except CkptfsError as error:
            self._early = error
        finally:
            self._send.close()

    async def found(self, item: Item) -> None:
        """Add a result. Waits while the queue is full."""
        await self._send.send(item)

    async def progress(self) -> CacheResults:
        """The results since the last call. Waits a moment for the first one."""
        items: list[Item] = []
        with trio.move_on_after(_PROGRESS_S), contextlib.suppress(trio.EndOfChannel):
            items.append(await self._receive.receive())
        item_bytes = 0
        try:
            while item_bytes < _NEWS_BYTES_MAX:
                items.append(self._receive.receive_nowait())
                item_bytes += len(msgspec.json.encode(items[-1]))
        except trio.EndOfChannel:
            self.has_ended = True
        except trio.WouldBlock:
            pass
        return CacheResults(
            ended=self.has_ended,
            done=self.done,
            all=self.all,
            files=self.files,
            freed=self.freed,
            open_files=self.open_files,
            open_bytes=self.open_bytes,
            removed_at_start=self.removed_at_start,
            checkpoints=[item for item in items if isinstance(item, CachedCheckpoint)],
            cached_files=[item for item in items if isinstance(item, CachedFile)],
            damaged=[item for item in items if isinstance(item, DamagedFile)],
            early_code=self._early.code if self._early else "",
            early_message=str(self._early) if self._early else "",
        )
