"""`next_ticket`, the scheduler's decision, as a pure function of tickets, load and time."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import FakeStore

from ckptfs._daemon.fetch.flow_control import FlowControl, FlowControls
from ckptfs._daemon.fetch.scheduler import Load, Priority, Ticket, next_ticket

DEMAND, READAHEAD, PREFETCH, DARK = Priority
NOW_S = 1000.0
STORE, OTHER_STORE = FakeStore(), FakeStore()


def unlimited(_: object) -> FlowControl:
    return FlowControl()


def load_of(
    *running: Ticket, slots_max: int = 8, bytes_max: int = 100, begun_s: float = NOW_S
) -> Load:
    load = Load(slots_max, bytes_max)
    for ticket in running:
        load.start(ticket, begun_s)
    return load


def choose(waiting: Sequence[Ticket], load: Load) -> Ticket | float:
    return next_ticket(waiting, load, unlimited, NOW_S)


def test_next_ticket_without_tickets_is_never() -> None:
    assert choose([], load_of()) == math.inf


def test_next_ticket_is_the_most_urgent_and_then_the_oldest() -> None:
    dark, prefetch, readahead = Ticket(DARK, 1), Ticket(PREFETCH, 1), Ticket(READAHEAD, 1)
    first, second = Ticket(DEMAND, 1), Ticket(DEMAND, 1)
    waiting = [dark, prefetch, readahead, second, first]
    order: list[Ticket] = []
    while isinstance(found := choose(waiting, load_of()), Ticket):
        waiting.remove(found)
        order.append(found)
    assert order == [first, second, readahead, prefetch, dark]


def test_next_ticket_leaves_slots_to_demand() -> None:
    load = load_of(*[Ticket(DEMAND, 1) for _ in range(6)])
    demand = Ticket(DEMAND, 1)
    assert choose([Ticket(READAHEAD, 1)], load) == math.inf
    assert choose([demand], load) is demand


def test_next_ticket_too_large_for_the_bytes_is_not_overtaken() -> None:
    large, small = Ticket(DEMAND, 60), Ticket(DEMAND, 1)
    assert choose([large, small], load_of(Ticket(DEMAND, 50))) == math.inf
    assert choose([Ticket(DEMAND, 101)], load_of()) != math.inf  # a single transfer may always run


def test_next_ticket_of_a_prefetch_waits_for_a_quiet_time() -> None:
    prefetch = Ticket(PREFETCH, 1)
    load = load_of()
    load.reader_s = NOW_S - 0.1
    load.rested_s = math.inf
    assert choose([prefetch], load) == pytest.approx(NOW_S + 0.4)
    load.reader_s = NOW_S - 0.6
    assert choose([prefetch], load) is prefetch
    load.start(prefetch, NOW_S)
    assert choose([Ticket(PREFETCH, 1)], load) == pytest.approx(NOW_S + 0.4)  # the second one
    load.reader_s = NOW_S - 1.1
    assert isinstance(choose([Ticket(PREFETCH, 1)], load), Ticket)


def test_next_ticket_of_a_prefetch_beside_readers_has_a_share_after_a_rest() -> None:
    load = load_of(Ticket(DEMAND, 1))
    load.reader_s = NOW_S
    load.start(prefetch := Ticket(PREFETCH, 1), NOW_S - 1)
    load.release_slot(prefetch, NOW_S)
    load.release_bytes(prefetch)
    load.reader_s = math.inf  # there is always a reader
    assert choose([Ticket(PREFETCH, 1)], load) == pytest.approx(NOW_S + 31)
    load.rested_s = NOW_S
    assert isinstance(choose([Ticket(PREFETCH, 1)], load), Ticket)


def test_next_ticket_passes_over_prefetches_that_yield() -> None:
    prefetch, dark = Ticket(PREFETCH, 1), Ticket(DARK, 1)
    load = load_of()
    load.reader_s, load.rested_s = NOW_S, math.inf
    assert choose([prefetch, dark], load) is dark


def test_next_ticket_of_prefetches_with_their_share_of_the_bytes_is_never() -> None:
    load = load_of(Ticket(PREFETCH, 25))
    assert choose([Ticket(PREFETCH, 1)], load) == math.inf


def test_next_ticket_passes_over_a_store_at_its_limit_of_requests() -> None:
    flow_controls = FlowControls()
    for _ in range(4):
        flow_controls.of(STORE).began()
    flow_controls.of(STORE).timed_out(0.0, 1.0)
    load = load_of(Ticket(DEMAND, 1, STORE), Ticket(DEMAND, 1, STORE))
    slow, other = Ticket(DEMAND, 1, STORE), Ticket(READAHEAD, 1, OTHER_STORE)
    assert next_ticket([slow, other], load, flow_controls.of, NOW_S) is other
    assert next_ticket([slow], load, flow_controls.of, NOW_S) == math.inf


def test_next_ticket_passes_over_a_user_at_the_limit_while_others_wait() -> None:
    load = load_of(Ticket(DEMAND, 1, user=7), Ticket(DEMAND, 1, user=7))
    greedy, other = Ticket(DEMAND, 1, user=7), Ticket(DEMAND, 1)
    assert choose([greedy, other], load) is other
    assert choose([greedy], load) is greedy  # no other user waits, and a quarter stays free


_TICKETS = st.lists(
    st.builds(
        Ticket,
        st.sampled_from(Priority),
        st.integers(1, 60),
        st.sampled_from([None, STORE, OTHER_STORE]),
        st.sampled_from([None, None, 7, 8]),
    ),
    max_size=12,
)


@given(_TICKETS, _TICKETS, st.floats(0, 3))
def test_next_ticket_changes_nothing_and_answers_the_same(
    running: list[Ticket], waiting: list[Ticket], quiet_s: float
) -> None:
    load = load_of(*running)
    load.reader_s = NOW_S - quiet_s
    before = list(waiting)
    found = choose(waiting, load)
    assert choose(waiting, load) is found or choose(waiting, load) == found
    assert waiting == before
    assert load.running == set(running)
    if isinstance(found, Ticket):
        assert found in waiting
        assert load.fits(found)
    else:
        assert found > NOW_S


@given(_TICKETS, st.lists(st.sampled_from(Priority)))
def test_load_counts_nothing_once_all_transfers_have_ended(
    tickets: list[Ticket], priorities: list[Priority]
) -> None:
    load = load_of(*tickets)
    for ticket, priority in zip(tickets, priorities, strict=False):
        load.change_priority(ticket, priority, priority)
    for ticket in tickets:
        load.release_slot(ticket, NOW_S)
        load.release_bytes(ticket)
    assert not load.running
    assert load.bytes == load._prefetch_bytes == 0
    assert not load.has_reader
    for counter in (load._slots_of, load._bytes_of, load._requests_to, load._ahead_bytes_of):
        assert not counter
