"""Readers, prefetches, hedges, passthrough, evictions and faults at random: each byte is right.

The reference model is the content itself: a read gives exactly its bytes, or an error that one of
the planned faults explains. A thread may copy the bytes later, while everything else goes on.
Buffers are poisoned when they are given back, so bytes out of a buffer that was reused are wrong.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB, FakeStore, InlineOffload, T, pattern
from support.rig import View, bytes_on_disk, rig_in
from trio.testing import MockClock

from ckptfs._daemon.cache import object_dir
from ckptfs._daemon.cache.buffer_pool import Buffer, Buffers
from ckptfs._daemon.cache.cache_dir import remove
from ckptfs._daemon.cache.cached_object import CachedObject
from ckptfs._daemon.cache.object_dir import Files
from ckptfs._daemon.cache.page_copies import Found, Loan
from ckptfs._daemon.fetch import hedging
from ckptfs.errors import StoreError, StoreUnavailable

CONTENT = {"a": pattern(5 * MIB + 7, 1), "b": pattern(2 * MIB, 2), "c": pattern(300_000, 3)}
FOLDER = 24 << 10
DEADLINE_S = 5.0


class Read(NamedTuple):
    """Read from a share of the file on. `length` may go beyond its end. A thread copies the bytes
    `copied_s` later."""

    start: float
    length: int
    pause_s: float
    copied_s: float


class Lend(NamedTuple):
    """Have the kernel read the file by itself for a while, if it can."""

    pause_s: float


class Prefetch(NamedTuple):
    """Fetch the file in the background, and perhaps give up."""

    patience_s: float


class Evict(NamedTuple):
    """Drop the file from the cache, if no program has it open."""


class Plan(NamedTuple):
    """The steps of all actors, the machine, and the faults."""

    actors: list[tuple[str, list[Read | Lend | Prefetch | Evict]]]
    cache_bytes_max: int
    in_flight_bytes_max: int
    span_bytes_max: int
    connections_max: int
    latencies_s: list[float]
    read_faults: list[tuple[int, bool]]
    check_faults: list[int]
    disk_faults: list[int]
    hedges: bool  # each request that takes longer than another one


_pauses = st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.0])
_reads = st.builds(
    Read, st.floats(0, 1), st.sampled_from([1, 4096, 128 << 10, MIB]), _pauses, _pauses
)
_steps = st.one_of(
    _reads,
    _reads,
    _reads,
    st.builds(Lend, _pauses),
    st.builds(Prefetch, st.sampled_from([0.0, 0.05, 60.0])),
    st.just(Evict()),
)
_plans = st.builds(
    Plan,
    st.lists(
        st.tuples(st.sampled_from(sorted(CONTENT)), st.lists(_steps, min_size=1, max_size=8)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0, 100, MIB + FOLDER, 3 * MIB + 3 * FOLDER, 6 * MIB]),
    st.sampled_from([8 * MIB, 32 * MIB]),
    st.sampled_from([MIB, 2 * MIB, 4 * MIB]),
    st.integers(1, 5),
    st.lists(st.sampled_from([0.0, 0.02, 0.5, 3.0]), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=3),
    st.lists(st.integers(1, 12), max_size=2),
    st.lists(st.integers(1, 8), max_size=3),
    st.booleans(),
)


class Machine(InlineOffload):
    """Runs each read after a planned delay."""

    def __init__(self, latencies_s: Sequence[float]) -> None:
        super().__init__()
        self._latencies_s = itertools.cycle(latencies_s)

    async def run(self, kind: str, call: Callable[[], T]) -> T:
        if kind == "data":
            await trio.sleep(next(self._latencies_s))
        return await super().run(kind, call)


class Run:
    """One plan that is carried out."""

    def __init__(self, view: View, store: FakeStore, plan: Plan, nursery: trio.Nursery) -> None:
        self.view = view
        self.nursery = nursery
        self.copying_bytes_max = 0
        self.plan = plan
        self.attachment = view.attach(store)
        self.lent: set[int] = set()  # inodes that the kernel reads by itself
        may_fail = plan.read_faults or plan.check_faults or 3.0 in plan.latencies_s
        self._errors = (StoreError,) if may_fail else ()  # and its subclasses, as StoreTimeout

    def _planned_faults(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.suppress(*self._errors)

    async def act(self, path: str, steps: "list[Read | Lend | Prefetch | Evict]") -> None:
        inode = self.view.stat(self.attachment, path).inode
        content = CONTENT[path]
        for step in steps:
            if isinstance(step, Evict):
                self._evict(path)
                continue
            handle = self.view.vfs.open(inode)
            try:
                if isinstance(step, Read):
                    await self._read(handle, content, step)
                elif isinstance(step, Lend):
                    await self._lend(inode, content, step)
                else:
                    await self._prefetch(path, step)
            finally:
                self.view.vfs.release(handle)
            self._check_limits()

    async def _read(self, handle: int, content: bytes, step: Read) -> None:
        offset = int(step.start * len(content))
        expected = content[offset : offset + step.length]
        with self._planned_faults():
            vfs = self.view.vfs
            is_later = step.copied_s > 0
            found = vfs.read_now(handle, offset, step.length, may_copy_later=is_later)
            if found is None:
                found = Found(await vfs.read(handle, offset, step.length))
            if is_later:
                loan = self.view.rig.cache.reads.lend(found)
                self.copying_bytes_max += sum(map(len, loan.memory))
                self.nursery.start_soon(self._copy_later, found, loan, expected, step.copied_s)
            else:
                assert b"".join(found.views) == expected
        await trio.sleep(step.pause_s)

    async def _copy_later(self, found: Found, loan: Loan, expected: bytes, copied_s: float) -> None:
        await trio.sleep(copied_s)
        if all(copy.run() for copy in found.copies):
            assert b"".join(found.views) == expected
        else:
            for copy in found.copies:
                self.view.rig.cache.reads.note_failed_copy(copy)
        self.copying_bytes_max -= sum(map(len, loan.memory))
        self.view.rig.cache.reads.take_back(loan)

    async def _lend(self, inode: int, content: bytes, step: Lend) -> None:
        entry = None
        if inode not in self.lent:  # the kernel has each inode once
            entry = self.view.vfs.begin_passthrough(inode)
        if entry is None:
            await trio.sleep(step.pause_s)
            return
        self.lent.add(inode)
        assert os.pread(entry.files.data, len(content) + 1, 0) == content
        await trio.sleep(step.pause_s)
        assert os.pread(entry.files.data, len(content) + 1, 0) == content
        self.lent.discard(inode)
        self.view.rig.cache.end_passthrough(entry)

    async def _prefetch(self, path: str, step: Prefetch) -> None:
        file = next(f for f in self.attachment.files.values() if f.pin.path == path)
        blocks = range(len(file.entry.state))
        with trio.move_on_after(step.patience_s), self._planned_faults():
            await self.view.rig.fetcher.fetch(file, blocks)

    def _evict(self, path: str) -> None:
        cache = self.view.rig.cache
        digest = next(
            digest
            for digest, listed in zip(
                self.attachment.snapshot.digests(), self.attachment.snapshot.listed, strict=True
            )
            if listed.path == path
        )
        if folder := cache.index.evict(digest):
            remove(folder)

    def _check_limits(self) -> None:
        cache, limit = self.view.rig.cache, self.plan.cache_bytes_max
        on_disk = bytes_on_disk(cache.directory)
        assert on_disk <= cache.index.used_bytes
        assert on_disk <= limit or not limit
        # One span may always run, even a larger one than all of the memory.
        assert cache.buffers.total_bytes <= self.copying_bytes_max + max(
            self.plan.in_flight_bytes_max, self.plan.span_bytes_max
        )


_serial = itertools.count()
_release = Buffers.release


def release_poisoned(buffers: Buffers[CachedObject], buffer: Buffer[CachedObject]) -> None:
    _release(buffers, buffer)
    if not buffers.is_lent(buffer.memory):
        buffer.view[:] = b"\xdb" * len(buffer.view)


@given(_plans)
def test_random_mixture_gives_only_right_bytes(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    directory = tmp_path_factory.getbasetemp() / f"mixture{next(_serial)}"
    store = FakeStore(CONTENT)
    for at, can_pass in plan.read_faults:
        store.fail("read_into", (StoreUnavailable if can_pass else StoreError)("planned"), at=at)
    for at in plan.check_faults:
        store.fail("confirm", StoreUnavailable("planned"), at=at)
    write, writes = object_dir.write, itertools.count(1)

    def write_or_fail(files: Files, offset: int, data: memoryview) -> None:
        if next(writes) in plan.disk_faults:
            write(files, offset, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(files, offset, data)

    async def main() -> None:
        settings = {
            "cache_bytes_max": plan.cache_bytes_max,
            "in_flight_bytes_max": plan.in_flight_bytes_max,
            "span_bytes_max": plan.span_bytes_max,
            "connections_max": plan.connections_max,
            "read_deadline_s": DEADLINE_S,
        }
        async with rig_in(directory, Machine(plan.latencies_s), **settings) as rig:
            view = View(rig)
            with trio.fail_after(len(plan.actors) * 8 * 3 * DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    run = Run(view, store, plan, nursery)
                    for path, steps in plan.actors:
                        nursery.start_soon(run.act, path, steps)
                await view.quiet()
            assert not rig.fetcher.spans._flights
            assert rig.fetcher.scheduler.in_flight().bytes == 0
            assert not rig.cache.opened
            assert rig.cache.buffers.total_bytes == 0
            run._check_limits()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_dir, "write", write_or_fail)
        patch.setattr(Buffers, "release", release_poisoned)
        if plan.hedges:
            patch.setattr(hedging, "_KNOWN_MIN", 1)
            patch.setattr(hedging, "_SHARE", 1.0)
        trio.run(main, clock=MockClock(autojump_threshold=0))
