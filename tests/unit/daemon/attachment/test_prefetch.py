"""Prefetch keeps the order, yields to readers, stays within the cache, and ends with its use."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from support.archives import write_safetensors
from support.bench import ELSEWHERE, PLACE, Bench
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.rig import read_of, rig_in
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.attachment import prefetch as prefetch_module
from ckptfs._daemon.attachment.attachment import Attachment
from ckptfs._daemon.attachment.prefetch import Prefetch
from ckptfs._model.plans.plan import Plan, Step, Wanted
from ckptfs.errors import AccessDenied, ObjectChanged, StoreUnavailable

ONE_BY_ONE: dict[str, Any] = {"connections_max": 1, "span_bytes_max": MIB}


@asynccontextmanager
async def bench_in(
    directory: Path,
    files: dict[str, int],
    offload: InlineOffload | None = None,
    **settings: object,
) -> AsyncIterator[Bench]:
    """A service; the store at `PLACE` holds files of these sizes."""
    async with rig_in(directory, offload or InlineOffload(), **settings) as rig:
        bench = Bench(rig)
        contents = {
            path: pattern(size, number) for number, (path, size) in enumerate(files.items())
        }
        bench.stores[PLACE.path] = FakeStore(contents)
        yield bench


async def run(bench: Bench, attachment: Attachment, *globs: str, plan: Plan | None = None) -> None:
    """Prefetch, and wait for the end."""
    bench.service.prefetches.begin(attachment, Wanted(list(globs), plan=plan))
    await ended(attachment)


async def ended(attachment: Attachment) -> None:
    """Wait until no task of the attachment runs."""
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
        for file, digest in zip(
            attachment.manifest.files, attachment.snapshot.digests(), strict=False
        )
        if bench.rig.cache.stored_bytes(digest) == file.size
    }


async def test_prefetch_of_globs_fetches_each_file_once(
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
        assert len(bench.store(PLACE).reads()) == 5  # cached bytes are not fetched again
        await run(bench, attachment, "*")
        assert bench.service.reporter.status(0).attachments[0].state == "cached"


async def test_prefetch_of_globs_keeps_their_order(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    names = [f"{letter}{number:02}" for letter in "bca" for number in range(15)]
    async with bench_in(tmp_path, dict.fromkeys(sorted(names), 5), **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "b*", "c*", "*")
        order = fetched(bench)
        assert sorted(order) == sorted(names)
        # Eight are under way at the same time.
        assert all(abs(order.index(name) - place) < 8 for place, name in enumerate(names))


async def test_prefetch_leaves_out_failing_files(tmp_path: Path, autojump_clock: MockClock) -> None:
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
            inode = attachment.snapshot.tree.root.children[name.encode()]
            assert word in attachment.peek(inode.index).health.error


async def test_prefetch_ends_when_the_store_stops_answering(
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
async def test_prefetch_ends_when_the_cache_is_full_without_eviction(
    tmp_path: Path, autojump_clock: MockClock, count: int, size: int, fit: int
) -> None:
    files = {f"{number:03}": size for number in range(count)}
    async with bench_in(tmp_path, files, cache_bytes_max=2 * MIB) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "*")
        assert sorted(fetched(bench)) == list(files)[:fit]
        assert cached(bench, attachment) == set(list(files)[:fit])
        assert bench.rig.cache.index.used_bytes <= 2 * MIB


async def test_prefetch_of_a_file_larger_than_the_cache_fetches_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 9 * MIB, "b": 5}, cache_bytes_max=4 * MIB) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "b", "a")
        assert fetched(bench) == ["b"]


async def test_prefetch_ends_with_its_attachment(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB, "b": 5 * MIB}, **ONE_BY_ONE, linger_s=0) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1.0}
        bench.service.prefetches.begin(attachment, Wanted(["*"]))
        await trio.sleep(3.5)
        begun = len(bench.store(PLACE).reads())
        assert 1 <= begun <= 4
        bench.service.attachments.let_go(attachment)
        await trio.sleep(1000)
        assert bench.shown() == []
        assert len(bench.store(PLACE).reads()) <= begun + 1
        assert not attachment.background
        assert attachment.error == ""
        bench.offload.latency_s = {}
        again = await bench.attach()  # it does not delay another prefetch
        await run(bench, again, "*")
        assert cached(bench, again) == {"a", "b"}


async def test_prefetch_lets_reads_overtake_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB, "b": 5}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1.0}
        bench.service.prefetches.begin(attachment, Wanted(["a"]))
        await trio.sleep(3.5)
        store = bench.store(PLACE)
        begun = len(store.reads())
        root = attachment.snapshot.tree.root.children
        b = bench.service.vfs.open(root[b"b"].inode)
        assert await read_of(bench.service.vfs, b, 0, 5) == pattern(5, 1)
        assert [call.path for call in store.reads()][begun:][:2].count("b") == 1
        a = bench.service.vfs.open(root[b"a"].inode)
        # The first request gets the one connection at once, and any file may be first.
        at = max({i * MIB for i in range(40)} - {call.offset for call in store.reads("a")})
        begun = len(store.reads())
        assert await read_of(bench.service.vfs, a, at, 10) == pattern(40 * MIB, 0)[at:][:10]
        assert at in [call.offset for call in store.reads()[begun:][:2]]
        for handle in (a, b):
            bench.service.vfs.release(handle)


async def test_prefetch_leaves_connections_for_reads(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a": 40 * MIB, "b": 5}
    async with bench_in(tmp_path, files, connections_max=4, span_bytes_max=MIB) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1e6}  # no request ends
        bench.service.prefetches.begin(attachment, Wanted(["a"]))
        await trio.sleep(10)
        store = bench.store(PLACE)
        assert store.reads() == []
        handle = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"b"].inode)
        bench.offload.latency_s = {}
        with trio.fail_after(1):
            assert await read_of(bench.service.vfs, handle, 0, 5) == pattern(5, 1)
        bench.service.vfs.release(handle)


async def test_prefetch_ending_with_its_attachment_leaves_other_readers_intact(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Two users' attachments of one place have their blocks in common."""
    async with bench_in(tmp_path, {"a": 8 * MIB}, **ONE_BY_ONE, linger_s=0) as bench:
        mine, theirs = await bench.attach(), await bench.attach(uid=4242)
        handle = bench.service.vfs.open(mine.snapshot.tree.root.children[b"a"].inode)
        found: dict[int, bytes] = {}

        async def read(offset: int) -> None:
            found[offset] = await read_of(bench.service.vfs, handle, offset, 5)

        async with trio.open_nursery() as nursery:
            await read(0)
            bench.offload.latency_s = {"data": 1.0}
            nursery.start_soon(read, 4 * MIB)  # before the prefetch, which joins it
            await wait_all_tasks_blocked()
            bench.service.prefetches.begin(theirs, Wanted(["*"]))
            await wait_all_tasks_blocked()
            nursery.start_soon(read, 6 * MIB)
            await wait_all_tasks_blocked()
            bench.service.attachments.let_go(theirs)
        expected = pattern(8 * MIB, 0)
        assert found == {at: expected[at:][:5] for at in (0, 4 * MIB, 6 * MIB)}
        bench.service.vfs.release(handle)


async def test_prefetch_of_one_place_leaves_another_untouched(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 5}) as bench:
        elsewhere = await bench.attach(ELSEWHERE)
        attachment = await bench.attach()
        await run(bench, attachment, "*")
        assert bench.store(ELSEWHERE).reads() == []
        assert elsewhere.state(0) == "lazy"


async def test_prefetch_of_a_changing_object_caches_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 3 * MIB, "b": 5}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        store = bench.store(PLACE)
        store.at_moment(4, lambda: store.overwrite("a", pattern(3 * MIB, 9)))
        await run(bench, attachment, "*")
        assert cached(bench, attachment) == {"b"}
        handle = bench.service.vfs.open(attachment.snapshot.tree.root.children[b"a"].inode)
        with pytest.raises(ObjectChanged):
            await read_of(bench.service.vfs, handle, 0, 5)
        bench.service.vfs.release(handle)


# -- readers first


async def read_all(bench: Bench, attachment: Attachment, name: str, pause_s: float = 0) -> None:
    """Read a file from the first byte to the last, as the kernel asks for it."""
    node = attachment.snapshot.tree.root.children[name.encode()]
    handle = bench.service.vfs.open(node.inode)
    for offset in range(0, node.size, MIB // 4):
        await read_of(bench.service.vfs, handle, offset, MIB // 4)
        await trio.sleep(pause_s)
    bench.service.vfs.release(handle)


def reads_of(bench: Bench, name: str) -> int:
    """How many requests a file's bytes took so far."""
    return len(bench.store(PLACE).reads(name))


async def test_prefetch_yields_to_a_reader_and_resumes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a": 80 * MIB, "b": 24 * MIB}
    async with bench_in(
        tmp_path, files, connections_max=16, span_bytes_max=MIB, window_bytes_max=4 * MIB
    ) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 0.1}
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["a"]))
        await trio.sleep(0.35)
        alone = reads_of(bench, "a")
        assert alone == 3 * 14  # two of sixteen connections are reserved for readers
        begun_s = trio.current_time()
        await read_all(bench, attachment, "b")
        took_s = trio.current_time() - begun_s
        # Running requests, and then one in 32 parts of the time.
        assert 14 <= reads_of(bench, "a") - alone <= 14 + 1 + took_s / (32 * 0.1)
        assert not prefetch.ended.is_set()
        with trio.fail_after(10):
            await prefetch.ended.wait()
        assert cached(bench, attachment) == {"a", "b"}


async def test_prefetch_leaves_a_reader_at_full_speed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The time by the test's clock, on a link that all requests share."""

    class SharedLink(InlineOffload):
        running = 0

        async def run(self, kind, call):  # type: ignore[no-untyped-def]
            if kind != "data":
                return await super().run(kind, call)
            self.running += 1
            left = 1.0
            while left > 0:
                await trio.sleep(0.002)
                left -= 1 / self.running / 4  # one alone takes 8 ms
            self.running -= 1
            return call()

    async def time_of_reading(beside: bool) -> float:
        directory = tmp_path / str(beside)
        directory.mkdir()
        settings = {"span_bytes_max": MIB, "in_flight_bytes_max": 8 * MIB}
        link = SharedLink()
        async with bench_in(directory, {"a": 40 * MIB, "b": 40 * MIB}, link, **settings) as bench:
            attachment = await bench.attach()
            if beside:
                bench.service.prefetches.begin(attachment, Wanted(["a"]))
                await trio.sleep(0.1)
                assert link.running == 2
            begun_s = trio.current_time()
            await read_all(bench, attachment, "b")
            return trio.current_time() - begun_s

    alone_s = await time_of_reading(False)
    beside_s = await time_of_reading(True)
    assert alone_s <= beside_s <= 1.1 * alone_s


async def test_prefetch_beside_repeated_reads_does_not_starve(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a": 5 * MIB, "b": 100 * MIB}
    async with bench_in(tmp_path, files, span_bytes_max=MIB, window_bytes_max=0) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 0.05}
        prefetch = None
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all, bench, attachment, "b", 0.01)
                await trio.sleep(1)
                prefetch = bench.service.prefetches.begin(attachment, Wanted(["a"]))
                await prefetch.ended.wait()
                assert cached(bench, attachment) == {"a"}  # the reader is not done
                assert reads_of(bench, "b") > 5 * 5
                nursery.cancel_scope.cancel()
        assert prefetch
        assert prefetch.ended.is_set()


# -- a limit of bytes per second


async def test_prefetch_with_a_rate_stays_below_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a": 20 * MIB, "b": 4 * MIB, "c": 4 * MIB, "d": 5, "e": 2 * MIB}
    async with bench_in(tmp_path, files) as bench:
        attachment = await bench.attach()
        begun_s = trio.current_time()
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["*"], 2 * MIB))
        for second in range(1, 15):
            await trio.sleep_until(begun_s + second)
            fetched_bytes = prefetch.state().fetched
            assert 2 * MIB * (second - 1) <= fetched_bytes <= 2 * MIB * second + MIB
        await prefetch.ended.wait()
        assert trio.current_time() - begun_s == pytest.approx(15, abs=0.6)
        begun_s = trio.current_time()
        again = bench.service.prefetches.begin(attachment, Wanted(["*"], 1))
        await again.ended.wait()
        assert trio.current_time() == begun_s  # cached bytes cost nothing
        assert (again.state().cached, again.state().fetched) == (30 * MIB + 5, 0)


async def test_prefetch_with_a_high_rate_runs_at_full_speed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB}) as bench:
        attachment = await bench.attach()
        begun_s = trio.current_time()
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["*"], 1 << 50))
        await prefetch.ended.wait()
        assert trio.current_time() - begun_s < 1e-6
        assert reads_of(bench, "a") == 10  # requests of half a span


# -- state


async def test_prefetch_state_reports_progress(tmp_path: Path, autojump_clock: MockClock) -> None:
    files = {"a": 20 * MIB + 5, "b": 3 * MIB, "c": 7}
    async with bench_in(tmp_path, files, span_bytes_max=MIB, connections_max=5) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "b")
        bench.offload.latency_s = {"data": 1.0}
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["a", "b"]))
        assert not prefetch.state().ended
        seen: list[int] = []
        while not prefetch.ended.is_set():
            await trio.sleep(0.9)
            state = prefetch.state()
            seen.append(state.fetched)
            if state.fetched:
                assert (state.files, state.bytes) == (2, 23 * MIB + 5)
                assert state.cached == 3 * MIB
        assert seen == sorted(seen)
        assert len(set(seen)) >= 7  # three requests at a time
        state = prefetch.state()
        assert state.ended
        assert (state.fetched, state.cached) == (20 * MIB + 5, 3 * MIB)
        assert (state.errors, state.error_count, state.early_code) == ([], 0, "")


async def test_prefetch_state_reports_failed_files(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_module, "_ERRORS_MAX", 3)
    names = [f"{number:02}" for number in range(20)]
    async with bench_in(tmp_path, dict.fromkeys(names, 5)) as bench:
        attachment = await bench.attach()
        for name in names[::2]:
            bench.store(PLACE).overwrite(name, b"other")
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["*"]))
        await prefetch.ended.wait()
        state = prefetch.state()
        assert state.error_count == 10
        assert len(state.errors) == 3
        assert {error.path for error in state.errors} <= set(names[::2])
        assert {error.code for error in state.errors} == {"object-changed"}
        assert all(error.path in error.message for error in state.errors)
        assert (state.files, state.bytes, state.fetched) == (20, 100, 50)
        assert state.early_code == ""


async def test_prefetch_state_reports_the_reason_of_an_early_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    files = {"a": MIB, "b": MIB, "c": 3 * MIB, "d": 5}
    async with bench_in(tmp_path, files, cache_bytes_max=4 * MIB, read_deadline_s=9) as bench:
        attachment = await bench.attach()
        full = bench.service.prefetches.begin(attachment, Wanted(["*"]))
        await full.ended.wait()
        assert full.state().early_code == "limit"
        assert "can hold 4.0 MiB, which is enough for the first 2 of 4 files (5.0 MiB)" in (
            full.state().early_message
        )
        bench.offload.latency_s = {"data": 1.0}
        detached = bench.service.prefetches.begin(attachment, Wanted(["d"]))
        await trio.sleep(0.5)
        bench.service.attachments.detach(attachment, force=True)
        await detached.ended.wait()
        assert detached.state().early_code == "not-attached"
        again = await bench.attach()
        for operation in ("confirm", "read_into"):
            bench.store(PLACE).fail_always(operation, StoreUnavailable("it is dark"))
        dark = bench.service.prefetches.begin(again, Wanted(["d"]))
        await dark.ended.wait()
        assert dark.state().early_code in ("store-unavailable", "store-timeout")
        assert "it is dark" in dark.state().early_message


async def test_prefetch_cancelled_ends_its_requests(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 40 * MIB}, **ONE_BY_ONE) as bench:
        attachment = await bench.attach()
        bench.offload.latency_s = {"data": 1.0}
        prefetch = bench.service.prefetches.begin(attachment, Wanted(["*"], 8 * MIB))
        await trio.sleep(3.5)
        prefetch.cancel()
        await prefetch.ended.wait()
        begun = reads_of(bench, "a")
        await trio.sleep(100)
        assert reads_of(bench, "a") == begun
        assert attachment.state(0) == "lazy"
        assert not attachment.background
        started_late = bench.service.prefetches.begin(attachment, Wanted(["*"]))
        started_late.cancel()
        await started_late.ended.wait()
        assert reads_of(bench, "a") == begun


async def test_prefetch_cancelled_leaves_requests_of_another_one(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    for first in (True, False):
        directory = tmp_path / str(first)
        directory.mkdir()
        async with bench_in(directory, {"a": 12 * MIB}, span_bytes_max=4 * MIB) as bench:
            attachment = await bench.attach()
            bench.offload.latency_s = {"data": 1.0}
            prefetches: list[prefetch_module.Prefetch] = []
            for _ in range(2):
                prefetches.append(bench.service.prefetches.begin(attachment, Wanted(["*"])))
                await trio.sleep(0.1)
            prefetches.pop(0 if first else 1).cancel()
            [other] = prefetches
            await other.ended.wait()
            state = other.state()
            assert (state.fetched, state.error_count, state.early_code) == (12 * MIB, 0, "")
            assert cached(bench, attachment) == {"a"}
            assert reads_of(bench, "a") == 6


@pytest.mark.parametrize("is_planned", [False, True])
async def test_prefetch_of_a_plan_turns_readahead_of_its_files_off(
    tmp_path: Path, autojump_clock: MockClock, is_planned: bool
) -> None:
    """After files that were read as a whole the daemon begins the next one with the whole
    window, unless a plan says which bytes will be read."""
    names = ["m-1.safetensors", "m-2.safetensors", "m-3.safetensors"]
    file = tmp_path / names[0]
    write_safetensors(file, dict.fromkeys("abc", 4 * MIB))
    async with bench_in(tmp_path, {}, window_bytes_max=8 * MIB) as bench:
        bench.stores[PLACE.path] = FakeStore(dict.fromkeys(names, file.read_bytes()))
        attachment, vfs = await bench.attach(), bench.service.vfs
        steps = [Step(number, "", 0, MIB, ()) for number in range(3 if is_planned else 0)]
        plan = Plan(uri="u", version="v", files=names, steps=steps)
        if is_planned:
            await run(bench, attachment, plan=plan)

        async def read(name: str, stop: int) -> set[int]:
            """Read the beginning of a file, and return the fetched blocks of the last one."""
            handle = vfs.open(attachment.snapshot.tree.root.children[name.encode()].inode)
            for at in range(0, stop, MIB):
                await read_of(vfs, handle, at, MIB)
            vfs.release(handle)
            await ended(attachment)
            reads = bench.store(PLACE).reads(names[2])
            return {
                block
                for call in reads
                for block in range(call.offset // MIB, (call.offset + call.length) // MIB)
            }

        await read(names[0], 12 * MIB)
        begun = await read(names[1], 12 * MIB)
        assert begun == ({0} if is_planned else set(range(8)))
        ahead = await read(names[2], MIB)
        assert ahead == ({0} if is_planned else set(range(9)))


# -- keeping


KEEP = Wanted(["a", "b"], keep=True)


async def keep(bench: Bench, attachment: Attachment, wanted: Wanted = KEEP) -> Prefetch:
    """Prefetch to the end. Files that it keeps stay kept."""
    prefetch = bench.service.prefetches.begin(attachment, wanted)
    with trio.fail_after(1000):
        await prefetch.ended.wait()
    await wait_all_tasks_blocked()
    return prefetch


async def test_prefetch_with_keep_holds_its_files_in_a_full_cache(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    sizes = {"a": 2 * MIB, "b": MIB, "c": 9 * MIB}
    async with bench_in(tmp_path, sizes, cache_bytes_max=6 * MIB, linger_s=0) as bench:
        attachment = await bench.attach()
        state = (await keep(bench, attachment)).state()
        assert (state.early_code, state.error_count, state.files) == ("", 0, 2)
        assert cached(bench, attachment) == {"a", "b"}
        for path in ("c", "a", "c"):  # more than the cache can keep, twice
            file = attachment.file(attachment.snapshot.tree.root.children[path.encode()].index)
            with bench.rig.fetcher.opened(file):
                await bench.rig.fetcher.fetch(file, range(len(file.entry.state)))
        assert cached(bench, attachment) == {"a", "b"}
        assert [call.path for call in bench.store(PLACE).reads()].count("a") <= 2
        bench.service.attachments.let_go(attachment)
        await trio.sleep(1)
        assert bench.shown() == []
        again = await bench.attach()  # nothing is kept any more
        file = again.file(again.snapshot.tree.root.children[b"c"].index)
        with bench.rig.fetcher.opened(file):
            await bench.rig.fetcher.fetch(file, range(9))
        assert cached(bench, again) == set()


async def test_prefetch_with_keep_beyond_the_cache_fetches_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 3 * MIB, "b": 2 * MIB}, cache_bytes_max=4 * MIB) as bench:
        attachment = await bench.attach()
        state = (await keep(bench, attachment)).state()
        assert state.early_code == "limit"
        assert "2 files of 5.0 MiB do not fit into the cache" in state.early_message
        assert "cache_bytes_max" in state.early_message
        assert fetched(bench) == []
        assert not attachment.kept
        assert (await keep(bench, attachment, Wanted(["a"], keep=True))).state().early_code == ""
        # Kept files are not counted again, and further files do not fit.
        assert (await keep(bench, attachment, Wanted(["a"], keep=True))).state().early_code == ""
        assert (await keep(bench, attachment, Wanted(["b"], keep=True))).state().early_code != ""


async def test_prefetch_with_keep_of_one_user_takes_a_quarter_of_the_cache(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 3 * MIB, "b": 6 * MIB}, cache_bytes_max=16 * MIB) as bench:
        attachment = await bench.attach(uid=4321)
        state = (await keep(bench, attachment)).state()
        assert state.early_code == "limit"
        assert "of the 4.0 MiB that are for uid 4321" in state.early_message
        await keep(bench, attachment, Wanted(["a"], keep=True))
        assert cached(bench, attachment) == {"a"}
        ours = await bench.attach()
        assert (await keep(bench, ours)).state().early_code == ""


async def test_prefetch_with_keep_of_the_same_files_counts_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": 2 * MIB, "b": MIB}, cache_bytes_max=4 * MIB) as bench:
        attachment = await bench.attach()
        prefetches = [bench.service.prefetches.begin(attachment, KEEP) for _ in range(8)]
        for prefetch in prefetches:
            await prefetch.ended.wait()
            assert prefetch.state().early_code == ""
        for _ in range(8):
            await keep(bench, attachment)
        # Prefetches of files that are kept already hold nothing.
        assert max(attachment.kept.values()) <= len(prefetches)
        assert len(attachment.background) <= len(prefetches)
        assert len(bench.store(PLACE).reads()) == 2


async def test_prefetch_with_keep_keeps_all_files_or_none(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with bench_in(tmp_path, {"a": MIB, "b": 5}, read_deadline_s=30) as bench:
        attachment = await bench.attach()
        store = bench.store(PLACE)
        store.fail("read_into", AccessDenied("b is closed"), at=1, times=2)
        state = (await keep(bench, attachment)).state()
        assert state.error_count
        assert "b is closed" in state.errors[0].message
        assert not attachment.kept
        store.fail_always("read_into", StoreUnavailable("dark"))
        state = (await keep(bench, attachment)).state()
        assert state.early_code == "store-timeout"
        assert not attachment.kept
        assert not attachment.background
        store.fail_always("read_into", None)
        assert (await keep(bench, attachment)).state().early_code == ""
        assert set(attachment.kept) == attachment.stays != set()


async def test_prefetch_with_keep_finds_a_damaged_block_before_its_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    sizes = {"a": 3 * MIB, "b": MIB}
    async with bench_in(tmp_path, sizes) as bench:
        attachment = await bench.attach()
        await run(bench, attachment, "*")
    for data in (tmp_path / "cache" / "objects").rglob("data"):
        with data.open("r+b") as file:
            file.seek(5000)
            file.write(b"damaged")
        os.utime(data, (1, 1))  # so the cache does not take it for the verified file
    async with bench_in(tmp_path, sizes) as bench:
        attachment = await bench.attach()
        bench.store(PLACE)
        state = (await keep(bench, attachment)).state()
        assert (state.early_code, state.error_count) == ("", 0)
        for name in "ab":
            file = attachment.file(attachment.snapshot.tree.root.children[name.encode()].index)
            content = bench.store(PLACE).content(name)
            assert content
            with bench.rig.fetcher.opened(file):
                assert file.entry.verified
                assert await bench.rig.read(file, 0, MIB) == content[:MIB]


async def test_prefetch_with_keep_on_a_failing_disk_is_an_error(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench_in(tmp_path, {"a": MIB, "b": 5}) as bench:
        attachment = await bench.attach()
        monkeypatch.setattr("ckptfs._daemon.cache.block_io.write", lambda *_: None)
        state = (await keep(bench, attachment)).state()
        assert state.errors[0].code == "cache"
        assert "the cache did not keep all of it" in state.errors[0].message
        assert not attachment.kept
