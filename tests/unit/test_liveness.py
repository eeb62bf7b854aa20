"""Deadlines of reads count from the last new byte of their store."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock
from unit.fakes import MIB, FakeStore, InlineOffload, pattern
from unit.rig import rig_in

from ckptfs._daemon.liveness import Liveness
from ckptfs.errors import StoreTimeout

if TYPE_CHECKING:
    from ckptfs._store.progress import Progress

DATA = pattern(4 * MIB)


async def test_a_wait_ends_when_its_own_store_gives_nothing(autojump_clock: MockClock) -> None:
    liveness = Liveness()
    a, b = object(), object()
    ended: dict[str, float] = {}

    async def wait(name: str, store: object) -> None:
        with liveness.waiting(store, 10):
            await trio.sleep_forever()
        ended[name] = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a", a)
        nursery.start_soon(wait, "b", b)
        begun_s = trio.current_time()
        for _ in range(6):
            await trio.sleep(5)
            liveness.came(a, trio.current_time() - 1)
    assert ended["b"] - begun_s == pytest.approx(10)
    assert ended["a"] - begun_s == pytest.approx(39)
    assert not liveness._waits


class Link(InlineOffload):
    """Brings each read's bytes at a rate, and says so, as a socket does."""

    def __init__(self, bytes_per_s: float, stops_after: int = 1 << 62) -> None:
        super().__init__()
        self.bytes_per_s = bytes_per_s
        self.stops_after = stops_after
        self.reads = 0

    async def data(self, function, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.reads += 1
        progress: Progress = function.__self__
        sent = 0
        while sent < MIB:
            await trio.sleep(1)
            if sent < self.stops_after:
                progress.came(int(self.bytes_per_s))
                progress.last_s += trio.current_time() - progress.last_s  # the test's clock
                sent += int(self.bytes_per_s)
        return function(*args, **kwargs)


@pytest.fixture
def same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that fill buffers have the clock of the event loop."""
    monkeypatch.setattr("ckptfs._daemon.transfers.time.monotonic", trio.current_time)
    monkeypatch.setattr("ckptfs._store.progress.time.monotonic", trio.current_time)


@pytest.mark.usefixtures("same_clock")
async def test_a_read_goes_on_as_long_as_bytes_come(
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
async def test_a_read_ends_when_no_more_bytes_come(
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
async def test_readers_that_wait_for_a_place_live_with_the_others_bytes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    offload = Link(20_000)  # 53 s for a block
    async with rig_in(tmp_path, offload, read_deadline_s=10, connections_max=1) as rig:
        file = rig.open(FakeStore({"a": DATA}), "a")
        async with trio.open_nursery() as nursery:
            for block in range(4):
                nursery.start_soon(partial(rig.read, file, block * MIB, 100))
        assert offload.reads == 4
