"""The fetcher and the cache below it: cached bytes are used, and a failing disk fails no read."""

import errno
import math
import os
import time
from pathlib import Path

import pytest
import trio
from support.fakes import MIB, OLD_NS, FakeStore, InlineOffload, pattern
from support.fetching import DATA, SIZE
from support.rig import bytes_on_disk, rig_in
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.cache import block_io, disk_ops, object_dir
from ckptfs._daemon.cache.cached_object import IN_MEMORY, VERIFIED
from ckptfs._daemon.cache.object_dir import Files
from ckptfs._daemon.offload import Offload
from ckptfs.errors import (
    AccessDenied,
    ObjectChanged,
    StoreTimeout,
    StoreUnavailable,
)


async def test_settled_cached_bytes_cost_no_request(
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


async def test_settled_cached_bytes_need_a_check_beside_other_users(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, allow_other=True) as rig:
        await rig.read(rig.open(store, "a"), 0, 2 * MIB)
        await rig.quiet()
        other = FakeStore({"a": DATA})  # the same object, for credentials that may not read it
        other.fail_always("confirm", AccessDenied("not for you"))
        file = rig.open(other, "a")
        with pytest.raises(AccessDenied):
            await rig.read(file, 0, MIB)
    async with rig_in(tmp_path, allow_other=True) as rig:
        store.calls.clear()
        assert await rig.read(rig.open(store, "a"), 0, MIB) == DATA[:MIB]
        assert [c.operation for c in store.calls] == ["confirm"]


async def test_passthrough_is_refused_to_a_user_whom_the_store_refuses(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, allow_other=True) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, SIZE)
        await rig.quiet()
        other = FakeStore({"a": DATA})
        other.fail_always("confirm", AccessDenied("not for you"))
        refused = rig.open(other, "a")
        await rig.fetcher.before_passthrough(refused)
        assert rig.fetcher.begin_passthrough(refused) is None
        assert rig.fetcher.read_now(refused, 0, 1) is None
        assert rig.fetcher.begin_passthrough(file) is not None
        rig.cache.end_passthrough(file.entry)


async def test_read_without_descriptors_asks_the_store_and_keeps_the_cache(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, SIZE)
        await rig.quiet()
        rig.fetcher.close(file)
        used_bytes = rig.cache.index.used_bytes
        with monkeypatch.context() as patch:

            def open_existing(*_: object) -> None:
                raise OSError(errno.EMFILE, "Too many open files")

            patch.setattr(object_dir, "open_existing", open_existing)
            rig.fetcher.open(file)
            assert await rig.read(file, 0, 10) == DATA[:10]
            await rig.quiet()
            rig.fetcher.close(file)
        assert rig.cache.index.used_bytes == used_bytes
        store.calls.clear()
        rig.fetcher.open(file)
        assert await rig.read(file, 0, SIZE) == DATA
        assert not store.reads()


async def test_readahead_in_a_small_cache_evicts_no_unread_block(
    tmp_path: Path, store: FakeStore
) -> None:
    async with rig_in(tmp_path, cache_bytes_max=8 * MIB) as rig:
        file = rig.open(store, "a")
        for offset in range(0, SIZE, MIB):
            length = min(MIB, SIZE - offset)
            rig.fetcher.access(file, offset, length)
            assert await rig.read(file, offset, length) == DATA[offset : offset + length]
            await rig.quiet()
        assert file.activity.total().fetched_bytes == SIZE


async def test_wait_for_a_slot_is_not_a_failure_of_the_store(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    offload = InlineOffload()
    offload.latency_s = {"data": 7.0}
    settings = {"read_deadline_s": 10, "connections_max": 3, "span_bytes_max": MIB}
    async with rig_in(tmp_path, offload, **settings) as rig:
        file = rig.open(store, "a")
        await rig.read(file, 0, MIB)
        for index in range(1, 6):
            rig.fetcher.access(file, (index - 1) * MIB, MIB)  # one slot is for readahead
        await rig.quiet()
        assert file.health.error == ""
        assert file.entry.stored_bytes() >= 8 * MIB


async def test_young_cached_bytes_need_one_version_check(tmp_path: Path, offload: Offload) -> None:
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


async def test_young_cached_bytes_of_the_same_second_are_not_used(tmp_path: Path) -> None:
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
            await rig.read(file, 0, MIB)  # it shares the folder, but is the older version


async def test_version_check_answered_late_publishes_no_older_bytes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Two attachments share the folder. The last check of the older one began before the change."""
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
        newer.version.trusted = False  # as if it were young
        newer.version.pin = store.pin("a")
        assert await rig.read(newer, 2 * MIB, 10) == new[2 * MIB : 2 * MIB + 10]
        assert await rig.read(newer, 0, 10) == new[:10]


async def test_span_failure_of_another_attachment_fails_no_reader(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    """The attachments of two users share the spans of an object, but not their credentials."""
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
async def test_file_opened_again_is_the_same_version(
    tmp_path: Path, store: FakeStore, bytes_max: int
) -> None:
    """The cache may have lost the folder meanwhile, and the ETag with it."""
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
async def test_disk_that_cannot_be_written_causes_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        if what == "write":
            monkeypatch.setattr(object_dir, "write", _no_space)
        elif what == "record":
            monkeypatch.setattr(object_dir, "write_sums", _no_space)
        else:
            monkeypatch.setattr(object_dir, "create", _no_space)
        for offset in range(0, SIZE, MIB):
            assert await rig.read(file, offset, 5) == DATA[offset : offset + 5]
        await rig.quiet()
        expected = VERIFIED if what == "record" else IN_MEMORY
        assert set(file.entry.state) == {expected}
        if what == "write":
            assert rig.cache.index.used_bytes == 24 << 10
            path = rig.cache.directory / "objects"
            assert sum(p.stat().st_blocks for p in path.rglob("data")) == 0


async def test_disk_write_that_fails_half_way_causes_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = object_dir.write

    def half(files: Files, offset: int, data: memoryview) -> None:
        write(files, offset, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(object_dir, "write", half)
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        assert await rig.read(file, 0, 4 * MIB) == DATA[: 4 * MIB]
        await rig.quiet()
        assert os.fstat(file.entry.files.data).st_blocks == 0
        assert rig.cache.index.used_bytes == 24 << 10


async def test_disk_that_cannot_be_read_causes_no_read_error(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_io, "load", lambda *_: None)
    monkeypatch.setattr(disk_ops, "read_cached", _no_space)
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        with trio.fail_after(10):
            assert await rig.read(file, 0, MIB) == DATA[:MIB]
            assert await rig.read(file, MIB - 1, 2) == DATA[MIB - 1 : MIB + 1]
        assert len(store.reads()) < 10


async def test_damaged_block_is_fetched_again(tmp_path: Path, store: FakeStore) -> None:
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
async def test_file_larger_than_the_cache_is_readable(
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
        assert rig.cache.index.used_bytes <= bytes_max


async def test_fetch_gives_slots_and_bytes_back_after_each_error(
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


async def test_fetch_of_small_files_gives_their_last_bytes(
    tmp_path: Path, offload: Offload
) -> None:
    store = FakeStore({"one": b"x", "edge": pattern(MIB), "over": pattern(MIB + 1)})
    async with rig_in(tmp_path, offload) as rig:
        assert await rig.read(rig.open(store, "one"), 0, 1) == b"x"
        assert await rig.read(rig.open(store, "edge"), MIB - 1, 1) == pattern(MIB)[-1:]
        file = rig.open(store, "over")
        assert await rig.read(file, MIB - 1, 2) == pattern(MIB + 1)[-2:]
        await rig.quiet()
        assert file.state(rig.cache.stored_bytes(file.key.digest())) == "cached"
