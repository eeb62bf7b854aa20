"""The fetcher fetches each byte once, and one reader does not harm the others."""

import itertools
from pathlib import Path

import pytest
import trio
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.fetching import DATA, SIZE, collect
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon.fetch.remote_file import RemoteFile
from ckptfs._daemon.offload import Offload
from ckptfs.errors import (
    CkptfsError,
    LimitExceeded,
    StoreUnavailable,
)

# -- single flight


async def test_fetch_of_one_block_for_many_readers_is_one_request(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        places = [(3 * MIB + i, 1000) for i in range(30)]
        results = await collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        assert [(c.offset, c.length) for c in store.reads()] == [(3 * MIB, MIB)]
        assert await rig.read(file, 3 * MIB, MIB) == DATA[3 * MIB : 4 * MIB]
        assert len(store.reads()) == 1
        counts = file.activity.total()
        assert (counts.fetched_bytes, counts.fetches) == (MIB, 1)


async def test_fetch_for_overlapping_readers_gets_each_byte_once(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        places = [(i * MIB // 2, 2 * MIB) for i in range(36)]
        results = await collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        fetched = [(c.offset, c.offset + c.length) for c in store.reads()]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(fetched)))


async def test_fetch_joins_missing_blocks_into_spans(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path, span_bytes_max=8 * MIB) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 10 * MIB, 1)
        assert await rig.read(file, 5, SIZE - 5) == DATA[5:]
        spans = [(c.offset // MIB, c.length) for c in store.reads()]
        assert spans[0] == (10, MIB)
        assert sorted(spans[1:]) == [(0, 8 * MIB), (8, 2 * MIB), (11, 8 * MIB), (19, MIB + 5)]


async def test_fetch_includes_the_blocks_of_readahead(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        for offset in range(0, 4 * MIB, MIB):
            rig.fetcher.access(file, offset, MIB)
            assert await rig.read(file, offset, MIB) == DATA[offset : offset + MIB]
        await rig.quiet()
        assert file.entry.readable(range(8))
        assert sum(c.length for c in store.reads()) == file.entry.stored_bytes()


async def test_fetch_after_a_file_that_was_read_whole_is_eager(tmp_path: Path) -> None:
    names = ["1", "2", "3", "4"]
    store = FakeStore(dict.fromkeys(names, DATA))
    async with rig_in(tmp_path) as rig:

        async def read(name: str, stop: int) -> int:
            """Read the beginning. Returns the bytes that were fetched after the first access."""
            file = rig.open(store, name)
            rig.fetcher.access(file, 0, MIB)
            await rig.quiet()
            first = file.entry.stored_bytes()
            for offset in range(MIB, stop, MIB):
                rig.fetcher.access(file, offset, min(MIB, stop - offset))
                await rig.quiet()
            rig.fetcher.close(file)
            return first

        assert await read("1", SIZE) == MIB
        assert await read("2", MIB) == SIZE
        assert await read("3", MIB) == MIB  # the last file was only begun
        other = FakeStore({"4": DATA})
        file = rig.open(other, "4")
        rig.fetcher.access(file, 0, MIB)
        await rig.quiet()
        assert file.entry.stored_bytes() == MIB  # another checkpoint


# -- priorities and cancellation


async def test_dark_store_leaves_slots_to_other_stores(tmp_path: Path) -> None:
    names = [str(number) for number in range(40)]
    dark = FakeStore(dict.fromkeys(names, pattern(MIB)))
    bright = FakeStore({"a": DATA})
    async with rig_in(tmp_path, Offload(4), connections_max=4) as rig:
        dark.fail("confirm", StoreUnavailable("outage"), at=1)
        first = rig.open(dark, "0")
        gates = [dark.block("read_into", at=number) for number in range(1, 41)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, first, 0, 1)
            while not first.health.cause:  # noqa: ASYNC110 - the store is dark from then on
                await trio.sleep(0.002)
            for name in names[1:]:
                nursery.start_soon(rig.read, rig.open(dark, name), 0, 1)
            await trio.to_thread.run_sync(gates[0].entered.wait, 10)
            with trio.fail_after(10):
                assert await rig.read(rig.open(bright, "a"), 0, MIB) == DATA[:MIB]
            nursery.cancel_scope.cancel()
        dark.release_all()
        await rig.quiet()


async def test_demand_overtakes_queued_readahead(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    settings = {"connections_max": 1, "span_bytes_max": MIB, "window_bytes_max": 4 * MIB}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(store, "a")
        for offset in range(0, 4 * MIB, MIB):
            await rig.read(file, offset, MIB)
        offload.latency_s = {"data": 1.0}
        for offset in range(0, 4 * MIB, MIB):
            rig.fetcher.access(file, offset, MIB)
        await trio.sleep(0.5)
        assert await rig.read(file, 18 * MIB, 1) == DATA[18 * MIB : 18 * MIB + 1]
        order = [c.offset // MIB for c in store.reads()[4:]]
        assert order[1] == 18  # after the one that was under way
        last = max({4, 5, 6, 7} - set(order))
        assert await rig.read(file, last * MIB, 1)  # it was queued, and overtakes the others
        order = [c.offset // MIB for c in store.reads()[4:]]
        assert len(order) <= 4
        assert order[-1] == last
        await rig.quiet()
        assert sorted(c.offset // MIB for c in store.reads()) == [0, 1, 2, 3, 4, 5, 6, 7, 18]


async def test_cancelled_reader_leaves_its_span_to_others(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0, "control": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        for cancelled_at in (0.5, 1.5, 2.5):  # in the first check, the read, the last check
            place = int(cancelled_at) * MIB
            got: list[bytes] = []

            async def stays(place: int = place, got: list[bytes] = got) -> None:
                got.append(await rig.read(file, place, 10))

            async with trio.open_nursery() as nursery:
                with trio.move_on_after(cancelled_at):
                    nursery.start_soon(stays)
                    await rig.read(file, place, 10)
            assert got == [DATA[place : place + 10]]
        assert len(store.reads()) == 3
        assert not file.health.error


async def test_cancelled_last_reader_still_fills_the_cache(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        with trio.move_on_after(0.5):
            await rig.read(file, 0, 1)
        rig.fetcher.close(file)
        await rig.quiet()
        assert rig.cache.stored_bytes(file.key.digest()) == MIB
        rig.fetcher.open(file)
        assert await rig.read(file, 0, 1) == DATA[:1]
        assert len(store.reads()) == 1


async def test_file_closed_during_its_first_check_is_read_again(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    """A forced detach closes a file while it is read."""
    offload = InlineOffload()
    offload.latency_s = {"control": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        rig.fetcher.access(file, 0, 1)
        await trio.sleep(0.5)
        rig.fetcher.close(file)
        await rig.quiet()
        rig.fetcher.open(file)
        assert await rig.read(file, 0, 1) == DATA[:1]


async def test_read_of_a_closed_file_gives_bytes_or_a_ckptfs_error(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0, "control": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        for closed_at in (0.5, 1.5, 2.5):  # in the first check, the read, the last check
            file = rig.open(store, "a")
            results: list[bytes | CkptfsError] = []

            async def reader(file: RemoteFile = file, results: list = results) -> None:
                results += await collect(rig, file, [(int(trio.current_time()) * MIB, 10)])

            offset = int(trio.current_time()) * MIB
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.sleep(closed_at)
                rig.fetcher.close(file)
            [result] = results
            assert result == DATA[offset : offset + 10] or isinstance(result, CkptfsError)
            await rig.quiet()
        assert await rig.read(rig.open(store, "a"), 0, 10) == DATA[:10]


# -- users


async def test_reads_of_one_user_do_not_delay_other_users(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The reads of one user fill that user's share, and the queue, at a slow store."""
    store = FakeStore({"theirs": bytes(40 * MIB), "ours": DATA})
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, span_bytes_max=MIB) as rig:
        theirs = rig.open(store, "theirs", user=1234)
        ours = rig.open(store, "ours")
        await rig.read(theirs, 0, 1)
        await rig.read(ours, 0, 1)
        offload.latency_s = {"data": 10.0}
        for index in range(1, 40):
            rig.fetcher.access(theirs, index * MIB, 1)
        await trio.sleep(5)
        begun_s = trio.current_time()
        for index in range(1, 4):
            await rig.read(ours, index * MIB, 1)
        assert trio.current_time() - begun_s == pytest.approx(30)
        offload.latency_s = {}


async def test_span_wanted_by_two_users_has_no_user_limit(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    data = pattern(40 * MIB)
    store = FakeStore({"a": data})
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, span_bytes_max=MIB) as rig:
        theirs = rig.open(store, "a", user=1234)
        ours = rig.open(store, "a")
        await rig.read(theirs, 0, 1)
        await rig.read(ours, 0, 1)
        offload.latency_s = {"data": 10.0}
        for index in range(1, 40):
            rig.fetcher.access(theirs, index * MIB, 1)
        begun_s = trio.current_time()
        assert await rig.read(ours, 35 * MIB, 5) == data[35 * MIB :][:5]
        assert trio.current_time() - begun_s == pytest.approx(10)
        assert len(store.reads()) < 30
        offload.latency_s = {}


async def test_open_files_of_one_user_are_limited(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    store = FakeStore(dict.fromkeys("abc", b"x"))
    async with rig_in(tmp_path) as rig:
        first, second = (rig.open(store, name, user=1234) for name in "ab")
        rig.fetcher.open(first)  # it is open already
        with pytest.raises(LimitExceeded, match="uid 1234 has 2 files open, the most"):
            rig.open(store, "c", user=1234)
        rig.open(store, "c", user=1235)
        rig.open(store, "c")
        rig.fetcher.close(second)
        rig.open(store, "c", user=1234)
