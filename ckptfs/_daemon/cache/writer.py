"""From a span's buffer to the disk: room first, so that the cache's limit holds, then the bytes."""

import trio

from ckptfs._daemon.cache import block_io
from ckptfs._daemon.cache.buffer_pool import Buffer
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.object_dir import pages
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import blocks_length


class Storing:
    """Writes to the cache. The lock `_room` lets one write at a time make room."""

    def __init__(self, cache: Cache, offload: Offload) -> None:
        self._cache = cache
        self._offload = offload
        self._room = trio.Lock()

    async def until_no_hole(self) -> None:
        """Return when no block is DYING that is now: holes are made under this lock."""
        async with self._room:
            pass

    async def store(self, entry: CachedObject, blocks: range, buffer: Buffer[CachedObject]) -> None:
        """Write `blocks` from the beginning of `buffer`, with their checksums, and then the map.
        A failure leaves the readers their bytes."""
        length = blocks_length(blocks, entry.size)
        if not await self._make_room(entry, length):
            return
        about, files = entry.about, entry.files
        view = buffer.view[:length]
        sums = await self._offload.disk(block_io.write, files, about, blocks.start, view)
        if entry.files is not files:  # retired meanwhile: the kernel may read these files
            self._cache.room.give_back(entry, length, freed=False)
        elif sums is not None and entry.about.etag == about.etag:
            self._cache.publish(entry, blocks.start, sums)
        else:  # the disk refused it, or it is another version since
            freed = await self._offload.disk(block_io.take_out, files, about, blocks)
            self._cache.room.give_back(entry, length, freed)

    async def shrink(self) -> None:
        """Have the cache within its limit, which may have become lower."""
        await self._make_room(None, 0)

    async def free_disk(self, length: int) -> bool:
        """Have `length` bytes of the disk for others than the cache, which leaves the free share.
        Objects are evicted for that. Returns whether there are so many."""
        spare_bytes = self._cache.index.spare_bytes()
        if spare_bytes is None or spare_bytes >= length:
            return spare_bytes is not None
        if not await self._make_room(None, length):
            return False
        self._cache.index.used_bytes -= pages(length)
        return True

    async def _make_room(self, entry: CachedObject | None, length: int) -> bool:
        has_room = False
        async with self._room:
            with trio.CancelScope(shield=True):
                has_room = await self._cache.room.make(self._offload, entry, length)
        return has_room
