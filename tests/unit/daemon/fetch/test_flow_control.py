"""Flow control: the limits of a store follow its speed."""

import math

import pytest
import trio
from support.fakes import MIB, FakeStore

from ckptfs._daemon.fetch.flow_control import FlowControl, FlowControls
from ckptfs._daemon.fetch.scheduler import Priority, Scheduler, Ticket

SLOW, MEDIUM, FAST = 100_000, 20 * MIB, 10_000 * MIB


def measured(bytes_per_s: float, seconds: float = 3.0) -> FlowControl:
    """The flow control of a store with that speed."""
    flow = FlowControl()
    for step in range(10):
        part_s = seconds / 10
        flow.came(int(bytes_per_s * part_s), step * part_s, (step + 1) * part_s)
    return flow


@pytest.mark.parametrize("bytes_per_s", [SLOW, MEDIUM, FAST])
def test_flow_control_measures_the_speed_while_bytes_come(bytes_per_s: int) -> None:
    assert measured(bytes_per_s).bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)


def test_flow_control_adds_bytes_but_not_time_of_parallel_requests() -> None:
    flow = FlowControl()
    for _ in range(16):
        flow.came(MIB, 10.0, 11.0)
    assert flow.bytes_per_s == pytest.approx(16 * MIB)


def test_flow_control_ignores_the_wait_for_a_first_byte() -> None:
    flow = FlowControl()
    for number in range(20):  # a first byte after 4 s, then 1 MiB in 0.02 s
        flow.came(MIB, 4.0 * number, 4.0 * number + 0.02)
    assert flow.bytes_per_s == pytest.approx(50 * MIB)


def test_flow_control_speed_follows_the_link() -> None:
    flow = measured(FAST)
    for step in range(90):
        flow.came(SLOW, 100.0 + step, 101.0 + step)
    assert flow.bytes_per_s == pytest.approx(SLOW, rel=0.1)


def test_flow_control_without_measurements_has_no_limits() -> None:
    flow = FlowControl()
    flow.came(10, 0.0, 0.1)
    assert flow.bytes_per_s == flow.ahead_bytes_max == flow.requests_max == math.inf
    assert flow.span_blocks_max == math.inf


@pytest.mark.parametrize(
    ("bytes_per_s", "span_blocks", "ahead_mib"),
    [(SLOW, 1, 1), (MEDIUM, 20, 80), (FAST, 10_000, 40_000)],
)
def test_flow_control_limits_spans_and_windows_by_the_speed(
    bytes_per_s: int, span_blocks: int, ahead_mib: int
) -> None:
    flow = measured(bytes_per_s)
    assert flow.span_blocks_max == pytest.approx(span_blocks, rel=0.05)
    assert flow.ahead_bytes_max == pytest.approx(ahead_mib * MIB, rel=0.05)


def test_flow_control_halves_the_requests_once_per_burst() -> None:
    flow = FlowControl()
    for _ in range(16):
        flow.began()
    for _ in range(16):  # these requests began at the same time
        flow.timed_out(0.0, 3.0)
    assert flow.requests_max == 8
    flow.timed_out(3.5, 6.5)
    assert flow.requests_max == 4
    for now_s in (10.0, 20.0, 30.0):
        flow.timed_out(now_s - 1, now_s)
    assert flow.requests_max == 2  # a reader must not wait for one request that hangs


def test_flow_control_raises_the_requests_after_answers() -> None:
    flow = FlowControl()
    for _ in range(16):
        flow.began()
    flow.timed_out(0.0, 3.0)
    answers = 0
    while flow.requests_max < 16:
        flow.answered()
        answers += 1
    assert 80 < answers < 120  # one request more for as many answers as there are requests


async def test_flow_control_of_a_slow_store_leaves_other_stores_alone(
    nursery: trio.Nursery,
) -> None:
    flow_controls = FlowControls()
    slow, fast = FakeStore(), FakeStore()
    flow = flow_controls.of(slow)
    for _ in range(8):
        flow.began()
    flow.timed_out(0.0, 3.0)  # four at once
    flow.timed_out(4.0, 7.0)  # two
    scheduler = Scheduler(16, 64 * MIB, nursery, flow_controls)
    tickets = [Ticket(Priority.DEMAND, MIB, slow) for _ in range(5)]
    for ticket in tickets:
        nursery.start_soon(scheduler.acquire, ticket)
    other = Ticket(Priority.DEMAND, MIB, fast)
    await scheduler.acquire(other)
    await trio.testing.wait_all_tasks_blocked()
    granted = [ticket for ticket in tickets if ticket.granted.is_set()]
    assert len(granted) == 2
    scheduler.release_slot(granted[0])
    scheduler.release_bytes(granted[0])
    await trio.testing.wait_all_tasks_blocked()
    assert sum(ticket.granted.is_set() for ticket in tickets) == 3
    nursery.cancel_scope.cancel()


async def test_flow_control_limits_readahead_on_a_slow_link(nursery: trio.Nursery) -> None:
    flow_controls = FlowControls()
    store = FakeStore()
    flow_controls.of(store).came(2 * MIB, 0.0, 4.0)  # half a MiB per second: 2 MiB ahead
    scheduler = Scheduler(16, 64 * MIB, nursery, flow_controls)
    ahead = [Ticket(Priority.READAHEAD, MIB, store) for _ in range(5)]
    for ticket in ahead:
        nursery.start_soon(scheduler.acquire, ticket)
    await trio.testing.wait_all_tasks_blocked()
    assert sum(ticket.granted.is_set() for ticket in ahead) == 2
    demand = Ticket(Priority.DEMAND, MIB, store)
    await scheduler.acquire(demand)
    assert demand.granted.is_set()
    scheduler.raise_priority(ahead[2], Priority.DEMAND)
    nursery.cancel_scope.cancel()
