"""Eviction: the limit of the cache holds before each write, because victims make room for it.

Whole closed objects go first, least recently used first. Then go the oldest blocks of open objects,
except blocks that programs have waited for (`CachedObject.kept`). Such a block is DYING until its
hole is made: it cannot be read, nor fetched again. Victims are counted until they are removed. If
the room is still too small, the new bytes are not stored. Then only their buffer has them, and
readers advance without a disk.
"""

import contextlib
from collections.abc import Callable, Mapping

from ckptfs._daemon.cache import block_io, object_dir
from ckptfs._daemon.cache.cache_dir import warn
from ckptfs._daemon.cache.cached_object import ABSENT, DYING, ON_DISK, CachedObject
from ckptfs._daemon.cache.index import Index
from ckptfs._daemon.cache.object_dir import NO_FILES, Files, folder_bytes, pages
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import block_length

_Block = tuple[CachedObject, int]
"""An object and the index of its block."""


class Room:
    """Makes room among the objects that `index` counts. `opened` has the open ones, and `held`
    keeps one of them open in a context."""

    def __init__(
        self,
        index: Index,
        opened: Mapping[str, CachedObject],
        held: Callable[[CachedObject], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._index = index
        self._opened = opened
        self._held = held

    async def make(self, offload: Offload, entry: CachedObject | None, length: int) -> bool:
        """Reserve room on the disk for `length` more bytes of `entry`, or only reach the limit.

        The caller makes one call at a time, and does not cancel it.

        Returns:
            Whether the bytes may be written. Those that are not published are for `give_back`.
        """
        created = entry if entry is not None and entry.files is NO_FILES else None
        wanted_bytes = pages(length) + (folder_bytes(created.size) if created else 0)
        spare_bytes = self._index.spare_bytes()
        if spare_bytes is None or (entry is not None and entry.unreliable):
            return False
        goal_bytes = self._evict_closed(wanted_bytes, spare_bytes)
        folders = dict(self._index.trash)
        gone = await self._index.delete(offload.disk, folders) if folders else []
        freed_bytes = sum(folders[folder] for folder in gone)
        blocks = self._choose_blocks(goal_bytes - sum(folders.values()))
        if freed_bytes + await self._punch(offload, blocks) < goal_bytes:
            return False
        self._index.used_bytes += wanted_bytes
        if created is None or await self._create(offload, created):
            return True
        self._index.used_bytes -= wanted_bytes
        return False

    def _evict_closed(self, wanted_bytes: int, spare_bytes: int) -> int:
        """Put closed objects into the trash. Returns the bytes that have to be freed, which may be
        more than the trash has."""
        trash_bytes = sum(self._index.trash.values())
        while True:
            goal_bytes = max(wanted_bytes - spare_bytes, self._index.excess(wanted_bytes))
            if trash_bytes >= goal_bytes or not self._index.closed:
                return goal_bytes
            digest, stored = next(iter(self._index.closed.items()))
            try:
                path = self._index.evict(digest)
            except OSError:
                return goal_bytes
            if path is not None:  # otherwise another process has removed it
                trash_bytes += stored.bytes
                self._index.evicted_objects += 1
                self._index.evicted_bytes += stored.bytes

    def _choose_blocks(self, missing_bytes: int) -> list[_Block]:
        """Blocks of open objects, which are DYING from now on."""
        chosen: list[_Block] = []
        while missing_bytes > 0 and (victim := self._fullest_open()) is not None:
            index = victim.oldest.popleft()
            if victim.state[index] in ON_DISK:
                victim.renew(index)
                victim.state[index] = DYING
                victim.memory.pop(index, None)
                chosen.append((victim, index))
                missing_bytes -= pages(block_length(index, victim.size))
                self._index.evicted_bytes += pages(block_length(index, victim.size))
        return chosen

    def _fullest_open(self) -> CachedObject | None:
        # Where a hole could not be made, there is no point in trying again.
        candidates = (
            e for e in self._opened.values() if not (e.passthroughs or e.kept or e.dead_bytes)
        )
        fullest = max(candidates, key=lambda entry: len(entry.oldest), default=None)
        return fullest if fullest and fullest.oldest else None

    async def _punch(self, offload: Offload, blocks: list[_Block]) -> int:
        """Make holes of blocks, as far as the disk permits it. Returns the freed bytes."""
        if not blocks:
            return 0
        freed_bytes = 0
        with contextlib.ExitStack() as held:
            for victim in {victim for victim, _ in blocks}:
                held.enter_context(self._held(victim))
            outcomes = await offload.disk(_take_out_all, blocks)
            for (victim, index), is_gone in zip(blocks, outcomes, strict=True):
                victim.state[index] = ABSENT
                victim.sums[index] = 0
                length = block_length(index, victim.size)
                self.give_back(victim, length, is_gone)  # the map does not have it any more
                freed_bytes += pages(length) if is_gone else 0
        return freed_bytes

    async def _create(self, offload: Offload, entry: CachedObject) -> bool:
        """Make the folder of an object. Returns whether the disk has permitted it."""
        files = await offload.disk(self._new_folder, entry)
        if files is None:
            entry.bury(folder_bytes(entry.size))
            self._index.used_bytes += entry.dead_bytes
        entry.files = files or NO_FILES
        return entry.files is not NO_FILES

    def _new_folder(self, entry: CachedObject) -> Files | None:
        """Blocking. None: the folder could be neither made nor removed."""
        root = self._index.root
        try:
            return object_dir.create(root.folder(entry.digest), entry.about)
        except OSError as error:
            warn(f"make a folder for {entry.about.key.path}", error)
        try:
            root.remove(entry.digest)
        except OSError:
            return None
        return NO_FILES

    def give_back(self, entry: CachedObject, length: int, freed: bool) -> None:
        """Take in the outcome of `take_out` of blocks of `length` bytes together."""
        if freed:
            self._index.used_bytes -= pages(length)
        else:
            entry.bury(length)


def _take_out_all(blocks: list[_Block]) -> list[bool]:
    """Blocking. Returns for each block whether its space is free."""
    return [
        block_io.take_out(entry.files, entry.about, range(index, index + 1))
        for entry, index in blocks
    ]
