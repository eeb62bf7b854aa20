"""How much may be under way at a store, as its speed says."""

import math

import pytest
import trio
from unit.fakes import MIB, FakeStore

from ckptfs._daemon.flow import Flow, Flows
from ckptfs._daemon.slots import Priority, Slots, Ticket

SLOW, MEDIUM, FAST = 100_000, 20 * MIB, 10_000 * MIB


def measured(bytes_per_s: float, seconds: float = 3.0) -> Flow:
    """A flow of that speed."""
    flow = Flow()
    for step in range(10):
        part_s = seconds / 10
        flow.came(int(bytes_per_s * part_s), step * part_s, (step + 1) * part_s)
    return flow


@pytest.mark.parametrize("bytes_per_s", [SLOW, MEDIUM, FAST])
def test_the_speed_is_that_of_the_time_in_which_bytes_came(bytes_per_s: int) -> None:
    assert measured(bytes_per_s).bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)


def test_requests_beside_each_other_add_their_bytes_and_not_their_time() -> None:
    flow = Flow()
    for _ in range(16):
        flow.came(MIB, 10.0, 11.0)
    assert flow.bytes_per_s == pytest.approx(16 * MIB)


def test_waiting_for_a_first_byte_says_nothing_of_the_speed() -> None:
    flow = Flow()
    for number in range(20):  # a first byte after 4 s, then 1 MiB in 0.02 s
        flow.came(MIB, 4.0 * number, 4.0 * number + 0.02)
    assert flow.bytes_per_s == pytest.approx(50 * MIB)


def test_the_speed_follows_the_link() -> None:
    flow = measured(FAST)
    for step in range(90):
        flow.came(SLOW, 100.0 + step, 101.0 + step)
    assert flow.bytes_per_s == pytest.approx(SLOW, rel=0.1)


def test_a_store_that_was_not_measured_has_no_limits() -> None:
    flow = Flow()
    flow.came(10, 0.0, 0.1)
    assert flow.bytes_per_s == flow.ahead_bytes_max == flow.requests_max == math.inf
    assert flow.span_blocks_max == math.inf


@pytest.mark.parametrize(
    ("bytes_per_s", "span_blocks", "ahead_mib"),
    [(SLOW, 1, 1), (MEDIUM, 20, 80), (FAST, 10_000, 40_000)],
)
def test_spans_and_windows_follow_the_speed(
    bytes_per_s: int, span_blocks: int, ahead_mib: int
) -> None:
    flow = measured(bytes_per_s)
    assert flow.span_blocks_max == pytest.approx(span_blocks, rel=0.05)
    assert flow.ahead_bytes_max == pytest.approx(ahead_mib * MIB, rel=0.05)


def test_timeouts_halve_the_requests_once_for_a_burst() -> None:
    flow = Flow()
    for _ in range(16):
        flow.began()
    for _ in range(16):  # all of them began at the same time
        flow.timed_out(0.0, 3.0)
    assert flow.requests_max == 8
    flow.timed_out(3.5, 6.5)
    assert flow.requests_max == 4
    for now_s in (10.0, 20.0, 30.0):
        flow.timed_out(now_s - 1, now_s)
    assert flow.requests_max == 2  # a reader must not wait for one request that hangs


def test_answers_bring_the_requests_back() -> None:
    flow = Flow()
    for _ in range(16):
        flow.began()
    flow.timed_out(0.0, 3.0)
    answers = 0
    while flow.requests_max < 16:
        flow.answered()
        answers += 1
    assert 80 < answers < 120  # one request more for as many answers as there are requests


async def test_a_slow_store_gets_few_requests_and_the_others_all(nursery: trio.Nursery) -> None:
    flows = Flows()
    slow, fast = FakeStore(), FakeStore()
    flow = flows.of(slow)
    for _ in range(8):
        flow.began()
    flow.timed_out(0.0, 3.0)  # four at once
    flow.timed_out(4.0, 7.0)  # two
    slots = Slots(16, 64 * MIB, nursery, flows)
    tickets = [Ticket(Priority.DEMAND, MIB, slow) for _ in range(5)]
    for ticket in tickets:
        nursery.start_soon(slots.acquire, ticket)
    other = Ticket(Priority.DEMAND, MIB, fast)
    await slots.acquire(other)
    await trio.testing.wait_all_tasks_blocked()
    granted = [ticket for ticket in tickets if ticket.granted.is_set()]
    assert len(granted) == 2
    slots.release_place(granted[0])
    slots.release_bytes(granted[0])
    await trio.testing.wait_all_tasks_blocked()
    assert sum(ticket.granted.is_set() for ticket in tickets) == 3
    nursery.cancel_scope.cancel()


async def test_readahead_on_a_slow_link_leaves_it_to_the_readers(nursery: trio.Nursery) -> None:
    flows = Flows()
    store = FakeStore()
    flows.of(store).came(2 * MIB, 0.0, 4.0)  # half a MiB per second: 2 MiB ahead
    slots = Slots(16, 64 * MIB, nursery, flows)
    ahead = [Ticket(Priority.READAHEAD, MIB, store) for _ in range(5)]
    for ticket in ahead:
        nursery.start_soon(slots.acquire, ticket)
    await trio.testing.wait_all_tasks_blocked()
    assert sum(ticket.granted.is_set() for ticket in ahead) == 2
    demand = Ticket(Priority.DEMAND, MIB, store)
    await slots.acquire(demand)
    assert demand.granted.is_set()
    slots.raise_priority(ahead[2], Priority.DEMAND)
    nursery.cancel_scope.cancel()
