"""The fetcher retries after temporary errors, and no read hangs."""

import math
import os
import time
from pathlib import Path

import pytest
import trio
from support.fakes import MIB, FakeStore, InlineOffload, pattern
from support.fetching import DATA, SIZE
from support.rig import rig_in
from trio.testing import MockClock

from ckptfs._daemon.cache.cached_object import ABSENT
from ckptfs._daemon.offload import Offload
from ckptfs.errors import (
    AccessDenied,
    CkptfsError,
    ObjectChanged,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)


async def test_retry_repeats_requests_after_temporary_errors(
    tmp_path: Path, store: FakeStore, autojump_clock: MockClock
) -> None:
    async with rig_in(tmp_path) as rig:
        file = rig.open(store, "a")
        store.fail("confirm", StoreUnavailable("no route"), times=3)
        store.fail("read_into", StoreUnavailable("HTTP status 503"), times=3)
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        await rig.quiet()
        assert len(store.reads()) == 4
        assert not file.health.failing
        assert "HTTP status 503" in file.health.error
        assert file.state(0) == "lazy"


async def test_retry_of_a_failing_store_ends_at_the_deadline(
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
        assert await rig.read(file, MIB, 2) == DATA[MIB : MIB + 2]  # no failure is remembered
        await rig.quiet()
        assert not file.health.failing


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
        assert file.health.failing
        assert "a: no" in file.health.error
        await rig.quiet()
        assert rig.cache.index.used_bytes == 0
        offload.latency_s = {}
        assert await rig.read(file, 0, 1) == DATA[:1]


async def test_version_check_of_cached_bytes_reports_its_timeout(
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
        assert file.health.failing
        assert "no data within 30 s" in file.health.error


async def test_late_transfers_write_nothing(tmp_path: Path, store: FakeStore) -> None:
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
        used = rig.cache.index.used_bytes
        assert await rig.read(file, 0, MIB) == DATA[:MIB]  # by another thread
        store.overwrite("a", pattern(SIZE, 9))  # the bytes of the late thread
        gate.release.set()
        await _threads_ended(offload)
        await rig.quiet()
        assert os.pread(file.entry.files.data, MIB, 0) == DATA[:MIB]
        assert rig.cache.index.used_bytes == used + MIB


async def _threads_ended(offload: Offload) -> None:
    while offload.threads():  # noqa: ASYNC110 - no event says when they end
        await trio.sleep(0.002)


@pytest.mark.parametrize("error", [AccessDenied("expired"), StoreError("odd")], ids=repr)
@pytest.mark.parametrize("operation", ["confirm", "read_into"])
async def test_permanent_error_ends_a_read_and_the_next_read_retries(
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
        assert file.health.failing
        assert str(error) in file.health.error
        store.fail_always(operation, None)
        assert await rig.read(file, 0, 1) == DATA[:1]
        await rig.quiet()
        assert not file.health.failing


async def test_version_check_errors_are_noted_and_forgotten(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    store = FakeStore({"a": DATA}, mtime_ns=int(time.time()) * 10**9)
    async with rig_in(tmp_path) as rig:
        await rig.read(rig.open(store, "a"), 0, MIB)
        file = rig.open(store, "a")  # the bytes are cached, so the read needs no span
        store.fail_always("confirm", AccessDenied("expired"))
        with pytest.raises(AccessDenied):
            await rig.read(file, 0, MIB)
        assert file.health.failing
        assert "expired" in file.health.error
        store.fail_always("confirm", None)
        store.fail("confirm", StoreUnavailable("no route"))
        assert await rig.read(file, 0, MIB) == DATA[:MIB]
        assert not file.health.failing
        changed = rig.open(store, "a")
        store.overwrite("a", pattern(SIZE, 2))
        with pytest.raises(ObjectChanged):
            await rig.read(changed, 0, MIB)
        assert changed.health.changed


async def test_reader_that_joins_late_has_its_own_deadline(
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
