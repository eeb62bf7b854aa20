"""Hedging: a second request for a slow one mixes no bytes, loses no slot, and gives no store much
more work."""

import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.faultserver import FaultServer, Object
from support.rig import rig_in
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.cache.buffer_pool import Buffers
from ckptfs._daemon.cache.cached_object import ABSENT, CachedObject
from ckptfs._daemon.fetch.deadlines import ReadDeadlines
from ckptfs._daemon.fetch.flow_control import FlowControls
from ckptfs._daemon.fetch.hedging import Hedging
from ckptfs._daemon.fetch.retry import Retry
from ckptfs._daemon.fetch.scheduler import Priority, Scheduler, Ticket
from ckptfs._daemon.fetch.transfers import Transfers
from ckptfs._model.location import Location
from ckptfs._store.base import pin_of
from ckptfs._store.request_context import Progress
from ckptfs._store.resolve import open_store
from ckptfs._store.s3.store import S3Store
from ckptfs.errors import AccessDenied, StoreUnavailable

DATA = pattern(5000)
USUAL_S = 0.03
NEVER = math.inf


class Requests(InlineOffload):
    """Gives each read a planned duration."""

    def __init__(self) -> None:
        super().__init__()
        self.next_s: list[float] = []
        self.errors: list[Exception] = []
        self.running = 0

    async def run(self, kind, call):  # type: ignore[no-untyped-def]
        if kind != "data":
            return await super().run(kind, call)
        latency_s = self.next_s.pop(0) if self.next_s else USUAL_S
        self.running += 1
        try:
            with trio.CancelScope(deadline=trio.current_time() + latency_s):
                await trio.sleep_forever()
            if self.errors:
                raise self.errors.pop(0)
            return call()
        finally:
            self.running -= 1


class Bench:
    """Transfers of the object "a" of a fake store."""

    def __init__(self, nursery: trio.Nursery, places: int = 4) -> None:
        self.store = FakeStore({"a": DATA})
        self.offload = Requests()
        self.scheduler = Scheduler(places, 64 * MIB, nursery, FlowControls())
        self.buffers: Buffers[CachedObject] = Buffers(64 * MIB, lambda _: None)
        self.retry = Retry(self.scheduler)
        self.transfers = Transfers(
            self.offload,
            self.scheduler,
            self.buffers,
            self.retry,
            nursery,
            FlowControls(),
            ReadDeadlines(),
        )

    async def read(
        self, priority: Priority = Priority.DEMAND, ticket: Ticket | None = None
    ) -> float:
        """Read the object. Returns the time that it took."""
        ticket = ticket or Ticket(priority, MIB, self.store)
        await self.scheduler.acquire(ticket)
        begun_s = trio.current_time()
        pin = self.store.pin("a")
        got = await self.transfers.read(
            self.store,
            pin,
            100,
            len(DATA) - 100,
            ticket,
            heard=lambda _count, _at_s: True,
            silence_s=0.0,
        )
        assert got.buffer.view[: len(DATA) - 100] == DATA[100:]
        self.transfers.give_up(got)
        return trio.current_time() - begun_s

    async def know(self, count: int = 40) -> None:
        """Learn the usual time of requests, and earn a second request per 20 of them."""
        for _ in range(count):
            await self.read()

    def check_ended(self) -> None:
        """Check that no request, slot or byte is left."""
        assert self.offload.running == 0
        assert self.scheduler.in_flight().bytes == 0
        assert self.scheduler.in_flight().running == 0
        assert not self.transfers._under_way


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


async def test_hedging_gets_the_bytes_of_a_stalled_request(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [NEVER]
    assert await bench.read() < 0.1 + 0.025 + 2 * USUAL_S
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_hedging_repeats_no_request_of_a_steady_store(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for number in range(200):
        bench.offload.next_s = [USUAL_S * (0.5 + number % 7 / 7)]
        await bench.read()
    assert bench.transfers.hedged_requests == 0


async def test_hedging_takes_the_first_request_if_it_wins(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [0.2, NEVER]
    assert await bench.read() == pytest.approx(0.2)
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_hedging_with_two_answers_at_once_frees_one_result(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [0.125 + USUAL_S, USUAL_S]
    await bench.read()
    assert bench.transfers.hedged_requests == 1
    await wait_all_tasks_blocked()
    bench.check_ended()


async def test_hedging_of_readahead_begins_when_a_reader_waits(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [NEVER]
    ticket = Ticket(Priority.READAHEAD, MIB, bench.store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.read, Priority.READAHEAD, ticket)
        await trio.sleep(10)
        assert bench.transfers.hedged_requests == 0
        bench.scheduler.raise_priority(ticket, Priority.DEMAND)
    assert bench.transfers.hedged_requests == 1


async def test_hedging_repeats_at_most_one_request_in_twenty(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    for number in range(200):
        bench.offload.next_s = [0.2] if number % 10 == 0 else []
        await bench.read()
    assert 8 <= bench.transfers.hedged_requests <= 240 / 20


async def test_hedging_of_a_store_that_becomes_slow_stops(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [1.0] * 1000
    for _ in range(100):
        await bench.read()
    assert bench.transfers.hedged_requests <= 5


async def test_hedging_stops_after_a_temporary_error(
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


async def test_hedging_raises_the_first_error_if_both_requests_fail(
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


async def test_hedging_ignores_an_error_of_the_second_request(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [1.0, 0.1]
    bench.offload.errors = [AccessDenied("no")]
    assert await bench.read() == pytest.approx(1.0)
    bench.check_ended()


async def test_hedging_of_a_dark_store_repeats_no_request(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.retry._darken(bench.store)
    bench.offload.next_s = [5.0]
    assert await bench.read() == pytest.approx(5.0)
    assert bench.transfers.hedged_requests == 0


async def test_hedging_takes_no_slot_that_others_need(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    bench.offload.next_s = [5.0] * 3
    async with trio.open_nursery() as nursery:
        for _ in range(3):  # of four slots: one is left for the next reader
            nursery.start_soon(bench.read)
        await trio.sleep(4)
        assert bench.transfers.hedged_requests == 0
        assert bench.scheduler.acquire_now(Ticket(Priority.DEMAND, MIB)) is False
        await bench.read()


async def test_hedging_of_a_cancelled_read_leaves_nothing(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.know()
    for patience_s in (0.05, 0.13, 1.0):
        bench.offload.next_s = [NEVER, NEVER]
        with trio.move_on_after(patience_s):
            await bench.read()
        await wait_all_tasks_blocked()
        bench.check_ended()
    assert bench.transfers.hedged_requests == 2


# -- hedging


def paced(first_s: float, whole_s: float, count: int = 100) -> Hedging:
    hedging = Hedging()
    for _ in range(count):
        hedging.add(8 * MIB, first_s, whole_s)
    return hedging


def test_hedging_before_the_first_byte_compares_first_bytes() -> None:
    hedging = paced(0.2, 3.0)
    assert not hedging.is_slow(8 * MIB, 0, 0.59)
    assert hedging.is_slow(8 * MIB, 0, 0.61)
    assert hedging.is_slow(5, 0, 0.61)  # of any size


def test_hedging_does_not_call_a_nearly_finished_request_slow() -> None:
    hedging = paced(0.2, 3.0)
    assert not hedging.is_slow(8 * MIB, MIB, 2.9)
    assert hedging.is_slow(8 * MIB, MIB, 3.1)
    assert not hedging.is_slow(8 * MIB, 7 * MIB, 7.8)
    assert hedging.is_slow(8 * MIB, 7 * MIB, 7.9)  # it has stalled
    assert not hedging.is_slow(4 * MIB, MIB, 100.0)  # the usual time of this size is not known


def test_hedging_without_known_times_calls_no_request_slow() -> None:
    assert not Hedging().is_slow(8 * MIB, 0, 1e9)
    assert not paced(0.01, 0.1, 19).is_slow(8 * MIB, 0, 1e9)
    hedging = paced(0.001, 0.01)
    assert not hedging.is_slow(8 * MIB, 0, 0.099)
    assert hedging.is_slow(8 * MIB, 0, 0.101)


@given(st.lists(st.booleans(), max_size=300))
def test_hedging_spends_only_earned_requests(wants: list[bool]) -> None:
    hedging = paced(0.01, 0.1, 20)
    count = 0
    for number, wanted in enumerate(wants, 21):
        if wanted and hedging.has_earned:
            hedging.spend()
            count += 1
        hedging.add(MIB, 0.01, 0.1)
        assert count <= number / 20


# -- versions, through the cache


async def test_hedging_never_mixes_bytes_of_two_answers(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The first request has read one half when the object is written again. The second request
    reads the new version, and is done first."""
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
        assert rig.fetcher.transfers.hedged_requests == 1
        await rig.quiet()
        assert file.entry.state[50] == ABSENT
        assert file.health.changed


# -- reads that are given up


@asynccontextmanager
async def served(fault: str) -> AsyncIterator[FaultServer]:
    with FaultServer() as server:
        server.objects["bucket/run/a"] = Object(DATA, 1_500_000_000)
        server.fault = fault
        yield server


@pytest.mark.parametrize("fault", ["black hole", "trickling body"])
async def test_given_up_read_ends_with_its_connection(fault: str) -> None:
    options = {"scheme": "http", "region": "us-east-1"}
    secrets = {"access_key": "k", "secret_key": "s"}
    async with served("") as server:
        at = Location(
            "s3", "bucket/run", {**options, "endpoint_override": server.endpoint}, secrets
        )
        store = open_store(at, 600.0)
        assert isinstance(store, S3Store)
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
        with pytest.raises(StoreUnavailable):  # it does not even begin
            progress.run(lambda: store.read_into(pin, 0, memoryview(bytearray(len(DATA)))))
        server.heal()
        buffer = bytearray(len(DATA))
        store.read_into(pin, 0, memoryview(buffer))
        assert buffer == DATA
        store.close()
