"""Places for transfers: bounded in number and in bytes, given out by priority.

**Prefetch yields to readers**, because what it runs takes bandwidth and CPU from them, however free
the places are. A *reader* here is a transfer with DEMAND or READAHEAD that waits for a place or has
one; one that a reader joins becomes the reader's. Transfers that run are not interrupted.

- While there is a reader, and until there was none for `_QUIET_S`, no prefetch starts, but for its
  share: one at a time, after a rest that is `_REST` times as long as the last one took. So a
  prefetch never stands still for ever, and readers who take all of the bandwidth all the time leave
  it at most one request in `_REST` + 1 parts of the time, whatever the bandwidth is.
- Then one may run, and twice as many after each further `_QUIET_S`: a reader who comes back soon
  does not find the link full.

**One user** other than root and the daemon's own may take a quarter of the places and of the
bytes. More they get only while nobody else's reader waits, and while a quarter stays free for
others, so that these need not wait until one of them has ended.

**One store** has no more requests, and no more bytes that no reader waits for, than its speed
allows (`flow`). One transfer of each kind may always run.

A store that does not answer (DARK) takes no bandwidth: it is no reader, and does not wait behind a
prefetch that yields.
"""

import math
from collections import Counter
from enum import IntEnum
from itertools import count
from typing import NamedTuple

import trio

from ckptfs._daemon.flow import Flows
from ckptfs._daemon.users import share_of


class Priority(IntEnum):
    """Who goes first. A reader is waiting for DEMAND; nobody waits yet for READAHEAD; PREFETCH may
    never be read; DARK is for stores that do not answer, whoever waits: they must not keep the
    others from theirs."""

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2
    DARK = 3


_KEPT_FOR_DEMAND = 2
"""Places that the others leave free, so that a reader does not wait for one to end."""
_LEFT_BESIDE = 1
"""Places that `acquire_now` leaves free."""

_QUIET_S = 0.5
"""Between two requests of one reader there is the version check of the first, a round trip (of 20
to 100 ms on object stores); or the time that it takes to use half of a full window, 32 MiB."""
_REST = 31
"""Readers are to lose less than a tenth in all, what ran already when they came included. Where
everything shares two cores, a rest of 15 cost 6 % of the bytes."""
_PREFETCH_SHARE = 0.25
"""Of the bytes in flight. What runs when a reader comes, and cannot be stopped, is then a sixteenth
of 512 MiB, with the default of 128 MiB in flight."""

_serial = count()


class Ticket:
    """A request for one place and `length` bytes. `priority` may be raised while it waits; it is
    DARK as long as `store` is, and then again `wanted`. `user`: who may not have more than a share;
    None: anybody."""

    def __init__(
        self, priority: Priority, length: int, store: object = None, user: int | None = None
    ) -> None:
        self.priority = self.wanted = priority
        self.length = length
        self.store = store
        self.user = user
        self.serial = next(_serial)
        self.granted = trio.Event()
        self.granted_s = 0.0


class SlotsInUse(NamedTuple):
    """How many transfers run, with how many bytes in flight; how many wait for a place."""

    running: int
    bytes: int
    waiting: dict[Priority, int]


class Slots:
    """`places_max` places and `bytes_max` bytes. One transfer may always run, however large.

    `nursery` runs the timer of the prefetches that yield; `flows` limit each store.
    """

    def __init__(
        self, places_max: int, bytes_max: int, nursery: trio.Nursery, flows: Flows | None = None
    ) -> None:
        self._flows = flows or Flows()
        self._places_max = places_max
        self._bytes_max = bytes_max
        self._nursery = nursery
        self._bytes = 0
        self._running: set[Ticket] = set()
        self._waiting: list[Ticket] = []
        self._places_of: Counter[int] = Counter()  # by user
        self._bytes_of: Counter[int] = Counter()
        self._reader_s = -math.inf  # when there was a reader last
        self._rested_s = -math.inf  # when prefetch may take its share again
        self._timer: trio.CancelScope | None = None

    def in_use(self) -> SlotsInUse:
        """What there is now."""
        waiting = dict.fromkeys(Priority, 0)
        for ticket in self._waiting:
            waiting[ticket.priority] += 1
        return SlotsInUse(len(self._running), self._bytes, waiting)

    def resize(self, places_max: int, bytes_max: int) -> None:
        """Have so many from now on. What is given out comes back by itself."""
        self._places_max, self._bytes_max = places_max, bytes_max
        self._grant()

    async def acquire(self, ticket: Ticket) -> None:
        """Wait for a place and room for the bytes; `release_place` and `release_bytes` give them
        back. Cancelling leaves the queue."""
        ticket.granted = trio.Event()
        self._waiting.append(ticket)
        self._grant()
        try:
            await ticket.granted.wait()
        except trio.Cancelled:
            if ticket.granted.is_set():
                self.release_place(ticket)
                self.release_bytes(ticket)
            else:
                self._waiting.remove(ticket)
                self._grant()  # it may have been in the way of smaller ones
            raise

    def acquire_now(self, ticket: Ticket) -> bool:
        """Take a place and room for the bytes if nobody who waits for DEMAND could have them, and
        one place is left for who comes next."""
        full = len(self._running) + _LEFT_BESIDE >= self._places_max
        if full or self._bytes + ticket.length > self._bytes_max:
            return False
        if any(waiting.priority is Priority.DEMAND for waiting in self._waiting):
            return False
        if self._has_share(ticket) and not self._leaves_share(ticket):
            return False
        if self._is_too_much(ticket):
            return False
        self._start(ticket)
        return True

    def release_place(self, ticket: Ticket) -> None:
        """Give the place back."""
        now_s = trio.current_time()
        self._running.remove(ticket)
        if ticket.user is not None:
            self._places_of -= Counter([ticket.user])  # zeros go
        if ticket.priority <= Priority.READAHEAD:
            self._reader_s = now_s
        elif ticket.priority is Priority.PREFETCH:
            self._rested_s = now_s + _REST * (now_s - ticket.granted_s)
        self._grant()

    def release_bytes(self, ticket: Ticket) -> None:
        """Give the room back."""
        self._bytes -= ticket.length
        if ticket.user is not None:
            self._bytes_of -= Counter({ticket.user: ticket.length})
        self._grant()

    def raise_priority(self, ticket: Ticket, priority: Priority) -> None:
        """Let a waiting ticket go ahead of others; one that has a place is a reader's from then
        on."""
        if priority < ticket.priority:
            ticket.priority = priority
            self._grant()

    def share(self, ticket: Ticket) -> None:
        """Somebody else wants it, too: while it waits, it is nobody's."""
        if not ticket.granted.is_set():
            ticket.user = None
            self._grant()

    def darken(self, store: object) -> None:
        """Let what waits for that store go last."""
        for ticket in self._waiting:
            if ticket.store is store:
                ticket.priority = Priority.DARK

    def brighten(self, store: object) -> None:
        """Give what waits for that store its priority back."""
        for ticket in self._waiting:
            if ticket.store is store:
                ticket.priority = ticket.wanted
        self._grant()

    def _grant(self) -> None:
        while (ticket := self._next()) is not None:
            kept = 0 if ticket.priority is Priority.DEMAND else _KEPT_FOR_DEMAND
            full = len(self._running) + kept >= self._places_max
            if self._bytes and (full or self._bytes + ticket.length > self._bytes_max):
                return
            self._waiting.remove(ticket)
            self._start(ticket)

    def _start(self, ticket: Ticket) -> None:
        self._running.add(ticket)
        self._bytes += ticket.length
        if ticket.user is not None:
            self._places_of[ticket.user] += 1
            self._bytes_of[ticket.user] += ticket.length
        ticket.granted_s = trio.current_time()
        ticket.granted.set()

    def _next(self) -> Ticket | None:
        """The first in the queue; prefetches are passed over while they have to yield, and users
        while they have their share."""
        candidates = self._waiting
        start_s = self._prefetch_start_s()
        if start_s > trio.current_time():
            candidates = [t for t in self._waiting if t.priority is not Priority.PREFETCH]
            if len(candidates) < len(self._waiting):
                self._grant_at(start_s)
        candidates = [ticket for ticket in candidates if not self._is_too_much(ticket)]
        if self._bytes_of:
            candidates = self._within_shares(candidates)
        return min(candidates, key=lambda t: (t.priority, t.serial), default=None)

    def _within_shares(self, tickets: list[Ticket]) -> list[Ticket]:
        beyond = {ticket for ticket in tickets if self._has_share(ticket)}
        within = [ticket for ticket in tickets if ticket not in beyond]
        if any(ticket.priority <= Priority.READAHEAD for ticket in within):
            return within
        return within + [ticket for ticket in beyond if self._leaves_share(ticket)]

    def _is_too_much(self, ticket: Ticket) -> bool:
        """Whether its store has all that it may have under way."""
        beside = [t for t in self._running if t.store is ticket.store]
        if ticket.store is None or not beside:
            return False
        flow = self._flows.of(ticket.store)
        if len(beside) >= flow.requests_max:
            return True
        if ticket.wanted is Priority.DEMAND:
            return False
        ahead_bytes = sum(t.length for t in beside if t.wanted is not Priority.DEMAND)
        return bool(ahead_bytes) and ahead_bytes + ticket.length > flow.ahead_bytes_max

    def _leaves_share(self, ticket: Ticket) -> bool:
        """Whether somebody else would find as much free as one user may have."""
        places = self._places_max - share_of(self._places_max)
        bytes_max = self._bytes_max - share_of(self._bytes_max)
        return len(self._running) < places and self._bytes + ticket.length <= bytes_max

    def _has_share(self, ticket: Ticket) -> bool:
        """Whether its user has all that one of the other users may take. One transfer of each may
        run, however large."""
        if ticket.user is None or not self._bytes_of[ticket.user]:
            return False
        is_full = self._places_of[ticket.user] >= share_of(self._places_max)
        length = self._bytes_of[ticket.user] + ticket.length
        return is_full or length > share_of(self._bytes_max)

    def _prefetch_start_s(self) -> float:
        """When the next prefetch may start, if nothing happens until then."""
        if any(t.priority <= Priority.READAHEAD for t in (*self._running, *self._waiting)):
            self._reader_s = trio.current_time()
        lengths = [t.length for t in self._running if t.priority is Priority.PREFETCH]
        if sum(lengths) >= self._bytes_max * _PREFETCH_SHARE:
            return math.inf
        # 1 may run after one quiet time, 2 after two, 4 after three.
        quiet_s = self._reader_s + _QUIET_S * (1 + len(lengths).bit_length())
        return quiet_s if lengths else min(quiet_s, self._rested_s)

    def _grant_at(self, time_s: float) -> None:
        if self._timer is not None:
            self._timer.deadline = time_s
            return
        self._timer = trio.CancelScope(deadline=time_s)
        self._nursery.start_soon(self._run_timer, self._timer)

    async def _run_timer(self, timer: trio.CancelScope) -> None:
        with timer:
            await trio.sleep_forever()
        self._timer = None
        self._grant()
