"""The scheduler of transfers: slots and bytes, bounded and granted by priority.

`next_ticket` decides which transfer starts next. It is a pure function of the waiting tickets, of
the load and of the time. `Scheduler` is the queue around it.

**Prefetch yields to readers**, because its transfers take bandwidth and CPU from readers even when
slots are free. A *reader* here is a transfer with DEMAND or READAHEAD that waits for a slot or has
one. A prefetch that a reader joins becomes a reader. Running transfers are not interrupted.

- While there is a reader, and for `_QUIET_S` after the last one, no prefetch starts, except for a
  share: one prefetch at a time, after a rest that is `_REST` times as long as the last one took. So
  a prefetch always makes progress, and readers who use all of the bandwidth all the time leave it
  at most one of `_REST` + 1 parts of the time, at any bandwidth.
- Then one prefetch may run, and twice as many after each further `_QUIET_S`. So a reader who comes
  back soon does not find a full link.

**One user** other than root and the daemon's own may take a quarter of the slots and of the bytes.
Such a user gets more only while no reader of another user waits, and while a quarter stays free for
others, so that these need not wait for the end of a transfer.

**One store** has no more requests, and no more bytes that no reader waits for, than its speed
allows (`flow_control`). One transfer of each kind may always run.

**A store that does not answer** (DARK) takes no bandwidth. So its transfers are no readers, and do
not wait behind a prefetch that yields.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from enum import IntEnum
from itertools import count
from typing import NamedTuple, TypeVar

import trio

from ckptfs._daemon.fetch.flow_control import FlowControl, FlowControls
from ckptfs._daemon.quotas import share_of

K = TypeVar("K", bound=Hashable)


class Priority(IntEnum):
    """The order of transfers.

    Attributes:
        DEMAND: A reader waits for the bytes.
        READAHEAD: A reader will probably want the bytes soon.
        PREFETCH: The bytes may never be read.
        DARK: The store does not answer. Even demand must not delay the readers of other stores.
    """

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2
    DARK = 3


_KEPT_FOR_DEMAND = 2
"""The slots that other priorities leave free, so that a reader does not wait for one."""
_LEFT_BESIDE = 1
"""The slots that `Scheduler.acquire_now` leaves free."""

_QUIET_S = 0.5
"""Between two requests of one reader there is the version check of the first, a round trip (of 20
to 100 ms on object stores), or the time that it takes to use half of a full window, 32 MiB."""
_REST = 31
"""Readers are to lose less than a tenth in all, the transfers that ran before they came included.
On two shared cores, a rest of 15 cost 6 % of the bytes."""
_PREFETCH_SHARE = 0.25
"""The share of the bytes in flight for prefetches. The prefetches that run when a reader comes, and
cannot be stopped, then have a sixteenth of 512 MiB, with the default of 128 MiB in flight."""

_serial = count()


class Ticket:
    """A request for one slot and a number of bytes.

    Attributes:
        priority: The priority now. It is DARK while the store is dark.
        wanted: The priority while the store answers.
        length: The bytes.
        store: The store of the transfer, if flow control limits it.
        user: The user who may have no more than a share; None if the ticket has no such limit.
        serial: The order in which the tickets were made.
        granted: The event that the ticket has its slot and its bytes.
        granted_s: The event loop's time of that.
    """

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


class InFlight(NamedTuple):
    """The number of running transfers, their bytes, and the number of waiting ones."""

    running: int
    bytes: int
    waiting: dict[Priority, int]


class Load:
    """The slots and bytes in use, counted by user and by store, with their limits.

    Attributes:
        slots_max: The most transfers at once.
        bytes_max: The most bytes in flight. One transfer may always run, even a larger one.
        running: The tickets that have a slot.
        bytes: The bytes in flight.
        reader_s: The last time at which there was a reader.
        rested_s: The time from which prefetch may take its share again.
    """

    def __init__(self, slots_max: int, bytes_max: int) -> None:
        self.slots_max = slots_max
        self.bytes_max = bytes_max
        self.running: set[Ticket] = set()
        self.bytes = 0
        self.reader_s = -math.inf
        self.rested_s = -math.inf
        self._of_priority: Counter[Priority] = Counter()
        self._prefetch_bytes = 0
        self._slots_of: Counter[int] = Counter()  # by user
        self._bytes_of: Counter[int] = Counter()  # by user
        self._requests_to: Counter[object] = Counter()  # by store
        self._ahead_bytes_of: Counter[object] = Counter()  # by store, without demand

    # -- changes

    def start(self, ticket: Ticket, now_s: float) -> None:
        """Give the ticket its slot and its bytes."""
        self.running.add(ticket)
        self.bytes += ticket.length
        if ticket.user is not None:
            _add(self._bytes_of, ticket.user, ticket.length)
        self._count(ticket, 1)
        ticket.granted_s = now_s

    def release_slot(self, ticket: Ticket, now_s: float) -> None:
        """Take the slot back."""
        self.running.remove(ticket)
        self._count(ticket, -1)
        if ticket.priority <= Priority.READAHEAD:
            self.reader_s = now_s
        elif ticket.priority is Priority.PREFETCH:
            self.rested_s = now_s + _REST * (now_s - ticket.granted_s)

    def release_bytes(self, ticket: Ticket) -> None:
        """Take the bytes back."""
        self.bytes -= ticket.length
        if ticket.user is not None:
            _add(self._bytes_of, ticket.user, -ticket.length)

    def change_priority(self, ticket: Ticket, priority: Priority, wanted: Priority) -> None:
        """Change the priorities of a ticket, which may run."""
        is_running = ticket in self.running
        if is_running:
            self._count(ticket, -1)
        ticket.priority, ticket.wanted = priority, wanted
        if is_running:
            self._count(ticket, 1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self._of_priority[ticket.priority] += sign
        if ticket.priority is Priority.PREFETCH:
            self._prefetch_bytes += sign * ticket.length
        if ticket.user is not None:
            _add(self._slots_of, ticket.user, sign)
        if ticket.store is not None:
            _add(self._requests_to, ticket.store, sign)
            if ticket.wanted is not Priority.DEMAND:
                _add(self._ahead_bytes_of, ticket.store, sign * ticket.length)

    # -- questions

    @property
    def has_reader(self) -> bool:
        """Whether a reader's transfer runs."""
        return bool(self._of_priority[Priority.DEMAND] or self._of_priority[Priority.READAHEAD])

    def fits(self, ticket: Ticket) -> bool:
        """Whether a slot and the bytes are free for the ticket."""
        kept = 0 if ticket.priority is Priority.DEMAND else _KEPT_FOR_DEMAND
        is_full = len(self.running) + kept >= self.slots_max
        return not self.bytes or not (is_full or self.bytes + ticket.length > self.bytes_max)

    def prefetch_start_s(self) -> float:
        """The time from which the next prefetch may start, if nothing happens until then."""
        if self._prefetch_bytes >= self.bytes_max * _PREFETCH_SHARE:
            return math.inf
        # One may run after one quiet time, 2 after two, 4 after three.
        running = self._of_priority[Priority.PREFETCH]
        quiet_s = self.reader_s + _QUIET_S * (1 + running.bit_length())
        return quiet_s if running else min(quiet_s, self.rested_s)

    def fills_store(self, ticket: Ticket, flow_of: Callable[[object], FlowControl]) -> bool:
        """Whether the store of the ticket has all that its speed allows."""
        requests = self._requests_to.get(ticket.store, 0)
        if not requests:
            return False
        flow = flow_of(ticket.store)
        if requests >= flow.requests_max:
            return True
        if ticket.wanted is Priority.DEMAND:
            return False
        ahead_bytes = self._ahead_bytes_of.get(ticket.store, 0)
        return bool(ahead_bytes) and ahead_bytes + ticket.length > flow.ahead_bytes_max

    def has_share(self, ticket: Ticket) -> bool:
        """Whether the user of the ticket has all that one of the other users may take.

        One transfer of each user may run, even a larger one.
        """
        if ticket.user is None or not self._bytes_of.get(ticket.user):
            return False
        is_full = self._slots_of[ticket.user] >= share_of(self.slots_max)
        length = self._bytes_of[ticket.user] + ticket.length
        return is_full or length > share_of(self.bytes_max)

    def leaves_share(self, ticket: Ticket) -> bool:
        """Whether the ticket leaves as much free for other users as one user may have."""
        slots = self.slots_max - share_of(self.slots_max)
        bytes_max = self.bytes_max - share_of(self.bytes_max)
        return len(self.running) < slots and self.bytes + ticket.length <= bytes_max

    def within_shares(self, tickets: list[Ticket]) -> list[Ticket]:
        """The tickets that may start now without taking the share of another user."""
        if not self._bytes_of:
            return tickets
        beyond = {ticket for ticket in tickets if self.has_share(ticket)}
        within = [ticket for ticket in tickets if ticket not in beyond]
        if any(ticket.priority <= Priority.READAHEAD for ticket in within):
            return within
        return within + [ticket for ticket in beyond if self.leaves_share(ticket)]


def next_ticket(
    waiting: Iterable[Ticket], load: Load, flow_of: Callable[[object], FlowControl], now_s: float
) -> Ticket | float:
    """The ticket to start now. Pure.

    A ticket that does not fit holds back those behind it, so that a large one is not overtaken for
    ever. Prefetches that yield, tickets of a store at its limit, and tickets of a
    user at the limit hold back no other ticket.

    Args:
        waiting: The waiting tickets.
        load: The slots and bytes in use. Its `reader_s` is `now_s` if there is a reader.
        flow_of: The flow control of a store.
        now_s: The time.

    Returns:
        The ticket; or, if none may start, the time at which one may start although nothing else
        happens (infinity: never).
    """
    start_s = load.prefetch_start_s()
    candidates: list[Ticket] = []
    has_yielded = False
    for ticket in waiting:
        if start_s > now_s and ticket.priority is Priority.PREFETCH:
            has_yielded = True
        elif not load.fills_store(ticket, flow_of):
            candidates.append(ticket)
    candidates = load.within_shares(candidates)
    first = min(candidates, key=lambda ticket: (ticket.priority, ticket.serial), default=None)
    if first is not None and load.fits(first):
        return first
    return start_s if has_yielded else math.inf


class Scheduler:
    """The queue of transfers. A timer in `nursery` starts the prefetches that yield."""

    def __init__(
        self,
        slots_max: int,
        bytes_max: int,
        nursery: trio.Nursery,
        flow_controls: FlowControls,
    ) -> None:
        self._flow_of = flow_controls.of
        self._load = Load(slots_max, bytes_max)
        self._nursery = nursery
        self._waiting: list[Ticket] = []
        self._timer: trio.CancelScope | None = None

    def in_flight(self) -> InFlight:
        """The use of the scheduler now."""
        waiting = dict.fromkeys(Priority, 0)
        for ticket in self._waiting:
            waiting[ticket.priority] += 1
        return InFlight(len(self._load.running), self._load.bytes, waiting)

    def resize(self, slots_max: int, bytes_max: int) -> None:
        """Use other limits from now on. Running transfers beyond them end by themselves."""
        self._load.slots_max, self._load.bytes_max = slots_max, bytes_max
        self._grant()

    async def acquire(self, ticket: Ticket, *, is_dark: bool = False) -> None:
        """Wait for a slot and for the bytes. A cancelled ticket leaves the queue.

        The caller gives them back by `release_slot` and `release_bytes`. `is_dark` says whether the
        store of the ticket does not answer.
        """
        ticket.granted = trio.Event()
        ticket.priority = Priority.DARK if is_dark else ticket.wanted
        self._waiting.append(ticket)
        self._grant()
        try:
            await ticket.granted.wait()
        except trio.Cancelled:
            if ticket.granted.is_set():
                self.release_slot(ticket)
                self.release_bytes(ticket)
            else:
                self._waiting.remove(ticket)
                self._grant()  # it may have been in the way of smaller ones
            raise

    def acquire_now(self, ticket: Ticket) -> bool:
        """Take a slot and the bytes, unless a transfer that waits for DEMAND could have them.

        One slot is left for the next reader.
        """
        load = self._load
        full = len(load.running) + _LEFT_BESIDE >= load.slots_max
        if full or load.bytes + ticket.length > load.bytes_max:
            return False
        if any(waiting.priority is Priority.DEMAND for waiting in self._waiting):
            return False
        if load.has_share(ticket) and not load.leaves_share(ticket):
            return False
        if load.fills_store(ticket, self._flow_of):
            return False
        self._start(ticket, trio.current_time())
        return True

    def release_slot(self, ticket: Ticket) -> None:
        """Give the slot back."""
        self._load.release_slot(ticket, trio.current_time())
        self._grant()

    def release_bytes(self, ticket: Ticket) -> None:
        """Give the bytes back."""
        self._load.release_bytes(ticket)
        self._grant()

    def raise_priority(self, ticket: Ticket, priority: Priority, *, is_dark: bool = False) -> None:
        """Let a waiting ticket overtake others, and let a running one count as a reader's. If its
        store `is_dark`, that begins when the store answers again."""
        wanted = min(ticket.wanted, priority)
        now = ticket.priority if is_dark else min(ticket.priority, priority)
        if (now, wanted) != (ticket.priority, ticket.wanted):
            self._load.change_priority(ticket, now, wanted)
            self._grant()

    def share(self, ticket: Ticket) -> None:
        """Lift the limit of the user from a waiting ticket, because another user wants its bytes,
        too."""
        if not ticket.granted.is_set():
            ticket.user = None
            self._grant()

    def darken(self, store: object) -> None:
        """Let the tickets that wait for that store go last."""
        for ticket in self._waiting:
            if ticket.store is store:
                ticket.priority = Priority.DARK

    def brighten(self, store: object) -> None:
        """Give the tickets that wait for that store their priority back."""
        for ticket in self._waiting:
            if ticket.store is store:
                ticket.priority = ticket.wanted
        self._grant()

    def _grant(self) -> None:
        """Start all tickets that may start now."""
        load, now_s = self._load, trio.current_time()
        if load.has_reader or any(t.priority <= Priority.READAHEAD for t in self._waiting):
            load.reader_s = now_s
        while isinstance(found := next_ticket(self._waiting, load, self._flow_of, now_s), Ticket):
            self._waiting.remove(found)
            self._start(found, now_s)
        self._wake_at(found)

    def _start(self, ticket: Ticket, now_s: float) -> None:
        self._load.start(ticket, now_s)
        ticket.granted.set()

    def _wake_at(self, time_s: float) -> None:
        if self._timer is not None:
            self._timer.deadline = time_s
        elif time_s < math.inf:
            self._timer = trio.CancelScope(deadline=time_s)
            self._nursery.start_soon(self._run_timer, self._timer)

    async def _run_timer(self, timer: trio.CancelScope) -> None:
        with timer:
            await trio.sleep_forever()
        self._timer = None
        self._grant()


def _add(counter: Counter[K], key: K, amount: int) -> None:
    """Add to a counter. Zeros go, so that a counter does not keep a detached store."""
    counter[key] += amount
    if not counter[key]:
        del counter[key]
