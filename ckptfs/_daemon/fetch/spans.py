"""Spans: runs of absent blocks, each fetched by one request for all callers that want them.

While a span is under way each of its blocks is in `Spans._flights`, and callers that want one of
the blocks wait for that span. So no byte is fetched twice (single flight). The life of a span (see
`span_states`):

1. WANTED: the span waits for a slot (`scheduler`: demand before readahead, bounded slots and bytes)
   and takes a buffer.
2. RUNNING: a worker thread reads the range into the buffer (`transfers`), and the slot is given
   back. If the store's answer does not name the version, a check that began after the read confirms
   it (`version_checks`).
3. DONE: the blocks are readable, and the waiting readers continue. The span makes room in the cache
   and writes the blocks to the disk (`writer`). Then the bytes of the buffer count as in flight no
   more. So a disk that is slower than the store slows the next spans down.
4. ENDED.

Bytes of another version are never visible, and never on the disk. They end with the span.

**Errors.** After a temporary error the span is WANTED again, without a slot, until its deadline
(`retry`). Another error makes it FAILED at once, and ends the reads that wait for it.

**Deadline.** The deadline counts from the last new bytes. Bytes that one try has brought do not
count in the next one.

**Cancellation.** A reader that goes away leaves the span running for others. A prefetch that ends
cancels the spans that no reader has asked for meanwhile. A span that runs out of time abandons its
thread, and the buffer with it.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable

import trio

from ckptfs._daemon.cache.cache import Cache
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.writer import Storing
from ckptfs._daemon.fetch.deadlines import ReadDeadlines
from ckptfs._daemon.fetch.flow_control import FlowControls
from ckptfs._daemon.fetch.limits import limits_of
from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.fetch.retry import Retry
from ckptfs._daemon.fetch.scheduler import Priority, Scheduler
from ckptfs._daemon.fetch.span_states import Claim, Span
from ckptfs._daemon.fetch.transfers import Transferred, Transfers
from ckptfs._daemon.fetch.version_checks import VersionChecks
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.usage.counters import Usage, current
from ckptfs._model.blocks import BLOCK_BYTES, runs
from ckptfs._model.config import Config
from ckptfs.errors import CkptfsError, ObjectChanged, StoreError, StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

Fill = Callable[[int, memoryview], None]
"""Fills a buffer with consecutive blocks of the pinned version, from that block on."""


class FetchParts:
    """The parts of the package that spans use, put together, and the nursery in which they run."""

    def __init__(
        self, config: Config, cache: Cache, offload: Offload, nursery: trio.Nursery
    ) -> None:
        self.cache = cache
        self.offload = offload
        self.nursery = nursery
        self.flow_controls = FlowControls()
        self.read_deadlines = ReadDeadlines()
        limits = limits_of(config)
        self.scheduler = Scheduler(
            limits.connections, limits.in_flight_bytes, nursery, self.flow_controls
        )
        self.retry = Retry(self.scheduler)
        self.version_checks = VersionChecks(
            cache, offload, self.retry, allow_other=config.allow_other
        )
        self.writer = Storing(cache, offload)
        self.transfers = Transfers(
            offload,
            self.scheduler,
            cache.buffers,
            self.retry,
            nursery,
            self.flow_controls,
            self.read_deadlines,
        )


class Spans:
    """The spans that are under way."""

    def __init__(self, config: Config, parts: FetchParts) -> None:
        self._parts = parts
        self.configure(config)
        self._flights: dict[tuple[str, int], Span] = {}
        self._prefetched: Counter[tuple[str, int]] = Counter()  # prefetches that want a block now

    def configure(self, config: Config) -> None:
        """Apply settings that have changed."""
        self._deadline_s = config.read_deadline_s
        self._blocks_max = max(1, config.span_bytes_max // BLOCK_BYTES)

    # -- asking for them

    def under_way(self, entry: CachedObject, blocks: Iterable[int]) -> set[Span]:
        """The spans that will bring some of `blocks`."""
        found = {self._flights.get((entry.digest, index)) for index in blocks}
        return {span for span in found if span is not None}

    def want(
        self,
        file: RemoteFile,
        entry: CachedObject,
        blocks: Iterable[int],
        priority: Priority,
        usage: Usage | None = None,
    ) -> list[Claim]:
        """Join the spans that will bring `blocks`, which are absent, and start new ones for the
        rest. The new ones count as `usage`'s, or else as the background's of the checkpoint."""
        claims: dict[Span, Claim] = {}
        missing: list[int] = []
        for index in blocks:
            span = self._flights.get((entry.digest, index))
            if span is None:
                missing.append(index)
            elif span not in claims:
                is_overtaken = span.done.is_set()
                claims[span] = Claim(span, file, is_joined=True, is_overtaken=is_overtaken)
                self._join(span, file, priority)
        for run in runs(missing, self._length_max(file, priority)):
            span = Span(file, entry, run, priority, usage or file.activity.background)
            claims[span] = Claim(span, file, is_joined=False, is_overtaken=False)
            self._register(span)
            self._parts.nursery.start_soon(self._run, span)
        return list(claims.values())

    def _length_max(self, file: RemoteFile, priority: Priority) -> int:
        """The most blocks of a new span."""
        flow = self._parts.flow_controls.of(file.store)
        length_max = int(min(self._blocks_max, flow.span_blocks_max))
        if priority is Priority.PREFETCH:  # more connections for the bytes it may have in flight
            length_max = max(1, length_max // 2)
        return length_max

    def _join(self, span: Span, file: RemoteFile, priority: Priority) -> None:
        if file.user != span.file.user:
            self._parts.scheduler.share(span.ticket)
        is_dark = self._parts.retry.is_dark(span.file.store)
        self._parts.scheduler.raise_priority(span.ticket, priority, is_dark=is_dark)

    @contextlib.contextmanager
    def prefetching(self, entry: CachedObject, blocks: range) -> Generator[None]:
        """Let a prefetch want `blocks` in this context.

        If it is cancelled, the spans end that neither a reader nor another prefetch wants.
        """
        wanted = Counter((entry.digest, index) for index in blocks)
        self._prefetched += wanted
        is_cancelled = False
        try:
            yield
        except trio.Cancelled:
            is_cancelled = True
            raise
        finally:
            self._prefetched -= wanted  # zeros go
            if is_cancelled:
                self._drop(entry, blocks)

    def _drop(self, entry: CachedObject, blocks: range) -> None:
        for span in self.under_way(entry, blocks):
            if span.ticket.priority is not Priority.PREFETCH:
                continue
            if not any((entry.digest, i) in self._prefetched for i in span.blocks):
                span.drop()

    async def insert(self, file: RemoteFile, entry: CachedObject, blocks: range, fill: Fill) -> int:
        """Fill those of `blocks` that are absent and that no span fetches. Returns their bytes.

        A reader that wants one of them meanwhile waits for it, and fetches it if this fails.
        Raises what `fill` raises.
        """
        inserted_bytes = 0
        for index in runs(blocks, self._blocks_max):
            absent = [i for i in entry.absent(index) if (entry.digest, i) not in self._flights]
            for run in runs(absent, self._blocks_max):
                span = Span(file, entry, run, Priority.DEMAND, file.activity.background)
                span.ticket.store = None  # neither a dark store nor a slow one delays it
                await self._insert(span, fill)
                inserted_bytes += span.length
        return inserted_bytes

    async def _insert(self, span: Span, fill: Fill) -> None:
        self._register(span)
        try:
            await self._parts.scheduler.acquire(span.ticket)
            span.begin(asks_store=False)
            fill_span = functools.partial(fill, span.blocks.start)
            got = await self._parts.transfers.bring(fill_span, span.length, span.ticket)
            self._arrived(span, got)
            current(span.file.activity.background).taken_bytes += span.length
            await self._store(span, got)
        finally:
            if not span.done.is_set():
                span.fail(
                    StoreUnavailable(
                        f"{span.file.name}: the transfer from another node is incomplete"
                    )
                )
            self._end(span)

    # -- their life

    def _register(self, span: Span) -> None:
        digest = span.entry.digest
        self._flights.update(dict.fromkeys(((digest, i) for i in span.blocks), span))
        span.file.flights += 1
        span.file.activity.in_flight += 1
        span.entry.users += 1  # the file may be closed before the span ends, or even starts

    async def _run(self, span: Span) -> None:
        """Bring the blocks from the store; returns when the span has ended."""
        file, retry = span.file, self._parts.retry
        try:
            with span.scope:
                await retry.run(file, lambda: self._attempt(span))
            if span.scope.cancelled_caught:
                self._out_of_time(span)
            elif span.transferred is not None:
                retry.delivered(file.store)
                await self._store(span, span.transferred)
        except CkptfsError as error:
            span.fail(error)
        except Exception:  # it must not end the daemon
            log.exception("unexpected error while fetching %s", file.path)
            error = StoreError(f"{file.name}: internal error; see the log")
            span.fail(error)
            file.note(error)
        finally:
            self._end(span)

    def _out_of_time(self, span: Span) -> None:
        file = span.file
        error = StoreTimeout(
            f"{file.name}: nothing came from the store within {self._deadline_s:g} s; last: "
            f"{file.health.cause or 'no answer'}"
        )
        span.fail(error)
        if not span.is_dropped:
            file.note(error)

    async def _attempt(self, span: Span) -> None:
        """Fetch the span once; or again if the object is the pinned version after all."""
        file, checks = span.file, self._parts.version_checks
        while True:
            pin = file.pin
            try:
                return await self._fetch(span)
            except StoreUnavailable as error:
                if not error.retry_after_s:  # an object that became shorter can look like an outage
                    await checks.confirm(file, span.entry)
                raise
            except ObjectChanged:
                await checks.repin(file, span.entry, pin)
                if file.pin == pin:
                    raise

    async def _fetch(self, span: Span) -> None:
        """Wait for a slot, read the range, and let the readers continue."""
        file, parts = span.file, self._parts
        span.queue()
        if not file.version.trusted:
            span.start_clock(self._deadline_s)
            await parts.version_checks.learn(file, span.entry)
        with file.activity.queueing():
            is_dark = parts.retry.is_dark(file.store)
            await parts.scheduler.acquire(span.ticket, is_dark=is_dark)
        span.start_clock(self._deadline_s)
        span.begin(asks_store=True)
        pin = file.pin
        got = await parts.transfers.read(
            file.store,
            pin,
            span.offset,
            span.length,
            span.ticket,
            heard=span.heard,
            silence_s=span.deadline_s,
        )
        with self._given_up_on_error(got):
            if got.is_confirmed:
                parts.version_checks.prove(file, pin)
            else:
                await parts.version_checks.confirm(file, span.entry)
        self._arrived(span, got)
        file.activity.fetched(span.usage, span.length)

    @contextlib.contextmanager
    def _given_up_on_error(self, got: Transferred) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._parts.transfers.give_up(got)
            raise

    def _arrived(self, span: Span, got: Transferred) -> None:
        """Let the readers continue. Raises ObjectChanged if the cache has another version now."""
        with self._given_up_on_error(got):
            self._parts.version_checks.check_cached(span.file, span.entry, "meanwhile")
        self._parts.cache.keep(span.entry, span.blocks, got.buffer)
        span.arrive(got)

    async def _store(self, span: Span, got: Transferred) -> None:
        with trio.CancelScope(shield=True):  # a thread uses the buffer, and `entry`
            await self._parts.writer.store(span.entry, span.blocks, got.buffer)

    def _end(self, span: Span) -> None:
        span.file.flights -= 1
        span.file.activity.in_flight -= 1
        for index in span.blocks:
            del self._flights[span.entry.digest, index]
        if span.transferred is not None:
            self._parts.cache.buffers.keep(span.transferred.buffer)
            self._parts.scheduler.release_bytes(span.transferred.ticket)
        self._parts.cache.close(span.entry)
        span.end()
