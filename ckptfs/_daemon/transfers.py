"""Transfers: a range of an object from the store into a buffer, by one request or by two.

**Hedging.** When a request is so slow that a second one for the same range pays (`pace`), one
begins, if a reader waits for the bytes. It is a request like the first, with a thread, a buffer and
a place of its own (`Slots.acquire_now`: none that another reader waits for). Who is done first has
brought the bytes, all of them, and with them the store's word on their version; the other one is
given up: its connection is closed (`_store.progress`), and its thread ends by itself. An error of
the first is one of the transfer only if the second fails, too.

A task looks at what is under way every `_LOOK_S`, while a second request may begin. Stores whose
requests cannot be given up get no second ones: each would keep a thread.

**Bytes that come** are noticed every `_NOTICE_S`: the store's speed follows from them (`flow`), and
the deadlines of the reads that wait for them move (`liveness`).
"""

import logging
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from ckptfs._daemon.flow import Flows
from ckptfs._daemon.liveness import Liveness
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.pace import Pace
from ckptfs._daemon.slots import Priority, Slots, Ticket
from ckptfs._store.base import Pin, Store
from ckptfs._store.deadline import deadline_s, ends_at
from ckptfs._store.progress import Progress
from ckptfs.errors import CkptfsError, StoreTimeout, StoreUnavailable

if TYPE_CHECKING:
    from ckptfs._daemon.buffers import Buffer, Buffers
    from ckptfs._daemon.cached import CachedObject

log = logging.getLogger(__name__)

_LOOK_S = 0.025
"""A quarter of the shortest time that is called slow."""
_NOTICE_S = 0.1
"""Far below the shortest deadline that makes sense, 1 s."""

Heard = Callable[[int, float], bool]
"""Told how many bytes a transfer has, and when the last of them came; says whether that is more
than ever before."""


def _while_bytes_come(read: Callable[[], bool], progress: Progress, silence_s: float) -> bool:
    """Run `read` with a deadline that moves as the span's does."""
    end_s = deadline_s()
    with ends_at(lambda: max(end_s, progress.last_s and progress.last_s + silence_s)):
        return read()


class Transferred(NamedTuple):
    """What a transfer has brought: `buffer` begins with the bytes, which `ticket` counts as in
    flight. `is_confirmed`: the store's answer has named their version."""

    buffer: "Buffer[CachedObject]"
    ticket: Ticket
    is_confirmed: bool


class _Transfer:
    """One that is under way."""

    def __init__(
        self,
        store: Store,
        pin: Pin,
        offset: int,
        length: int,
        ticket: Ticket,
        heard: Heard,
        silence_s: float,
    ) -> None:
        self.heard = heard
        self.silence_s = silence_s
        self.noticed = 0
        self.noticed_s = 0.0
        self.store = store
        self.pin = pin
        self.offset = offset
        self.length = length
        self.ticket = ticket
        self.begun_s = trio.current_time()
        self.progress = Progress()
        self.first = trio.CancelScope()
        self.second = trio.CancelScope(deadline=trio.current_effective_deadline())
        self.second_ended: trio.Event | None = None
        self.result: Transferred | None = None


class Transfers:
    """Reads from stores, in threads, into `buffers`.

    Attributes:
        hedged_requests: How many second requests there were, since the daemon was started.
    """

    def __init__(
        self,
        offload: Offload,
        slots: Slots,
        buffers: "Buffers[CachedObject]",
        outages: Outages,
        nursery: trio.Nursery,
        flows: Flows | None = None,
        liveness: Liveness | None = None,
    ) -> None:
        self._flows = flows or Flows()
        self._liveness = liveness or Liveness()
        self._notices = False
        self._offload = offload
        self._slots = slots
        self._buffers = buffers
        self._outages = outages
        self._nursery = nursery
        # Weak: a detached store's credentials must not stay.
        self._paces: weakref.WeakKeyDictionary[Store, Pace] = weakref.WeakKeyDictionary()
        self._under_way: set[_Transfer] = set()
        self._looks = False
        self.hedged_requests = 0

    async def read(
        self,
        store: Store,
        pin: Pin,
        offset: int,
        length: int,
        ticket: Ticket,
        heard: Heard = lambda _count, _at_s: True,
        silence_s: float = 0.0,
    ) -> Transferred:
        """Read `length` bytes. `ticket` has been granted, and gives its place back when this ends;
        its bytes, too, if it is not that of the result. `heard` is told of bytes that came; the
        request may last `silence_s` from each of them on.

        Raises what a Store raises.
        """
        transfer = _Transfer(store, pin, offset, length, ticket, heard, silence_s)
        with self._measured(transfer):
            return await self._read(transfer)

    async def _read(self, transfer: _Transfer) -> Transferred:
        store, length = transfer.store, transfer.length
        pace = self._paces.setdefault(store, Pace())
        self._under_way.add(transfer)
        if not self._looks and self._may_hedge(transfer):
            self._looks = True
            self._nursery.start_soon(self._look)
        try:
            await self._run(transfer)
        except BaseException as error:
            if isinstance(error, StoreUnavailable):
                pace.failed()
            if transfer.result is not None:
                self.give_up(transfer.result)
            raise
        finally:
            self._under_way.discard(transfer)
            transfer.second.cancel()
        assert transfer.result is not None
        whole_s = trio.current_time() - transfer.begun_s
        pace.took(length, transfer.progress.first_s or whole_s, whole_s)
        return transfer.result

    @contextmanager
    def _measured(self, transfer: _Transfer) -> Generator[None]:
        """Learn from a transfer, which runs in this context, what the store can give."""
        flow = self._flows.of(transfer.store)
        flow.began()
        if not self._notices:
            self._notices = True
            self._nursery.start_soon(self._notice)
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

    async def _notice(self) -> None:
        while self._under_way:
            await trio.sleep(_NOTICE_S)
            for transfer in list(self._under_way):
                progress = transfer.progress
                if progress.body_count > transfer.noticed:
                    ago_s = time.monotonic() - progress.last_s
                    self._came(transfer, progress.body_count, trio.current_time() - ago_s)
        self._notices = False

    def _came(self, transfer: _Transfer, count: int, at_s: float) -> None:
        """A transfer has `count` bytes since `at_s`."""
        if transfer.progress.body_count:  # a library's call does not say when its bytes came
            since_s = transfer.noticed_s or transfer.begun_s + transfer.progress.first_s
            self._flows.of(transfer.store).came(count - transfer.noticed, since_s, at_s)
        transfer.noticed, transfer.noticed_s = count, at_s
        if transfer.heard(count, at_s):
            self._liveness.came(transfer.store, at_s)

    def give_up(self, transferred: Transferred) -> None:
        """The bytes are of no use."""
        self._slots.release_bytes(transferred.ticket)
        self._buffers.release(transferred.buffer)

    async def _run(self, transfer: _Transfer) -> None:
        """Return when it has a result."""
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
    def _filling(self, buffer: "Buffer[CachedObject]", ticket: Ticket) -> Generator[None]:
        """A thread fills `buffer` in this context, which ends with the place. If it fails, the
        bytes are given back, too, and the buffer, unless the thread goes on with it."""
        try:
            yield
        except BaseException as error:
            self._slots.release_bytes(ticket)
            if isinstance(error, trio.Cancelled):
                self._buffers.abandon(buffer)
            else:
                self._buffers.release(buffer)
            raise
        finally:
            self._slots.release_place(ticket)

    async def _request(self, transfer: _Transfer, ticket: Ticket, progress: Progress) -> None:
        """Try to bring the result. One that is cancelled abandons its thread (see `offload`), and
        with it the buffer, which nobody else may have while that thread may write into it."""
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
        """As `read`, but `fill` brings the bytes, of the pinned version, and no store. Raises what
        it raises."""
        buffer = self._buffers.take(length)
        with self._filling(buffer, ticket):
            await self._offload.data(fill, buffer.view[:length])
        return Transferred(buffer, ticket, is_confirmed=True)

    # -- hedging

    async def _look(self) -> None:
        while any(map(self._may_hedge, self._under_way)):
            await trio.sleep(_LOOK_S)
            for transfer in list(self._under_way):
                if self._is_slow(transfer):
                    self._hedge(transfer)
        self._looks = False

    def _may_hedge(self, transfer: _Transfer) -> bool:
        store = transfer.store
        return store.gives_up and self._paces[store].has_earned

    def _is_slow(self, transfer: _Transfer) -> bool:
        if transfer.ticket.priority is not Priority.DEMAND or transfer.second_ended is not None:
            return False
        store = transfer.store
        if not self._may_hedge(transfer) or self._outages.is_dark(store):
            return False
        elapsed_s = trio.current_time() - transfer.begun_s
        return self._paces[store].is_slow(transfer.length, transfer.progress.count, elapsed_s)

    def _hedge(self, transfer: _Transfer) -> None:
        """Begin the second request, if there is a place for it."""
        first = transfer.ticket
        ticket = Ticket(first.priority, first.length, transfer.store, first.user)
        if self._slots.acquire_now(ticket):
            self.hedged_requests += 1
            self._paces[transfer.store].spend()
            transfer.second_ended = trio.Event()
            self._nursery.start_soon(self._second, transfer, ticket, transfer.second_ended)

    async def _second(self, transfer: _Transfer, ticket: Ticket, ended: trio.Event) -> None:
        try:
            with transfer.second:
                await self._request(transfer, ticket, Progress())
                transfer.first.cancel()
        except CkptfsError as error:  # the first one may still succeed, or says so, too
            log.debug("second request: %s", error)
        except Exception:
            log.exception("unexpected error while fetching %s", transfer.pin.path)
        finally:
            ended.set()
