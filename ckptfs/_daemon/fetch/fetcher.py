"""The fetcher, between readers, cache and store. It fetches absent blocks that readers wait for.

The parts of the package:

- `remote_file`: the state of a file;
- `spans`: single flight, and the life of a span;
- `transfers`: the requests, with `hedging`, `flow_control` and `deadlines`;
- `scheduler`: the slots and the bytes in flight;
- `version_checks`: the version checks;
- `retry`: the retries, and the stores that do not answer;
- `readahead`: the blocks that will be wanted next;
- `failed_reads`: the reads that fail at once.

A read ends with its bytes, or with an error when the store gave no new byte for as long as the read
deadline (`deadlines`). A reader that joined an older span's failure tries once more. A read that
has failed by its deadline fails at once when the kernel repeats it (`failed_reads`).
"""

import contextlib
import resource
import weakref
from collections import Counter
from collections.abc import Generator
from typing import TYPE_CHECKING

import trio

from ckptfs._daemon.cache import block_io
from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import (
    DOUBTED,
    DYING,
    ON_DISK,
    STORED,
    VERIFIED,
    CachedObject,
)
from ckptfs._daemon.cache.page_copies import Found, Views
from ckptfs._daemon.fetch.limits import limits_of
from ckptfs._daemon.fetch.readahead import Readahead
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._daemon.fetch.spans import FetchParts, Fill, Spans
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.quotas import share_of
from ckptfs._daemon.usage.counters import Usage
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of, runs
from ckptfs._model.config import Config
from ckptfs.errors import CacheError, CkptfsError, LimitExceeded, StoreTimeout

if TYPE_CHECKING:
    from ckptfs._store.base import Store

_PASSTHROUGH_WAIT_S = 1.0
"""The longest wait of an open for the version check without which the kernel must not read the file
by itself: a few round trips."""
_SECURE_TRIES = 3
"""Tries of `Fetcher.secure`. A damaged block is fetched again, and a full cache may evict it."""
_CHECKED = frozenset((VERIFIED, DOUBTED))
"""The states of blocks on the disk that were checked since the object was opened."""


class Fetcher:
    """Reads files through the cache. All methods belong to the event loop.

    Attributes:
        scheduler: The slots and the bytes in flight.
        spans: The spans that are under way.
        transfers: The requests.
        window_bytes_max: The largest window of readahead.
    """

    def __init__(
        self, config: Config, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self._parts = parts = FetchParts(config, cache, offload, nursery)
        self._cache = cache
        self.scheduler = parts.scheduler
        self.transfers = parts.transfers
        self.spans = Spans(config, parts)
        self._apply(config)
        self._files_of: Counter[int] = Counter()  # open files by user
        descriptors_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files_of_max = share_of(descriptors_max // 2)  # each takes two
        # The stores whose last large file was read as a whole: most likely the next one will be,
        # too.
        self._read_whole: weakref.WeakSet[Store] = weakref.WeakSet()

    def _apply(self, config: Config) -> None:
        self._deadline_s = config.read_deadline_s
        # A window that fills the cache would evict blocks that were not read yet.
        window_bytes = limits_of(config).window_bytes
        share = config.cache_bytes_max // 4 if config.cache_bytes_max else window_bytes
        self.window_bytes_max = min(window_bytes, share)

    async def configure(self, config: Config) -> None:
        """Apply settings that have changed, also those of the cache. Returns when the cache is
        within its limit."""
        self._apply(config)
        self.spans.configure(config)
        limits = limits_of(config)
        self.scheduler.resize(limits.connections, limits.in_flight_bytes)
        self._parts.offload.data.resize(limits.connections)
        self._cache.resize(
            config.cache_bytes_max, config.cache_free_share_min, limits.in_flight_bytes
        )
        await self._parts.writer.shrink()

    async def free_disk(self, length: int) -> bool:
        """See ``writer.Storing.free_disk``."""
        return await self._parts.writer.free_disk(length)

    # -- files

    def open(self, file: RemoteFile) -> None:
        """Make the file readable. Each call needs a `close`. Raises LimitExceeded."""
        opened = file.opened
        if opened.count:
            opened.count += 1
            return
        if file.user is not None and self._files_of[file.user] >= self._files_of_max:
            raise LimitExceeded(
                f"{file.name}: uid {file.user} has {self._files_of_max} files open, the most for "
                "one user; close some, or raise the daemon's limit of descriptors (ulimit -n)"
            )
        opened.entry = self._cache.open(file.key, file.origin)
        opened.count = 1
        if file.user is not None:
            self._files_of[file.user] += 1
        eager = file.store in self._read_whole and not file.is_planned
        opened.readahead = Readahead(
            file.size, self.window_bytes_max, file.format.parts, eager=eager
        )
        file.format.reopened()
        self._parts.version_checks.opened(file)

    def close(self, file: RemoteFile) -> None:
        """Undo one `open`. Spans that are under way end by themselves."""
        opened = file.opened
        opened.count -= 1
        if not opened.count:
            if opened.readahead is not None and opened.readahead.was_eager_in_vain:
                self._read_whole.discard(file.store)
            file.failed_reads.clear()
            self._cache.close(file.entry)
            opened.entry = opened.readahead = None
            if file.user is not None:
                self._files_of -= Counter([file.user])  # zeros go

    @contextlib.contextmanager
    def opened(self, file: RemoteFile) -> Generator[None]:
        """Keep a file readable while the context lasts, or until its attachment is removed."""
        self.open(file)
        try:
            yield
        finally:
            if file.opened.count:
                self.close(file)

    # -- passthrough

    async def before_passthrough(self, file: RemoteFile) -> None:
        """Do the first check of a file whose blocks are all there and verified, as its first read
        would. If it fails, or takes long, the reads will do the check."""
        entry = file.entry
        if file.version.trusted or not entry.verified:
            return
        patience = trio.move_on_after(_PASSTHROUGH_WAIT_S)
        with self._cache.held(entry), patience, contextlib.suppress(CkptfsError):
            await self._parts.version_checks.learn(file, entry)

    def begin_passthrough(self, file: RemoteFile) -> CachedObject | None:
        """The blocks of the file, if they are complete and the kernel may read them by itself.

        Each success needs a `Cache.end_passthrough`.
        """
        entry, version = file.entry, file.version
        if not version.trusted or version.pin.etag != entry.about.etag:
            return None
        return entry if self._cache.begin_passthrough(entry) else None

    # -- reading

    def read_now(
        self, file: RemoteFile, offset: int, length: int, entry: CachedObject | None = None
    ) -> Views | None:
        """The bytes, if no wait is needed for them; else None. Valid until the next call.

        `entry` is the file's, for a caller that holds it while the file may be closed.
        """
        entry = entry or file.entry
        if not self._is_readable(file, entry, offset, length):
            return None
        return self._cache.reads.read_now(entry, offset, length)

    def find_now(self, file: RemoteFile, offset: int, length: int) -> Found | None:
        """As `read_now`, but the copies out of the page cache have still to run."""
        if not self._is_readable(file, file.entry, offset, length):
            return None
        return self._cache.reads.find_now(file.entry, offset, length)

    @staticmethod
    def _is_readable(file: RemoteFile, entry: CachedObject, offset: int, length: int) -> bool:
        version = file.version
        is_right = version.trusted and version.pin.etag == entry.about.etag
        return is_right and entry.readable(blocks_of(offset, length))

    async def read(self, file: RemoteFile, offset: int, length: int) -> Views:
        """The bytes [offset, offset + length), which must lie within the file; `length` >= 1.

        Raises the errors of a Store, at the latest when the store gave no new byte for as long as
        the read deadline.
        """
        entry = file.entry  # kept open, because a forced detach closes the file at any time
        waiting = self._parts.read_deadlines.waiting(file.store, self._deadline_s)
        with self._cache.held(entry), waiting:
            while True:
                await self._ensure(file, entry, blocks_of(offset, length), Priority.DEMAND)
                data = self.read_now(file, offset, length, entry)
                if data is None:
                    data = await self._load(entry, offset, length)
                if data is not None:
                    return data
        cause = f"; last: {file.health.cause}" if file.health.cause else ""
        error = StoreTimeout(f"{file.name}: no data within {self._deadline_s:g} s{cause}")
        if not file.health.failing:
            file.note(error)
        raise error

    @staticmethod
    def fail_again(file: RemoteFile, offset: int, length: int) -> None:
        """Raise StoreTimeout if a read of these bytes has just failed by its deadline, and they
        have not come since."""
        blocks = blocks_of(offset, length)
        error = file.failed_reads.of(file.entry.absent(blocks) if file.version.trusted else blocks)
        if error is not None:
            raise StoreTimeout(str(error))

    def overshoots(self, file: RemoteFile, offset: int, length: int) -> bool:
        """Whether some of these bytes are here, or on their way, and others are not."""
        blocks = blocks_of(offset, length)
        absent = file.entry.absent(blocks)
        missing = [i for i in absent if not self.spans.under_way(file.entry, [i])]
        return 0 < len(missing) < len(blocks)

    def access(
        self, file: RemoteFile, offset: int, length: int, usage: Usage | None = None
    ) -> None:
        """Start the spans that a read needs, and then those of its readahead.

        Ends the validity of what `read_now` returned. `usage` has the counters of the reader.
        """
        readahead = file.opened.readahead
        if file.health.changed or readahead is None:
            return
        entry = file.entry
        if needed := entry.absent(blocks_of(offset, length)):
            self.spans.want(file, entry, needed, Priority.DEMAND, usage)
        readahead.limit_window(self._parts.flow_controls.of(file.store).ahead_bytes_max)
        ahead = readahead.access(offset, length)
        if readahead.is_read_whole:
            self._read_whole.add(file.store)
        if not ahead:
            return
        if wanted := entry.absent(ahead):
            self.spans.want(file, entry, wanted, Priority.READAHEAD, usage)
        if cold := self._cache.cold(entry, ahead):
            entry.users += 1  # the file may be closed before the task starts
            self._parts.nursery.start_soon(self._check_ahead, entry, cold)

    async def _check_ahead(self, entry: CachedObject, cold: list[range]) -> None:
        """Read blocks into memory and check them, so that their readers need no thread."""
        try:
            for blocks in cold:
                if entry.users == 1:  # the last reader has gone
                    break
                await self._check_stored(entry, blocks)
        finally:
            self._cache.close(entry)

    async def _check_stored(self, entry: CachedObject, blocks: range) -> None:
        """Check blocks that are on the disk, and drop the damaged ones."""
        sums = entry.sums[blocks.start : blocks.stop]
        good = await self._parts.offload.disk(block_io.check, entry, blocks, sums)
        for index, checksum, is_good in zip(blocks, sums, good, strict=True):
            self._cache.loaded(entry, index, checksum, is_good)

    async def fetch(
        self, file: RemoteFile, blocks: range, priority: Priority = Priority.PREFETCH
    ) -> None:
        """Bring `blocks` of an open file into the cache, behind the bytes that readers wait for.

        Raises the errors of a Store. It raises StoreTimeout when the read deadline is over and the
        store has not even answered the first check. Each request then has that time, too.
        """
        entry = file.entry
        with self._cache.held(entry):
            if not file.version.trusted:
                await self._learn(file, entry)
            with self.spans.prefetching(entry, blocks):
                if not await self._ensure(file, entry, blocks, priority):
                    await self._ensure(file, entry, blocks, priority)

    async def secure(self, file: RemoteFile, priority: Priority) -> None:
        """Have all of an open file on the disk, and checked, behind what readers wait for.

        Raises the errors of a Store, and CacheError if the disk does not keep the file.
        """
        entry = file.entry
        blocks = range(len(entry.state))
        with self._cache.held(entry):
            for _ in range(_SECURE_TRIES):
                await self.fetch(file, blocks, priority)
                for span in self.spans.under_way(entry, blocks):  # a reader's, to be stored
                    await span.ended.wait()
                stored = (i for i in blocks if entry.state[i] == STORED)
                for run in runs(stored, block_io.CHECK_BLOCKS):
                    await self._check_stored(entry, run)
                if _CHECKED.issuperset(entry.state):
                    return
        raise CacheError(
            f"{file.name}: the cache did not keep all of it; see the daemon's log, and check the "
            "cache's disk and how much room there is (ckptfs doctor)"
        )

    async def insert(self, file: RemoteFile, blocks: range, fill: Fill) -> int:
        """Bring the absent ones of `blocks` from another place than the store. Returns their bytes.

        The file is open, and its version is known. Raises what `fill` raises, and ObjectChanged.
        """
        entry = file.entry
        with self._cache.held(entry):
            if any(entry.state[i] == DYING for i in blocks):
                await self._parts.writer.until_no_hole()
            return await self.spans.insert(file, entry, blocks, fill)

    async def _learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """Do the first check. Bytes of other files do not move its deadline."""
        with trio.move_on_after(self._deadline_s):
            await self._parts.retry.run(file, lambda: self._parts.version_checks.learn(file, entry))
        if not file.version.trusted:
            error = StoreTimeout(
                f"{file.name}: no answer within {self._deadline_s:g} s; last: "
                f"{file.health.cause or 'none'}"
            )
            if not file.health.failing:
                file.note(error)
            raise error

    async def _ensure(
        self, file: RemoteFile, entry: CachedObject, blocks: range, priority: Priority
    ) -> bool:
        """Return when each block was there at some moment since the call.

        Returns:
            Whether that is so. False means that a span has failed for a reason that was not this
            call's.
        """
        if not file.version.trusted:
            await self._learn(file, entry)
        self._parts.version_checks.check_cached(
            file,
            entry,
            "in the second in which it was attached; attach the checkpoint again to see the new "
            "version",
        )
        if any(entry.state[i] == DYING for i in blocks):
            await self._parts.writer.until_no_hole()
        claims = self.spans.want(file, entry, entry.absent(blocks), priority)
        is_prefetch = priority is Priority.PREFETCH
        return all([await claim.wait(until_stored=is_prefetch) for claim in claims])

    async def _load(self, entry: CachedObject, offset: int, length: int) -> Views | None:
        """The bytes, checked, from memory or else from the disk; None if a block was lost
        meanwhile."""
        parts: Views = []
        for index in blocks_of(offset, length):
            base = index * BLOCK_BYTES
            start, stop = max(offset, base), min(offset + length, base + BLOCK_BYTES)
            if entry.readable(range(index, index + 1)) and (
                views := self._cache.reads.read_now(entry, start, stop - start)
            ):
                parts.append(memoryview(bytes(views[0])))  # the next block may take time
                continue
            if entry.state[index] not in ON_DISK:
                return None
            checksum = entry.sums[index]
            data = await self._parts.offload.disk(block_io.load, entry, index, checksum)
            self._cache.loaded(entry, index, checksum, data is not None)
            if data is None:
                return None
            parts.append(memoryview(data)[start - base : stop - base])
        return parts
