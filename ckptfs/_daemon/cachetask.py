"""One task on the cache as a whole, as whoever asked for it sees it: how far it is, what it found.

What it finds waits in a queue of a few items until it is asked for: a client that asks for nothing
holds the task up, and takes no memory.
"""

import contextlib
from collections.abc import Awaitable, Callable

import msgspec
import trio

from ckptfs._model.replies import CachedCheckpoint, CachedFile, CacheNews, DamagedFile
from ckptfs.errors import CkptfsError

Item = CachedCheckpoint | CachedFile | DamagedFile

_QUEUE_MAX = 64
_NEWS_BYTES_MAX = 512 << 10
"""Of the items of one reply, but for its last one: below the longest message (1 MiB), because a
path and a URI have at most 100 KiB each."""
_NEWS_S = 0.2
"""Longest wait for news: five times a second looks live."""


class CacheTask:
    """A task that has begun.

    Attributes:
        ended: There will be no more news.
        done, all, files, freed, open_files, open_bytes, removed_at_start: See `CacheNews`.
    """

    def __init__(self) -> None:
        self.ended = False
        self.done = self.all = self.files = self.freed = 0
        self.open_files = self.open_bytes = self.removed_at_start = 0
        self._scope = trio.CancelScope()
        self._early: CkptfsError | None = None
        self._send, self._receive = trio.open_memory_channel[Item](_QUEUE_MAX)

    def cancel(self) -> None:
        """Nobody is interested any more."""
        self._scope.cancel()

    async def run(self, body: Callable[["CacheTask"], Awaitable[None]]) -> None:
        """Do it; returns when it has ended, for whatever reason but a defect."""
        try:
            with self._scope:
                await body(self)
        except CkptfsError as error:
            self._early = error
        finally:
            self._send.close()

    async def found(self, item: Item) -> None:
        """Report something. Waits while there is much that nobody has asked for."""
        await self._send.send(item)

    async def news(self) -> CacheNews:
        """What was found since the last time; waits a moment for something."""
        items: list[Item] = []
        with trio.move_on_after(_NEWS_S), contextlib.suppress(trio.EndOfChannel):
            items.append(await self._receive.receive())
        item_bytes = 0
        try:
            while item_bytes < _NEWS_BYTES_MAX:
                items.append(self._receive.receive_nowait())
                item_bytes += len(msgspec.json.encode(items[-1]))
        except trio.EndOfChannel:
            self.ended = True
        except trio.WouldBlock:
            pass
        return CacheNews(
            ended=self.ended,
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
