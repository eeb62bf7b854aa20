"""Commands on the cache: bounded, cancelled with their client, and careful with what is in use."""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from support.diskfaults import Fault, planned
from support.fakes import MIB, InlineOffload
from support.rig import Rig, rig_in
from trio.testing import MockClock, wait_all_tasks_blocked
from unit.daemon.cache.test_cache import block_of, key_of, store

from ckptfs._daemon.cache import block_io, disk_ops, jobs
from ckptfs._daemon.cache.block_io import Block
from ckptfs._daemon.cache.jobs import CacheJob
from ckptfs._daemon.cache.object_dir import Origin
from ckptfs._daemon.control import permissions
from ckptfs._daemon.control.cache_commands import CacheCommands
from ckptfs._model.protocol.message import LINE_BYTES_MAX
from ckptfs._model.protocol.replies import CacheResults
from ckptfs._model.protocol.requests import (
    CacheRequest,
    ClearCache,
    CollectCache,
    ListCache,
    VerifyCache,
)
from ckptfs._model.protocol.wire import encode
from ckptfs.errors import LimitExceeded, LocationError, ProtocolError

ALICE = 4711
RUN = Origin("run-0123456789ab", "s3://bucket/run", "run", 30 * MIB, 0)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig_in(tmp_path, InlineOffload()) as rig:
        yield rig


@pytest.fixture
def tasks(rig: Rig) -> CacheCommands:
    return CacheCommands(rig.cache, rig.offload, rig.nursery, [])


def cached(rig: Rig, path: str, size: int = 3 * MIB, origin: Origin = RUN) -> str:
    """Store an object whole; its digest."""
    key = key_of(path, size)
    rig.cache.close(rig.cache.open(key, origin))
    entry = rig.cache.open(key, origin)
    for index in range(len(entry.state)):
        store(rig.cache, entry, index, block_of(entry, index))
    rig.cache.close(entry)
    return key.digest()


async def all_news(tasks: CacheCommands, request: CacheRequest, uid: int) -> list[CacheResults]:
    """All news of a command that is carried out."""
    task = tasks.begin(request, uid)
    told = [await task.progress()]
    while not told[-1].ended:
        told.append(await task.progress())
    return told


async def done(tasks: CacheCommands, request: CacheRequest, uid: int = 0) -> CacheResults:
    """The last news, with all that was found."""
    told = await all_news(tasks, request, uid)
    return msgspec.structs.replace(
        told[-1],
        checkpoints=[each for news in told for each in news.checkpoints],
        cached_files=[each for news in told for each in news.cached_files],
        damaged=[each for news in told for each in news.damaged],
    )


async def test_replies_are_bounded(rig: Rig, tasks: CacheCommands) -> None:
    for number in range(60):
        origin = Origin(f"run-{number:012x}", "s3://" + "ü" * 40_000, "run", 1, 0)
        cached(rig, f"run/{number}", 1, origin)
    told = await all_news(tasks, ListCache(), 0)
    assert max(len(encode(news)) for news in told) < LINE_BYTES_MAX
    assert sum(len(news.checkpoints) for news in told) == 60
    assert len(told) > 4


async def test_who_asks_for_nothing_holds_up_the_own_command_only(
    rig: Rig, tasks: CacheCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_QUEUE_MAX", 2)
    for number in range(9):
        cached(rig, f"run/{number}", 1)
    held_up = [tasks.begin(ListCache(checkpoint=RUN.name), ALICE + 1) for _ in range(2)]
    first = tasks.begin(ListCache(checkpoint=RUN.name), 0)
    await wait_all_tasks_blocked()
    assert first.files == 3  # two in the queue, and one that waits
    assert (await done(tasks, VerifyCache())).files == 9
    for task in (first, *held_up):
        task.cancel()
    await wait_all_tasks_blocked()
    assert len((await done(tasks, ListCache(checkpoint=RUN.name))).cached_files) == 9


async def test_commands_are_limited_and_counted(
    rig: Rig, tasks: CacheCommands, autojump_clock: MockClock
) -> None:
    cached(rig, "run/a", 3 * MIB, Origin("run-0123456789ab", "u", "run", 1, ALICE))
    slow = VerifyCache(rate=1)
    running = [tasks.begin(slow, ALICE) for _ in range(4)]
    with pytest.raises(LimitExceeded, match="4 cache commands are running"):
        tasks.begin(slow, ALICE)
    running += [tasks.begin(slow, 0) for _ in range(12)]
    with pytest.raises(LimitExceeded, match="16 cache commands are running"):
        tasks.begin(slow, 0)
    await wait_all_tasks_blocked()
    for task in running:
        task.cancel()
    await wait_all_tasks_blocked()
    with pytest.raises(ProtocolError, match="one goal"):
        tasks.begin(CollectCache(free=1, keep=1), 0)
    assert (await done(tasks, ClearCache(), ALICE)).files == 1


async def test_a_rate_is_kept(rig: Rig, tasks: CacheCommands, autojump_clock: MockClock) -> None:
    cached(rig, "run/a", 10 * MIB)
    began_s = trio.current_time()
    assert (await done(tasks, VerifyCache(rate=MIB))).done == 10 * MIB
    assert 9 <= trio.current_time() - began_s <= 11


async def test_an_order_of_use_outlasts_a_check(rig: Rig, tasks: CacheCommands) -> None:
    digests = [cached(rig, f"run/{number}", 1) for number in range(5)]
    assert (await done(tasks, VerifyCache())).files == 5
    assert [digest for digest, _ in rig.cache.contents()] == digests


@pytest.mark.parametrize("kind", ["EIO", "short"])
async def test_a_disk_that_reads_badly(rig: Rig, tasks: CacheCommands, kind: str) -> None:
    digest = cached(rig, "run/a", 3 * MIB)
    with planned(Fault("read_direct", kind, "odd" if kind == "short" else "always")) as plan:
        plan.active = True
        last = await done(tasks, VerifyCache())
        assert plan.hits
    if kind == "short":  # it comes in parts
        assert last.damaged == []
        assert rig.cache.stored_bytes(digest) == 3 * MIB
    else:
        assert [(each.path, each.blocks) for each in last.damaged] == [("a", 3)]
        assert rig.cache.stored_bytes(digest) == 0


@pytest.mark.parametrize("refuses", ["open", "read"])
async def test_a_disk_that_cannot_be_read_directly(
    rig: Rig, tasks: CacheCommands, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without O_DIRECT, and one with larger sectors."""
    cached(rig, "run/a", 3 * MIB + 5)
    real_open, real_read = disk_ops.open_file, disk_ops.read_direct
    direct: set[int] = set()

    def open_file(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "no")
        fd = real_open(path, flags)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def read_direct(fd: int, view: memoryview, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "no")
        return real_read(fd, view, offset)

    monkeypatch.setattr(disk_ops, "open_file", open_file)
    monkeypatch.setattr(disk_ops, "read_direct", read_direct)
    last = await done(tasks, VerifyCache())
    assert (last.damaged, last.done) == ([], 3 * MIB + 5)


@pytest.mark.parametrize("meanwhile", ["evicted", "opened", "another version", "stored anew"])
async def test_what_is_another_by_now_is_not_dropped(
    rig: Rig, tasks: CacheCommands, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is read, found bad, and is no longer that block when it would be dropped."""
    digest = cached(rig, "run/a", 3 * MIB)
    opened: list[Any] = []

    def damaged(_: Any, about: Any, blocks: list[Block], *rest: Any) -> list[Block]:
        if not opened:
            if meanwhile == "evicted":
                opened.append(rig.cache.index.evict(digest))
                return list(blocks)
            entry = rig.cache.open(about.key)
            opened.append(entry)
            if meanwhile == "another version":
                rig.cache.learn(entry, '"new"')
            if meanwhile == "stored anew":
                rig.cache.loaded(entry, 1, entry.sums[1], good=False)
                store(rig.cache, entry, 1, bytes(MIB))
                return [(1, blocks[1][1])]
        return list(blocks)[:1] if meanwhile == "opened" else list(blocks)

    monkeypatch.setattr(block_io, "damaged", damaged)
    last = await done(tasks, VerifyCache(checkpoint=RUN.name))
    if meanwhile == "opened":
        assert [each.blocks for each in last.damaged] == [1]  # it is the same one
        assert rig.cache.stored_bytes(digest) == 2 * MIB
    if meanwhile == "stored anew":
        assert opened[0].state[1] in (1, 2, 4)
    if meanwhile in ("evicted", "another version"):
        assert last.damaged == []
    if meanwhile != "evicted":
        rig.cache.close(opened[0])


async def test_what_is_lent_or_open_is_not_taken_out(rig: Rig, tasks: CacheCommands) -> None:
    cached(rig, "run/a", 3 * MIB)
    cached(rig, "run/b", 3 * MIB)
    lent = rig.cache.open(key_of("run/a", 3 * MIB))
    for index in range(3):
        lent.state[index] = 2
    assert rig.cache.begin_passthrough(lent)
    rig.cache.close(lent)
    for request in (CollectCache(keep=0), CollectCache(older_s=0.0), ClearCache()):
        last = await done(tasks, request)
        assert (last.open_files, last.open_bytes) == (1, lent.disk_bytes())
    assert [digest for digest, _ in rig.cache.contents()] == [lent.digest]
    rig.cache.end_passthrough(lent)
    assert (await done(tasks, ClearCache())).files == 1


async def test_what_the_disk_does_not_delete_is_not_freed(rig: Rig, tasks: CacheCommands) -> None:
    cached(rig, "run/a", 3 * MIB)
    used = rig.cache.index.used_bytes
    with planned(Fault("remove", "EIO", "always")) as plan:
        plan.active = True
        last = await done(tasks, ClearCache())
    assert (last.freed, last.files, rig.cache.index.used_bytes) == (0, 0, used)
    cached_digest = cached(rig, "run/b", 1)
    with planned(Fault("rename", "EIO", "always")) as plan:
        plan.active = True
        assert (await done(tasks, ClearCache())).freed == 0
    assert rig.cache.stored_bytes(cached_digest) == 1
    assert (await done(tasks, ClearCache())).files == 1


async def test_a_description_that_is_gone(rig: Rig, tasks: CacheCommands) -> None:
    digest = cached(rig, "run/a", 3 * MIB)
    (rig.cache.index.root.folder(digest) / "about.json").unlink()
    assert (await done(tasks, ListCache(checkpoint=RUN.name))).files == 0
    last = await done(tasks, VerifyCache())
    assert [(each.uri, each.path, each.blocks) for each in last.damaged] == [(RUN.uri, "", 0)]
    assert rig.cache.index.used_bytes == 0


async def test_names(rig: Rig, tasks: CacheCommands) -> None:
    cached(rig, "run/a", 1)
    cached(rig, "b/a", 1, Origin("b-0123456789ab-0123456789ab", "s3://b", "b", 1, ALICE))
    for name, files in {
        RUN.name: 1,
        f"{RUN.name}-{ALICE}": 1,
        "run": 1,
        "b-0123456789ab-0123456789ab-17": 1,
        "b-0123456789ab": 0,  # it looks like a directory of its own
        "run-ffffffffffff": 0,
    }.items():
        assert (await done(tasks, ListCache(checkpoint=name))).files == files, name
    for name in ("ru", "run-0123", "../run", "run/a", "\0", "\ud800"):
        with pytest.raises(LocationError):
            raise (await failure(tasks, ListCache(checkpoint=name)))
    assert permissions.is_ours(0)
    assert (await done(tasks, ListCache(), ALICE)).files == 1


async def failure(tasks: CacheCommands, request: CacheRequest) -> Exception:
    """Why a command ends early."""
    last = await done(tasks, request)
    assert (last.early_code, last.files) == ("location", 0)
    return LocationError(last.early_message)


async def test_a_task_ends_with_its_news() -> None:
    async def body(task: CacheJob) -> None:
        raise LocationError("no")

    task = CacheJob()
    await task.run(body)
    news = await task.progress()
    assert (news.ended, news.early_code, news.early_message) == (True, "location", "no")
    assert (await task.progress()).ended
