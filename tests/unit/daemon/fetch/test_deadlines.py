"""Deadlines of reads count from the last new byte of their store."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon.fetch.deadlines import ReadDeadlines
from ckptfs.errors import StoreTimeout

if TYPE_CHECKING:
    from ckptfs._store.request_context import Progress

DATA = pattern(4 * MIB)


async def test_read_deadline_of_a_store_moves_with_its_own_bytes_only(
    autojump_clock: MockClock,
) -> None:
    read_deadlines = ReadDeadlines()
    a, b = object(), object()
    ended: dict[str, float] = {}

    async def wait(name: str, store: object) -> None:
        with read_deadlines.waiting(store, 10):
            await trio.sleep_forever()
        ended[name] = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a", a)
        nursery.start_soon(wait, "b", b)
        begun_s = trio.current_time()
        for _ in range(6):
            await trio.sleep(5)
            read_deadlines.came(a, trio.current_time() - 1)
    assert ended["b"] - begun_s == pytest.approx(10)
    assert ended["a"] - begun_s == pytest.approx(39)
    assert not read_deadlines._waits


class Link(InlineOffload):
    """Brings the bytes of each read at a rate, and counts them, as a socket does."""

    def __init__(self, bytes_per_s: float, stops_after: int = 1 << 62) -> None:
        super().__init__()
        self.bytes_per_s = bytes_per_s
        self.stops_after = stops_after
        self.reads = 0

    async def run(self, kind: str, call: Any) -> Any:
        if kind != "data":
            return await super().run(kind, call)
        self.reads += 1
        progress: Progress = call.func.__self__
        sent = 0
        while sent < MIB:
            await trio.sleep(1)
            if sent < self.stops_after:
                progress.came(int(self.bytes_per_s))
                progress.last_s += trio.current_time() - progress.last_s  # the test's clock
                sent += int(self.bytes_per_s)
        return call()


@pytest.fixture
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give threads that fill buffers the clock of the event loop."""
    monkeypatch.setattr("ckptfs._daemon.fetch.transfers.time.monotonic", trio.current_time)
    monkeypatch.setattr("ckptfs._store.request_context.time.monotonic", trio.current_time)


@pytest.mark.usefixtures("same_clock")
async def test_read_from_a_slow_link_lasts_while_bytes_come(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    offload = Link(5_000)  # 210 s for a block
    async with rig_in(tmp_path, offload, read_deadline_s=10) as rig:
        file = rig.open(FakeStore({"a": DATA}), "a")
        begun_s = trio.current_time()
        assert await rig.read(file, 1000, 5000) == DATA[1000:6000]
        assert trio.current_time() - begun_s > 200
        assert offload.reads == 1  # no byte was thrown away


@pytest.mark.usefixtures("same_clock")
async def test_read_ends_a_deadline_after_the_last_byte(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    offload = Link(50_000, stops_after=500_000)
    async with rig_in(tmp_path, offload, read_deadline_s=10) as rig:
        file = rig.open(FakeStore({"a": DATA}), "a")
        begun_s = trio.current_time()
        with pytest.raises(StoreTimeout, match="within 10 s"):
            await rig.read(file, 1000, 5000)
        assert 18 < trio.current_time() - begun_s < 21


@pytest.mark.usefixtures("same_clock")
async def test_read_deadline_moves_while_a_reader_waits_for_a_slot(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    offload = Link(20_000)  # 53 s for a block
    async with rig_in(tmp_path, offload, read_deadline_s=10, connections_max=1) as rig:
        file = rig.open(FakeStore({"a": DATA}), "a")
        async with trio.open_nursery() as nursery:
            for block in range(4):
                nursery.start_soon(partial(rig.read, file, block * MIB, 100))
        assert offload.reads == 4
