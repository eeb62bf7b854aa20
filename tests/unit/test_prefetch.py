"""Prefetch goes in the given order, behind the readers, within the cache, and ends with its use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from unit.fakes import MIB, FakeStore, InlineOffload, pattern
from unit.rig import rig_in
from unit.test_service import ELSEWHERE, PLACE, Bench

from ckptfs._daemon.attachment import Attachment
from ckptfs.errors import AccessDenied, ObjectChanged, StoreUnavailable

ONE_BY_ONE = {"connections_max": 1, "span_bytes_max": MIB}


@asynccontextmanager
async def bench_in(
    directory: Path, files: dict[str, int], **settings: object
) -> AsyncIterator[Bench]:
    """A service; the store at `PLACE` holds files of these sizes."""
    async with rig_in(directory, InlineOffload(), **settings) as rig:
        bench = Bench(rig)
        contents = {
            path: pattern(size, number) for number, (path, size) in enumerate(files.items())
        }
        bench.stores[PLACE.path] = FakeStore(contents)
        yield bench


async def run(bench: Bench, attachment: Attachment, *globs: str) -> None:
    """Prefetch, and wait for the end."""
    bench.service.prefetch(attachment, list(globs))
    await wait_all_tasks_blocked()
    with trio.fail_after(1000):
        while attachment.background:  # noqa: ASYNC110 - of the test's clock
            await trio.sleep(1)


def fetched(bench: Bench) -> list[str]:
    """The files in the order in which they were first read."""
    return list(dict.fromkeys(call.path for call in bench.store(PLACE).reads()))


def cached(bench: Bench, attachment: Attachment) -> set[str]:
    """The files that are in the cache as a whole."""
    return {
        file.path
        for file, digest in zip(attachment.manifest.files, attachment.digests, strict=False)
        if bench.rig.cache.stored_bytes(digest, file.size) == file.size
    }


async def test_the_files_of_the_globs_are_fetched_each_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a.json": 5, "b/x.json": 7, "c.bin": 2 * MIB, "d.bin": 3, "e.txt": 9, "empty": 0}
    async with bench_in(tmp_path, files, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "d*", "c.bin", "*.json", "a*", "nothing*")
        assert sorted(fetched(bench)) == ["a.json", "b/x.json", "c.bin", "d.bin"]
        assert cached(bench, attachment) == {"d.bin", "c.bin", "a.json", "b/x.json", "empty"}
        assert sum(call.length for call in bench.store(PLACE).reads()) == 15 + 2 * MIB
        await run(bench, attachment, "*.json")
        assert len(bench.store(PLACE).reads()) == 5  # what is there is not fetched again
        await run(bench, attachment, "*")
        assert bench.service.status(0).attachments[0].state == "cached"


async def test_the_order_is_that_of_the_globs(tmp_path: Path, autojump_clock: MockClock) -> None:
    names = [f"{letter}{number:02}" for letter in "bca" for number in range(15)]
    async with bench_in(tmp_path, dict.fromkeys(sorted(names), 5), **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "b*", "c*", "*")
        order = fetched(bench)
        assert sorted(order) == sorted(names)
        # Eight are under way at the same time.
        assert all(abs(order.index(name) - place) < 8 for place, name in enumerate(names))


async def test_files_that_cannot_be_fetched_are_left_out(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {name: 5 for name in "abcde"}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        store = bench.store(PLACE)
        store.overwrite("b", b"other")
        store.delete("c")
        store.fail("read_into", AccessDenied("d is closed"))
        await run(bench, attachment, "d")
        await run(bench, attachment, "[abce]")
        assert cached(bench, attachment) == {"a", "e"}
        assert sorted(call.path for call in store.reads()) == ["a", "d", "e"]
        assert attachment.state(0) == "changed"
        for name, word in (("b", "another version"), ("c", "deleted"), ("d", "closed")):
            inode = attachment.tree.root.children[name.encode()]
            assert word in attachment.peek(inode.index).error


async def test_it_ends_when_the_store_stops_answering(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {f"{number:02}": 5 for number in range(30)}
    async with bench_in(tmp_path, files, read_deadline_s=60) as bench:
        attachment = await bench.attach()
        store = bench.store(PLACE)
        for operation in ("confirm", "read_into"):
            store.fail_always(operation, StoreUnavailable("dark"))
        await run(bench, attachment, "*")
        assert {call.path for call in store.confirms()} <= set(list(files)[:8])  # those under way
        await trio.sleep(200)
        asked = len(store.calls)
        await trio.sleep(1000)
        assert len(store.calls) == asked


@pytest.mark.parametrize(
    ("count", "size", "fit"),
    [
        (40, MIB // 2, 3),
        (300, 1000, 73),  # each takes a page, and six of folder and map
    ],
)
async def test_it_ends_when_the_cache_is_full_and_pushes_nothing_out(
    tmp_path: Path, autojump_clock: MockClock, count: int, size: int, fit: int
) -> None:
    files = {f"{number:03}": size for number in range(count)}
    async with bench_in(tmp_path, files, cache_bytes_max=2 * MIB) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "*")
        assert sorted(fetched(bench)) == list(files)[:fit]
        assert cached(bench, attachment) == set(list(files)[:fit])
        assert bench.rig.cache.used_bytes <= 2 * MIB


async def test_a_file_larger_than_the_cache_is_not_begun(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 9 * MIB, "b": 5}, cache_bytes_max=4 * MIB) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "b", "a")
        assert fetched(bench) == ["b"]


async def test_it_ends_with_the_attachment(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB, "b": 5 * MIB}, **ONE_BY_ONE, linger_s=0) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1.0}
        bench.service.prefetch(attachment, ["*"])
        await trio.sleep(3.5)
        begun = len(bench.store(PLACE).reads())
        assert 1 <= begun <= 4
        bench.service.let_go(attachment)
        await trio.sleep(1000)
        assert bench.shown() == []
        assert len(bench.store(PLACE).reads()) <= begun + 1
        assert not attachment.background
        assert attachment.error == ""
        bench.offload.latency_s = {}
        again = await bench.attach()  # nothing of it is in the way of another one
        await run(bench, again, "*")
        assert cached(bench, again) == {"a", "b"}


async def test_readers_overtake_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB, "b": 5}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1.0}
        bench.service.prefetch(attachment, ["a"])
        await trio.sleep(3.5)
        store = bench.store(PLACE)
        begun = len(store.reads())
        root = attachment.tree.root.children
        b = bench.service.vfs.open(root[b"b"].inode)
        assert bytes(await bench.service.vfs.read(b, 0, 5)) == pattern(5, 1)
        assert [call.path for call in store.reads()][begun:][:2].count("b") == 1
        a = bench.service.vfs.open(root[b"a"].inode)
        begun = len(store.reads())
        last = pattern(40 * MIB, 0)[39 * MIB :][:10]
        assert bytes(await bench.service.vfs.read(a, 39 * MIB, 10)) == last
        assert 39 * MIB in [call.offset for call in store.reads()[begun:][:2]]
        for handle in (a, b):
            bench.service.vfs.release(handle)


async def test_it_leaves_places_for_readers(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings = {"connections_max": 4, "span_bytes_max": MIB}
    async with bench_in(tmp_path, {"a": 40 * MIB, "b": 5}, **settings) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1e6}  # none ends
        bench.service.prefetch(attachment, ["a"])
        await trio.sleep(10)
        store = bench.store(PLACE)
        assert store.reads() == []
        handle = bench.service.vfs.open(attachment.tree.root.children[b"b"].inode)
        bench.offload.latency_s = {}
        with trio.fail_after(1):
            assert bytes(await bench.service.vfs.read(handle, 0, 5)) == pattern(5, 1)
        bench.service.vfs.release(handle)


async def test_a_reader_of_what_ends_with_another_attachment_is_not_harmed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Two users' attachments of one place have their blocks in common."""
    async with bench_in(tmp_path, {"a": 8 * MIB}, **ONE_BY_ONE, linger_s=0) as bench:
        mine, theirs = await bench.attach(), await bench.attach(uid=4242)
        handle = bench.service.vfs.open(mine.tree.root.children[b"a"].inode)
        found: dict[int, bytes] = {}

        async def read(offset: int) -> None:
            found[offset] = bytes(await bench.service.vfs.read(handle, offset, 5))

        async with trio.open_nursery() as nursery:
            await read(0)
            bench.offload.latency_s = {"data": 1.0}
            nursery.start_soon(read, 4 * MIB)  # before the prefetch, which joins it
            await wait_all_tasks_blocked()
            bench.service.prefetch(theirs, ["*"])
            await wait_all_tasks_blocked()
            nursery.start_soon(read, 6 * MIB)
            await wait_all_tasks_blocked()
            bench.service.let_go(theirs)
        expected = pattern(8 * MIB, 0)
        assert found == {at: expected[at:][:5] for at in (0, 4 * MIB, 6 * MIB)}
        bench.service.vfs.release(handle)


async def test_another_place_is_not_touched(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench_in(tmp_path, {"a": 5}) as bench:
        elsewhere = await bench.attach(ELSEWHERE)
        attachment = await bench.attach()
        await run(bench, attachment, "*")
        assert bench.store(ELSEWHERE).reads() == []
        assert elsewhere.state(0) == "lazy"


async def test_an_object_that_changes_while_it_is_fetched_is_not_kept(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 3 * MIB, "b": 5}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        store = bench.store(PLACE)
        store.at_moment(4, lambda: store.overwrite("a", pattern(3 * MIB, 9)))
        await run(bench, attachment, "*")
        assert cached(bench, attachment) == {"b"}
        handle = bench.service.vfs.open(attachment.tree.root.children[b"a"].inode)
        with pytest.raises(ObjectChanged):
            await bench.service.vfs.read(handle, 0, 5)
        bench.service.vfs.release(handle)
