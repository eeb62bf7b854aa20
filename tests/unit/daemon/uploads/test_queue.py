"""The queue of uploads: the order, the tries, the ends, and the daemon after this one."""

import errno
import os
import shutil

import msgspec
import pytest
import trio
from support.background import ELSEWHERE, SENT, TARGET, THIRD, UID, Process, World
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.attachment import journal
from ckptfs._daemon.uploads import credentials
from ckptfs._daemon.uploads.attempts import PATIENCE_S, Attempts
from ckptfs._daemon.uploads.queue import Queue
from ckptfs._model.upload_messages import NotSent
from ckptfs._mount import handoff
from ckptfs.errors import (
    AccessDenied,
    Busy,
    CacheError,
    LocationError,
    NoUpload,
    StoreUnavailable,
    TargetExists,
)

PASSES = NotSent(StoreUnavailable.code, "the store does not answer")
FAILS = NotSent(TargetExists.code, "other content")


def state(queue: Queue, upload: str) -> str:
    return queue.find(upload, UID).state


async def test_uploads_to_one_place_run_in_order_and_two_at_a_time(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    targets = [TARGET, TARGET, ELSEWHERE, THIRD]
    uploads = [await world.accepted(queue, target) for target in targets]
    await wait_all_tasks_blocked()
    assert [state(queue, upload) for upload in uploads] == [
        "running",
        "waiting",
        "running",
        "waiting",
    ]
    first = processes[0]
    assert first.setup is not None
    assert first.setup.location == TARGET
    assert first.setup.directory == queue.spool.path_of(uploads[0])
    first.finish()
    await wait_all_tasks_blocked()
    assert [state(queue, upload) for upload in uploads] == [
        "done",
        "running",
        "running",
        "waiting",
    ]


async def test_an_upload_that_is_done_keeps_its_record_only(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    upload = await world.accepted(queue)
    await wait_all_tasks_blocked()
    processes[0].progressed(3)
    assert queue.find(upload, UID).sent == 3
    processes[0].finish()
    status = await queue.wait_ended(upload, UID, 10)
    assert (status.state, status.sent, status.cached) == ("done", 4, 4)
    assert (queue.sent_bytes, queue.ended["done"], queue.active()) == (4, 1, 0)
    await wait_all_tasks_blocked()
    assert world.files() == [f"{upload}/upload.json"]
    after = world.queue()
    await after.restore()
    assert after.find(upload, UID).record.sent == SENT


async def test_a_store_that_does_not_answer_is_tried_again_and_others_get_the_turn(
    world: World, queue: Queue, processes: list[Process], autojump_clock: MockClock
) -> None:
    upload = await world.accepted(queue)
    begun_s = trio.current_time()
    pauses_s: list[float] = []
    for _ in range(8):
        while not processes:  # noqa: ASYNC110 - the clock jumps
            await trio.sleep(0.5)
        pauses_s.append(trio.current_time() - begun_s)
        begun_s = trio.current_time()
        processes[0].finish(PASSES)
        await trio.sleep(0.1)
        assert state(queue, upload) == "waiting"
    assert pauses_s == sorted(pauses_s)
    assert 59 < pauses_s[-1] < 62
    assert queue.find(upload, UID).record.message == PASSES.message
    await world.accepted(queue, ELSEWHERE)
    await trio.sleep(0.1)
    assert [process.setup.asked for process in processes if process.setup] == [ELSEWHERE]


async def test_an_hour_without_a_byte_is_a_failure_that_keeps_the_files(
    world: World, queue: Queue, processes: list[Process], autojump_clock: MockClock
) -> None:
    upload = await world.accepted(queue)
    begun_s = trio.current_time()
    while state(queue, upload) != "failed":
        await trio.sleep(0.5)
        for process in processes.copy():
            process.finish(PASSES)
    assert PATIENCE_S - 120 < trio.current_time() - begun_s < PATIENCE_S + 120
    assert f"{upload}/files/file" in world.files()
    assert queue.kept_bytes(failed=True) == 4


def test_attempts_begin_anew_with_progress_and_heed_the_store() -> None:
    attempts = Attempts()
    attempts.begun(100.0)
    assert attempts.pause_s(StoreUnavailable.code, 0, 100.0) == 1.0
    assert attempts.pause_s(StoreUnavailable.code, 20.0, 101.0) == 20.0
    assert attempts.pause_s(StoreUnavailable.code, 7200.0, 102.0) == 60.0
    attempts.progressed(5000.0)
    assert attempts.pause_s(StoreUnavailable.code, 0, 5001.0) == 1.0
    assert attempts.pause_s(StoreUnavailable.code, 0, 5000.0 + PATIENCE_S) is None
    assert Attempts().pause_s(AccessDenied.code, 0, 0) is None


async def test_a_failure_keeps_the_files_and_a_retry_sends_other_credentials(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    upload = await world.accepted(queue)
    await wait_all_tasks_blocked()
    processes[0].finish(FAILS)
    status = await queue.wait_ended(upload, UID, 10)
    assert (status.state, status.code, status.message) == ("failed", FAILS.code, FAILS.message)
    assert world.files() == [f"{upload}/files/file", f"{upload}/upload.json"]
    with pytest.raises(LocationError, match="name its own target"):
        await queue.retry(upload, UID, ELSEWHERE)
    await queue.retry(upload, UID, TARGET)
    await wait_all_tasks_blocked()
    assert state(queue, upload) == "running"
    with pytest.raises(Busy, match="it is running"):
        await queue.retry(upload, UID, TARGET)
    processes[0].finish()
    assert (await queue.wait_ended(upload, UID, 10)).message == ""


async def test_two_retries_at_the_same_time_are_one_and_a_drop_ends_it(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    upload = await world.accepted(queue)
    leaves = []
    queue.hold_newest(TARGET.identity, UID, leaves)
    await wait_all_tasks_blocked()
    processes[0].finish(FAILS)
    await wait_all_tasks_blocked()
    refused: list[str] = []

    async def retry() -> None:
        try:
            await queue.retry(upload, UID, TARGET)
        except (Busy, NoUpload) as error:
            refused.append(error.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(retry)
        nursery.start_soon(retry)
    await wait_all_tasks_blocked()
    assert (len(processes), refused) == (1, [Busy.code])
    assert queue.find(upload, UID).holders == 1
    processes[0].finish(FAILS)
    leaves[0]()
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retry)
        nursery.start_soon(queue.drop, upload, UID)
    await wait_all_tasks_blocked()
    assert (processes, queue.active(), world.files()) == ([], 0, [])


async def test_the_end_is_recorded_when_the_disk_takes_it(
    world: World,
    queue: Queue,
    processes: list[Process],
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload = await world.accepted(queue)
    await trio.sleep(0.1)
    with monkeypatch.context() as full:
        full.setattr(queue.spool, "save", is_full)
        processes[0].finish()
        await trio.sleep(5)
        assert state(queue, upload) == "done"
        crashed = world.queue()
        await crashed.restore()
        assert state(crashed, upload) == "waiting"  # it finds all at the store
        assert f"{upload}/files/file" in world.files()
    await trio.sleep(5)
    after = world.queue()
    await after.restore()
    assert state(after, upload) == "done"
    assert world.files() == [f"{upload}/upload.json"]


@pytest.mark.parametrize("result", [SENT, FAILS], ids=["done", "failed"])
async def test_an_upload_whose_disk_was_replaced_takes_no_space(
    result: object,
    world: World,
    queue: Queue,
    processes: list[Process],
    autojump_clock: MockClock,
) -> None:
    upload = await world.accepted(queue)
    await trio.sleep(0.1)
    shutil.rmtree(world.folder / "uploads")
    assert queue.kept_bytes() == 4
    processes[0].finish(result)  # type: ignore[arg-type]
    await trio.sleep(5)
    assert state(queue, upload) == ("done" if result is SENT else "failed")
    assert queue.kept_bytes() == 0


async def test_the_next_daemon_sends_nothing_older_than_what_a_place_has(
    world: World, processes: list[Process], caplog: pytest.LogCaptureFixture
) -> None:
    before = world.queue()
    older = await world.accepted(before, ELSEWHERE)
    newer = await world.accepted(before, ELSEWHERE)
    record = before.find(newer, UID).record
    before.spool.save(msgspec.structs.replace(record, state="done", sent=SENT))
    after = world.queue()
    await after.restore()
    assert [state(after, upload) for upload in (older, newer)] == ["failed", "done"]
    assert "has a later upload" in after.find(older, UID).record.message
    assert f"{older}/files/file" in world.files()


async def test_users_see_their_own_uploads_and_root_all(world: World, queue: Queue) -> None:
    upload = await world.accepted(queue)
    for uid in (UID, 0):
        assert [each.id for each in queue.statuses(uid, with_done=True)] == [upload]
    assert queue.statuses(UID + 1, with_done=True) == []
    with pytest.raises(NoUpload):
        await queue.drop(upload, UID + 1)
    with pytest.raises(NoUpload):
        await queue.wait_ended("0" * 12, UID, 0)


async def test_a_dropped_upload_ends_first_and_then_its_files_go(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    upload = await world.accepted(queue)
    waiting = await world.accepted(queue)
    await wait_all_tasks_blocked()
    await queue.drop(upload, UID)
    assert world.files() == [f"{waiting}/files/file", f"{waiting}/upload.json"]
    assert (queue.ended["dropped"], queue.active()) == (1, 1)
    await wait_all_tasks_blocked()
    assert state(queue, waiting) == "running"
    with pytest.raises(NoUpload, match="ckptfs uploads"):
        queue.find(upload, UID)


async def test_files_that_an_attachment_shows_stay_until_it_ends(
    world: World, queue: Queue, processes: list[Process], autojump_clock: MockClock
) -> None:
    upload = await world.accepted(queue)
    leaves = []
    assert queue.hold_newest(TARGET.identity, UID, leaves) == queue.spool.path_of(upload)
    assert queue.hold_newest(ELSEWHERE.identity, UID, leaves) == ""
    await trio.sleep(1)
    processes[0].finish()
    await trio.sleep(5)
    assert f"{upload}/files/file" in world.files()
    world.shown.add(queue.spool.path_of(upload))
    [leave] = leaves
    leave()
    await trio.sleep(5)
    assert f"{upload}/files/file" in world.files()
    world.shown.clear()
    await trio.sleep(5)
    assert world.files() == [f"{upload}/upload.json"]
    assert queue.hold_newest(TARGET.identity, UID, leaves) == ""


async def test_the_next_daemon_continues_with_the_credentials_in_memory(
    world: World, processes: list[Process]
) -> None:
    before = world.queue()
    uploads = [await world.accepted(before, target) for target in (TARGET, ELSEWHERE)]
    after = world.queue()
    await after.restore()
    assert [after.find(upload, UID).asked for upload in uploads] == [TARGET, ELSEWHERE]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.run)
        await wait_all_tasks_blocked()
        assert len(processes) == 2
        nursery.cancel_scope.cancel()


async def test_without_that_memory_uploads_with_credentials_fail_and_others_go_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    before = world.queue()
    with_secrets = await world.accepted(before, TARGET)
    without = await world.accepted(before, ELSEWHERE)
    assert not any(b"S3CR3T" in (world.folder / "uploads" / f).read_bytes() for f in world.files())
    next_boot = World(world.folder)
    after = next_boot.queue()
    await after.restore()
    failed = (await after.wait_ended(with_secrets, UID, 0)).message
    assert failed.startswith(TARGET.uri)
    assert f"ckptfs uploads --retry {with_secrets}" in failed
    assert after.find(without, UID).goes_on
    assert f"{with_secrets}/files/file" in world.files()
    for fd in next_boot.fds.all():
        os.close(fd)


async def test_what_has_no_record_goes_and_what_is_not_ours_stays(world: World) -> None:
    before = world.queue()
    unfinished = world.staged(before)
    foreign = world.folder / "uploads" / "notes"
    foreign.mkdir()
    (foreign / "text").write_text("mine")
    after = world.queue()
    await after.restore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert world.files() == ["notes/text"]
    assert unfinished not in world.files()


async def test_dropped_files_that_an_attachment_shows_outlive_the_daemon(
    world: World, queue: Queue, autojump_clock: MockClock
) -> None:
    upload = await world.accepted(queue)
    world.shown.add(queue.spool.path_of(upload))
    await queue.drop(upload, UID)
    after = world.queue()
    await after.restore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.run)
        await trio.sleep(5)
        assert world.files() == [f"{upload}/files/file"]
        world.shown.clear()
        await trio.sleep(5)
        assert world.files() == []
        nursery.cancel_scope.cancel()


async def test_a_daemon_without_the_directory_learns_of_its_uploads_later(
    world: World, processes: list[Process], autojump_clock: MockClock
) -> None:
    """The daemon before this one is stuck, and holds the lock of the directory."""
    upload = await world.accepted(world.queue())
    world.has_disk = False
    after = world.queue()
    await after.restore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.run)
        with pytest.raises(CacheError, match="does not know its uploads yet"):
            await after.wait_ended(upload, UID, 0)
        with pytest.raises(CacheError, match="does not know its uploads yet"):
            await after.drop(upload, UID)
        asked = []

        async def ask() -> None:
            asked.append((await after.wait_ended(upload, UID, 0)).state)

        nursery.start_soon(ask)
        await trio.sleep(5)
        assert (asked, processes) == ([], [])
        world.has_disk = True
        await trio.sleep(5)
        assert asked == ["running"]
        assert state(after, upload) == "running"
        [process] = processes
        assert process.setup is not None
        assert process.setup.asked == TARGET  # with the credentials in memory
        nursery.cancel_scope.cancel()


async def test_a_record_that_cannot_be_read_keeps_its_files(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    before = world.queue()
    upload = await world.accepted(before)
    (world.folder / "uploads" / upload / "upload.json").write_text("{")
    after = world.queue()
    await after.restore()
    assert after.statuses(0, with_done=True) == []
    assert f"{upload}/files/file" in world.files()
    assert f"cannot read {world.folder}/uploads/{upload}/upload.json" in caplog.text


async def test_a_named_store_with_another_place_gets_nothing(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    queue.resolve = lambda *_: (ELSEWHERE, "default")
    upload = await world.accepted(queue)
    status = await queue.wait_ended(upload, UID, 10)
    assert (status.state, status.code) == ("failed", LocationError.code)
    assert processes == []


async def test_old_records_go(
    world: World, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs._daemon.uploads.removal._DONE_MAX", 2)
    queue = world.queue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.run)
        uploads = []
        for _ in range(4):
            uploads.append(await world.accepted(queue))
            await wait_all_tasks_blocked()
            processes[0].finish()
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [each.id for each in queue.statuses(UID, with_done=True)] == uploads[2:]
    assert world.files() == sorted(f"{upload}/upload.json" for upload in uploads[2:])


def test_the_journal_of_attachments_leaves_uploads_alone(world: World) -> None:
    memory = handoff.Handoff(world.fds).journal
    credentials.keep(memory, "000000000005", ELSEWHERE)
    credentials.keep(memory, "000000000005", TARGET)
    journal.forget(memory, 5)
    assert journal.recorded(memory) == {}
    assert credentials.kept(handoff.Handoff(world.fds).journal) == {"000000000005": TARGET}
    credentials.forget(memory, "000000000005")
    assert credentials.kept(memory) == {}
