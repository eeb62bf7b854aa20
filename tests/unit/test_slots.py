"""Places are bounded, the urgent go first, and none is lost when a waiter goes away."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.slots import Priority, Slots, Ticket

DEMAND, READAHEAD, PREFETCH, DARK = Priority


class Clients:
    """Tasks that acquire tickets; `granted` names those that hold a place, in order."""

    def __init__(self, slots: Slots, nursery: trio.Nursery) -> None:
        self.slots = slots
        self.granted: list[str] = []
        self.tickets: dict[str, Ticket] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._nursery = nursery

    async def start(
        self, name: str, priority: Priority, length: int = 1, user: int | None = None
    ) -> None:
        self.tickets[name] = Ticket(priority, length, user=user)
        self.scopes[name] = trio.CancelScope()
        self._nursery.start_soon(self._run, name)
        await wait_all_tasks_blocked()

    async def _run(self, name: str) -> None:
        with self.scopes[name]:
            await self.slots.acquire(self.tickets[name])
            self.granted.append(name)

    async def release(self, name: str) -> None:
        self.granted.remove(name)
        self.slots.release_place(self.tickets[name])
        self.slots.release_bytes(self.tickets[name])
        await wait_all_tasks_blocked()


@pytest.fixture
async def clients(nursery: trio.Nursery) -> Clients:
    return Clients(Slots(3, 100, nursery), nursery)


async def test_demand_goes_first_and_then_the_older(clients: Clients) -> None:
    for name in ("a", "b", "c"):
        await clients.start(name, DEMAND)
    await clients.start("late readahead", READAHEAD)
    await clients.start("first demand", DEMAND)
    await clients.start("second demand", DEMAND)
    assert clients.granted == ["a", "b", "c"]
    await clients.release("a")
    assert clients.granted == ["b", "c", "first demand"]
    await clients.release("b")
    assert clients.granted == ["c", "first demand", "second demand"]
    for name in ("c", "first demand"):
        await clients.release(name)
    assert clients.granted == ["second demand"]  # two places are kept for demand
    await clients.release("second demand")
    assert clients.granted == ["late readahead"]


async def test_readahead_leaves_places_for_demand(clients: Clients) -> None:
    await clients.start("ahead", READAHEAD)
    await clients.start("more ahead", READAHEAD)
    assert clients.granted == ["ahead"]
    await clients.start("x", DEMAND)
    await clients.start("y", DEMAND)
    assert clients.granted == ["ahead", "x", "y"]


async def test_bytes_are_bounded_and_a_large_one_is_not_overtaken(clients: Clients) -> None:
    await clients.start("60", DEMAND, 60)
    await clients.start("50", DEMAND, 50)
    await clients.start("1", DEMAND, 1)
    assert clients.granted == ["60"]
    await clients.release("60")
    assert sorted(clients.granted) == ["1", "50"]


async def test_one_transfer_larger_than_everything_may_run_alone(clients: Clients) -> None:
    await clients.start("huge", READAHEAD, 10**9)
    await clients.start("other", DEMAND)
    assert clients.granted == ["huge"]
    await clients.release("huge")
    assert clients.granted == ["other"]
    await clients.start("huge again", DEMAND, 10**9)
    assert clients.granted == ["other"]


async def test_cancelling_a_waiter_leaves_the_queue(clients: Clients) -> None:
    for name in ("a", "b", "c", "gone", "next"):
        await clients.start(name, DEMAND)
    clients.scopes["gone"].cancel()
    await wait_all_tasks_blocked()
    await clients.release("a")
    assert clients.granted == ["b", "c", "next"]


async def test_cancelling_a_blocked_head_lets_smaller_ones_go(clients: Clients) -> None:
    """The head of the queue was in the way only while it waited."""
    await clients.start("60", DEMAND, 60)
    await clients.start("50", DEMAND, 50)
    await clients.start("1", DEMAND, 1)
    clients.scopes["50"].cancel()
    await wait_all_tasks_blocked()
    assert clients.granted == ["60", "1"]


async def test_cancelling_after_the_grant_gives_the_place_back(nursery: trio.Nursery) -> None:
    slots = Slots(1, 100, nursery)
    ticket = Ticket(DEMAND, 100)
    with trio.CancelScope() as scope:
        scope.cancel()
        await slots.acquire(ticket)
    assert scope.cancelled_caught
    with trio.fail_after(1):
        await slots.acquire(Ticket(DEMAND, 100))


async def test_a_raised_ticket_goes_ahead(clients: Clients) -> None:
    for name in ("a", "b", "c"):
        await clients.start(name, DEMAND)
    await clients.start("one", READAHEAD)
    await clients.start("two", READAHEAD)
    clients.slots.raise_priority(clients.tickets["two"], DEMAND)
    clients.slots.raise_priority(clients.tickets["two"], READAHEAD)  # never lowers
    await clients.release("a")
    assert clients.granted == ["b", "c", "two"]


async def test_raising_uses_a_place_that_was_kept(clients: Clients) -> None:
    await clients.start("ahead", READAHEAD)
    await clients.start("more", READAHEAD)
    assert clients.granted == ["ahead"]
    clients.slots.raise_priority(clients.tickets["more"], DEMAND)
    await wait_all_tasks_blocked()
    assert clients.granted == ["ahead", "more"]


async def test_what_takes_a_place_at_once_leaves_one_and_does_not_overtake_demand(
    clients: Clients,
) -> None:
    assert clients.slots.acquire_now(Ticket(DEMAND, 40))
    assert not clients.slots.acquire_now(Ticket(DEMAND, 61))
    second = Ticket(DEMAND, 10)
    assert clients.slots.acquire_now(second)
    assert not clients.slots.acquire_now(Ticket(DEMAND, 1))  # the third place is left
    clients.slots.release_place(second)
    clients.slots.release_bytes(second)
    await clients.start("ahead", READAHEAD, 61)
    assert clients.slots.acquire_now(second)
    clients.slots.release_place(second)
    clients.slots.release_bytes(second)
    await clients.start("demand", DEMAND, 61)
    assert clients.granted == []
    assert not clients.slots.acquire_now(Ticket(DEMAND, 1))


# -- prefetch yields


@pytest.fixture
def many(nursery: trio.Nursery, mock_clock: MockClock) -> Clients:
    """With places for all; the clock moves only when the test says so."""
    return Clients(Slots(100, 1000, nursery), nursery)


async def pass_s(clock: MockClock, seconds: float) -> None:
    clock.jump(seconds)
    await wait_all_tasks_blocked()


async def start_prefetches(clients: Clients, count: int) -> None:
    for number in range(count):
        await clients.start(f"p{number}", PREFETCH)


async def test_prefetches_run_beside_each_other_where_nobody_reads(many: Clients) -> None:
    await start_prefetches(many, 20)
    assert len(many.granted) == 20


async def test_prefetches_leave_bytes_for_readers(many: Clients) -> None:
    """What runs cannot be stopped, so that a quarter of the bytes is the most."""
    for name in "abcd":
        await many.start(name, PREFETCH, 100)
    assert many.granted == ["a", "b", "c"]
    await many.start("reader", READAHEAD, 700)
    assert many.granted == ["a", "b", "c", "reader"]


@pytest.mark.parametrize("priority", [DEMAND, READAHEAD])
async def test_a_prefetch_begins_when_readers_have_been_quiet(
    many: Clients, mock_clock: MockClock, priority: Priority
) -> None:
    await many.start("share", PREFETCH)
    await pass_s(mock_clock, 100)
    await many.start("reader", priority)
    await many.release("share")  # its rest is longer than all that follows
    await start_prefetches(many, 20)
    await pass_s(mock_clock, 10)
    assert many.granted == ["reader"]
    await many.release("reader")
    counts: list[int] = []
    for _ in range(6):
        counts.append(len(many.granted))
        await pass_s(mock_clock, 0.501)
    assert counts == [0, 1, 2, 4, 8, 16]


async def test_a_reader_that_waits_counts(many: Clients, mock_clock: MockClock) -> None:
    await many.start("share", PREFETCH)
    await pass_s(mock_clock, 100)
    await many.start("all", DARK, 999)
    await many.start("reader", DEMAND, 5)
    await many.release("share")
    await start_prefetches(many, 1)
    await pass_s(mock_clock, 10)
    assert many.granted == ["all"]
    many.scopes["reader"].cancel()
    await wait_all_tasks_blocked()
    assert many.granted == ["all"]
    await pass_s(mock_clock, 0.501)
    assert many.granted == ["all", "p0"]


async def test_readers_that_never_rest_leave_prefetch_a_share(
    many: Clients, mock_clock: MockClock
) -> None:
    await many.start("reader", DEMAND)
    await start_prefetches(many, 3)
    assert many.granted == ["reader", "p0"]
    await pass_s(mock_clock, 1)
    await many.release("p0")
    await pass_s(mock_clock, 30.9)
    assert many.granted == ["reader"]
    await pass_s(mock_clock, 0.2)
    assert many.granted == ["reader", "p1"]
    await pass_s(mock_clock, 1000)
    assert many.granted == ["reader", "p1"]  # one at a time
    await many.release("p1")
    await pass_s(mock_clock, 31 * 1000 + 1)
    assert many.granted == ["reader", "p2"]


async def test_a_prefetch_that_a_reader_joins_is_the_readers(
    many: Clients, mock_clock: MockClock
) -> None:
    await start_prefetches(many, 2)
    many.slots.raise_priority(many.tickets["p0"], DEMAND)
    await many.release("p1")
    await many.start("more", PREFETCH)
    await pass_s(mock_clock, 100)
    await many.release("more")  # it was the share
    await many.start("next", PREFETCH)
    await pass_s(mock_clock, 100)
    assert many.granted == ["p0"]
    await many.start("joined", PREFETCH)
    many.slots.raise_priority(many.tickets["joined"], DEMAND)
    await wait_all_tasks_blocked()
    assert many.granted == ["p0", "joined"]


async def test_a_dark_store_neither_stops_prefetches_nor_waits_behind_one_that_yields(
    many: Clients, mock_clock: MockClock
) -> None:
    await many.start("dark", DARK)
    await start_prefetches(many, 2)
    assert many.granted == ["dark", "p0", "p1"]
    await pass_s(mock_clock, 1)
    await many.start("reader", DEMAND)
    await many.start("yields", PREFETCH)
    await many.start("dark, too", DARK)
    assert many.granted == ["dark", "p0", "p1", "reader", "dark, too"]


async def test_cancelling_a_prefetch_that_yields(many: Clients, mock_clock: MockClock) -> None:
    await many.start("reader", DEMAND)
    await start_prefetches(many, 3)
    for name in ("p0", "p1"):
        many.scopes[name].cancel()
    many.granted.remove("p0")
    many.slots.release_place(many.tickets["p0"])
    many.slots.release_bytes(many.tickets["p0"])
    await many.release("reader")
    await pass_s(mock_clock, 0.501)
    assert many.granted == ["p2"]


# -- users


@pytest.fixture
def sixteen(nursery: trio.Nursery) -> Clients:
    return Clients(Slots(16, 160, nursery), nursery)


async def test_one_user_alone_leaves_a_quarter_to_others(sixteen: Clients) -> None:
    for number in range(100):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    assert len(sixteen.granted) == 12
    await sixteen.start("root", DEMAND)
    for number in range(3):
        await sixteen.start(f"b{number}", DEMAND, user=8)
    assert sixteen.granted[12:] == ["root", "b0", "b1", "b2"]


async def test_who_has_more_than_a_quarter_gets_no_more_while_others_wait(
    sixteen: Clients,
) -> None:
    for number in range(100):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    for number in range(14):
        await sixteen.start(f"root{number}", DEMAND)
    for number in range(12):
        await sixteen.release(f"a{number}")
    running = [name.rstrip("0123456789") for name in sixteen.granted]
    assert (running.count("root"), running.count("a")) == (12, 4)
    for number in range(14):
        await sixteen.release(f"root{number}")
    assert len(sixteen.granted) == 12


async def test_a_user_may_take_a_quarter_before_others_who_came_later(sixteen: Clients) -> None:
    for number in range(16):
        await sixteen.start(f"root{number}", DEMAND)
    for number in range(5):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    for number in range(16, 20):
        await sixteen.start(f"root{number}", DEMAND)
    for number in range(8):
        await sixteen.release(f"root{number}")
    assert sixteen.granted[8:] == ["a0", "a1", "a2", "a3", "root16", "root17", "root18", "root19"]


async def test_bytes_are_shared_like_places(sixteen: Clients) -> None:
    for number in range(4):
        await sixteen.start(f"a{number}", DEMAND, 30, user=7)
    await sixteen.start("root", DEMAND, 40)
    assert sixteen.granted == ["a0", "a1", "a2", "a3", "root"]
    await sixteen.start("large", DEMAND, 100, user=8)
    await sixteen.start("a4", DEMAND, 1, user=7)
    assert "a4" not in sixteen.granted
    for name in ("a0", "a1", "a2", "a3"):
        await sixteen.release(name)
    assert sorted(sixteen.granted) == ["a4", "large", "root"]  # one of each, however large


async def test_what_somebody_else_wants_too_is_nobodys(sixteen: Clients) -> None:
    for number in range(20):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    await sixteen.start("ahead", READAHEAD, user=7)
    assert len(sixteen.granted) == 12
    sixteen.slots.share(sixteen.tickets["a15"])
    await wait_all_tasks_blocked()
    assert sixteen.granted[12:] == ["a15"]
    sixteen.slots.share(sixteen.tickets["a0"])  # it runs, as one of theirs
    for name in list(sixteen.granted):
        await sixteen.release(name)
    while sixteen.granted:
        await sixteen.release(sixteen.granted[0])
    assert not sixteen.slots._places_of
    assert not sixteen.slots._bytes_of


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(Priority), st.integers(1, 150)),
        st.tuples(
            st.sampled_from(["release", "cancel", "raise", "sleep"]),
            st.just(0),
            st.integers(0, 99),
        ),
    ),
    max_size=40,
)


@given(_OPERATIONS, st.integers(1, 5), st.booleans())
def test_bounds_hold_and_nothing_waits_without_a_reason(
    operations: "list[tuple[str, int, int]]", places: int, with_users: bool
) -> None:
    clock = MockClock()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            clients = Clients(Slots(places, 100, nursery), nursery)
            for number, (operation, priority, value) in enumerate(operations):
                waiting = [n for n in clients.tickets if n not in clients.granted]
                if operation == "start":
                    user = (None, 7, 8)[number % 3] if with_users else None
                    await clients.start(str(number), Priority(priority), value, user)
                elif operation == "release" and clients.granted:
                    name = clients.granted[value % len(clients.granted)]
                    await clients.release(name)
                    del clients.tickets[name]
                elif operation == "cancel" and waiting:
                    name = waiting[value % len(waiting)]
                    clients.scopes[name].cancel()
                    del clients.tickets[name]
                elif operation == "raise" and waiting:
                    name = waiting[value % len(waiting)]
                    clients.slots.raise_priority(clients.tickets[name], DEMAND)
                elif operation == "sleep":
                    clock.jump(value / 50)
                await wait_all_tasks_blocked()
                _check(clients, places)
            for _ in range(len(clients.tickets)):
                for name in list(clients.granted):
                    await clients.release(name)
                    del clients.tickets[name]
                await pass_s(clock, 1e6)
            assert not clients.tickets  # all had their turn
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def _check(clients: Clients, places: int) -> None:
    running = [clients.tickets[name] for name in clients.granted]
    waiting = [t for name, t in clients.tickets.items() if name not in clients.granted]
    taken = sum(t.length for t in running)
    assert len(running) <= places
    assert taken <= 100 or len(running) == 1
    others = [t for t in waiting if t.priority is not PREFETCH]  # which may have to yield
    if any(t.user for t in others):
        assert running  # they may have to leave something to others
    elif others:
        head = min(others, key=lambda t: (t.priority, t.serial))
        kept = 0 if head.priority is DEMAND else 2
        # A prefetch that does not have to yield is before what is dark.
        before = [t for t in waiting if t.priority <= head.priority and t.serial <= head.serial]
        before += [t for t in waiting if t.priority < head.priority]
        assert running
        longest = max(t.length for t in before)
        assert len(running) + kept >= places or taken + longest > 100
