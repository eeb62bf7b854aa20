"""Files that a client hands over: whole, below their directory, and gone with the connection."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from support.background import GID, SENT, TARGET, UID, Process, World
from trio.testing import MockClock, wait_all_tasks_blocked

from ckptfs._daemon.uploads import staging as staging_module
from ckptfs._daemon.uploads.handing_over import HandingOver, Staging
from ckptfs._daemon.uploads.queue import Queue
from ckptfs._model.protocol.uploads import BeginUpload, StageFile
from ckptfs._model.upload_messages import NotSent
from ckptfs._model.uploads import UploadOptions
from ckptfs.errors import CacheError, CannotUpload, LimitExceeded, ProtocolError

DATA = bytes(range(256)) * 40
PIECE = 4096


@contextmanager
def descriptor(folder: Path, data: bytes = DATA) -> Iterator[int]:
    path = folder / "source"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


async def begin(handing_over: HandingOver, files: int, size: int) -> Staging | None:
    request = BeginUpload(location=TARGET, files=files, bytes=size, options=UploadOptions())
    return await handing_over.begin(request, TARGET.identity, UID, GID)


async def stage(
    handing_over: HandingOver,
    staging: Staging | None,
    path: str,
    source: int,
    size: int = len(DATA),
    pieces: "list[tuple[int, int]] | None" = None,
) -> None:
    assert staging is not None
    for offset in range(0, max(1, size), PIECE):
        piece = offset, min(PIECE, size - offset)
        for start, length in [piece] if pieces is None else pieces:
            upload = staging.record.id
            request = StageFile(id=upload, path=path, size=size, offset=start, length=length)
            await handing_over.stage(staging, request, source)
        if pieces is not None:
            return


@pytest.mark.parametrize("how", ["shared or copied", "copied by the kernel", "copied here"])
async def test_pieces_become_the_file_and_the_commit_makes_it_an_upload(
    how: str,
    world: World,
    queue: Queue,
    processes: list[Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "planned")

    if how != "shared or copied":
        monkeypatch.setattr(staging_module.fcntl, "ioctl", refuse)
    if how == "copied here":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 2, len(DATA))
        with descriptor(tmp_path) as fd:
            await stage(handing_over, staging, "a/b/file", fd)
            await stage(handing_over, staging, "a/empty", fd, 0)
        assert staging is not None
        assert handing_over.statuses(UID)[0].state == "staging"
        assert handing_over.statuses(UID + 1) == []
        status = await handing_over.commit(staging)
        assert status.state in ("waiting", "running")
        handing_over.leave(staging)  # the upload no longer belongs to the connection
        await wait_all_tasks_blocked()
        assert handing_over.active() == 0
    top = Path(queue.spool.path_of(staging.record.id))
    assert (top / "a/b/file").read_bytes() == DATA
    assert (top / "a/empty").read_bytes() == b""
    assert (top / "a/b/file").stat().st_mode & 0o777 == 0o600


async def test_files_without_a_commit_go_with_the_connection(
    world: World, queue: Queue, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 2, len(DATA))
        with descriptor(tmp_path) as fd:
            await stage(handing_over, staging, "file", fd)
        assert staging is not None
        with pytest.raises(ProtocolError, match="lacks files"):
            await handing_over.commit(staging)
        assert world.files() != []
        handing_over.leave(staging)
    assert world.files() == []
    assert handing_over.kept_bytes() == 0


@pytest.mark.parametrize(
    ("path", "size", "pieces"),
    [
        ("../file", 8, None),
        ("/file", 8, None),
        ("a//file", 8, None),
        ("a/./file", 8, None),
        ("", 8, None),
        ("file", len(DATA) + 1, None),
        ("file", 8, [(4, 4)]),
        ("file", 8, [(0, 4), (0, 4)]),
        ("file", 8, [(0, 4), (4, 8)]),
        ("file", 8, [(0, 0)]),
    ],
)
async def test_pieces_that_were_not_announced_are_refused(
    path: str,
    size: int,
    pieces: "list[tuple[int, int]] | None",
    world: World,
    queue: Queue,
    tmp_path: Path,
) -> None:
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 2, len(DATA))
        with descriptor(tmp_path) as fd, pytest.raises(ProtocolError):
            await stage(handing_over, staging, path, fd, size, pieces)
        assert staging is not None
        handing_over.leave(staging)
    assert world.files() == []


async def test_links_and_other_descriptors_lead_nowhere(
    world: World, queue: Queue, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        for plan in ("folder", "file", "pipe"):
            staging = await begin(handing_over, 1, len(DATA))
            assert staging is not None
            top = Path(queue.spool.path_of(staging.record.id))
            reader, writer = os.pipe()
            with descriptor(tmp_path) as fd:
                if plan == "pipe":
                    with pytest.raises(ProtocolError, match="not of a file"):
                        await stage(handing_over, staging, "link/file", reader)
                else:
                    (top / "link").symlink_to(outside if plan == "folder" else outside / "file")
                    path = "link/file" if plan == "folder" else "link"
                    with pytest.raises(CannotUpload, match="cannot be taken over"):
                        await stage(handing_over, staging, path, fd)
            os.close(reader)
            os.close(writer)
            handing_over.leave(staging)
    assert list(outside.iterdir()) == []
    assert world.files() == []


async def test_a_source_that_becomes_shorter_is_an_error(
    world: World, queue: Queue, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 1, len(DATA))
        with descriptor(tmp_path, DATA[:-1]) as fd, pytest.raises(CannotUpload, match="shorter"):
            await stage(handing_over, staging, "file", fd)
        assert staging is not None
        with pytest.raises(ProtocolError, match="lacks files"):
            await handing_over.commit(staging)
        handing_over.leave(staging)


async def test_a_full_disk_is_an_error_that_says_what_to_do(
    world: World, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "planned")

    monkeypatch.setattr(staging_module.fcntl, "ioctl", refuse)
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        world.room = False
        staging = await begin(handing_over, 1, len(DATA))
        with descriptor(tmp_path) as fd, pytest.raises(CannotUpload, match="no room"):
            await stage(handing_over, staging, "file", fd)
        world.room = True
        monkeypatch.setattr(os, "copy_file_range", full)
        another = await begin(handing_over, 1, len(DATA))
        with descriptor(tmp_path) as fd, pytest.raises(CannotUpload, match="wait=True"):
            await stage(handing_over, another, "file", fd)
        for each in (staging, another):
            assert each is not None
            handing_over.leave(each)
    assert world.files() == []


async def test_a_disk_that_refuses_the_commit_is_an_error_and_keeps_nothing(
    world: World, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 1, 0)
        with descriptor(tmp_path) as fd:
            await stage(handing_over, staging, "file", fd, 0)
        assert staging is not None
        monkeypatch.setattr(queue.spool, "persist", fails)
        with pytest.raises(CacheError, match="wait=True"):
            await handing_over.commit(staging)
        handing_over.leave(staging)
    assert world.files() == []
    assert queue.active() == handing_over.active() == 0


async def test_over_the_limit_a_begin_waits_for_an_upload_that_ends(
    world: World, queue: Queue, processes: list[Process], autojump_clock: MockClock
) -> None:
    world.limit = 10
    first = await world.accepted(queue, data=b"12345678")
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        with pytest.raises(LimitExceeded, match="upload_bytes_max allows 10 B"):
            await begin(handing_over, 1, 11)
        assert await begin(handing_over, 1, 3) is None
        processes[0].finish(SENT)
        staging = await begin(handing_over, 1, 3)
        assert staging is not None
        assert await begin(handing_over, 1, 8) is None  # the first one arrives yet
        handing_over.leave(staging)
    assert first in {each.id for each in queue.statuses(UID, with_done=True)}


async def test_failed_uploads_that_fill_the_limit_are_named_at_once(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    world.limit = 10
    await world.accepted(queue, data=b"12345678")
    await wait_all_tasks_blocked()
    processes[0].finish(NotSent("target-exists", "other content"))
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        with pytest.raises(LimitExceeded, match="--drop removes them"):
            await begin(world.handing_over(queue, nursery), 1, 3)


async def test_attached_files_that_fill_the_limit_are_named_at_once(
    world: World, queue: Queue, processes: list[Process]
) -> None:
    world.limit = 10
    upload = await world.accepted(queue, data=b"12345678")
    world.shown.add(queue.spool.path_of(upload))
    await wait_all_tasks_blocked()
    processes[0].finish(SENT)
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        with pytest.raises(LimitExceeded, match="that are attached"):
            await begin(world.handing_over(queue, nursery), 1, 3)


async def test_uploads_that_begin_at_the_same_time_share_the_limit(
    world: World, queue: Queue, autojump_clock: MockClock
) -> None:
    world.limit = 10
    found: list[Staging | None] = []

    async def one() -> None:
        found.append(await begin(handing_over, 1, 6))

    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        async with trio.open_nursery() as both:
            both.start_soon(one)
            both.start_soon(one)
        [staging] = filter(None, found)
        handing_over.leave(staging)


@pytest.mark.parametrize("refused", ["mkdir", "open"])
async def test_a_begin_that_the_disk_refuses_leaves_no_directory(
    refused: str, world: World, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: "str | Path", *more: Any, **named: Any) -> Any:
        if str(path).endswith("/files"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, *more, **named)

    really = getattr(os, refused)
    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        with monkeypatch.context() as patch:
            patch.setattr(os, refused, refuse)
            with pytest.raises(CacheError, match="Too many open files"):
                await begin(handing_over, 1, 4)
        assert handing_over.active() == handing_over.kept_bytes() == 0
    assert list((world.folder / "uploads").iterdir()) == []


async def test_files_that_the_disk_keeps_after_the_connection_go_later(
    world: World,
    queue: Queue,
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async with trio.open_nursery() as nursery:
        handing_over = world.handing_over(queue, nursery)
        staging = await begin(handing_over, 1, len(DATA))
        with descriptor(tmp_path) as fd:
            await stage(handing_over, staging, "file", fd)
        assert staging is not None
        with monkeypatch.context() as patch:
            patch.setattr(queue.spool, "remove", refuse)
            handing_over.leave(staging)
            await trio.sleep(5)
            assert world.files() != []
        await trio.sleep(5)
    assert world.files() == []
