"""A second request where the first one is slow: no byte is mixed, no place lost, and no store gets
much more to do."""

import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from faultserver import FaultServer, Object
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from unit.fakes import MIB, FakeStore, InlineOffload, pattern
from unit.rig import rig_in

from ckptfs._daemon.buffers import Buffers
from ckptfs._daemon.cached import ABSENT, CachedObject
from ckptfs._daemon.outages import Outages
from ckptfs._daemon.pace import Pace
from ckptfs._daemon.slots import Priority, Slots, Ticket
from ckptfs._daemon.transfers import Transfers
from ckptfs._model.location import Location
from ckptfs._store.base import pin_of
from ckptfs._store.progress import Progress
from ckptfs._store.resolve import open_store
from ckptfs.errors import AccessDenied, StoreUnavailable

DATA = pattern(5000)
USUAL_S = 0.03
NEVER = math.inf


class Requests(InlineOffload):
    """Each read takes as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.next_s: list[float] = []
        self.errors: list[Exception] = []
        self.running = 0

    async def data(self, function, *args, **kwargs):  # type: ignore[no-untyped-def]
        latency_s = self.next_s.pop(0) if self.next_s else USUAL_S
        self.running += 1
        try:
            with trio.CancelScope(deadline=trio.current_time() + latency_s):
                await trio.sleep_forever()
            if self.errors:
                raise self.errors.pop(0)
            return function(*args, **kwargs)
        finally:
            self.running -= 1


class Bench:
    """Transfers of the object "a" of a fake store."""

    def __init__(self, nursery: trio.Nursery, places: int = 4) -> None:
        self.store = FakeStore({"a": DATA})
        self.offload = Requests()
        self.slots = Slots(places, 64 * MIB, nursery)
        self.buffers: Buffers[CachedObject] = Buffers(64 * MIB, lambda _: None)
        self.outages = Outages(self.slots)
        self.transfers = Transfers(self.offload, self.slots, self.buffers, self.outages, nursery)

    async def read(
        self, priority: Priority = Priority.DEMAND, ticket: Ticket | None = None
    ) -> float:
        """Read it; returns how long that took."""
        ticket = ticket or Ticket(priority, MIB, self.store)
        await self.slots.acquire(ticket)
        begun_s = trio.current_time()
        pin = self.store.pin("a")
        got = await self.transfers.read(self.store, pin, 100, len(DATA) - 100, ticket)
        assert got.buffer.view[: len(DATA) - 100] == DATA[100:]
        self.transfers.give_up(got)
        return trio.current_time() - begun_s

    async def know(self, count: int = 40) -> None:
        """Learn how long requests usually take, and earn a twentieth of that in second ones."""
        for _ in range(count):
            await self.read()

    def check_ended(self) -> None:
        """Nothing is left of what there was."""
        assert self.offload.running == 0
        assert self.slots._bytes == 0
        assert not self.slots._running
        assert not self.transfers._under_way


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


async def test_the_second_request_brings_what_the_first_does_not(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [NEVER]
    assert await bench.read() < 0.1 + 0.025 + 2 * USUAL_S
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_nothing_is_hedged_where_nothing_is_slow(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for number in range(200):
        bench.offload.next_s = [USUAL_S * (0.5 + number % 7 / 7)]
        await bench.read()
    assert bench.transfers.hedged_requests == 0


async def test_the_first_may_still_be_first(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    bench.offload.next_s = [0.2, NEVER]
    assert await bench.read() == pytest.approx(0.2)
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_both_at_the_same_moment(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    bench.offload.next_s = [0.125 + USUAL_S, USUAL_S]
    await bench.read()
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_readahead_waits_until_somebody_waits_for_it(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [NEVER]
    ticket = Ticket(Priority.READAHEAD, MIB, bench.store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, Priority.READAHEAD, ticket)
        await trio.sleep(10)
        assert bench.transfers.hedged_requests == 0
        bench.slots.raise_priority(ticket, Priority.DEMAND)
    assert bench.transfers.hedged_requests == 1


async def test_at_most_one_in_twenty_is_made_again(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    for number in range(200):
        bench.offload.next_s = [0.2] if number % 10 == 0 else []
        await bench.read()
    assert 8 <= bench.transfers.hedged_requests <= 240 / 20


async def test_a_store_that_becomes_slow_is_left_alone(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [1.0] * 1000
    for _ in range(100):
        await bench.read()
    assert bench.transfers.hedged_requests <= 5


async def test_after_an_error_that_can_pass_nothing_is_made_again(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.errors = [StoreUnavailable("SlowDown")]
    with pytest.raises(StoreUnavailable):
        await bench.read()
    bench.offload.next_s = [5.0]
    assert await bench.read() == pytest.approx(5.0)
    assert bench.transfers.hedged_requests == 0
    bench.check_ended()


async def test_an_error_of_the_first_counts_if_the_second_fails_too(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [0.2, 0.2]
    bench.offload.errors = [StoreUnavailable("gone")]
    assert await bench.read() == pytest.approx(0.3, abs=0.03)
    await bench.know(20)
    bench.offload.next_s = [0.2, 0.2]
    bench.offload.errors = [StoreUnavailable("first"), StoreUnavailable("second")]
    with pytest.raises(StoreUnavailable, match="first"):
        await bench.read()
    await wait_all_tasks_blocked()
    assert bench.transfers.hedged_requests == 2
    bench.check_ended()


async def test_an_error_of_the_second_is_none(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    bench.offload.next_s = [1.0, 0.1]
    bench.offload.errors = [AccessDenied("no")]
    assert await bench.read() == pytest.approx(1.0)
    bench.check_ended()


async def test_a_dark_store_gets_no_second_request(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    bench.outages._darken(bench.store)
    bench.offload.next_s = [5.0]
    assert await bench.read() == pytest.approx(5.0)
    assert bench.transfers.hedged_requests == 0


async def test_a_library_gets_no_second_request(bench: Bench, autojump_clock: MockClock) -> None:
    bench.store.gives_up = False
    await bench.know()
    bench.offload.next_s = [5.0]
    assert await bench.read() == pytest.approx(5.0)


async def test_a_place_that_others_need_is_not_taken(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [5.0] * 3
    async with trio.open_nursery() as nursery:
        for _ in range(3):  # of four: one is left for who comes next
            nursery.start_soon(bench.read)
        await trio.sleep(4)
        assert bench.transfers.hedged_requests == 0
        assert bench.slots.acquire_now(Ticket(Priority.DEMAND, MIB)) is False
        await bench.read()


async def test_who_gives_up_leaves_nothing(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.know()
    for patience_s in (0.05, 0.13, 1.0):
        bench.offload.next_s = [NEVER, NEVER]
        with trio.move_on_after(patience_s):
            await bench.read()
        await wait_all_tasks_blocked()
        bench.check_ended()
    assert bench.transfers.hedged_requests == 2


# -- pace


def paced(first_s: float, whole_s: float, count: int = 100) -> Pace:
    pace = Pace()
    for _ in range(count):
        pace.took(8 * MIB, first_s, whole_s)
    return pace


def test_without_a_first_byte_the_others_first_bytes_count() -> None:
    pace = paced(0.2, 3.0)
    assert not pace.is_slow(8 * MIB, 0, 0.59)
    assert pace.is_slow(8 * MIB, 0, 0.61)
    assert pace.is_slow(5, 0, 0.61)  # of whatever size


def test_what_is_nearly_done_is_not_slow() -> None:
    pace = paced(0.2, 3.0)
    assert not pace.is_slow(8 * MIB, MIB, 2.9)
    assert pace.is_slow(8 * MIB, MIB, 3.1)
    assert not pace.is_slow(8 * MIB, 7 * MIB, 7.8)
    assert pace.is_slow(8 * MIB, 7 * MIB, 7.9)  # it has stalled
    assert not pace.is_slow(4 * MIB, MIB, 100.0)  # nobody knows how long such a one takes


def test_without_knowledge_nothing_is_slow() -> None:
    assert not Pace().is_slow(8 * MIB, 0, 1e9)
    assert not paced(0.01, 0.1, 19).is_slow(8 * MIB, 0, 1e9)
    pace = paced(0.001, 0.01)
    assert not pace.is_slow(8 * MIB, 0, 0.099)
    assert pace.is_slow(8 * MIB, 0, 0.101)


@given(st.lists(st.booleans(), max_size=300))
def test_what_is_spent_was_earned(wants: list[bool]) -> None:
    pace = paced(0.01, 0.1, 20)
    count = 0
    for number, wanted in enumerate(wants, 21):
        if wanted and pace.has_earned:
            pace.spend()
            count += 1
        pace.took(MIB, 0.01, 0.1)
        assert count <= number / 20


# -- versions, through the cache


async def test_bytes_of_two_answers_are_never_mixed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The first request has read half when the object is written again; the second one reads the
    new version, and is first."""
    size = 60 * MIB
    store = FakeStore({"a": pattern(size)})
    offload = Requests()
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        for index in range(40):
            await rig.read(file, index * MIB, 1)
        store.overwrite("a", pattern(size, 2))
        offload.next_s = [NEVER]
        with pytest.raises(Exception, match="another version"):
            await rig.read(file, 50 * MIB, MIB)
        assert rig.fetcher.hedged_requests == 1
        await rig.quiet()
        assert file.entry.state[50] == ABSENT
        assert file.changed


# -- what is given up


@asynccontextmanager
async def served(fault: str) -> AsyncIterator[FaultServer]:
    with FaultServer() as server:
        server.objects["bucket/run/a"] = Object(DATA, 1_500_000_000)
        server.fault = fault
        yield server


@pytest.mark.parametrize("fault", ["black hole", "trickling body"])
async def test_a_read_that_is_given_up_ends_and_its_connection_too(fault: str) -> None:
    options = {"scheme": "http", "region": "us-east-1"}
    secrets = {"access_key": "k", "secret_key": "s"}
    async with served("") as server:
        at = Location(
            "s3", "bucket/run", {**options, "endpoint_override": server.endpoint}, secrets
        )
        store = open_store(at, 600.0)
        pin = pin_of((await trio.to_thread.run_sync(store.list, 10)).files[0])
        server.fault = fault
        progress, ended = Progress(), threading.Event()

        def read() -> None:
            with pytest.raises(StoreUnavailable):
                progress.run(lambda: store.read_into(pin, 0, memoryview(bytearray(len(DATA)))))
            ended.set()

        def is_under_way() -> bool:
            return bool(progress.count if fault == "trickling body" else progress._sock)

        thread = threading.Thread(target=read)
        thread.start()
        with trio.fail_after(20):
            while not is_under_way():  # noqa: ASYNC110 - in a thread
                await trio.sleep(0.01)
            progress.give_up()
            await trio.to_thread.run_sync(ended.wait, 20)
        thread.join()
        assert not store._client._connections._idle
        with pytest.raises(StoreUnavailable):  # nor does it begin
            progress.run(lambda: store.read_into(pin, 0, memoryview(bytearray(len(DATA)))))
        server.heal()
        buffer = bytearray(len(DATA))
        store.read_into(pin, 0, memoryview(buffer))
        assert buffer == DATA
        store.close()
