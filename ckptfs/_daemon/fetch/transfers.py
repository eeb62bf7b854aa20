"""Transfers: a range of an object from the store into a buffer, by one request or by two.

**Hedging.** If a reader waits for the bytes of a request that is so slow that a second one for the
same range pays (`hedging`), a second request begins. It has a thread, a buffer and a slot of its
own, like the first (`Scheduler.acquire_now` gives it no slot that another reader waits for). The
request that is done first has brought all of the bytes, and with them the store's word on their
version. The daemon gives the other one up: it closes the connection (`_store.request_context`), and
the thread ends by itself. An error of the first request is an error of the transfer only if the
second request fails, too.

A task checks the running transfers every `_HEDGE_CHECK_S` while a second request may begin. Stores
whose requests cannot be given up get no second ones, because each would keep a thread.

**Bytes that come** are counted every `_PROGRESS_S`. The speed of the store follows from them
(`flow_control`), and the deadlines of the reads that wait for them move (`deadlines`).
"""

import logging
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import trio

from ckptfs._daemon.cache.buffer_pool import Buffer, Buffers
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.fetch.deadlines import ReadDeadlines
from ckptfs._daemon.fetch.flow_control import FlowControls
from ckptfs._daemon.fetch.hedging import Hedging
from ckptfs._daemon.fetch.retry import Retry
from ckptfs._daemon.fetch.scheduler import Priority, Scheduler, Ticket
from ckptfs._daemon.offload import Offload
from ckptfs._store.base import Pin, Store
from ckptfs._store.request_context import Progress, deadline_s, ends_at
from ckptfs.errors import CkptfsError, StoreTimeout, StoreUnavailable

log = logging.getLogger(__name__)

_HEDGE_CHECK_S = 0.025
"""A quarter of the shortest time after which a request counts as slow."""
_PROGRESS_S = 0.1
"""Far below the shortest useful deadline, 1 s."""

Heard = Callable[[int, float], bool]
"""Called with the number of bytes that a transfer has, and with the time of the last of them.
Returns whether it had fewer bytes before."""


def _while_bytes_come(read: Callable[[], bool], progress: Progress, silence_s: float) -> bool:
    """Run `read` with a deadline that moves as the span's does."""
    end_s = deadline_s()
    with ends_at(lambda: max(end_s, progress.last_s and progress.last_s + silence_s)):
        return read()


class Transferred(NamedTuple):
    """The bytes that a transfer has brought.

    Attributes:
        buffer: The buffer that begins with the bytes.
        ticket: The ticket that counts the bytes as in flight.
        is_confirmed: Whether the store's answer has named the version of the bytes.
    """

    buffer: Buffer[CachedObject]
    ticket: Ticket
    is_confirmed: bool


def _scope_of_second() -> trio.CancelScope:
    """The second request runs in the nursery, but has the deadline of its transfer."""
    return trio.CancelScope(deadline=trio.current_effective_deadline())


@dataclass(eq=False)
class _Transfer:
    """A transfer that runs.

    Attributes:
        heard: Called with the bytes that came.
        silence_s: The time that the request may last after each byte.
        counted: The bytes that are counted already.
        counted_s: The event loop's time at which they were counted; 0 before the first ones.
        begun_s: The event loop's time at which the transfer began.
        progress: The progress of the first request.
        first: The scope of the first request.
        second: The scope of the second request.
        second_ended: The event that the second request has ended; None if there was none.
        result: The bytes, once one of the requests has brought them.
    """

    store: Store
    pin: Pin
    offset: int
    length: int
    ticket: Ticket
    heard: Heard
    silence_s: float
    counted: int = 0
    counted_s: float = 0.0
    begun_s: float = field(default_factory=trio.current_time)
    progress: Progress = field(default_factory=Progress)
    first: trio.CancelScope = field(default_factory=trio.CancelScope)
    second: trio.CancelScope = field(default_factory=_scope_of_second)
    second_ended: trio.Event | None = None
    result: Transferred | None = None


class Transfers:
    """Reads from stores, in threads, into buffers.

    Attributes:
        hedged_requests: The number of second requests since the daemon was started.
    """

    def __init__(
        self,
        offload: Offload,
        scheduler: Scheduler,
        buffers: Buffers[CachedObject],
        retry: Retry,
        nursery: trio.Nursery,
        flow_controls: FlowControls,
        read_deadlines: ReadDeadlines,
    ) -> None:
        self._flow_controls = flow_controls
        self._read_deadlines = read_deadlines
        self._offload = offload
        self._scheduler = scheduler
        self._buffers = buffers
        self._retry = retry
        self._nursery = nursery
        # The keys are weak, because the credentials of a detached store must not stay in memory.
        self._hedgings: weakref.WeakKeyDictionary[Store, Hedging] = weakref.WeakKeyDictionary()
        self._under_way: set[_Transfer] = set()
        self._counts_progress = False
        self._checks_for_slow = False
        self.hedged_requests = 0

    async def read(
        self,
        store: Store,
        pin: Pin,
        offset: int,
        length: int,
        ticket: Ticket,
        heard: Heard,
        silence_s: float,
    ) -> Transferred:
        """Read `length` bytes. Raises what a Store raises.

        `ticket` has been granted. Its slot is given back when the transfer ends, and its bytes if
        it is not the ticket of the result. The request may last `silence_s` after each byte.
        """
        transfer = _Transfer(store, pin, offset, length, ticket, heard, silence_s)
        with self._measured(transfer):
            return await self._read(transfer)

    async def _read(self, transfer: _Transfer) -> Transferred:
        hedging = self._hedgings.setdefault(transfer.store, Hedging())
        self._under_way.add(transfer)
        if not self._checks_for_slow and self._may_hedge(transfer):
            self._checks_for_slow = True
            self._nursery.start_soon(self._check_for_slow)
        try:
            await self._run(transfer)
        except BaseException as error:
            if isinstance(error, StoreUnavailable):
                hedging.failed()
            if transfer.result is not None:
                self.give_up(transfer.result)
            raise
        finally:
            self._under_way.discard(transfer)
            transfer.second.cancel()
        assert transfer.result is not None
        whole_s = trio.current_time() - transfer.begun_s
        hedging.add(transfer.length, transfer.progress.first_s or whole_s, whole_s)
        return transfer.result

    @contextmanager
    def _measured(self, transfer: _Transfer) -> Generator[None]:
        """Measure the store's speed by a transfer that runs in this context."""
        flow = self._flow_controls.of(transfer.store)
        flow.began()
        if not self._counts_progress:
            self._counts_progress = True
            self._nursery.start_soon(self._count_progress)
        try:
            yield
            self._came(transfer, transfer.length, trio.current_time())
            flow.answered()
        except StoreTimeout:
            if not transfer.progress.count:
                flow.timed_out(transfer.begun_s, trio.current_time())
            raise
        finally:
            flow.ended()

    async def _count_progress(self) -> None:
        while self._under_way:
            await trio.sleep(_PROGRESS_S)
            for transfer in list(self._under_way):
                progress = transfer.progress
                # A read that was made again (`_workers.spread`) has brought some bytes twice.
                count = min(progress.body_count, transfer.length)
                if count > transfer.counted:
                    ago_s = time.monotonic() - progress.last_s
                    self._came(transfer, count, trio.current_time() - ago_s)
        self._counts_progress = False

    def _came(self, transfer: _Transfer, count: int, at_s: float) -> None:
        """Count the bytes of a transfer, which has `count` bytes since `at_s`."""
        if transfer.progress.body_count:  # a library's call does not say when its bytes came
            since_s = transfer.counted_s or transfer.begun_s + transfer.progress.first_s
            self._flow_controls.of(transfer.store).came(count - transfer.counted, since_s, at_s)
        transfer.counted, transfer.counted_s = count, at_s
        if transfer.heard(count, at_s):
            self._read_deadlines.came(transfer.store, at_s)

    def give_up(self, transferred: Transferred) -> None:
        """Free the buffer and the bytes of a result that is of no use."""
        self._scheduler.release_bytes(transferred.ticket)
        self._buffers.release(transferred.buffer)

    async def _run(self, transfer: _Transfer) -> None:
        """Return when the transfer has a result."""
        try:
            with transfer.first:
                await self._request(transfer, transfer.ticket, transfer.progress)
        except StoreUnavailable:
            if transfer.second_ended is None:
                raise
            await transfer.second_ended.wait()
            if transfer.result is None:
                raise

    @contextmanager
    def _filling(self, buffer: Buffer[CachedObject], ticket: Ticket) -> Generator[None]:
        """Have a thread fill `buffer` in this context, at whose end the slot is given back.

        If it fails, the bytes are given back, too. So is the buffer, unless the thread still runs.
        """
        try:
            yield
        except BaseException as error:
            self._scheduler.release_bytes(ticket)
            if isinstance(error, trio.Cancelled):
                self._buffers.abandon(buffer)
            else:
                self._buffers.release(buffer)
            raise
        finally:
            self._scheduler.release_slot(ticket)

    async def _request(self, transfer: _Transfer, ticket: Ticket, progress: Progress) -> None:
        """Try to bring the result.

        A cancelled request abandons its thread (see `offload`), and with it the buffer: no other
        request may use the buffer while that thread may write into it.
        """
        buffer = self._buffers.take(transfer.length)
        view = buffer.view[: transfer.length]
        with self._filling(buffer, ticket):
            try:
                read = partial(transfer.store.read_into, transfer.pin, transfer.offset, view)
                read = partial(_while_bytes_come, read, progress, transfer.silence_s)
                is_confirmed = await self._offload.data(progress.run, read)
            except trio.Cancelled:
                progress.give_up()
                raise
        got = Transferred(buffer, ticket, is_confirmed)
        if transfer.result is None and transfer in self._under_way:
            transfer.result = got
        else:
            self.give_up(got)

    async def bring(
        self, fill: Callable[[memoryview], None], length: int, ticket: Ticket
    ) -> Transferred:
        """Have `fill` bring bytes of the pinned version, instead of a store.

        Raises what `fill` raises.
        """
        buffer = self._buffers.take(length)
        with self._filling(buffer, ticket):
            await self._offload.data(fill, buffer.view[:length])
        return Transferred(buffer, ticket, is_confirmed=True)

    # -- hedging

    async def _check_for_slow(self) -> None:
        while any(map(self._may_hedge, self._under_way)):
            await trio.sleep(_HEDGE_CHECK_S)
            for transfer in list(self._under_way):
                if self._is_slow(transfer):
                    self._hedge(transfer)
        self._checks_for_slow = False

    def _may_hedge(self, transfer: _Transfer) -> bool:
        return self._hedgings[transfer.store].has_earned

    def _is_slow(self, transfer: _Transfer) -> bool:
        if transfer.ticket.priority is not Priority.DEMAND or transfer.second_ended is not None:
            return False
        store = transfer.store
        if not self._may_hedge(transfer) or self._retry.is_dark(store):
            return False
        elapsed_s = trio.current_time() - transfer.begun_s
        return self._hedgings[store].is_slow(transfer.length, transfer.progress.count, elapsed_s)

    def _hedge(self, transfer: _Transfer) -> None:
        """Begin the second request, if there is a slot for it."""
        first = transfer.ticket
        ticket = Ticket(first.priority, first.length, transfer.store, first.user)
        if self._scheduler.acquire_now(ticket):
            self.hedged_requests += 1
            self._hedgings[transfer.store].spend()
            transfer.second_ended = trio.Event()
            self._nursery.start_soon(self._second, transfer, ticket, transfer.second_ended)

    async def _second(self, transfer: _Transfer, ticket: Ticket, ended: trio.Event) -> None:
        try:
            with transfer.second:
                await self._request(transfer, ticket, Progress())
                transfer.first.cancel()
        except CkptfsError as error:  # the first one may still succeed, or raises the same error
            log.debug("second request: %s", error)
        except Exception:
            log.exception("unexpected error while fetching %s", transfer.pin.path)
        finally:
            ended.set()
