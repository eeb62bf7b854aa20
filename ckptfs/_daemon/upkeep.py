"""What is done to the cache as a whole: listing, checking, and taking things out.

All of it goes on beside readers, in small steps: one thread at a time works for all these tasks
together (`Upkeep.thread`), and the event loop has its turn after each few objects. Nothing is
touched that somebody has open, but that blocks which turn out damaged are dropped, as a reader
would have them dropped.

**Checking** reads objects without opening them in the cache, so that it is no use of them and their
order stays. What is found damaged is looked at once more in the event loop: it is dropped only if
the block is still the one that was read.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import trio

from ckptfs._daemon import cachedir, check
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import ON_DISK, CachedObject
from ckptfs._daemon.cachedir import About, Origin, Stored
from ckptfs._daemon.cachetask import CacheTask
from ckptfs._daemon.check import Block
from ckptfs._daemon.offload import Offload
from ckptfs._model.blocks import BLOCK_BYTES, block_length
from ckptfs._model.replies import CachedCheckpoint, CachedFile, DamagedFile

_STEP = 1000
"""Objects after which the event loop has its turn: some 2 ms."""
_FOLDERS = 64
"""Folders that a thread reads or deletes at once, and blocks (64 MiB) that it checks."""
_DROPS = 16
"""Damaged blocks after which the event loop has its turn: each is a hole to be punched."""

Chosen = Callable[[Origin], bool]
P = ParamSpec("P")
T = TypeVar("T")


class _Sum:
    """What a checkpoint has in the cache."""

    def __init__(self) -> None:
        self.files = self.open_files = self.bytes = self.cached = self.size = 0
        self.used_s = 0.0
        self.uri = ""

    def add(self, stored: Stored, is_open: bool) -> None:
        self.files += 1
        self.open_files += is_open
        self.bytes += stored.bytes
        self.cached += stored.data_bytes
        if stored.used_s >= self.used_s:
            self.used_s, self.uri = stored.used_s, stored.origin.uri
            self.size = stored.origin.size

    def told(self, name: str, uid: int, attached: "dict[str, bool]") -> CachedCheckpoint:
        return CachedCheckpoint(
            name=name,
            uri=self.uri,
            uid=uid,
            files=self.files,
            open_files=self.open_files,
            bytes=self.bytes,
            cached=self.cached,
            size=self.size,
            used=self.used_s,
            attached=name in attached,
            pinned=attached.get(name, False),
        )


class Goal(NamedTuple):
    """What `Upkeep.collect` is after: to free so many bytes (None: all it can), of what was used
    last before that time."""

    free: int | None
    before_s: float


class Upkeep:
    """What can be done to `cache`."""

    def __init__(self, cache: Cache, offload: Offload) -> None:
        self._cache = cache
        self._offload = offload
        self._one_thread = trio.CapacityLimiter(1)

    async def thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run disk IO."""
        async with self._one_thread:
            return await self._offload.disk(function, *args, **kwargs)

    # -- listing

    async def chosen(self, chosen: Chosen) -> list[tuple[str, Stored]]:
        """The objects that are chosen, least recently used first, and then what is open."""
        found: list[tuple[str, Stored]] = []
        for part in _parts(self._cache.contents(), _STEP):
            found += [each for each in part if chosen(each[1].origin)]
            await trio.lowlevel.checkpoint()
        return found

    async def list_checkpoints(
        self, task: CacheTask, chosen: Chosen, attached: "dict[str, bool]"
    ) -> None:
        """Each checkpoint, most recently used first. `attached`: names of those that are, and
        whether they are pinned."""
        found = await self.chosen(chosen)
        await self._tell_sums(task, found, attached)
        task.files = len(found)

    async def _tell_sums(
        self, task: CacheTask, objects: list[tuple[str, Stored]], attached: "dict[str, bool]"
    ) -> None:
        sums: dict[tuple[str, int], _Sum] = {}
        for part in _parts(objects, _STEP):
            for digest, stored in part:
                key = stored.origin.name, stored.origin.uid
                sums.setdefault(key, _Sum()).add(stored, self._cache.is_open(digest))
            await trio.lowlevel.checkpoint()
        for (name, uid), total in sorted(sums.items(), key=lambda each: -each[1].used_s):
            await task.found(total.told(name, uid, attached))

    async def list_files(self, task: CacheTask, chosen: Chosen) -> None:
        """Each file."""
        for part in _parts(await self.chosen(chosen), _FOLDERS):
            folders = [self._cache.folder(digest) for digest, _ in part]
            for (digest, stored), about in zip(
                part, await self.thread(_abouts, folders), strict=True
            ):
                if about is None:  # it is gone since, or will be found damaged
                    continue
                task.files += 1
                item = CachedFile(
                    uri=about.origin.uri,
                    uid=about.origin.uid,
                    path=about.origin.file_of(about.key),
                    bytes=stored.bytes,
                    cached=stored.data_bytes,
                    size=stored.size,
                    used=stored.used_s,
                    open=self._cache.is_open(digest),
                )
                await task.found(item)

    # -- taking out

    async def collect(self, task: CacheTask, chosen: Chosen, goal: Goal) -> None:
        """Take out objects that nobody has open, least recently used first, and tell of which
        checkpoints they were."""
        planned_bytes = 0
        batch: list[tuple[Path, Stored]] = []
        gone: list[tuple[str, Stored]] = []
        for digest, stored in await self.chosen(chosen):
            if self._cache.is_open(digest):
                task.open_files += 1
                task.open_bytes += stored.bytes
                continue
            enough = goal.free is not None and planned_bytes >= goal.free
            # Another one: it was used meanwhile.
            if enough or stored.used_s >= goal.before_s or self._cache.closed(digest) != stored:
                continue
            if (folder := self._evict(digest)) is None:
                continue
            batch.append((folder, stored))
            planned_bytes += stored.bytes
            if len(batch) == _FOLDERS:
                gone += await self._delete(task, batch)
                batch = []
        gone += await self._delete(task, batch)
        await self._tell_sums(task, gone, {})

    async def _delete(
        self, task: CacheTask, batch: list[tuple[Path, Stored]]
    ) -> list[tuple[str, Stored]]:
        if not batch:
            return []
        outcomes = await self.thread(_delete_all, [folder for folder, _ in batch])
        gone: list[tuple[str, Stored]] = []
        for (folder, stored), is_gone in zip(batch, outcomes, strict=True):
            self._cache.deleted(folder, is_gone)
            if is_gone:
                task.files += 1
                task.freed += stored.bytes
                gone.append(("", stored))
        return gone

    # -- checking

    async def verify(self, task: CacheTask, chosen: Chosen, rate: int) -> None:
        """Check each block, at most `rate` bytes per second (0: no limit), and drop the damaged
        ones."""
        objects = await self.chosen(chosen)
        task.all = sum(stored.data_bytes for _, stored in objects)
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        pace = _Pace(rate)
        for digest, stored in objects:
            before = task.done
            entry = self._cache.opened(digest)
            if entry is not None:
                blocks = [(i, entry.sums[i]) for i, s in enumerate(entry.state) if s in ON_DISK]
                bad = await self._check(task, digest, entry.about, blocks, buffer, pace)
                if bad is not None:
                    await self._drop(task, entry, entry.about, bad)
            elif self._cache.closed(digest) == stored:
                await self._verify_closed(task, digest, stored, buffer, pace)
            task.files += 1
            task.done = before + stored.data_bytes

    async def _verify_closed(
        self, task: CacheTask, digest: str, stored: Stored, buffer: memoryview, pace: "_Pace"
    ) -> None:
        try:
            about, sums = await self.thread(check.read_folder, self._cache.folder(digest))
        except (OSError, ValueError) as error:
            await self._drop_folder(task, digest, stored, error)
            return
        blocks = [(index, checksum) for index, checksum in enumerate(sums) if checksum]
        bad = await self._check(task, digest, about, blocks, buffer, pace)
        if not bad or (self._cache.closed(digest) is None and not self._cache.is_open(digest)):
            return
        entry = self._cache.open(about.key)  # by us, or by somebody else meanwhile
        try:
            await self._drop(task, entry, about, bad)
        finally:
            self._cache.close(entry)

    async def _check(
        self,
        task: CacheTask,
        digest: str,
        about: About,
        blocks: list[Block],
        buffer: memoryview,
        pace: "_Pace",
    ) -> list[Block] | None:
        """The damaged blocks; None: the object is gone."""
        bad: list[Block] = []
        for part in _parts(blocks, pace.blocks):
            length = sum(block_length(index, about.key.size) for index, _ in part)
            await pace.wait(length)
            folder = self._cache.folder(digest)
            try:
                suspects = await self.thread(check.damaged, folder, about, part, buffer)
                # It may just have been taken out, and be stored anew, when it was read.
                bad += await self.thread(check.damaged, folder, about, suspects, buffer)
            except OSError:
                return None
            task.done += length
        return bad

    async def _drop(
        self, task: CacheTask, entry: CachedObject, about: About, bad: list[Block]
    ) -> None:
        if entry.about.etag != about.etag:
            return  # another version by now
        dropped = 0
        for part in _parts(bad, _DROPS):
            for index, checksum in part:
                if entry.state[index] in ON_DISK and entry.sums[index] == checksum:
                    self._cache.loaded(entry, index, checksum, good=False)
                    dropped += 1
                    task.freed += block_length(index, entry.size)
            await trio.lowlevel.checkpoint()
        if dropped:
            reason = "it does not have the bytes that were written, or cannot be read"
            path = about.origin.file_of(about.key)
            item = DamagedFile(uri=about.origin.uri, path=path, blocks=dropped, reason=reason)
            await task.found(item)

    def _evict(self, digest: str) -> Path | None:
        """The folder to delete; None: there is none, or the disk refuses, and it stays."""
        try:
            return self._cache.evict(digest)
        except OSError:
            return None

    async def _drop_folder(
        self, task: CacheTask, digest: str, stored: Stored, error: Exception
    ) -> None:
        if self._cache.closed(digest) != stored:
            return  # it is gone, or in use, since: then it was whole
        if (folder := self._evict(digest)) is not None:
            gone = await self.thread(Cache.delete, folder)
            self._cache.deleted(folder, gone)
            task.freed += stored.bytes if gone else 0
        await task.found(DamagedFile(uri=stored.origin.uri, path="", blocks=0, reason=str(error)))


class _Pace:
    """Lets `rate` bytes pass in a second (0: no limit)."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._paid_s = trio.current_time()
        self.blocks = min(_FOLDERS, max(1, rate // 4 // BLOCK_BYTES)) if rate else _FOLDERS

    async def wait(self, length: int) -> None:
        """Until so many more may be read."""
        await trio.sleep_until(self._paid_s)
        if self._rate:
            self._paid_s = max(self._paid_s, trio.current_time()) + length / self._rate


def _parts(items: "list[T]", length: int) -> Iterator["list[T]"]:
    return (items[start : start + length] for start in range(0, len(items), length))


def _abouts(folders: Iterable[Path]) -> list[About | None]:
    """Blocking."""
    found: list[About | None] = []
    for folder in folders:
        found.append(None)
        with suppress(OSError, ValueError):
            found[-1] = cachedir.read_about(folder)
    return found


def _delete_all(folders: Iterable[Path]) -> list[bool]:
    """Blocking."""
    return [Cache.delete(folder) for folder in folders]
