"""Each byte is fetched once, is of the pinned version or not given at all, and no read hangs."""

import errno
import itertools
import math
import os
import time
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from unit.fakes import MIB, OLD_NS, FakeStore, InlineOffload, pattern
from unit.rig import Rig, bytes_on_disk, rig_in

from ckptfs._daemon import blockio, cachedir, disk
from ckptfs._daemon.cached import ABSENT, IN_MEMORY, VERIFIED
from ckptfs._daemon.cachedir import Files
from ckptfs._daemon.offload import Offload
from ckptfs._daemon.remote import RemoteFile
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    LimitExceeded,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)

SIZE = 20 * MIB + 5
DATA = pattern(SIZE)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore({"a": DATA})


@pytest.fixture(params=[InlineOffload, lambda: Offload(16)], ids=["inline", "threads"])
def offload(request: pytest.FixtureRequest) -> Offload:
    return request.param()


async def _collect(
    rig: Rig, file: RemoteFile, places: "list[tuple[int, int]]"
) -> "list[bytes | CkptfsError]":
    """Read all places at the same time."""
    results: list[bytes | CkptfsError] = [b""] * len(places)

    async def one(number: int) -> None:
        try:
            results[number] = await rig.read(file, *places[number])
        except CkptfsError as error:
            results[number] = error

    async with trio.open_nursery() as nursery:
        for number in range(len(places)):
            nursery.start_soon(one, number)
    return results


# -- single flight


async def test_many_readers_of_a_block_cost_one_read(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        places = [(3 * MIB + i, 1000) for i in range(30)]
        results = await _collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        assert [(c.offset, c.length) for c in store.reads()] == [(3 * MIB, MIB)]
        assert await rig.read(file, 3 * MIB, MIB) == DATA[3 * MIB : 4 * MIB]
        assert len(store.reads()) == 1
        assert (rig.fetcher.fetched_bytes, rig.fetcher.fetched_spans) == (MIB, 1)


async def test_overlapping_readers_fetch_each_byte_once(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        places = [(i * MIB // 2, 2 * MIB) for i in range(36)]
        results = await _collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        fetched = [(c.offset, c.offset + c.length) for c in store.reads()]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(fetched)))


async def test_missing_blocks_are_joined_into_spans(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path, span_bytes_max=8 * MIB) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 10 * MIB, 1)
        assert await rig.read(file, 5, SIZE - 5) == DATA[5:]
        spans = [(c.offset // MIB, c.length) for c in store.reads()]
        assert spans[0] == (10, MIB)
        assert sorted(spans[1:]) == [(0, 8 * MIB), (8, 2 * MIB), (11, 8 * MIB), (19, MIB + 5)]


async def test_readahead_is_fetched_too(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        for offset in range(0, 4 * MIB, MIB):
            rig.fetcher.access(file, offset, MIB)
            assert await rig.read(file, offset, MIB) == DATA[offset : offset + MIB]
        await rig.quiet()
        assert file.entry.readable(range(8))
        assert sum(c.length for c in store.reads()) == file.entry.stored_bytes()


async def test_after_a_file_that_was_read_whole_the_next_is_read_eagerly(tmp_path: Path) -> None:
    names = ["1", "2", "3", "4"]
    store = FakeStore(dict.fromkeys(names, DATA))
    async with rig_in(tmp_path) as rig:

        async def read(name: str, stop: int) -> int:
            """Read the beginning; how much was fetched after the first access."""
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
        assert await read("3", MIB) == MIB  # the last one was only begun
        other = FakeStore({"4": DATA})
        file = rig.open(other, "4")
        rig.fetcher.access(file, 0, MIB)
        await rig.quiet()
        assert file.entry.stored_bytes() == MIB  # another checkpoint


# -- versions


async def test_a_check_precedes_the_first_read_and_one_follows_each(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        await rig.read(file, 5 * MIB, 1)
        operations = [c.operation for c in store.calls]
        assert operations[0] == "confirm"
        assert operations[-1] == "confirm"
        first = operations.index("read_into")
        assert operations[first:] == ["read_into", "confirm", "read_into", "confirm"]
        assert file.pin.etag == store.etag("a")


@pytest.mark.parametrize("when", ["before", "torn", "after"])
async def test_bytes_of_another_version_are_never_seen(
    tmp_path: Path, store: FakeStore, offload: Offload, when: str
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        moment = {"before": 1, "torn": 2, "after": 3}[when]
        store.at_moment(moment, lambda: store.overwrite("a", pattern(SIZE, 2)))
        with pytest.raises(ObjectChanged):
            await rig.read(file, 5 * MIB, MIB)
        await rig.quiet()
        assert file.entry.state[5] == ABSENT
        assert file.changed
        assert file.state(0) == "changed"
        assert "a is another version" in file.error
        assert await rig.read(file, 0, MIB) == DATA[:MIB]  # what is cached can still be read
        with pytest.raises(ObjectChanged):
            await rig.read(file, 8 * MIB, 1)
        assert rig.cache.used_bytes == MIB + (24 << 10)


async def test_a_version_written_back_in_the_same_second_is_another_one(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        store.overwrite("a", pattern(SIZE, 2), mtime_ns=OLD_NS)
        with pytest.raises(ObjectChanged):
            await rig.read(file, 5 * MIB, 1)


async def test_a_shorter_object_is_a_changed_one_even_if_it_looks_like_an_outage(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        store.overwrite("a", b"short")
        store.fail("read_into", StoreUnavailable("HTTP status 500"))
        with pytest.raises(ObjectChanged):
            await rig.read(file, 5 * MIB, 1)
        assert len(store.reads()) == 2


async def test_a_deleted_object_is_a_changed_one(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        store.delete("a")
        with pytest.raises(ObjectChanged, match="deleted"):
            await rig.read(file, 0, 1)
        assert not store.reads()


_serial = itertools.count()
_reads = st.lists(
    st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(1, MIB)), min_size=1, max_size=4),
    min_size=1,
    max_size=6,
)


@given(
    _reads,
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=3),
    st.sampled_from([0, 2 * MIB + (24 << 10), 100]),
)
def test_whatever_is_overwritten_when_the_bytes_are_of_one_version(
    tmp_path_factory: pytest.TempPathFactory,
    reads: "list[list[tuple[int, int]]]",
    overwrites: "list[tuple[int, bool]]",
    bytes_max: int,
) -> None:
    size = 4 * MIB + 7
    versions = [pattern(size, number) for number in range(len(overwrites) + 1)]
    store = FakeStore({"a": versions[0]})
    directory = tmp_path_factory.getbasetemp() / f"mixed{next(_serial)}"
    seen: list[tuple[int, bytes]] = []

    async def main() -> None:
        async with rig_in(directory, cache_bytes_max=bytes_max, span_bytes_max=2 * MIB) as rig:
            file = rig.open(store, "a")
            later = 0
            for (moment, same_second), data in zip(overwrites, versions[1:], strict=True):
                later += moment
                mtime_ns = OLD_NS if same_second else None
                store.at_moment(
                    later, lambda d=data, m=mtime_ns: store.overwrite("a", d, mtime_ns=m)
                )
            for places in reads:
                results = await _collect(rig, file, places)
                for (offset, _), result in zip(places, results, strict=True):
                    if isinstance(result, bytes):
                        seen.append((offset, result))
                    else:
                        assert isinstance(result, ObjectChanged)
            assert rig.cache.used_bytes <= bytes_max or not bytes_max

    trio.run(main)
    assert any(
        all(data == version[offset : offset + len(data)] for offset, data in seen)
        for version in versions
    )


async def test_waiting_spans_share_their_checks(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"control": 1.0, "data": 0.1}
    async with rig_in(tmp_path, offload, span_bytes_max=MIB, connections_max=100) as rig:
        file = rig.open(store, "a")
        places = [(i * MIB, MIB) for i in range(20)]
        results = await _collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        assert len(store.reads()) == 20
        assert len(store.confirms()) <= 5


async def test_a_check_that_began_before_the_read_ended_does_not_count(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, span_bytes_max=MIB) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        # The check of block 1 is asked at 1 s and answered at 11 s. The read of block 2 ends at 3 s
        # and the object was written at 2 s: what is answered at 11 s says nothing about it.
        offload.reply_s = {"control": 10.0}
        offload.latency_s = {"data": 1.0}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, file, MIB, 1)
            await trio.sleep(0.5)
            offload.latency_s = {"data": 2.5}
            rig.fetcher.access(file, 2 * MIB, 1)
            await trio.sleep(1.5)
            store.overwrite("a", pattern(SIZE, 2))
        await rig.quiet()
        assert file.entry.state[1] == VERIFIED
        assert file.entry.state[2] == ABSENT
        assert file.changed


# -- errors


async def test_what_can_pass_is_tried_again(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        store.fail("confirm", StoreUnavailable("no route"), times=3)
        store.fail("read_into", StoreUnavailable("HTTP status 503"), times=3)
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        await rig.quiet()
        assert len(store.reads()) == 4
        assert not file.failing
        assert "HTTP status 503" in file.error
        assert file.state(0) == "lazy"


async def test_a_store_that_never_answers_well_ends_at_the_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with rig_in(tmp_path, read_deadline_s=30) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        store.fail_always("read_into", StoreUnavailable("no route to host"))
        began = trio.current_time()
        with pytest.raises(StoreTimeout, match=r"30 s; last: .*no route to host"):
            await rig.read(file, MIB, 1)
        assert trio.current_time() - began == pytest.approx(30)
        assert 5 < len(store.reads()) < 60  # pauses grow
        assert file.state(0) == "failing"
        await rig.quiet()
        store.fail_always("read_into", None)
        assert await rig.read(file, MIB, 2) == DATA[MIB : MIB + 2]  # nothing remembers
        await rig.quiet()
        assert not file.failing


@pytest.mark.parametrize("kind", ["data", "control"])
async def test_a_dark_store_ends_at_the_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock, kind: str
) -> None:
    offload = InlineOffload()
    offload.latency_s = {kind: math.inf}
    async with rig_in(tmp_path, offload, read_deadline_s=30) as rig:
        file = rig.open(store, "a")
        for _ in range(2):
            with pytest.raises(StoreTimeout, match="30 s"):
                await rig.read(file, 0, 1)
        assert file.failing
        assert "a: no" in file.error
        await rig.quiet()
        assert rig.cache.used_bytes == 0
        offload.latency_s = {}
        assert await rig.read(file, 0, 1) == DATA[:1]


async def test_a_check_of_cached_bytes_that_never_ends_is_reported(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    store = FakeStore({"a": DATA}, mtime_ns=int(time.time()) * 10**9)
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, read_deadline_s=30) as rig:
        await rig.read(rig.open(store, "a"), 0, 1)
        offload.latency_s = {"control": math.inf}
        file = rig.open(store, "a")
        with pytest.raises(StoreTimeout):
            await rig.read(file, 0, 1)
        assert file.failing
        assert "no data within 30 s" in file.error


async def test_transfers_that_come_back_late_write_nothing(
    tmp_path: Path, store: FakeStore
) -> None:
    offload = Offload(16)
    async with rig_in(tmp_path, offload, read_deadline_s=0.3) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 10 * MIB, 1)
        gate = store.block("read_into")
        with pytest.raises(StoreTimeout):
            await rig.read(file, 0, MIB)
        assert gate.entered.is_set()
        await rig.quiet()
        assert file.entry.state[0] == ABSENT
        used = rig.cache.used_bytes
        assert await rig.read(file, 0, MIB) == DATA[:MIB]  # by another thread
        store.overwrite("a", pattern(SIZE, 9))  # what the late one will bring
        gate.release.set()
        await _threads_ended(offload)
        await rig.quiet()
        assert os.pread(file.entry.files.data, MIB, 0) == DATA[:MIB]
        assert rig.cache.used_bytes == used + MIB


async def _threads_ended(offload: Offload) -> None:
    while offload.threads():  # noqa: ASYNC110 - nobody else knows when they end
        await trio.sleep(0.002)


@pytest.mark.parametrize("error", [AccessDenied("expired"), StoreError("odd")], ids=repr)
@pytest.mark.parametrize("operation", ["confirm", "read_into"])
async def test_what_cannot_pass_ends_at_once_and_is_tried_anew(
    tmp_path: Path,
    store: FakeStore,
    autojump_clock: MockClock,
    error: CkptfsError,
    operation: str,
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        store.fail_always(operation, error)
        with pytest.raises(type(error), match=str(error)):
            await rig.read(file, 0, 1)
        assert trio.current_time() == 0
        assert file.failing
        assert str(error) in file.error
        store.fail_always(operation, None)
        assert await rig.read(file, 0, 1) == DATA[:1]
        await rig.quiet()
        assert not file.failing


async def test_errors_of_a_check_alone_are_noted_and_pass(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    store = FakeStore({"a": DATA}, mtime_ns=int(time.time()) * 10**9)
    async with rig_in(tmp_path) as rig:
        await rig.read(rig.open(store, "a"), 0, MIB)
        file = rig.open(store, "a")  # all that will be read is cached: there is no span
        store.fail_always("confirm", AccessDenied("expired"))
        with pytest.raises(AccessDenied):
            await rig.read(file, 0, MIB)
        assert file.failing
        assert "expired" in file.error
        store.fail_always("confirm", None)
        store.fail("confirm", StoreUnavailable("no route"))
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        assert not file.failing
        changed = rig.open(store, "a")
        store.overwrite("a", pattern(SIZE, 2))
        with pytest.raises(ObjectChanged):
            await rig.read(changed, 0, MIB)
        assert changed.changed


async def test_a_reader_that_joined_late_has_its_own_deadline(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, read_deadline_s=30) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 5 * MIB, 1)
        offload.latency_s = {"data": math.inf}
        rig.fetcher.access(file, 0, 1)
        await trio.sleep(20)
        offload.latency_s = {}
        assert await rig.read(file, 0, 1) == DATA[:1]  # the old span ended at 30 s


# -- who goes first, and who goes away


async def test_a_dark_store_leaves_places_to_the_others(tmp_path: Path) -> None:
    names = [str(number) for number in range(40)]
    dark = FakeStore(dict.fromkeys(names, pattern(MIB)))
    bright = FakeStore({"a": DATA})
    async with rig_in(tmp_path, Offload(4), connections_max=4) as rig:
        dark.fail("confirm", StoreUnavailable("outage"), at=1)
        first = rig.open(dark, "0")
        gates = [dark.block("read_into", at=number) for number in range(1, 41)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.read, first, 0, 1)
            while not first.cause:  # noqa: ASYNC110 - the store is known to be dark from then on
                await trio.sleep(0.002)
            for name in names[1:]:
                nursery.start_soon(rig.read, rig.open(dark, name), 0, 1)
            await trio.to_thread.run_sync(gates[0].entered.wait, 10)
            with trio.fail_after(10):
                assert await rig.read(rig.open(bright, "a"), 0, MIB) == DATA[:MIB]
            nursery.cancel_scope.cancel()
        dark.release_all()
        await rig.quiet()


async def test_demand_goes_before_queued_readahead(
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
        assert await rig.read(file, last * MIB, 1)  # queued already: it goes ahead of the others
        order = [c.offset // MIB for c in store.reads()[4:]]
        assert len(order) <= 4
        assert order[-1] == last
        await rig.quiet()
        assert sorted(c.offset // MIB for c in store.reads()) == [0, 1, 2, 3, 4, 5, 6, 7, 18]


async def test_a_reader_that_goes_away_leaves_the_span_to_others(
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
        assert not file.error


async def test_the_last_reader_that_goes_away_still_warms_the_cache(
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
        assert rig.cache.stored_bytes(file.key.digest(), SIZE) == MIB
        rig.fetcher.open(file)
        assert await rig.read(file, 0, 1) == DATA[:1]
        assert len(store.reads()) == 1


async def test_a_file_closed_during_its_first_check_harms_nobody(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    """As when a checkpoint is detached by force while it is read."""
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


async def test_a_read_ends_well_or_with_our_error_if_its_file_is_closed_meanwhile(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0, "control": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        for closed_at in (0.5, 1.5, 2.5):  # in the first check, the read, the last check
            file = rig.open(store, "a")
            results: list[bytes | CkptfsError] = []

            async def reader(file: RemoteFile = file, results: list = results) -> None:
                results += await _collect(rig, file, [(int(trio.current_time()) * MIB, 10)])

            offset = int(trio.current_time()) * MIB
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.sleep(closed_at)
                rig.fetcher.close(file)
            [result] = results
            assert result == DATA[offset : offset + 10] or isinstance(result, CkptfsError)
            await rig.quiet()
        assert await rig.read(rig.open(store, "a"), 0, 10) == DATA[:10]


# -- the cache below


async def test_settled_bytes_of_an_earlier_attachment_cost_no_request(
    tmp_path: Path, store: FakeStore, offload: Offload
) -> None:
    async with rig_in(tmp_path, offload) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 2 * MIB)
        await rig.quiet()
        rig.fetcher.close(file)
    store.calls.clear()
    async with rig_in(tmp_path, Offload(1)) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, 2 * MIB) == DATA[: 2 * MIB]
        assert not store.calls
        assert await rig.read(file, 2 * MIB, 1) == DATA[2 * MIB : 2 * MIB + 1]
        assert [c.operation for c in store.calls] == ["read_into", "confirm"]


async def test_settled_bytes_are_not_lent_where_there_are_other_users(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, allow_other=True) as rig:
        await rig.read(rig.open(store, "a"), 0, 2 * MIB)
        await rig.quiet()
        other = FakeStore({"a": DATA})  # the same object, with credentials that cannot read it
        other.fail_always("confirm", AccessDenied("not for you"))
        file = rig.open(other, "a")
        with pytest.raises(AccessDenied):
            await rig.read(file, 0, MIB)
    async with rig_in(tmp_path, allow_other=True) as rig:
        store.calls.clear()
        assert await rig.read(rig.open(store, "a"), 0, MIB) == DATA[:MIB]
        assert [c.operation for c in store.calls] == ["confirm"]


async def test_nothing_is_lent_to_the_kernel_for_whom_the_store_refuses(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, allow_other=True) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, SIZE)
        await rig.quiet()
        other = FakeStore({"a": DATA})
        other.fail_always("confirm", AccessDenied("not for you"))
        refused = rig.open(other, "a")
        await rig.fetcher.before_lending(refused)
        assert rig.fetcher.lend(refused) is None
        assert rig.fetcher.read_now(refused, 0, 1) is None
        assert rig.fetcher.lend(file) is not None
        rig.cache.take_back(file.entry)


async def test_without_descriptors_the_store_is_read_and_the_cache_stays(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, SIZE)
        await rig.quiet()
        rig.fetcher.close(file)
        used_bytes = rig.cache.used_bytes
        with monkeypatch.context() as patch:

            def open_existing(*_: object) -> None:
                raise OSError(errno.EMFILE, "Too many open files")

            patch.setattr(cachedir, "open_existing", open_existing)
            rig.fetcher.open(file)
            assert await rig.read(file, 0, 10) == DATA[:10]
            await rig.quiet()
            rig.fetcher.close(file)
        assert rig.cache.used_bytes == used_bytes
        store.calls.clear()
        rig.fetcher.open(file)
        assert await rig.read(file, 0, SIZE) == DATA
        assert not store.reads()


async def test_readahead_does_not_push_itself_out_of_a_small_cache(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, cache_bytes_max=8 * MIB) as rig:
        file = rig.open(store, "a")
        for offset in range(0, SIZE, MIB):
            length = min(MIB, SIZE - offset)
            rig.fetcher.access(file, offset, length)
            assert await rig.read(file, offset, length) == DATA[offset : offset + length]
            await rig.quiet()
        assert rig.fetcher.fetched_bytes == SIZE


async def test_waiting_for_a_place_is_not_a_failure_of_the_store(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 7.0}
    settings = {"read_deadline_s": 10, "connections_max": 3, "span_bytes_max": MIB}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, MIB)
        for index in range(1, 6):
            rig.fetcher.access(file, (index - 1) * MIB, MIB)  # one place is for readahead
        await rig.quiet()
        assert file.error == ""
        assert file.entry.stored_bytes() >= 8 * MIB


async def test_young_bytes_of_an_earlier_attachment_need_one_check(
    tmp_path: Path, offload: Offload
) -> None:
    store = FakeStore({"a": DATA}, mtime_ns=int(time.time()) * 10**9)
    async with rig_in(tmp_path, offload) as rig:
        await rig.read(rig.open(store, "a"), 0, 2 * MIB)
        await rig.quiet()
    store.calls.clear()
    async with rig_in(tmp_path, Offload(1)) as rig:
        file = rig.open(store, "a")
        assert rig.fetcher.read_now(file, 0, 1) is None
        assert await rig.read(file, 0, 2 * MIB) == DATA[: 2 * MIB]
        assert await rig.read(file, MIB, 5) == DATA[MIB : MIB + 5]
        assert [c.operation for c in store.calls] == ["confirm"]


async def test_young_bytes_written_again_in_the_same_second_are_not_used(tmp_path: Path) -> None:
    mtime_ns = int(time.time()) * 10**9
    store = FakeStore({"a": DATA}, mtime_ns=mtime_ns)
    new = pattern(SIZE, 2)
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 2 * MIB)
        store.overwrite("a", new, mtime_ns=mtime_ns)
        newer = rig.open(store, "a")
        assert await rig.read(newer, 0, MIB) == new[:MIB]
        with pytest.raises(ObjectChanged):
            await rig.read(file, 0, MIB)  # shares the folder, but is the older version


async def test_a_check_answered_late_does_not_publish_into_the_newer_version(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Two attachments share the folder: the older one's last check was asked before the change."""
    store = FakeStore({"a": DATA}, mtime_ns=OLD_NS)
    new = pattern(SIZE, 2)
    offload = InlineOffload()
    async with rig_in(tmp_path, offload) as rig:
        old = rig.open(store, "a")
        await rig.read(old, MIB, 1)
        offload.reply_s = {"control": 10.0}
        rig.fetcher.access(old, 0, 1)
        await trio.sleep(5)
        store.overwrite("a", new, mtime_ns=OLD_NS)
        offload.reply_s = {}
        newer = rig.open(store, "a")
        newer.trusted = False  # as if it were young
        newer.pin = store.pin("a")
        assert await rig.read(newer, 2 * MIB, 10) == new[2 * MIB : 2 * MIB + 10]
        assert await rig.read(newer, 0, 10) == new[:10]


async def test_failures_of_another_attachment_are_not_mine(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    """Two users' attachments share the flights of an object, but not their credentials."""
    denied = FakeStore({"a": DATA})
    offload = InlineOffload()
    offload.latency_s = {"data": 1.0}
    async with rig_in(tmp_path, offload) as rig:
        theirs, mine = rig.open(denied, "a"), rig.open(store, "a")
        denied.fail_always("read_into", AccessDenied("expired"))
        rig.fetcher.access(theirs, 0, 1)
        await trio.sleep(0.5)
        assert await rig.read(mine, 0, 10) == DATA[:10]


@pytest.mark.parametrize("bytes_max", [0, 4 * MIB + (24 << 10), 100])
async def test_a_file_opened_again_is_the_same_version(
    tmp_path: Path, store: FakeStore, bytes_max: int
) -> None:
    """Also when the cache has lost its folder meanwhile, and with it what it knew."""
    store.overwrite("b", DATA)
    async with rig_in(tmp_path, cache_bytes_max=bytes_max) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        rig.fetcher.close(file)
        await rig.read(rig.open(store, "b"), 0, 4 * MIB)
        rig.fetcher.open(file)
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        store.overwrite("a", pattern(SIZE, 2), mtime_ns=OLD_NS)
        with pytest.raises(ObjectChanged):
            await rig.read(file, 7 * MIB, MIB)


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["write", "record", "folder"])
async def test_a_disk_that_cannot_be_written_is_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        if what == "write":
            monkeypatch.setattr(cachedir, "write", _no_space)
        elif what == "record":
            monkeypatch.setattr(cachedir, "write_sums", _no_space)
        else:
            monkeypatch.setattr(cachedir, "create", _no_space)
        for offset in range(0, SIZE, MIB):
            assert await rig.read(file, offset, 5) == DATA[offset : offset + 5]
        await rig.quiet()
        expected = VERIFIED if what == "record" else IN_MEMORY
        assert set(file.entry.state) == {expected}
        if what == "write":
            assert rig.cache.used_bytes == 24 << 10
            path = rig.cache.directory / "objects"
            assert sum(p.stat().st_blocks for p in path.rglob("data")) == 0


async def test_a_write_that_fails_half_way_is_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cachedir.write

    def half(files: Files, offset: int, data: memoryview) -> None:
        write(files, offset, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cachedir, "write", half)
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, 4 * MIB) == DATA[: 4 * MIB]
        await rig.quiet()
        assert os.fstat(file.entry.files.data).st_blocks == 0
        assert rig.cache.used_bytes == 24 << 10


async def test_a_disk_that_cannot_be_read_is_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockio, "load", lambda *_: None)
    monkeypatch.setattr(disk, "read_cached", _no_space)
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        with trio.fail_after(10):
            assert await rig.read(file, 0, MIB) == DATA[:MIB]
            assert await rig.read(file, MIB - 1, 2) == DATA[MIB - 1 : MIB + 1]
        assert len(store.reads()) < 10


async def test_a_damaged_block_is_fetched_again(tmp_path: Path, store: FakeStore) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 3 * MIB)
        await rig.quiet()
        digest = file.key.digest()
    path = tmp_path / "cache" / "objects" / digest[:2] / digest / "data"
    with path.open("r+b") as data:
        data.seek(MIB + 5)
        data.write(b"damage")
    store.calls.clear()
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, 3 * MIB) == DATA[: 3 * MIB]
        assert [(c.offset, c.length) for c in store.reads()] == [(MIB, MIB)]


@pytest.mark.parametrize("bytes_max", [100, MIB + (24 << 10), 3 * MIB + (24 << 10)])
async def test_a_file_larger_than_the_cache_is_readable(
    tmp_path: Path, store: FakeStore, offload: Offload, bytes_max: int
) -> None:
    settings = {"cache_bytes_max": bytes_max, "span_bytes_max": MIB, "window_bytes_max": 4 * MIB}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(store, "a")
        for offset in range(0, SIZE, 128 << 10):
            length = min(128 << 10, SIZE - offset)
            rig.fetcher.access(file, offset, length)
            assert await rig.read(file, offset, length) == DATA[offset : offset + length]
            assert bytes_on_disk(rig.cache.directory) <= bytes_max
        await rig.quiet()
        await wait_all_tasks_blocked()
        assert rig.cache.used_bytes <= bytes_max


async def test_places_and_bytes_are_given_back_whatever_happens(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    settings = {"connections_max": 1, "in_flight_bytes_max": MIB, "read_deadline_s": 10}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(store, "a")
        store.fail("read_into", StoreUnavailable("once"))
        store.fail("read_into", AccessDenied("twice"), at=2)
        with pytest.raises(AccessDenied):
            await rig.read(file, 0, 1)
        offload.latency_s = {"data": math.inf}
        with pytest.raises(StoreTimeout):
            await rig.read(file, 0, 1)
        offload.latency_s = {}
        store.at_moment(2, lambda: store.overwrite("a", DATA))
        with pytest.raises(ObjectChanged):
            await rig.read(file, 0, 1)
        other = rig.open(store, "a")
        assert await rig.read(other, 0, MIB) == DATA[:MIB]


async def test_a_small_file_and_its_last_bytes(tmp_path: Path, offload: Offload) -> None:
    store = FakeStore({"one": b"x", "edge": pattern(MIB), "over": pattern(MIB + 1)})
    async with rig_in(tmp_path, offload) as rig:
        assert await rig.read(rig.open(store, "one"), 0, 1) == b"x"
        assert await rig.read(rig.open(store, "edge"), MIB - 1, 1) == pattern(MIB)[-1:]
        file = rig.open(store, "over")
        assert await rig.read(file, MIB - 1, 2) == pattern(MIB + 1)[-2:]
        await rig.quiet()
        assert file.state(rig.cache.stored_bytes(file.key.digest(), MIB + 1)) == "cached"


# -- users


async def test_one_user_keeps_nobody_waiting(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Their reads fill all that they may have, and the queue, at a store that takes its time."""
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


async def test_a_span_that_another_user_wants_too_waits_as_nobodys(
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


async def test_one_user_cannot_have_all_descriptors(
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
