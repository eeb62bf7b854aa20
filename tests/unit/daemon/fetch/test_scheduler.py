"""The scheduler: slots are bounded, urgent tickets go first, and a cancelled one loses no slot."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.fetch.flow_control import FlowControls
from ckptfs._daemon.fetch.scheduler import Priority, Scheduler, Ticket

DEMAND, READAHEAD, PREFETCH, DARK = Priority


class Clients:
    """Tasks that acquire tickets. `granted` names those that have a slot, in order."""

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery) -> None:
        self.scheduler = scheduler
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
            await self.scheduler.acquire(self.tickets[name])
            self.granted.append(name)

    async def release(self, name: str) -> None:
        self.granted.remove(name)
        self.scheduler.release_slot(self.tickets[name])
        self.scheduler.release_bytes(self.tickets[name])
        await wait_all_tasks_blocked()


@pytest.fixture
async def clients(nursery: trio.Nursery) -> Clients:
    return Clients(Scheduler(3, 100, nursery, FlowControls()), nursery)


async def test_scheduler_grants_demand_first_and_then_the_oldest(clients: Clients) -> None:
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
    assert clients.granted == ["second demand"]  # two slots are kept for demand
    await clients.release("second demand")
    assert clients.granted == ["late readahead"]


async def test_scheduler_keeps_slots_for_demand(clients: Clients) -> None:
    await clients.start("ahead", READAHEAD)
    await clients.start("more ahead", READAHEAD)
    assert clients.granted == ["ahead"]
    await clients.start("x", DEMAND)
    await clients.start("y", DEMAND)
    assert clients.granted == ["ahead", "x", "y"]


async def test_scheduler_bounds_bytes_and_lets_no_ticket_overtake(clients: Clients) -> None:
    await clients.start("60", DEMAND, 60)
    await clients.start("50", DEMAND, 50)
    await clients.start("1", DEMAND, 1)
    assert clients.granted == ["60"]
    await clients.release("60")
    assert sorted(clients.granted) == ["1", "50"]


async def test_scheduler_lets_an_oversized_transfer_run_alone(clients: Clients) -> None:
    await clients.start("huge", READAHEAD, 10**9)
    await clients.start("other", DEMAND)
    assert clients.granted == ["huge"]
    await clients.release("huge")
    assert clients.granted == ["other"]
    await clients.start("huge again", DEMAND, 10**9)
    assert clients.granted == ["other"]


async def test_scheduler_drops_a_cancelled_waiter(clients: Clients) -> None:
    for name in ("a", "b", "c", "gone", "next"):
        await clients.start(name, DEMAND)
    clients.scopes["gone"].cancel()
    await wait_all_tasks_blocked()
    await clients.release("a")
    assert clients.granted == ["b", "c", "next"]


async def test_scheduler_grants_smaller_tickets_after_a_cancelled_head(clients: Clients) -> None:
    """The head of the queue was in the way only while it waited."""
    await clients.start("60", DEMAND, 60)
    await clients.start("50", DEMAND, 50)
    await clients.start("1", DEMAND, 1)
    clients.scopes["50"].cancel()
    await wait_all_tasks_blocked()
    assert clients.granted == ["60", "1"]


async def test_scheduler_takes_back_the_slot_of_a_cancelled_ticket(nursery: trio.Nursery) -> None:
    scheduler = Scheduler(1, 100, nursery, FlowControls())
    ticket = Ticket(DEMAND, 100)
    with trio.CancelScope() as scope:
        scope.cancel()
        await scheduler.acquire(ticket)
    assert scope.cancelled_caught
    with trio.fail_after(1):
        await scheduler.acquire(Ticket(DEMAND, 100))


async def test_scheduler_lets_a_raised_ticket_overtake(clients: Clients) -> None:
    for name in ("a", "b", "c"):
        await clients.start(name, DEMAND)
    await clients.start("one", READAHEAD)
    await clients.start("two", READAHEAD)
    clients.scheduler.raise_priority(clients.tickets["two"], DEMAND)
    clients.scheduler.raise_priority(clients.tickets["two"], READAHEAD)  # it never lowers
    await clients.release("a")
    assert clients.granted == ["b", "c", "two"]


async def test_scheduler_gives_a_raised_ticket_a_kept_slot(clients: Clients) -> None:
    await clients.start("ahead", READAHEAD)
    await clients.start("more", READAHEAD)
    assert clients.granted == ["ahead"]
    clients.scheduler.raise_priority(clients.tickets["more"], DEMAND)
    await wait_all_tasks_blocked()
    assert clients.granted == ["ahead", "more"]


async def test_scheduler_acquire_now_leaves_a_slot_and_overtakes_no_demand(
    clients: Clients,
) -> None:
    assert clients.scheduler.acquire_now(Ticket(DEMAND, 40))
    assert not clients.scheduler.acquire_now(Ticket(DEMAND, 61))
    second = Ticket(DEMAND, 10)
    assert clients.scheduler.acquire_now(second)
    assert not clients.scheduler.acquire_now(Ticket(DEMAND, 1))  # the third slot is left
    clients.scheduler.release_slot(second)
    clients.scheduler.release_bytes(second)
    await clients.start("ahead", READAHEAD, 61)
    assert clients.scheduler.acquire_now(second)
    clients.scheduler.release_slot(second)
    clients.scheduler.release_bytes(second)
    await clients.start("demand", DEMAND, 61)
    assert clients.granted == []
    assert not clients.scheduler.acquire_now(Ticket(DEMAND, 1))


# -- prefetch yields


@pytest.fixture
def many(nursery: trio.Nursery, mock_clock: MockClock) -> Clients:
    """Clients with slots for all. The clock moves only when the test moves it."""
    return Clients(Scheduler(100, 1000, nursery, FlowControls()), nursery)


async def pass_s(clock: MockClock, seconds: float) -> None:
    clock.jump(seconds)
    await wait_all_tasks_blocked()


async def start_prefetches(clients: Clients, count: int) -> None:
    for number in range(count):
        await clients.start(f"p{number}", PREFETCH)


async def test_scheduler_without_readers_runs_prefetches_in_parallel(many: Clients) -> None:
    await start_prefetches(many, 20)
    assert len(many.granted) == 20


async def test_scheduler_keeps_bytes_from_prefetches(many: Clients) -> None:
    """Running transfers cannot be stopped, so prefetches have at most a quarter of the bytes."""
    for name in "abcd":
        await many.start(name, PREFETCH, 100)
    assert many.granted == ["a", "b", "c"]
    await many.start("reader", READAHEAD, 700)
    assert many.granted == ["a", "b", "c", "reader"]


@pytest.mark.parametrize("priority", [DEMAND, READAHEAD])
async def test_scheduler_starts_prefetches_after_a_quiet_time(
    many: Clients, mock_clock: MockClock, priority: Priority
) -> None:
    await many.start("share", PREFETCH)
    await pass_s(mock_clock, 100)
    await many.start("reader", priority)
    await many.release("share")  # its rest is longer than the rest of the test
    await start_prefetches(many, 20)
    await pass_s(mock_clock, 10)
    assert many.granted == ["reader"]
    await many.release("reader")
    counts: list[int] = []
    for _ in range(6):
        counts.append(len(many.granted))
        await pass_s(mock_clock, 0.501)
    assert counts == [0, 1, 2, 4, 8, 16]


async def test_scheduler_counts_a_waiting_reader(many: Clients, mock_clock: MockClock) -> None:
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


async def test_scheduler_leaves_prefetch_a_share_beside_readers(
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


async def test_scheduler_counts_a_joined_prefetch_as_a_reader(
    many: Clients, mock_clock: MockClock
) -> None:
    await start_prefetches(many, 2)
    many.scheduler.raise_priority(many.tickets["p0"], DEMAND)
    await many.release("p1")
    await many.start("more", PREFETCH)
    await pass_s(mock_clock, 100)
    await many.release("more")  # it had the share
    await many.start("next", PREFETCH)
    await pass_s(mock_clock, 100)
    assert many.granted == ["p0"]
    await many.start("joined", PREFETCH)
    many.scheduler.raise_priority(many.tickets["joined"], DEMAND)
    await wait_all_tasks_blocked()
    assert many.granted == ["p0", "joined"]


async def test_scheduler_of_a_dark_store_neither_stops_nor_awaits_prefetch(
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


async def test_scheduler_drops_a_cancelled_prefetch_that_yields(
    many: Clients, mock_clock: MockClock
) -> None:
    await many.start("reader", DEMAND)
    await start_prefetches(many, 3)
    for name in ("p0", "p1"):
        many.scopes[name].cancel()
    many.granted.remove("p0")
    many.scheduler.release_slot(many.tickets["p0"])
    many.scheduler.release_bytes(many.tickets["p0"])
    await many.release("reader")
    await pass_s(mock_clock, 0.501)
    assert many.granted == ["p2"]


# -- users


@pytest.fixture
def sixteen(nursery: trio.Nursery) -> Clients:
    return Clients(Scheduler(16, 160, nursery, FlowControls()), nursery)


async def test_scheduler_lets_one_user_take_all_but_a_quarter(sixteen: Clients) -> None:
    for number in range(100):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    assert len(sixteen.granted) == 12
    await sixteen.start("root", DEMAND)
    for number in range(3):
        await sixteen.start(f"b{number}", DEMAND, user=8)
    assert sixteen.granted[12:] == ["root", "b0", "b1", "b2"]


async def test_scheduler_limits_a_user_to_a_quarter_while_others_wait(
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


async def test_scheduler_grants_a_users_quarter_in_order_of_arrival(sixteen: Clients) -> None:
    for number in range(16):
        await sixteen.start(f"root{number}", DEMAND)
    for number in range(5):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    for number in range(16, 20):
        await sixteen.start(f"root{number}", DEMAND)
    for number in range(8):
        await sixteen.release(f"root{number}")
    assert sixteen.granted[8:] == ["a0", "a1", "a2", "a3", "root16", "root17", "root18", "root19"]


async def test_scheduler_shares_bytes_like_slots(sixteen: Clients) -> None:
    for number in range(4):
        await sixteen.start(f"a{number}", DEMAND, 30, user=7)
    await sixteen.start("root", DEMAND, 40)
    assert sixteen.granted == ["a0", "a1", "a2", "a3", "root"]
    await sixteen.start("large", DEMAND, 100, user=8)
    await sixteen.start("a4", DEMAND, 1, user=7)
    assert "a4" not in sixteen.granted
    for name in ("a0", "a1", "a2", "a3"):
        await sixteen.release(name)
    assert sorted(sixteen.granted) == [
        "a4",
        "large",
        "root",
    ]  # one of each user


async def test_scheduler_lifts_the_user_limit_of_a_shared_ticket(sixteen: Clients) -> None:
    for number in range(20):
        await sixteen.start(f"a{number}", DEMAND, user=7)
    await sixteen.start("ahead", READAHEAD, user=7)
    assert len(sixteen.granted) == 12
    sixteen.scheduler.share(sixteen.tickets["a15"])
    await wait_all_tasks_blocked()
    assert sixteen.granted[12:] == ["a15"]
    sixteen.scheduler.share(sixteen.tickets["a0"])  # it runs already, and still counts for its user
    for name in list(sixteen.granted):
        await sixteen.release(name)
    while sixteen.granted:
        await sixteen.release(sixteen.granted[0])
    assert not sixteen.scheduler._load._slots_of
    assert not sixteen.scheduler._load._bytes_of


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
def test_scheduler_holds_its_bounds_and_no_ticket_waits_in_vain(
    operations: "list[tuple[str, int, int]]", slots: int, with_users: bool
) -> None:
    clock = MockClock()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            clients = Clients(Scheduler(slots, 100, nursery, FlowControls()), nursery)
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
                    clients.scheduler.raise_priority(clients.tickets[name], DEMAND)
                elif operation == "sleep":
                    clock.jump(value / 50)
                await wait_all_tasks_blocked()
                _check(clients, slots)
            for _ in range(len(clients.tickets)):
                for name in list(clients.granted):
                    await clients.release(name)
                    del clients.tickets[name]
                await pass_s(clock, 1e6)
            assert not clients.tickets  # all of them had a slot
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def _check(clients: Clients, slots: int) -> None:
    running = [clients.tickets[name] for name in clients.granted]
    waiting = [t for name, t in clients.tickets.items() if name not in clients.granted]
    taken = sum(t.length for t in running)
    assert len(running) <= slots
    assert taken <= 100 or len(running) == 1
    others = [t for t in waiting if t.priority is not PREFETCH]  # prefetches may have to yield
    if any(t.user for t in others):
        assert running  # they may have to leave slots to others
    elif others:
        head = min(others, key=lambda t: (t.priority, t.serial))
        kept = 0 if head.priority is DEMAND else 2
        # A prefetch that does not yield goes before dark tickets.
        before = [t for t in waiting if t.priority <= head.priority and t.serial <= head.serial]
        before += [t for t in waiting if t.priority < head.priority]
        assert running
        longest = max(t.length for t in before)
        assert len(running) + kept >= slots or taken + longest > 100
