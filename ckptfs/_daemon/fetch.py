"""Fetching: single flight, versions, retries and deadlines between readers, store and cache.

**A span** is a run of absent blocks that is fetched by one request. While it is under way each of
its blocks is in `_flights`, and whoever wants one waits for that span: no byte is fetched twice.
Its life:

1. wait for a place (`Slots`: demand before readahead, bounded places and bytes), and take a buffer;
2. a worker thread reads the range into it; the place is given back;
3. where the store's answer itself does not name the version, a check that *began after* the read
   says that the object is still the pinned one. Checks are shared: all spans of a file that wait
   are covered by the next one (like a group commit), so a running reader pays no round trip;
4. the blocks are readable, and the waiting readers go on;
5. make room in the cache, under `_room`, so that the limit holds before the write;
6. a worker thread computes the checksums, writes the blocks and then the map; the bytes of the
   buffer count no longer as in flight. A disk that is slower than the store holds these, and so
   slows the next spans down.

Bytes of another version are never visible, and never on the disk: they end with the span.

**The first check** of a file happens before its first read: it learns the ETag, and lets cached
blocks of an earlier attachment be used. It is not needed where the listing had the ETag, or where
size and mtime settle it (see ``cache.SETTLED_S``); with `allow_other` it always is.

**Errors.** What can pass (`StoreUnavailable`) is tried again with growing, jittered pauses until
the deadline, the place given back meanwhile; a store that asks for a longer pause gets it. What
cannot (`ObjectChanged`, `AccessDenied`) ends the span at once, and with it the reads that wait. The
next read tries anew: nothing remembers a failure but the attributes. A reader that joined an older
span's failure tries once more within its own deadline.

**A dark store** must not keep the others waiting: from its first error that can pass until it has
delivered a span, its spans go last and leave places free, also those that are in the queue by then,
and its checks have their own threads. When it is back, its spans get their priority back, and who
pauses because of it tries at once.

**Cancellation.** A reader that goes away leaves the span running for others; a prefetch that ends
takes those with it that no reader has asked for meanwhile. A span that runs out of time abandons
its thread (see `offload`), and the buffer with it, which nobody else may have while that thread may
write into it.
"""

import contextlib
import logging
import math
import random
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from ckptfs._daemon.buffers import Buffer, capacity_of
from ckptfs._daemon.cache import Cache, Views
from ckptfs._daemon.cached import ABSENT, DYING, ON_DISK, CachedObject
from ckptfs._daemon.cachedir import ObjectKey
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.readahead import Readahead
from ckptfs._daemon.slots import Priority, Slots, Ticket
from ckptfs._model.blocks import BLOCK_BYTES, blocks_length, blocks_of, runs
from ckptfs._model.config import Config
from ckptfs._model.manifest import printable
from ckptfs._store.base import Pin, Store
from ckptfs.errors import (
    CkptfsError,
    NotAttached,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from ckptfs._model.formats import Parts

log = logging.getLogger(__name__)

State = Literal["lazy", "fetching", "cached", "changed", "failing"]

_PAUSE_S = 0.1
_PAUSE_S_MAX = 5.0
"""First and longest pause before another try; each is twice the last, times 0.5 to 1."""
_RETRY_AFTER_SPREAD = 1.25
"""Who is asked to come again later comes then or up to a quarter later: not all at once."""
_LEND_WAIT_S = 1.0
"""Longest that an open waits for the version check without which the kernel must not read the file
by itself: a few round trips."""


def stamped(error: Exception) -> str:
    """Time and text of an error, as the attribute `user.ckptfs.error` has it."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {error}"


class RemoteFile:
    """One file of one attachment. It has blocks to read (`entry`) while it is open.

    Attributes:
        pin: The pinned version.
        trusted: Whether `pin` was confirmed by the store since it was attached.
        changed: The object is another version by now.
        error: Time and text of the last error, or "".
        cause: Text of the last answer of the store that was an error which can pass, or "".
        served_bytes: How much of it was handed to the kernel, which keeps it in its page cache as
            long as there is memory: more than the size means that there was not.
        readahead: While it is open.
        head: Its first bytes, where they were seen; `parts`: what it consists of, where that is
            known. Both stay when it is closed: the kernel may have kept what it read.
        handed_on: The file after it was begun because of it.
        recognised: Nothing more is to be learned about its parts (see `recognise`).
    """

    def __init__(self, store: Store, key: ObjectKey, pin: Pin) -> None:
        self.store = store
        self.key = key
        self.pin = pin
        self.trusted = False
        self.changed = False
        self.failing = False
        self.error = ""
        self.cause = ""
        self.served_bytes = 0
        self.opens = 0
        self.flights = 0
        self.check_lock = trio.Lock()
        self.next_check: _Check | None = None
        self.readahead: Readahead | None = None
        self.handed_on = False
        self.head = b""
        self.parts: Parts | None = None
        self.recognised = False
        self._entry: CachedObject | None = None
        self.on_etag: Callable[[str], None] | None = None  # told what the listing did not have

    def pin_etag(self, etag: str) -> None:
        """The pinned version turned out to have this ETag."""
        if etag != self.pin.etag:
            self.pin = msgspec.structs.replace(self.pin, etag=etag)
            if self.on_etag is not None:
                self.on_etag(etag)

    @property
    def entry(self) -> CachedObject:
        """Its blocks; only while the file is open."""
        if self._entry is None:
            raise NotAttached(f"{printable(self.pin.path)} was closed: its checkpoint is detached")
        return self._entry

    @entry.setter
    def entry(self, entry: CachedObject | None) -> None:
        self._entry = entry

    def learn_parts(self, parts: "Parts") -> None:
        """Take in what the file consists of."""
        self.parts = parts
        if self.readahead is not None:
            self.readahead.learn_parts(parts)

    def state(self, cached_bytes: int) -> State:
        """What the attribute `user.ckptfs.state` says, where `cached_bytes` of it are on disk."""
        if self.changed:
            return "changed"
        if self.failing:
            return "failing"
        if self.flights:
            return "fetching"
        return "cached" if cached_bytes == self.pin.size else "lazy"


class _Check:
    """A version check that has not begun yet, or its outcome."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.cancelled = False
        self.error: CkptfsError | None = None


class _Span:
    def __init__(
        self, file: RemoteFile, entry: CachedObject, blocks: range, priority: Priority
    ) -> None:
        self.file = file
        self.entry = entry
        self.blocks = blocks
        self.length = blocks_length(blocks, entry.size)
        self.priority = priority  # the ticket's, if the store is not dark
        self.ticket = Ticket(priority, capacity_of(self.length))
        self.scope = trio.CancelScope()
        self.buffer: Buffer[CachedObject] | None = None
        self.done = trio.Event()  # its blocks can be read, or it has failed
        self.ended = trio.Event()  # and they are stored, if they can be
        self.dropped = False
        self.error: CkptfsError | None = None

    def start_clock(self, deadline_s: float) -> None:
        """Count from the first dealing with the store: waiting for a place is no fault of it."""
        if self.scope.deadline == math.inf:
            self.scope.deadline = trio.current_time() + deadline_s


class Fetcher:
    """Reads files through the cache. Spans run in `nursery`; all methods belong to the event
    loop."""

    def __init__(
        self, config: Config, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self._cache = cache
        self._offload = offload
        self._nursery = nursery
        self._deadline_s = config.read_deadline_s
        self._span_blocks_max = max(1, config.span_bytes_max // BLOCK_BYTES)
        # With other users, cached bytes are for those whose own credentials have passed a check.
        self._allow_other = config.allow_other
        # A window that fills the cache would push out what was not read yet.
        share = config.cache_bytes_max // 4 if config.cache_bytes_max else config.window_bytes_max
        self.window_bytes_max = min(config.window_bytes_max, share)
        self._slots = Slots(config.connections_max, config.in_flight_bytes_max, nursery)
        self._room = trio.Lock()
        self._flights: dict[tuple[str, int], _Span] = {}
        self._prefetched: Counter[tuple[str, int]] = Counter()  # how many prefetches ask for it now
        # Stores whose last answer was none; the event: it has delivered again. Weak: a detached
        # store's credentials must not stay.
        self._dark: weakref.WeakKeyDictionary[Store, trio.Event] = weakref.WeakKeyDictionary()
        # Stores whose last large file was read as a whole: most likely the next one will be, too.
        self._read_whole: weakref.WeakSet[Store] = weakref.WeakSet()
        self.fetched_bytes = 0
        self.fetched_spans = 0

    # -- files

    def open(self, file: RemoteFile) -> None:
        """Make the file readable; each call needs a `close`."""
        if file.opens:
            file.opens += 1
            return
        entry = file.entry = self._cache.open(file.key)
        file.opens = 1
        eager = file.store in self._read_whole
        file.readahead = Readahead(file.pin.size, self.window_bytes_max, file.parts, eager=eager)
        file.recognised = file.parts is not None
        if file.trusted:
            if not entry.about.etag:  # nothing of it is cached
                self._cache.learn(entry, file.pin.etag)
        elif not self._allow_other:
            if entry.about.settled and not file.pin.etag:
                file.pin_etag(entry.about.etag)
            if file.pin.etag:
                self._cache.learn(entry, file.pin.etag)
                file.trusted = True

    def close(self, file: RemoteFile) -> None:
        """Undo one `open`. Spans that are under way end by themselves."""
        file.opens -= 1
        if not file.opens:
            if file.readahead is not None and file.readahead.was_eager_in_vain:
                self._read_whole.discard(file.store)
            self._cache.close(file.entry)
            file.entry = file.readahead = None

    async def before_lending(self, file: RemoteFile) -> None:
        """Do the first check of a file whose bytes are all there and verified, as its first read
        would. If it fails, or takes long, the reads will see to it."""
        entry = file.entry
        if file.trusted or not entry.verified:
            return
        with self._held(entry), trio.move_on_after(_LEND_WAIT_S), contextlib.suppress(CkptfsError):
            await self._learn(file, entry)

    def lend(self, file: RemoteFile) -> CachedObject | None:
        """Its object, if that is complete and somebody else may read it (see `Cache.lend`)."""
        entry = file.entry
        if not file.trusted or file.pin.etag != entry.about.etag or not self._cache.lend(entry):
            return None
        return entry

    @contextlib.contextmanager
    def opened(self, file: RemoteFile) -> Generator[None]:
        """Keep a file readable while the context lasts, or until its attachment is removed."""
        self.open(file)
        try:
            yield
        finally:
            if file.opens:
                self.close(file)

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

        Raises what a Store raises, at the latest when the read deadline is over.
        """
        entry = file.entry  # held, because a forced detach closes the file at any time
        with self._held(entry), trio.move_on_after(self._deadline_s):
            while True:
                await self._ensure(file, entry, blocks_of(offset, length), Priority.DEMAND)
                data = self._read_now(file, entry, offset, length)
                if data is None:
                    data = await self._load(entry, offset, length)
                if data is not None:
                    return data
        cause = f"; last: {file.cause}" if file.cause else ""
        error = StoreTimeout(
            f"{printable(file.pin.path)}: no data within {self._deadline_s:g} s{cause}"
        )
        if not file.failing:
            self._note(file, error)
        raise error

    def access(self, file: RemoteFile, offset: int, length: int) -> None:
        """Take in an access: start what it needs, then what will be wanted next.

        Ends the validity of what `read_now` returned.
        """
        if file.changed or file.readahead is None:
            return
        entry = file.entry
        if needed := entry.absent(blocks_of(offset, length)):
            self._want(file, entry, needed, Priority.DEMAND)
        ahead = file.readahead.access(offset, length)
        if file.readahead.is_read_whole:
            self._read_whole.add(file.store)
        if ahead and (wanted := entry.absent(ahead)):
            self._want(file, entry, wanted, Priority.READAHEAD)

    async def fetch(
        self, file: RemoteFile, blocks: range, priority: Priority = Priority.PREFETCH
    ) -> None:
        """Bring `blocks` of an open file into the cache, behind what readers wait for.

        Raises what a Store raises: StoreTimeout when the read deadline is over and the store has
        not even answered the first check; each request then has that time, too.
        """
        entry = file.entry
        with self._held(entry):
            if not file.trusted:
                with trio.move_on_after(self._deadline_s):
                    await self._persist(file, lambda: self._learn(file, entry))
                if not file.trusted:
                    raise StoreTimeout(f"{printable(file.pin.path)}: {file.cause or 'no answer'}")
            try:
                with self._asked_by_prefetch(entry, blocks):
                    if not await self._ensure(file, entry, blocks, priority):
                        await self._ensure(file, entry, blocks, priority)
            except trio.Cancelled:
                self._drop(entry, blocks)
                raise

    @contextlib.contextmanager
    def _asked_by_prefetch(self, entry: CachedObject, blocks: range) -> Generator[None]:
        asked = Counter((entry.digest, index) for index in blocks)
        self._prefetched += asked
        try:
            yield
        finally:
            self._prefetched -= asked  # zeros go

    def _drop(self, entry: CachedObject, blocks: range) -> None:
        """End the spans that neither a reader nor another prefetch has asked for."""
        for index in blocks:
            span = self._flights.get((entry.digest, index))
            if span is None or span.ticket.priority is not Priority.PREFETCH:
                continue
            if not any((entry.digest, i) in self._prefetched for i in span.blocks):
                span.dropped = True
                span.scope.cancel()

    async def _ensure(
        self, file: RemoteFile, entry: CachedObject, blocks: range, priority: Priority
    ) -> bool:
        """Return when every block was there at some moment since the call; False: some were not,
        because of a failure that was not for this call."""
        if not file.trusted:
            await self._persist(file, lambda: self._learn(file, entry))
        if file.pin.etag != entry.about.etag:
            raise ObjectChanged(
                f"{printable(file.pin.path)} was written again in the second in which it was "
                "attached; attach the checkpoint again to see the new version"
            )
        state = entry.state
        if any(state[i] == DYING for i in blocks):
            async with self._room:  # the hole is made under this lock
                pass
        absent = [i for i in blocks if state[i] == ABSENT]
        known = {self._flights.get((entry.digest, i)) for i in absent}
        whole = True
        for span in self._want(file, entry, absent, priority):
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
        """The bytes from the disk, checked; None if a block was lost on the way."""
        parts: Views = []
        for index in blocks_of(offset, length):
            data: bytes | None = None
            if (view := self._cache.in_memory(entry, index)) is not None:
                data = bytes(view)  # the next block may take time, and the buffer
            elif entry.state[index] in ON_DISK:
                checksum = entry.sums[index]
                data = await self._offload.disk(self._cache.load, entry, index, checksum)
                self._cache.loaded(entry, index, checksum, data is not None)
            if data is None:
                return None
            base = index * BLOCK_BYTES
            parts.append(memoryview(data)[max(0, offset - base) : offset + length - base])
        return parts

    # -- spans

    def _want(
        self, file: RemoteFile, entry: CachedObject, blocks: Iterable[int], priority: Priority
    ) -> list[_Span]:
        """The spans that will bring `blocks`: those under way, and new ones for the rest."""
        digest = entry.digest
        spans: dict[_Span, None] = {}
        missing: list[int] = []
        for index in blocks:
            span = self._flights.get((digest, index))
            if span is None:
                missing.append(index)
            else:
                spans[span] = None
                span.priority = min(span.priority, priority)
                if span.file.store not in self._dark:
                    self._slots.raise_priority(span.ticket, priority)
        length_max = self._span_blocks_max
        if priority is Priority.PREFETCH:  # more connections for the bytes it may have in flight
            length_max = max(1, length_max // 2)
        for run in runs(missing, length_max):
            span = _Span(file, entry, run, priority)
            spans[span] = None
            self._flights.update(dict.fromkeys(((digest, i) for i in run), span))
            file.flights += 1
            entry.users += 1  # the file may be closed before the span ends, or even starts
            self._nursery.start_soon(self._run, span)
        return list(spans)

    async def _run(self, span: _Span) -> None:
        file, entry = span.file, span.entry
        try:
            with span.scope:
                await self._persist(file, lambda: self._attempt(span))
            if span.scope.cancelled_caught:
                span.error = StoreTimeout(
                    f"{printable(file.pin.path)}: not fetched within {self._deadline_s:g} s; last: "
                    f"{file.cause or 'no answer'}"
                )
                if not span.dropped:
                    self._note(file, span.error)
            else:
                self._brighten(file.store)
                with trio.CancelScope(shield=True):  # a thread uses the buffer, and `entry`
                    await self._store(span)
        except CkptfsError as error:
            span.error = error
        except Exception:  # it must not take the daemon with it
            log.exception("unexpected error while fetching %s", file.pin.path)
            span.error = StoreError(f"{printable(file.pin.path)}: internal error; see the log")
            self._note(file, span.error)
        finally:
            file.flights -= 1
            for index in span.blocks:
                del self._flights[entry.digest, index]
            if span.buffer is not None:
                self._cache.buffers.keep(span.buffer)
                self._slots.release_bytes(span.ticket)
            self._cache.close(entry)
            span.done.set()
            span.ended.set()

    async def _attempt(self, span: _Span) -> None:
        try:
            await self._fetch(span)
        except StoreUnavailable as error:
            if not error.retry_after_s:  # an object that became shorter can look like an outage
                await self._confirm(span.file)
            raise

    async def _fetch(self, span: _Span) -> None:
        """Steps 1 to 4, once. Afterwards the span has its buffer, and counts as in flight."""
        file, entry = span.file, span.entry
        if not file.trusted:
            span.start_clock(self._deadline_s)
            await self._learn(file, entry)
        if file.store in self._dark:
            span.ticket.priority = Priority.DARK
        await self._slots.acquire(span.ticket)
        buffer = self._cache.buffers.take(span.length)
        span.start_clock(self._deadline_s)
        in_thread = True
        try:
            is_confirmed = await self._read_into(span, buffer)
            in_thread = False
            if not is_confirmed:
                await self._confirm(file)
            if file.pin.etag != entry.about.etag:
                raise ObjectChanged(f"{printable(file.pin.path)} was written again meanwhile")
        except BaseException as error:
            self._slots.release_bytes(span.ticket)
            if in_thread and isinstance(error, trio.Cancelled):
                self._cache.buffers.abandon(buffer)
            else:
                self._cache.buffers.release(buffer)
            raise
        self.fetched_bytes += span.length
        self.fetched_spans += 1
        self._cache.keep(entry, span.blocks, buffer)
        span.buffer = buffer
        span.done.set()

    async def _read_into(self, span: _Span, buffer: "Buffer[CachedObject]") -> bool:
        offset = span.blocks.start * BLOCK_BYTES
        view = buffer.view[: span.length]
        try:
            read_into = span.file.store.read_into
            return await self._offload.data(read_into, span.file.pin, offset, view)
        finally:
            self._slots.release_place(span.ticket)

    async def _store(self, span: _Span) -> None:
        """Steps 5 and 6. Whatever happens here, the readers have their bytes."""
        entry, buffer, first = span.entry, span.buffer, span.blocks.start
        assert buffer is not None
        if not await self._make_room(entry, span.length):
            return
        about = entry.about
        view = buffer.view[: span.length]
        sums = await self._offload.disk(self._cache.write, entry, about, first, view)
        if sums is not None and entry.about.etag == about.etag:
            self._cache.publish(entry, first, sums)
        else:  # the disk refused it, or it is another version since
            freed = await self._offload.disk(self._cache.take_out, entry, span.blocks)
            self._cache.give_back(entry, span.length, freed)

    async def _make_room(self, entry: CachedObject, length: int) -> bool:
        """Whether `length` bytes may be written to the cache; they are reserved then."""
        async with self._room:
            reservation = self._cache.reserve(entry, length)
            if not reservation.needs_work:
                return reservation.stores
            victims = {victim for victim, _ in reservation.blocks}
            with contextlib.ExitStack() as held, trio.CancelScope(shield=True):
                for victim in victims:
                    held.enter_context(self._held(victim))
                files = await self._offload.disk(self._cache.make_room, reservation)
                self._cache.settle(reservation, files)
            return reservation.stores

    @contextlib.contextmanager
    def _held(self, entry: CachedObject) -> Generator[None]:
        """Keep an object open while a thread uses it."""
        entry.users += 1
        try:
            yield
        finally:
            self._cache.close(entry)

    # -- versions and errors

    async def _check_at_store(self, file: RemoteFile) -> Pin:
        store, pin = file.store, file.pin

        def confirm_unless_dark() -> Pin | None:
            return None if store in self._dark else store.confirm(pin)

        if store not in self._dark:
            confirmed = await self._offload.control(confirm_unless_dark)
            if confirmed is not None:
                return confirmed
            # It became dark while this check was in the queue, where it must not hold up others.
        return await self._offload.dark(store.confirm, pin)

    async def _learn(self, file: RemoteFile, entry: CachedObject) -> None:
        """The first check of a file: from here on its version is pinned with its ETag."""
        async with file.check_lock:
            if not file.trusted:
                confirmed = await self._check_at_store(file)
                file.pin_etag(confirmed.etag)
                self._cache.learn(entry, file.pin.etag)
                file.trusted = True

    async def _confirm(self, file: RemoteFile) -> None:
        """Return after a version check that began after this call; raises ObjectChanged."""
        check = file.next_check
        while check is not None:
            await check.done.wait()
            if not check.cancelled:
                break
            check = file.next_check
        else:
            check = file.next_check = _Check()
            try:
                async with file.check_lock:
                    file.next_check = None  # begun: whoever comes now needs the next one
                    await self._check_at_store(file)
            except CkptfsError as error:
                check.error = error
            except BaseException:
                check.cancelled = True
                raise
            finally:
                if file.next_check is check:
                    file.next_check = None
                check.done.set()
        if check.error is not None:
            raise check.error

    async def _persist(self, file: RemoteFile, attempt: Callable[[], Awaitable[None]]) -> None:
        """Run `attempt` until it succeeds; only errors that can pass are tried again.

        All of them are noted.
        """
        pause_s = _PAUSE_S
        while True:
            try:
                await attempt()
                file.failing = file.changed = False
                return
            except StoreUnavailable as error:
                is_back = self._darken(file.store)
                file.cause = str(error)
                self._note(file, error)
                asked_s = error.retry_after_s * random.uniform(1, _RETRY_AFTER_SPREAD)
            except CkptfsError as error:
                self._note(file, error)
                raise
            await trio.sleep(asked_s)
            with trio.move_on_after(max(0.0, pause_s * random.uniform(0.5, 1) - asked_s)):
                await is_back.wait()
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    def _darken(self, store: Store) -> trio.Event:
        """It has not answered; returns what is set when it delivers again."""
        is_back = self._dark.get(store)
        if is_back is None:
            is_back = self._dark[store] = trio.Event()
            for span in set(self._flights.values()):
                if span.file.store is store and not span.ticket.granted.is_set():
                    span.ticket.priority = Priority.DARK
        return is_back

    def _brighten(self, store: Store) -> None:
        """It has delivered."""
        is_back = self._dark.pop(store, None)
        if is_back is not None:
            is_back.set()
            for span in set(self._flights.values()):
                if span.file.store is store and not span.ticket.granted.is_set():
                    self._slots.raise_priority(span.ticket, span.priority)

    def _note(self, file: RemoteFile, error: CkptfsError) -> None:
        """Keep the error where the attributes find it, and log it where it is new."""
        if isinstance(error, ObjectChanged):
            file.changed = True
        if str(error) != file.error.partition(" ")[2]:
            log.warning("%s", error)
        file.failing = True
        file.error = stamped(error)
