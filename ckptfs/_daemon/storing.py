"""From a span's buffer to the disk: room first, so that the cache's limit holds, then the bytes."""

import contextlib
from typing import TYPE_CHECKING

import trio

from ckptfs._daemon import blockio
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import blocks_length

if TYPE_CHECKING:
    from ckptfs._daemon.buffers import Buffer


class Storing:
    """Writes to the cache. One reservation at a time: `_room` is held from `Room.reserve` to
    `Room.settle`."""

    def __init__(self, cache: Cache, offload: Offload) -> None:
        self._cache = cache
        self._offload = offload
        self._room = trio.Lock()

    async def until_no_hole(self) -> None:
        """Return when no block is DYING that is now: holes are made under this lock."""
        async with self._room:
            pass

    async def store(
        self, entry: CachedObject, blocks: range, buffer: "Buffer[CachedObject]"
    ) -> None:
        """Write `blocks` from the beginning of `buffer`, with their checksums, and then the map.
        Whatever happens here, the readers have their bytes."""
        length = blocks_length(blocks, entry.size)
        if not await self._make_room(entry, length):
            return
        about = entry.about
        view = buffer.view[:length]
        sums = await self._offload.disk(blockio.write, entry, about, blocks.start, view)
        if sums is not None and entry.about.etag == about.etag:
            self._cache.publish(entry, blocks.start, sums)
        else:  # the disk refused it, or it is another version since
            freed = await self._offload.disk(blockio.take_out, entry, blocks)
            self._cache.room.give_back(entry, length, freed)

    async def shrink(self) -> None:
        """Have the cache within its limit, which may have become lower."""
        await self._make_room(None, 0)

    async def _make_room(self, entry: CachedObject | None, length: int) -> bool:
        """Whether `length` bytes of `entry` may be written to the cache; they are reserved then."""
        async with self._room:
            reservation = self._cache.room.reserve(entry, length)
            if not reservation.needs_work:
                return reservation.stores
            victims = {victim for victim, _ in reservation.blocks}
            with contextlib.ExitStack() as held, trio.CancelScope(shield=True):
                for victim in victims:
                    held.enter_context(self._cache.held(victim))
                files = await self._offload.disk(self._cache.room.make_room, reservation)
                self._cache.room.settle(reservation, files)
            return reservation.stores
