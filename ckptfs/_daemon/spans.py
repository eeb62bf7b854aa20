"""Spans: runs of absent blocks, each fetched by one request, for whoever wants them.

While a span is under way each of its blocks is in `_flights`, and whoever wants one waits for that
span: no byte is fetched twice. Its life:

1. wait for a place (`Slots`: demand before readahead, bounded places and bytes), and take a buffer;
2. a worker thread reads the range into it (`transfers`); the place is given back;
3. where the store's answer itself does not name the version, a check that began after the read
   does (`versions`);
4. the blocks are readable, and the waiting readers go on;
5. make room in the cache, and write them to the disk (`storing`); then the bytes of the buffer
   count no longer as in flight. A disk that is slower than the store holds these, and so slows the
   next spans down.

Bytes of another version are never visible, and never on the disk: they end with the span.

**Errors** that can pass are tried again until the span's deadline (`outages`), the place given back
meanwhile; others end the span at once, and with it the reads that wait.

**Deadline.** It counts from the last bytes that were new: those that one try brought do not count
in the next one.

**Cancellation.** A reader that goes away leaves the span running for others; a prefetch that ends
takes those with it that no reader has asked for meanwhile. A span that runs out of time abandons
its thread, and the buffer with it.
"""

import contextlib
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable

import trio

from ckptfs._daemon.activity import Usage
from ckptfs._daemon.buffers import capacity_of
from ckptfs._daemon.cache import Cache
from ckptfs._daemon.cached import CachedObject
from ckptfs._daemon.flow import Flows
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.remote import RemoteFile
from ckptfs._daemon.slots import Priority, Slots, Ticket
from ckptfs._daemon.storing import Storing
from ckptfs._daemon.transfers import Transferred, Transfers
from ckptfs._daemon.versions import Versions
from ckptfs._model.blocks import BLOCK_BYTES, blocks_length, runs
from ckptfs._model.config import Config
from ckptfs._model.trace import Purpose
from ckptfs._store.base import Pin, changed
from ckptfs.errors import CkptfsError, ObjectChanged, StoreError, StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

_PURPOSES: dict[Priority, Purpose] = {
    Priority.DEMAND: "demand",
    Priority.READAHEAD: "readahead",
    Priority.PREFETCH: "prefetch",
}


_NEW_BYTES = 4 << 10
"""Fewer new bytes do not move a deadline, so that a server that trickles holds no reader. The S3
client ends a request that brings less in twice the longest silence."""

Fill = Callable[[int, memoryview], None]
"""Fills a buffer with consecutive blocks of the pinned version, from that one on."""


class Span:
    """One span of `entry`, the blocks of `file`.

    Attributes:
        usage: Of who was the first to want it.
        done: Its blocks can be read, or it has failed; then `error` says why.
        ended: And they are stored, if they can be.
        tries: How many requests it has taken.
        bytes_most: The most bytes that one of them has brought.
        wanted_s: When it was made, by ``time.perf_counter``; `begun_s`: when its last request was
            sent; `arrived_s`: when that had an answer.
    """

    def __init__(
        self,
        file: RemoteFile,
        entry: CachedObject,
        blocks: range,
        priority: Priority,
        usage: Usage,
    ) -> None:
        self.file = file
        self.usage = usage
        self.entry = entry
        self.blocks = blocks
        self.length = blocks_length(blocks, entry.size)
        self.ticket = Ticket(priority, capacity_of(self.length), file.store, file.user)
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.ended = trio.Event()
        self.dropped = False
        self.transferred: Transferred | None = None
        self.error: CkptfsError | None = None
        self.tries = 0
        self.bytes_most = 0
        self.deadline_s = math.inf
        self.wanted_s = self.begun_s = self.arrived_s = time.perf_counter()

    def start_clock(self, deadline_s: float) -> None:
        """Count from the first dealing with the store: waiting for a place is no fault of it."""
        if self.scope.deadline == math.inf:
            self.deadline_s = deadline_s
            self.scope.deadline = trio.current_time() + deadline_s

    def heard(self, count: int, at_s: float) -> bool:
        """The request that runs has `count` bytes, the last since `at_s`: whether some are new."""
        if count < self.bytes_most + _NEW_BYTES:
            return False
        self.bytes_most = count
        self.scope.deadline = max(self.scope.deadline, at_s + self.deadline_s)
        return True


class Spans:
    """All that are under way. They run in `nursery`.

    Attributes:
        fetched_bytes: That came from stores, since the daemon was started.
        fetched_spans: In how many spans.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        slots: Slots,
        outages: Outages,
        versions: Versions,
        transfers: Transfers,
        storing: Storing,
        nursery: trio.Nursery,
        flows: Flows | None = None,
    ) -> None:
        self._flows = flows or Flows()
        self._cache = cache
        self._slots = slots
        self._outages = outages
        self._versions = versions
        self._transfers = transfers
        self._storing = storing
        self._nursery = nursery
        self.configure(config)
        self._flights: dict[tuple[str, int], Span] = {}
        self._prefetched: Counter[tuple[str, int]] = Counter()  # how many prefetches ask for it now
        self.fetched_bytes = 0
        self.fetched_spans = 0

    def configure(self, config: Config) -> None:
        """Take in settings that have changed."""
        self._deadline_s = config.read_deadline_s
        self._blocks_max = max(1, config.span_bytes_max // BLOCK_BYTES)

    # -- asking for them

    def under_way(self, entry: CachedObject, blocks: Iterable[int]) -> set[Span]:
        """Those that will bring some of `blocks`."""
        found = {self._flights.get((entry.digest, index)) for index in blocks}
        return {span for span in found if span is not None}

    def want(
        self,
        file: RemoteFile,
        entry: CachedObject,
        blocks: Iterable[int],
        priority: Priority,
        usage: Usage | None = None,
    ) -> list[Span]:
        """The spans that will bring `blocks`: those under way, and new ones for the rest, which
        count as `usage`'s."""
        digest = entry.digest
        spans: dict[Span, None] = {}
        missing: list[int] = []
        for index in blocks:
            span = self._flights.get((digest, index))
            if span is None:
                missing.append(index)
            elif span not in spans:
                spans[span] = None
                self._join(span, file, priority)
        length_max = int(min(self._blocks_max, self._flows.of(file.store).span_blocks_max))
        if priority is Priority.PREFETCH:  # more connections for the bytes it may have in flight
            length_max = max(1, length_max // 2)
        for run in runs(missing, length_max):
            span = Span(file, entry, run, priority, usage or file.activity.background)
            spans[span] = None
            self._start(span)
        return list(spans)

    def _join(self, span: Span, file: RemoteFile, priority: Priority) -> None:
        if file.user != span.file.user:
            self._slots.share(span.ticket)
        span.ticket.wanted = min(span.ticket.wanted, priority)
        if not self._outages.is_dark(span.file.store):
            self._slots.raise_priority(span.ticket, priority)

    def _start(self, span: Span) -> None:
        self._register(span)
        self._nursery.start_soon(self._run, span)

    def _register(self, span: Span) -> None:
        digest = span.entry.digest
        self._flights.update(dict.fromkeys(((digest, i) for i in span.blocks), span))
        span.file.flights += 1
        span.file.activity.in_flight += 1
        span.entry.users += 1  # the file may be closed before the span ends, or even starts

    @contextlib.contextmanager
    def prefetching(self, entry: CachedObject, blocks: range) -> Generator[None]:
        """A prefetch asks for `blocks` in this context. If it is cancelled, the spans end that
        neither a reader nor another prefetch has asked for."""
        asked = Counter((entry.digest, index) for index in blocks)
        self._prefetched += asked
        is_cancelled = False
        try:
            yield
        except trio.Cancelled:
            is_cancelled = True
            raise
        finally:
            self._prefetched -= asked  # zeros go
            if is_cancelled:
                self._drop(entry, blocks)

    def _drop(self, entry: CachedObject, blocks: range) -> None:
        for span in self.under_way(entry, blocks):
            if span.ticket.priority is not Priority.PREFETCH:
                continue
            if not any((entry.digest, i) in self._prefetched for i in span.blocks):
                span.dropped = True
                span.scope.cancel()

    async def take_in(
        self, file: RemoteFile, entry: CachedObject, blocks: range, fill: Fill
    ) -> int:
        """Have those of `blocks` that are nowhere here, and that nobody fetches, from `fill`: how
        many bytes. Who wants one meanwhile waits for it, and fetches it if this fails. Raises what
        `fill` raises."""
        taken_bytes = 0
        for index in runs(blocks, self._blocks_max):
            absent = [i for i in entry.absent(index) if (entry.digest, i) not in self._flights]
            for run in runs(absent, self._blocks_max):
                span = Span(file, entry, run, Priority.DEMAND, file.activity.background)
                span.ticket.store = None  # a dark store does not hold it up
                await self._take_in(span, fill)
                taken_bytes += span.length
        return taken_bytes

    async def _take_in(self, span: Span, fill: Fill) -> None:
        entry, ticket = span.entry, span.ticket
        self._register(span)
        try:
            await self._slots.acquire(ticket)
            fill_span = functools.partial(fill, span.blocks.start)
            got = await self._transfers.bring(fill_span, span.length, ticket)
            self._arrived(span, got)
            span.file.activity.took(span.length)
            with trio.CancelScope(shield=True):
                await self._storing.store(entry, span.blocks, got.buffer)
        finally:
            if not span.done.is_set():
                span.error = StoreUnavailable(
                    f"{span.file.name}: another node did not bring it whole"
                )
            self._end(span)

    # -- their life

    async def _run(self, span: Span) -> None:
        file, entry = span.file, span.entry
        try:
            with span.scope:
                await self._outages.persist(file, lambda: self._attempt(span))
            if span.scope.cancelled_caught:
                self._out_of_time(span)
            elif span.transferred is not None:
                self._outages.delivered(file.store)
                with trio.CancelScope(shield=True):  # a thread uses the buffer, and `entry`
                    await self._storing.store(entry, span.blocks, span.transferred.buffer)
        except CkptfsError as error:
            span.error = error
        except Exception:  # it must not take the daemon with it
            log.exception("unexpected error while fetching %s", file.pin.path)
            span.error = StoreError(f"{file.name}: internal error; see the log")
            file.note(span.error)
        finally:
            self._end(span)

    def _out_of_time(self, span: Span) -> None:
        file = span.file
        span.error = StoreTimeout(
            f"{file.name}: nothing came from the store within {self._deadline_s:g} s; last: "
            f"{file.cause or 'no answer'}"
        )
        if not span.dropped:
            file.note(span.error)

    def _end(self, span: Span) -> None:
        span.file.flights -= 1
        span.file.activity.in_flight -= 1
        for index in span.blocks:
            del self._flights[span.entry.digest, index]
        if span.transferred is not None:
            self._cache.buffers.keep(span.transferred.buffer)
            self._slots.release_bytes(span.transferred.ticket)
        self._cache.close(span.entry)
        self._trace(span)
        span.done.set()
        span.ended.set()

    async def _attempt(self, span: Span) -> None:
        file, entry = span.file, span.entry
        while True:
            pin = file.pin
            try:
                return await self._fetch(span)
            except StoreUnavailable as error:
                if not error.retry_after_s:  # an object that became shorter can look like an outage
                    await self._versions.confirm(file, entry)
                raise
            except ObjectChanged:
                await self._versions.repin(file, entry, pin)
                if file.pin == pin:
                    raise

    async def _fetch(self, span: Span) -> None:
        """Steps 1 to 4, once."""
        file, entry, ticket = span.file, span.entry, span.ticket
        if not file.trusted:
            span.start_clock(self._deadline_s)
            await self._versions.learn(file, entry)
        ticket.priority = Priority.DARK if self._outages.is_dark(file.store) else ticket.wanted
        with file.activity.queueing():
            await self._slots.acquire(ticket)
        span.start_clock(self._deadline_s)
        span.tries += 1
        span.begun_s = time.perf_counter()
        offset = span.blocks.start * BLOCK_BYTES
        pin = file.pin
        got = await self._transfers.read(
            file.store,
            pin,
            offset,
            span.length,
            ticket,
            heard=span.heard,
            silence_s=span.deadline_s,
        )
        if got.is_confirmed:
            self._prove(file, pin, got)
        else:
            try:
                await self._versions.confirm(file, entry)
            except BaseException:
                self._transfers.give_up(got)
                raise
        self._arrived(span, got)
        self.fetched_bytes += span.length
        self.fetched_spans += 1
        file.activity.fetched(span.usage, span.length)

    def _prove(self, file: RemoteFile, pin: Pin, got: Transferred) -> None:
        """The answer to a read has named the ETag of `pin`. Raises ObjectChanged where another one
        was pinned meanwhile."""
        if file.pin.etag != pin.etag:
            self._transfers.give_up(got)
            raise changed(file.store.name, pin, "two answers named two versions")
        file.pin_etag(pin.etag, file.pin.etag_of)

    def _arrived(self, span: Span, got: Transferred) -> None:
        """Let the readers go on. Raises ObjectChanged if the cache has another version by now."""
        try:
            self._versions.check_cached(span.file, span.entry, "meanwhile")
        except BaseException:
            self._transfers.give_up(got)
            raise
        self._cache.keep(span.entry, span.blocks, got.buffer)
        span.transferred = got
        span.arrived_s = time.perf_counter()
        span.done.set()

    @staticmethod
    def _trace(span: Span) -> None:
        if span.file.trace is not None and span.tries:
            if span.error is not None:
                span.arrived_s = time.perf_counter()
            start = span.blocks.start * BLOCK_BYTES
            span.file.trace.fetched(
                span.file.index,
                start,
                start + span.length,
                _PURPOSES[span.ticket.wanted],
                span.tries,
                "" if span.error is None else str(span.error),
                (span.wanted_s, span.begun_s, span.arrived_s),
            )
