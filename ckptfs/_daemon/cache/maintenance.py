"""Maintenance of the cache as a whole: listing, verification and eviction.

It runs beside readers, in small steps. One thread at a time works for all these tasks together
(`Offload.upkeep`), and the event loop has its turn after each few objects. Open objects stay as
they are, except that damaged blocks are dropped, as a read would drop them.

**A check** reads objects without opening them in the cache, so it does not change the order of
their use. The event loop compares each damaged block once more, and drops it only if it is still
the block that was read.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import trio

from ckptfs._daemon.cache import block_io, object_dir
from ckptfs._daemon.cache.block_io import Block
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import ON_DISK, CachedObject
from ckptfs._daemon.cache.jobs import CacheJob
from ckptfs._daemon.cache.object_dir import About, Origin, Stored
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import Pace
from ckptfs._model.blocks import BLOCK_BYTES, block_length
from ckptfs._model.protocol.replies import CachedCheckpoint, CachedFile, DamagedFile

_STEP = 1000
"""Objects after which the event loop has its turn: some 2 ms."""
_FOLDERS = 64
"""Folders that a thread reads or deletes at once, and blocks (64 MiB) that it checks."""
_DROPS = 16
"""Damaged blocks after which the event loop has its turn: each is a hole to be punched."""

Chosen = Callable[[Origin], bool]
T = TypeVar("T")


class Goal(NamedTuple):
    """The goal of `Upkeep.collect`: to free so many bytes (None: all it can), of what was used
    last before that time."""

    free: int | None
    before_s: float


class Upkeep:
    """Maintenance tasks on `cache`."""

    def __init__(self, cache: Cache, offload: Offload) -> None:
        self._cache = cache
        self._lane = offload.upkeep

    # -- listing

    async def chosen(self, chosen: Chosen) -> list[tuple[str, Stored]]:
        """The chosen objects: closed ones, least recently used first, then open ones."""
        found: list[tuple[str, Stored]] = []
        for part in _parts(self._cache.contents(), _STEP):
            found += [each for each in part if chosen(each[1].origin)]
            await trio.lowlevel.checkpoint()
        return found

    async def list_checkpoints(
        self, job: CacheJob, chosen: Chosen, attached: "dict[str, bool]"
    ) -> None:
        """Each checkpoint, most recently used first. `attached`: names of those that are, and
        whether they are pinned."""
        found = await self.chosen(chosen)
        await self._tell_sums(job, found, attached)
        job.files = len(found)

    async def _tell_sums(
        self, job: CacheJob, objects: list[tuple[str, Stored]], attached: "dict[str, bool]"
    ) -> None:
        sums: dict[tuple[str, int], CachedCheckpoint] = {}
        for part in _parts(objects, _STEP):
            for digest, stored in part:
                one = _alone(stored, digest in self._cache.opened, attached)
                key = one.name, one.uid
                sums[key] = _together(sums[key], one) if key in sums else one
            await trio.lowlevel.checkpoint()
        for total in sorted(sums.values(), key=lambda each: -each.used):
            await job.found(total)

    async def list_files(self, job: CacheJob, chosen: Chosen) -> None:
        """Each file."""
        for part in _parts(await self.chosen(chosen), _FOLDERS):
            folders = [self._cache.index.root.folder(digest) for digest, _ in part]
            for (digest, stored), about in zip(
                part, await self._lane(_abouts, folders), strict=True
            ):
                if about is None:  # it is gone since, or will be found damaged
                    continue
                job.files += 1
                item = CachedFile(
                    uri=about.origin.uri,
                    uid=about.origin.uid,
                    path=about.origin.file_of(about.key),
                    bytes=stored.bytes,
                    cached=stored.data_bytes,
                    size=stored.size,
                    used=stored.used_s,
                    open=digest in self._cache.opened,
                )
                await job.found(item)

    # -- taking out

    async def collect(self, job: CacheJob, chosen: Chosen, goal: Goal) -> None:
        """Evict closed objects, least recently used first, and report their checkpoints."""
        planned_bytes = 0
        batch: dict[Path, Stored] = {}
        gone: list[tuple[str, Stored]] = []
        for digest, stored in await self.chosen(chosen):
            if digest in self._cache.opened:
                job.open_files += 1
                job.open_bytes += stored.bytes
                continue
            enough = goal.free is not None and planned_bytes >= goal.free
            # If it was used meanwhile, the index has another entry.
            was_used = self._cache.index.closed.get(digest) != stored
            if enough or was_used or stored.used_s >= goal.before_s:
                continue
            if (folder := self._evict(digest)) is None:
                continue
            batch[folder] = stored
            planned_bytes += stored.bytes
            if len(batch) == _FOLDERS:
                gone += await self._delete(job, batch)
                batch = {}
        gone += await self._delete(job, batch)
        await self._tell_sums(job, gone, {})

    async def _delete(self, job: CacheJob, batch: dict[Path, Stored]) -> list[tuple[str, Stored]]:
        gone = [batch[folder] for folder in await self._cache.index.delete(self._lane, batch)]
        job.files += len(gone)
        job.freed += sum(stored.bytes for stored in gone)
        return [("", stored) for stored in gone]

    # -- checking

    async def verify(self, job: CacheJob, chosen: Chosen, rate: int) -> None:
        """Check each block, at most `rate` bytes per second (0: no limit), and drop the damaged
        ones."""
        objects = await self.chosen(chosen)
        job.all = sum(stored.data_bytes for _, stored in objects)
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        pace = Pace(rate, _FOLDERS)
        for digest, stored in objects:
            before = job.done
            entry = self._cache.opened.get(digest)
            if entry is not None:
                blocks = [(i, entry.sums[i]) for i, s in enumerate(entry.state) if s in ON_DISK]
                bad = await self._check(job, digest, entry.about, blocks, buffer, pace)
                if bad is not None:
                    await self._drop(job, entry, entry.about, bad)
            elif self._cache.index.closed.get(digest) == stored:
                await self._verify_closed(job, digest, stored, buffer, pace)
            job.files += 1
            job.done = before + stored.data_bytes

    async def _verify_closed(
        self, job: CacheJob, digest: str, stored: Stored, buffer: memoryview, pace: Pace
    ) -> None:
        try:
            about, sums = await self._lane(
                block_io.read_folder, self._cache.index.root.folder(digest)
            )
        except (OSError, ValueError) as error:
            await self._drop_folder(job, digest, stored, error)
            return
        blocks = [(index, checksum) for index, checksum in enumerate(sums) if checksum]
        bad = await self._check(job, digest, about, blocks, buffer, pace)
        if not bad or (
            self._cache.index.closed.get(digest) is None and digest not in self._cache.opened
        ):
            return
        entry = self._cache.open(about.key)  # a reader may have opened it meanwhile
        try:
            await self._drop(job, entry, about, bad)
        finally:
            self._cache.close(entry)

    async def _check(
        self,
        job: CacheJob,
        digest: str,
        about: About,
        blocks: list[Block],
        buffer: memoryview,
        pace: Pace,
    ) -> list[Block] | None:
        """The damaged blocks; None: the object is gone."""
        bad: list[Block] = []
        for part in _parts(blocks, pace.blocks_max):
            length = sum(block_length(index, about.key.size) for index, _ in part)
            await pace.wait(length)
            folder = self._cache.index.root.folder(digest)
            try:
                suspects = await self._lane(block_io.damaged, folder, about, part, buffer)
                # A block may just have been taken out, and stored anew, when it was read.
                bad += await self._lane(block_io.damaged, folder, about, suspects, buffer)
            except OSError:
                return None
            job.done += length
        return bad

    async def _drop(
        self, job: CacheJob, entry: CachedObject, about: About, bad: list[Block]
    ) -> None:
        if entry.about.etag != about.etag:
            return  # another version by now
        dropped = 0
        for part in _parts(bad, _DROPS):
            for index, checksum in part:
                if entry.state[index] in ON_DISK and entry.sums[index] == checksum:
                    self._cache.loaded(entry, index, checksum, good=False)
                    dropped += 1
                    job.freed += block_length(index, entry.size)
            await trio.lowlevel.checkpoint()
        if dropped:
            reason = "it does not have the bytes that were written, or cannot be read"
            path = about.origin.file_of(about.key)
            item = DamagedFile(uri=about.origin.uri, path=path, blocks=dropped, reason=reason)
            await job.found(item)

    def _evict(self, digest: str) -> Path | None:
        """The folder to delete; None: there is none, or the disk refuses, and it stays."""
        try:
            return self._cache.index.evict(digest)
        except OSError:
            return None

    async def _drop_folder(
        self, job: CacheJob, digest: str, stored: Stored, error: Exception
    ) -> None:
        if self._cache.index.closed.get(digest) != stored:
            return  # it is gone by now, or in use, for which it was whole
        if (folder := self._evict(digest)) is not None:
            gone = await self._cache.index.delete(self._lane, [folder])
            job.freed += stored.bytes if gone else 0
        await job.found(DamagedFile(uri=stored.origin.uri, path="", blocks=0, reason=str(error)))


def _alone(stored: Stored, is_open: bool, attached: "dict[str, bool]") -> CachedCheckpoint:
    """An object as the only one of its checkpoint."""
    origin = stored.origin
    return CachedCheckpoint(
        name=origin.name,
        uri=origin.uri,
        uid=origin.uid,
        files=1,
        open_files=int(is_open),
        bytes=stored.bytes,
        cached=stored.data_bytes,
        size=origin.size,
        used=stored.used_s,
        attached=origin.name in attached,
        pinned=attached.get(origin.name, False),
    )


def _together(one: CachedCheckpoint, other: CachedCheckpoint) -> CachedCheckpoint:
    """The sum of two parts of a checkpoint, which was used when the later part was."""
    return msgspec.structs.replace(
        max(other, one, key=lambda each: each.used),
        files=one.files + other.files,
        open_files=one.open_files + other.open_files,
        bytes=one.bytes + other.bytes,
        cached=one.cached + other.cached,
    )


def _parts(items: "list[T]", length: int) -> Iterator["list[T]"]:
    return (items[start : start + length] for start in range(0, len(items), length))


def _abouts(folders: Iterable[Path]) -> list[About | None]:
    """Blocking."""
    found: list[About | None] = []
    for folder in folders:
        found.append(None)
        with suppress(OSError, ValueError):
            found[-1] = object_dir.read_about(folder)
    return found
