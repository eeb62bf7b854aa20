"""Fetching: between readers, cache and store. What is absent is fetched, and readers wait for it.

The parts: `spans` (single flight, the life of a span), `transfers` (requests), `versions` (checks),
`outages` (retries, dark stores), `storing` (to the disk), `slots` (places), `readahead` (what will
be wanted next), `remote` (the state of a file).

A read ends with its bytes, or with an error when the store gave no new byte for as long as the read
deadline (`liveness`). A reader that joined an older span's failure tries once more.
"""

import contextlib
import resource
import weakref
from collections import Counter
from collections.abc import Generator
from typing import TYPE_CHECKING

import trio

from ckptfs._daemon import blockio
from ckptfs._daemon.activity import Usage
from ckptfs._daemon.cache import Cache, Views
from ckptfs._daemon.cached import ABSENT, DYING, ON_DISK, CachedObject
from ckptfs._daemon.flow import Flows
from ckptfs._daemon.liveness import Liveness
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.readahead import Readahead
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority, Slots, SlotsInUse
from ckptfs._daemon.spans import Fill, Spans
from ckptfs._daemon.storing import Storing
from ckptfs._daemon.transfers import Transfers
from ckptfs._daemon.users import share_of
from ckptfs._daemon.versions import Versions
from ckptfs._model.blocks import BLOCK_BYTES, blocks_of
from ckptfs._model.config import Config
from ckptfs.errors import CkptfsError, LimitExceeded, StoreTimeout, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._store.base import Store

_LEND_WAIT_S = 1.0
"""Longest that an open waits for the version check without which the kernel must not read the file
by itself: a few round trips."""


class Fetcher:
    """Reads files through the cache. Spans run in `nursery`; all methods belong to the event
    loop."""

    def __init__(
        self, config: Config, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self._cache = cache
        self._offload = offload
        self._nursery = nursery
        self._flows = Flows()
        self._liveness = Liveness()
        places = config.connections_max, config.in_flight_bytes_max
        slots = self._slots = Slots(*places, nursery, self._flows)
        self._outages = Outages(slots)
        self._versions = Versions(cache, offload, self._outages, allow_other=config.allow_other)
        self._storing = Storing(cache, offload)
        self._transfers = Transfers(
            offload, slots, cache.buffers, self._outages, nursery, self._flows, self._liveness
        )
        self._spans = Spans(
            config,
            cache,
            slots,
            self._outages,
            self._versions,
            self._transfers,
            self._storing,
            nursery,
            self._flows,
        )
        self._take_in(config)
        self._files_of: Counter[int] = Counter()  # open ones, by user
        descriptors_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._files_of_max = share_of(descriptors_max // 2)  # each takes two
        # Stores whose last large file was read as a whole: most likely the next one will be, too.
        self._read_whole: weakref.WeakSet[Store] = weakref.WeakSet()

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from stores, since the daemon was started."""
        return self._spans.fetched_bytes

    @property
    def fetched_spans(self) -> int:
        """In how many spans they came."""
        return self._spans.fetched_spans

    def slots(self) -> SlotsInUse:
        """What is in flight, and how much waits for a place."""
        return self._slots.in_use()

    @property
    def hedged_requests(self) -> int:
        """How many requests were made a second time because the first one was slow."""
        return self._transfers.hedged_requests

    def _take_in(self, config: Config) -> None:
        self._deadline_s = config.read_deadline_s
        # A window that fills the cache would push out what was not read yet.
        share = config.cache_bytes_max // 4 if config.cache_bytes_max else config.window_bytes_max
        self.window_bytes_max = min(config.window_bytes_max, share)

    async def configure(self, config: Config) -> None:
        """Take in settings that have changed, the cache's too; returns when its limit holds."""
        self._take_in(config)
        self._spans.configure(config)
        self._slots.resize(config.connections_max, config.in_flight_bytes_max)
        self._offload.resize(config.connections_max)
        self._cache.resize(
            config.cache_bytes_max, config.cache_free_share_min, config.in_flight_bytes_max
        )
        await self._storing.shrink()

    # -- files

    def open(self, file: RemoteFile) -> None:
        """Make the file readable; each call needs a `close`. Raises LimitExceeded."""
        if file.opens:
            file.opens += 1
            return
        if file.user is not None and self._files_of[file.user] >= self._files_of_max:
            raise LimitExceeded(
                f"{file.name}: uid {file.user} has {self._files_of_max} files open, the most for "
                "one user; close some, or raise the daemon's limit of descriptors (ulimit -n)"
            )
        file.entry = self._cache.open(file.key, file.origin)
        file.opens = 1
        if file.user is not None:
            self._files_of[file.user] += 1
        eager = file.store in self._read_whole and not file.is_planned
        file.readahead = Readahead(file.pin.size, self.window_bytes_max, file.parts, eager=eager)
        file.recognised = file.parts is not None
        self._versions.opened(file)

    def close(self, file: RemoteFile) -> None:
        """Undo one `open`. Spans that are under way end by themselves."""
        file.opens -= 1
        if not file.opens:
            if file.readahead is not None and file.readahead.was_eager_in_vain:
                self._read_whole.discard(file.store)
            self._cache.close(file.entry)
            file.entry = file.readahead = None
            if file.user is not None:
                self._files_of -= Counter([file.user])  # zeros go

    @contextlib.contextmanager
    def opened(self, file: RemoteFile) -> Generator[None]:
        """Keep a file readable while the context lasts, or until its attachment is removed."""
        self.open(file)
        try:
            yield
        finally:
            if file.opens:
                self.close(file)

    async def before_lending(self, file: RemoteFile) -> None:
        """Do the first check of a file whose bytes are all there and verified, as its first read
        would. If it fails, or takes long, the reads will see to it."""
        entry = file.entry
        if file.trusted or not entry.verified:
            return
        patience = trio.move_on_after(_LEND_WAIT_S)
        with self._cache.held(entry), patience, contextlib.suppress(CkptfsError):
            await self._versions.learn(file, entry)

    def lend(self, file: RemoteFile) -> CachedObject | None:
        """Its object, if that is complete and somebody else may read it (see `Cache.lend`)."""
        entry = file.entry
        if not file.trusted or file.pin.etag != entry.about.etag or not self._cache.lend(entry):
            return None
        return entry

    # -- reading

    def read_now(self, file: RemoteFile, offset: int, length: int) -> Views | None:
        """The bytes, if they can be had without waiting. Valid until the next call."""
        return self._read_now(file, file.entry, offset, length)

    def _read_now(
        self, file: RemoteFile, entry: CachedObject, offset: int, length: int
    ) -> Views | None:
        if not file.trusted or file.pin.etag != entry.about.etag:
            return None
        if not entry.readable(blocks_of(offset, length)):
            return None
        return self._cache.read_now(entry, offset, length)

    async def read(self, file: RemoteFile, offset: int, length: int) -> Views:
        """The bytes [offset, offset + length), which must lie within the file; `length` >= 1.

        Raises what a Store raises, at the latest when the store gave no new byte for as long as the
        read deadline.
        """
        entry = file.entry  # held, because a forced detach closes the file at any time
        waiting = self._liveness.waiting(file.store, self._deadline_s)
        with self._cache.held(entry), waiting:
            while True:
                await self._ensure(file, entry, blocks_of(offset, length), Priority.DEMAND)
                data = self._read_now(file, entry, offset, length)
                if data is None:
                    data = await self._load(entry, offset, length)
                if data is not None:
                    return data
        cause = f"; last: {file.cause}" if file.cause else ""
        error = StoreTimeout(f"{file.name}: no data within {self._deadline_s:g} s{cause}")
        if not file.failing:
            file.note(error)
        raise error

    def lacks(self, file: RemoteFile, offset: int, length: int) -> bool:
        """Whether some of these bytes are not on this node."""
        return bool(file.entry.absent(blocks_of(offset, length)))

    def overshoots(self, file: RemoteFile, offset: int, length: int) -> bool:
        """Whether some of these bytes are here, or on their way, and others are not."""
        blocks = blocks_of(offset, length)
        absent = file.entry.absent(blocks)
        missing = [i for i in absent if not self._spans.under_way(file.entry, [i])]
        return 0 < len(missing) < len(blocks)

    def access(
        self, file: RemoteFile, offset: int, length: int, usage: Usage | None = None
    ) -> None:
        """Take in an access: start what it needs, then what will be wanted next. `usage`: of who
        reads.

        Ends the validity of what `read_now` returned.
        """
        if file.changed or file.readahead is None:
            return
        entry = file.entry
        if needed := entry.absent(blocks_of(offset, length)):
            self._spans.want(file, entry, needed, Priority.DEMAND, usage)
        file.readahead.limit_window(self._flows.of(file.store).ahead_bytes_max)
        ahead = file.readahead.access(offset, length)
        if file.readahead.is_read_whole:
            self._read_whole.add(file.store)
        if not ahead:
            return
        if wanted := entry.absent(ahead):
            self._spans.want(file, entry, wanted, Priority.READAHEAD, usage)
        if cold := self._cache.cold(entry, ahead):
            entry.users += 1  # the file may be closed before the task starts
            self._nursery.start_soon(self._check_ahead, entry, cold)

    async def _check_ahead(self, entry: CachedObject, cold: list[range]) -> None:
        """Have blocks in memory, and checked, when their readers come, who then need no thread."""
        try:
            for blocks in cold:
                if entry.users == 1:  # nobody reads any more
                    break
                sums = entry.sums[blocks.start : blocks.stop]
                good = await self._offload.disk(blockio.check, entry, blocks, sums)
                for index, checksum, is_good in zip(blocks, sums, good, strict=True):
                    self._cache.loaded(entry, index, checksum, is_good)
        finally:
            self._cache.close(entry)

    async def fetch(
        self, file: RemoteFile, blocks: range, priority: Priority = Priority.PREFETCH
    ) -> None:
        """Bring `blocks` of an open file into the cache, behind what readers wait for.

        Raises what a Store raises: StoreTimeout when the read deadline is over and the store has
        not even answered the first check; each request then has that time, too.
        """
        entry = file.entry
        with self._cache.held(entry):
            if not file.trusted:
                await self._learn(file, entry)
            with self._spans.prefetching(entry, blocks):
                if not await self._ensure(file, entry, blocks, priority):
                    await self._ensure(file, entry, blocks, priority)

    async def take_in(self, file: RemoteFile, blocks: range, fill: Fill) -> int:
        """Bring what is missing of `blocks` of an open file, whose version is known, into the cache
        from somewhere else than the store: how many bytes. Raises what `fill` raises, and
        ObjectChanged."""
        entry = file.entry
        with self._cache.held(entry):
            if any(entry.state[i] == DYING for i in blocks):
                await self._storing.until_no_hole()
            return await self._spans.take_in(file, entry, blocks, fill)

    async def _learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """Do the first check. Its deadline stays where it is, although other files' bytes come."""
        with trio.move_on_after(self._deadline_s):
            await self._outages.persist(file, lambda: self._versions.learn(file, entry))
        if not file.trusted:
            error = StoreTimeout(
                f"{file.name}: no answer within {self._deadline_s:g} s; last: "
                f"{file.cause or 'none'}"
            )
            if not file.failing:
                file.note(error)
            raise error

    async def _ensure(
        self, file: RemoteFile, entry: CachedObject, blocks: range, priority: Priority
    ) -> bool:
        """Return when every block was there at some moment since the call; False: some were not,
        because of a failure that was not for this call."""
        if not file.trusted:
            await self._learn(file, entry)
        self._versions.check_cached(
            file,
            entry,
            "in the second in which it was attached; attach the checkpoint again to see the new "
            "version",
        )
        state = entry.state
        if any(state[i] == DYING for i in blocks):
            await self._storing.until_no_hole()
        absent = [i for i in blocks if state[i] == ABSENT]
        known = self._spans.under_way(entry, absent)
        whole = True
        for span in self._spans.want(file, entry, absent, priority):
            # One that is done and yet wanted has been overtaken: it must not write any more.
            late = priority is Priority.PREFETCH or span.done.is_set()
            await (span.ended if late else span.done).wait()
            foreign = span.file is not file  # with other credentials, maybe of another version
            if span in known and (foreign or isinstance(span.error, StoreUnavailable)):
                whole &= span.error is None
                continue  # it was not for this read: the caller's loop tries anew
            if span.error is not None:
                raise span.error
        return whole

    async def _load(self, entry: CachedObject, offset: int, length: int) -> Views | None:
        """The bytes, from the disk where they are not in memory, and checked; None if a block was
        lost on the way."""
        parts: Views = []
        for index in blocks_of(offset, length):
            base = index * BLOCK_BYTES
            start, stop = max(offset, base), min(offset + length, base + BLOCK_BYTES)
            if entry.readable(range(index, index + 1)) and (
                views := self._cache.read_now(entry, start, stop - start)
            ):
                parts.append(memoryview(bytes(views[0])))  # the next block may take time
                continue
            if entry.state[index] not in ON_DISK:
                return None
            checksum = entry.sums[index]
            data = await self._offload.disk(blockio.load, entry, index, checksum)
            self._cache.loaded(entry, index, checksum, data is not None)
            if data is None:
                return None
            parts.append(memoryview(data)[start - base : stop - base])
        return parts
