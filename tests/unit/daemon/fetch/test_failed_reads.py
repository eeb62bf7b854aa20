"""A read that has failed by its deadline fails at once when the kernel asks again."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.rig import View, rig_in
from trio.testing import MockClock

from ckptfs._daemon.fetch.failed_reads import _BLOCKS_MAX, FRESH_S, FailedReads
from ckptfs._daemon.fetch.scheduler import Priority
from ckptfs._model.blocks import blocks_of
from ckptfs.errors import StoreTimeout, StoreUnavailable

DATA = pattern(8 * MIB)
DEADLINE_S = 30
PAGE = 4096


@pytest.fixture
def store() -> FakeStore:
    return FakeStore({"a": DATA})


@asynccontextmanager
async def file_in(
    directory: Path, store: FakeStore
) -> AsyncIterator[tuple[View, int, InlineOffload]]:
    """A view of the store, an open handle of its file, and the threads, which a test can delay."""
    offload = InlineOffload()
    async with rig_in(directory, offload, read_deadline_s=DEADLINE_S) as rig:
        view = View(rig)
        view.attach(store)
        yield view, view.vfs.open(view.stat(view.attachments[0], "a").inode), offload
        store.fail_always("read_into", None)
        offload.latency_s = {}
        await view.quiet()


async def ask(view: View, handle: int, offset: int, length: int) -> bytes:
    """Read as the kernel does for a file that was not opened with O_DIRECT."""
    found = view.vfs.read_now(handle, offset, length, is_exact=False)
    return b"".join(await view.vfs.read(handle, offset, length) if found is None else found.views)


async def waited_s(view: View, handle: int, offset: int, length: int) -> float:
    """The time until such a request of the kernel fails."""
    begun_s = trio.current_time()
    with pytest.raises(StoreTimeout):
        await ask(view, handle, offset, length)
    return trio.current_time() - begun_s


FAULTS = {
    "no answer": {"data": math.inf},
    "no answer to the first check": {"control": math.inf},
    "a late answer": {"data": 10.0 * DEADLINE_S},
    "unavailable": {},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "requests",
    [
        [(0, MIB), (0, PAGE)],  # read(2): readahead, and the page
        [(0, 128 << 10), (0, PAGE), (0, PAGE)],  # a page fault
        [(MIB - PAGE, 2 * PAGE), (MIB, PAGE)],  # over the edge of a block
        [(5 * MIB, PAGE), (5 * MIB + 100, 1)],
    ],
    ids=["read", "fault", "edge", "pread"],
)
async def test_failed_read_repeated_by_the_kernel_fails_at_once(
    tmp_path: Path,
    store: FakeStore,
    autojump_clock: MockClock,
    fault: str,
    requests: "list[tuple[int, int]]",
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        if fault == "no answer to the first check":
            view.attachments[0].file(0).version.trusted = False
        offload.latency_s = FAULTS[fault]
        store.fail_always("read_into", StoreUnavailable("503"))
        first, *again = [await waited_s(view, handle, *place) for place in requests]
        assert first == pytest.approx(DEADLINE_S)
        assert again == [0] * len(again)


async def test_failed_read_of_a_page_costs_many_readers_one_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    """The kernel asks for each reader in turn, because it holds the page's lock meanwhile."""
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        begun_s = trio.current_time()
        for _ in range(64):
            await waited_s(view, handle, MIB, PAGE)
            await trio.sleep(FRESH_S / 100)
        assert trio.current_time() - begun_s < DEADLINE_S + FRESH_S


async def test_failed_read_repeated_later_asks_the_store_again(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        for _ in range(3):
            assert await waited_s(view, handle, 0, MIB) == pytest.approx(DEADLINE_S)
            assert await waited_s(view, handle, 0, PAGE) == 0
            await trio.sleep(FRESH_S)
        await waited_s(view, handle, 0, MIB)
        offload.latency_s = {}
        assert await waited_s(view, handle, 0, PAGE) == 0  # the store is back, unnoticed
        await trio.sleep(FRESH_S)
        assert await ask(view, handle, 0, PAGE) == DATA[:PAGE]
        await view.quiet()
        # Once the bytes are here, an earlier failure does not count.
        view.attachments[0].file(0).failed_reads.add(range(1), StoreTimeout("before"))
        assert await ask(view, handle, 0, PAGE) == DATA[:PAGE]


async def test_failed_read_is_forgotten_when_the_file_is_closed(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        await waited_s(view, handle, 0, MIB)
        inode = view.stat(view.attachments[0], "a").inode
        beside = view.vfs.open(inode)
        assert await waited_s(view, beside, 0, PAGE) == 0  # the kernel knows only inodes
        for each in (handle, beside):
            view.vfs.release(each)
        offload.latency_s = {}
        assert await ask(view, view.vfs.open(inode), 0, PAGE) == DATA[:PAGE]


async def test_failed_read_leaves_other_ranges_their_own_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        await waited_s(view, handle, 0, MIB)
        assert await waited_s(view, handle, 6 * MIB, PAGE) == pytest.approx(DEADLINE_S)


async def test_failed_read_does_not_end_a_direct_read(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        await waited_s(view, handle, 0, MIB)
        assert view.vfs.read_now(handle, 0, PAGE, is_exact=True) is None


async def test_failed_read_leaves_a_waiting_reader_its_whole_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with file_in(tmp_path, store) as (view, handle, offload):
        offload.latency_s = {"data": math.inf}
        waited: list[float] = []

        async def read(offset: int) -> None:
            waited.append(await waited_s(view, handle, offset, PAGE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            await trio.sleep(DEADLINE_S - 1)
            nursery.start_soon(read, PAGE)  # of the same block
        assert waited == [pytest.approx(DEADLINE_S)] * 2


@pytest.mark.parametrize("priority", [Priority.READAHEAD, Priority.PREFETCH])
async def test_failed_read_of_readahead_or_prefetch_fails_no_reader(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock, priority: Priority
) -> None:
    """A reader does not inherit the deadline of a span that readahead or a prefetch began."""
    async with file_in(tmp_path, store) as (view, handle, offload):
        file = view.attachments[0].file(0)
        offload.latency_s = {"data": math.inf}
        with pytest.raises(StoreTimeout):
            await view.rig.fetcher.fetch(file, blocks_of(0, MIB), priority)
        assert file.health.failing
        assert await waited_s(view, handle, 0, PAGE) == pytest.approx(DEADLINE_S)


def test_failed_reads_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("ckptfs._daemon.fetch.failed_reads.trio.current_time", lambda: now_s)
    failed_reads = FailedReads()
    assert not failed_reads
    assert failed_reads.of([0]) is None
    for index in range(2 * _BLOCKS_MAX):
        failed_reads.add(range(index, index + 1), StoreTimeout(str(index)))
    assert failed_reads.of(range(_BLOCKS_MAX)) is None
    assert str(failed_reads.of([7, 2 * _BLOCKS_MAX - 1])) == str(2 * _BLOCKS_MAX - 1)
    now_s = FRESH_S / 2
    failed_reads.add(range(_BLOCKS_MAX, _BLOCKS_MAX + 1), StoreTimeout("newer"))
    now_s = FRESH_S
    assert failed_reads.of([_BLOCKS_MAX + 1]) is None
    assert str(failed_reads.of([_BLOCKS_MAX])) == "newer"
    failed_reads.clear()
    assert not failed_reads
