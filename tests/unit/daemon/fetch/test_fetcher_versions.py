"""The fetcher gives bytes of the pinned version, or an error."""

import itertools
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB, OLD_NS, FakeStore, InlineOffload, pattern
from support.fetching import DATA, SIZE, collect
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon.cache.cached_object import ABSENT, VERIFIED
from ckptfs._daemon.offload import Offload
from ckptfs.errors import (
    ObjectChanged,
    StoreUnavailable,
)


async def test_version_check_precedes_the_first_read_and_follows_each(
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
async def test_read_never_sees_bytes_of_another_version(
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
        assert file.health.changed
        assert file.state(0) == "changed"
        assert "a is another version" in file.health.error
        assert await rig.read(file, 0, MIB) == DATA[:MIB]  # cached bytes can still be read
        with pytest.raises(ObjectChanged):
            await rig.read(file, 8 * MIB, 1)
        assert rig.cache.index.used_bytes == MIB + (24 << 10)


async def test_version_written_in_the_same_second_is_another_one(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        store.overwrite("a", pattern(SIZE, 2), mtime_ns=OLD_NS)
        with pytest.raises(ObjectChanged):
            await rig.read(file, 5 * MIB, 1)


async def test_shorter_object_that_looks_like_an_outage_is_changed(
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


async def test_deleted_object_is_reported_as_changed(tmp_path: Path, store: FakeStore) -> None:
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
def test_read_beside_overwrites_gives_bytes_of_one_version(
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
                results = await collect(rig, file, places)
                for (offset, _), result in zip(places, results, strict=True):
                    if isinstance(result, bytes):
                        seen.append((offset, result))
                    else:
                        assert isinstance(result, ObjectChanged)
            assert rig.cache.index.used_bytes <= bytes_max or not bytes_max

    trio.run(main)
    assert any(
        all(data == version[offset : offset + len(data)] for offset, data in seen)
        for version in versions
    )


async def test_version_check_is_shared_by_waiting_spans(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"control": 1.0, "data": 0.1}
    async with rig_in(tmp_path, offload, span_bytes_max=MIB, connections_max=100) as rig:
        file = rig.open(store, "a")
        places = [(i * MIB, MIB) for i in range(20)]
        results = await collect(rig, file, places)
        assert results == [DATA[o : o + n] for o, n in places]
        assert len(store.reads()) == 20
        assert len(store.confirms()) <= 5


async def test_version_check_begun_before_the_end_of_a_read_is_ignored(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    async with rig_in(tmp_path, offload, span_bytes_max=MIB) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, 1)
        # The store gets the check of block 1 at 1 s and answers at 11 s. The object is written at
        # 2 s, and the read of block 2 ends at 3 s, so the answer at 11 s says nothing about it.
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
        assert file.health.changed
