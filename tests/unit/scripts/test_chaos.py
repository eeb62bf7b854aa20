"""`scripts/chaos` tells right from wrong; a judge that lets all pass would find nothing."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chaostest import uploads
from chaostest import verdict as judge
from chaostest.board import Board
from chaostest.content import MIB, Contents, File
from chaostest.report import Outcome
from chaostest.uploads import Upload, Uploads
from chaostest.verdict import Timeline, Verdict, Window
from chaostest.watch import Handle, Lease, OperationFailed, Watch

DEADLINE_S = 6.0


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


@pytest.fixture
def verdict(timeline: Timeline) -> Verdict:
    return Verdict(
        timeline,
        read_deadline_s=DEADLINE_S,
        attach_deadline_s=8.0,
        passthrough=False,
    )


def failure(
    operation: str, error: str, start_s: float, end_s: float, **more: Any
) -> dict[str, Any]:
    times = {"start_s": start_s, "end_s": end_s, "lease_s": start_s - 100}
    return {"operation": operation, "error": error, "text": "", "checkpoint": "a"} | times | more


@pytest.mark.parametrize(
    ("kind", "operation", "error", "is_allowed"),
    [
        ("dark", "read", "ETIMEDOUT", True),
        ("dark", "read", "EIO", False),
        ("dark", "stat", "ETIMEDOUT", False),
        ("dark", "attach", "store-unavailable", True),
        ("dark", "attach", "not-found", False),
        ("denied", "read", "EACCES", True),
        ("garbage", "read", "EIO", True),
        ("garbage", "read", "ESTALE", False),
        ("untrusted", "read", "ETIMEDOUT", True),
        ("untrusted", "read", "EIO", False),
        (judge.READ_ONLY, "read", "EIO", False),
        (judge.DISK_FAILS, "read", "EIO", False),
        (judge.DISK_FAILS, "evict", "EIO", True),
        (judge.DISK_FAILS, "attach", "place", False),
        (judge.DISK_FAILS, "stat", "EIO", False),
        (judge.DISK_HANGS, "read", "ETIMEDOUT", True),
        (judge.DISK_HANGS, "read", "EIO", False),
        (judge.KILLED, "read", "ENOTCONN", False),
        (judge.KILLED, "attach", "daemon", True),
        (judge.ENDED, "stat", "ENOTCONN", True),
        (judge.DETACHED, "read", "ESTALE", True),
        (judge.DETACHED, "read", "EIO", False),
    ],
)
def test_what_a_fault_excuses(
    timeline: Timeline, verdict: Verdict, kind: str, operation: str, error: str, is_allowed: bool
) -> None:
    timeline.windows.append(Window(kind, 10, 20))
    told = failure(operation, error, 12, 12 + 2 * DEADLINE_S)
    assert (verdict.of_failure(told) == "") is is_allowed


def test_a_disk_is_the_readers_where_the_kernel_reads_it(timeline: Timeline) -> None:
    verdict = Verdict(timeline, read_deadline_s=DEADLINE_S, attach_deadline_s=8.0, passthrough=True)
    timeline.windows.append(Window(judge.DISK_FAILS, 10, 20))
    assert not verdict.of_failure(failure("fault", "SIGBUS", 15, 16))
    assert not verdict.of_failure(failure("read", "EIO", 20 + judge.DISK_MEMORY_S, 51))
    assert verdict.of_failure(failure("read", "EIO", 21 + judge.DISK_MEMORY_S, 52))


def test_no_daemon_begins_on_a_bad_disk(timeline: Timeline, verdict: Verdict) -> None:
    timeline.windows.append(Window(judge.DISK_FAILS, 50, 60))
    timeline.windows.append(Window(judge.ENDED, 10, 11))
    assert verdict.of_failure(failure("attach", "place", 55, 56))
    timeline.windows.append(Window(judge.ENDED, 49, 50))
    assert not verdict.of_failure(failure("attach", "place", 51, 52))
    assert not verdict.of_failure(failure("attach", "place", 58, 59))
    assert verdict.of_failure(failure("attach", "place", 65, 66))


def test_a_fault_excuses_what_overlaps_it_only(timeline: Timeline, verdict: Verdict) -> None:
    timeline.windows.append(Window("denied", 10, 20))
    assert not verdict.of_failure(failure("read", "EACCES", 19, 21))
    assert "while nothing" in verdict.of_failure(failure("read", "EACCES", 21, 22))
    assert "while nothing" in verdict.of_failure(failure("read", "EACCES", 1, 2))


def test_what_ends_a_lease_excuses_until_it_is_let_go(timeline: Timeline, verdict: Verdict) -> None:
    timeline.windows.append(Window(judge.DETACHED, 10, 11, "a"))
    assert not verdict.of_failure(failure("stat", "ESTALE", 50, 51, lease_s=5))
    assert verdict.of_failure(failure("stat", "ESTALE", 50, 51, lease_s=40))
    assert verdict.of_failure(failure("stat", "ESTALE", 50, 51, lease_s=5, checkpoint="b"))


def test_a_read_must_not_give_up_early(timeline: Timeline, verdict: Verdict) -> None:
    timeline.windows.append(Window("dark", 10, 100))
    assert not verdict.of_failure(failure("read", "ETIMEDOUT", 10, 10 + DEADLINE_S))
    early = failure("read", "ETIMEDOUT", 10, 9 + DEADLINE_S)
    assert "timed out after 5.0 s" in verdict.of_failure(early)


def test_what_has_just_timed_out_does_so_at_once(timeline: Timeline, verdict: Verdict) -> None:
    timeline.windows.append(Window("dark", 10, 20))
    assert not verdict.of_failure(failure("read", "ETIMEDOUT", 17, 17.1))
    assert not verdict.of_failure(failure("read", "ETIMEDOUT", 20.9, 21))
    assert not verdict.of_failure(failure("fault", "SIGBUS", 20.9, 21))
    assert verdict.of_failure(failure("read", "ETIMEDOUT", 22, 22.1))
    assert verdict.of_failure(failure("fault", "SIGBUS", 22, 22.1))
    timeline.windows.append(Window("denied", 30, 90))
    assert "timed out after 0.1 s" in verdict.of_failure(failure("read", "ETIMEDOUT", 50, 50.1))


def test_stale_is_what_has_changed(timeline: Timeline, verdict: Verdict) -> None:
    timeline.publishing(3)
    now_s = time.monotonic()
    told = failure("read", "ESTALE", now_s, now_s + 1, file=3, version=0)
    assert not verdict.of_failure(told)
    assert verdict.of_failure(told | {"version": 1})
    assert verdict.of_failure(told | {"file": 4})


def test_a_pinned_version_is_of_the_time_of_the_attach(
    timeline: Timeline, verdict: Verdict
) -> None:
    timeline.publishing(0)
    [came_s] = timeline.published(0)
    pinned = {"file": 0, "version": 1, "attached_s": came_s + 1, "told_s": came_s + 2}
    assert not verdict.of_pin(pinned)
    assert verdict.of_pin(pinned | {"attached_s": came_s - 1})
    assert not verdict.of_pin(pinned | {"version": 0, "attached_s": came_s - 1})
    assert verdict.of_pin(pinned | {"version": 0, "attached_s": came_s + 20})
    # By the path, which leads to a newer attachment since an administrator has ended this one.
    timeline.windows.append(Window(judge.DETACHED, came_s, came_s + 1, "a"))
    earlier = pinned | {"attached_s": came_s - 1}
    assert not verdict.of_pin(earlier | {"checkpoint": "a"})
    assert verdict.of_pin(earlier | {"checkpoint": "b"})


def test_a_restart_gives_time_and_a_large_read_has_more(
    timeline: Timeline, verdict: Verdict
) -> None:
    limit_s = verdict.limit_s("read", 4096, 10, 11)
    assert 2 * DEADLINE_S < limit_s < 3 * DEADLINE_S
    assert verdict.limit_s("read", MIB, 10, 11) > limit_s
    timeline.windows.append(Window(judge.KILLED, 10, 11))
    assert verdict.limit_s("read", 4096, 10, 11) == limit_s + judge.PAUSE_S


# -- bytes


@pytest.fixture(scope="module")
def contents() -> Contents:
    return Contents(1)


def of_kind(contents: Contents, *, resizes: bool) -> File:
    return next(f for f in contents.files if f.resizes is resizes and f.bytes > 600)


class Told:
    """A watch, and what it tells."""

    def __init__(self, contents: Contents, folder: Path) -> None:
        self.board = Board(folder / "board", len(contents.files))
        self.watch = Watch(contents, self.board, 0, folder / "log")
        self._log = folder / "log"

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
def told(contents: Contents, tmp_path: Path) -> Told:
    return Told(contents, tmp_path)


def test_a_wrong_byte_is_seen(contents: Contents, told: Told) -> None:
    file = of_kind(contents, resizes=False)
    handle = Handle(Lease(file.checkpoint, 0.0), file, -1)
    right = contents.expected(file, 0, 100, 500)
    told.watch.check(handle, 100, right)
    assert handle.version == 0
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[1:] + right[:1], bytes(500)):
        with pytest.raises(OperationFailed):
            told.watch.check(handle, 100, wrong)
    assert [line["kind"] for line in told.lines()] == ["pinned", *["wrong"] * 3]


def test_bytes_of_two_versions_are_seen(contents: Contents, told: Told) -> None:
    file = of_kind(contents, resizes=False)
    told.board.set_version(file.index, 1)
    lease = Lease(file.checkpoint, 0.0)
    first, second = Handle(lease, file, -1), Handle(lease, file, -1)
    at = len(file.head)
    old, new = (contents.expected(file, version, at, 64) for version in (0, 1))
    assert old != new
    told.watch.check(first, 0, contents.expected(file, 1, 0, len(file.head)))  # says nothing
    assert first.version is None
    told.watch.check(first, at, old)
    for handle in (first, second):
        with pytest.raises(OperationFailed):
            told.watch.check(handle, at, new)
    with pytest.raises(OperationFailed):
        told.watch.check(Handle(Lease("", 0.0), file, -1), at, old[:32] + new[32:])
    scopes = [line["scope"] for line in told.lines() if line["kind"] == "wrong"]
    assert scopes == ["handle", "lease", "none"]


def test_an_end_too_early_is_seen(contents: Contents, told: Told) -> None:
    file = of_kind(contents, resizes=True)
    handle = Handle(Lease(file.checkpoint, 0.0), file, -1)
    handle.version = 0
    told.watch.check_end(handle, contents.size(file, 0))
    with pytest.raises(OperationFailed):
        told.watch.check_end(handle, contents.size(file, 0) - 1)


def test_a_failure_is_told_with_its_errno_and_what_is_expected_is_not(told: Told) -> None:
    assert told.watch.do("stat", os.stat, "/no such", expected=(errno.ENOENT,)) is None
    with pytest.raises(OperationFailed):
        told.watch.do("stat", os.stat, "/no such")
    [line] = told.lines()
    assert (line["operation"], line["error"]) == ("stat", "ENOENT")


def test_what_hangs_can_be_seen_from_outside(
    contents: Contents, told: Told, tmp_path: Path
) -> None:
    seen = Board(tmp_path / "board", len(contents.files))
    doing = told.watch.do("read", lambda: seen.doing(0), length=5)
    assert doing is not None
    assert (doing.operation, doing.bytes) == ("read", 5)
    assert seen.doing(0) is None


def test_a_version_has_the_bytes_of_its_pieces(contents: Contents) -> None:
    for file in contents.files[:6]:
        size = contents.size(file, 2)
        whole = contents.expected(file, 2, 0, size + 10)
        assert len(whole) == size
        for offset in (0, 5, size // 2, max(0, size - 3)):
            assert contents.expected(file, 2, offset, 100) == whole[offset : offset + 100]


# -- uploads


class UploadedTo:
    """The surroundings of an upload of a run, without a run."""

    def __init__(self, folder: Path) -> None:
        (folder / "node").mkdir()
        self.node = SimpleNamespace(folder=folder / "node")
        self.outcome = Outcome(1, {})
        self.timeline = Timeline()
        self.breaches: list[str] = []
        self._root = folder / "bucket"

    def uri_of(self, name: str) -> str:
        return str(self.stored(name))

    def stored(self, name: str) -> Path:
        return self._root / name

    def put(self, name: str, data: bytes) -> None:
        self.stored(name).parent.mkdir(parents=True, exist_ok=True)
        self.stored(name).write_bytes(data)

    def wait(self, seconds: float, until: Any = None) -> None:
        end_s = time.monotonic() + seconds
        while not until() and time.monotonic() < end_s:
            time.sleep(0.01)

    def breach(self, kind: str, text: str) -> None:
        self.breaches.append(text)

    def unfinished_uploads(self) -> list[str]:
        return ["uploads/9/x"]


@pytest.fixture
def run(tmp_path: Path) -> UploadedTo:
    return UploadedTo(tmp_path)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_an_upload_with_other_bytes_is_seen(
    is_wrong: bool, run: UploadedTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Upload(run, 1, random.Random(1))  # type: ignore[arg-type]
    upload._write()
    shutil.rmtree(run.stored("uploads/1"), ignore_errors=True)
    shutil.copytree(upload._top, run.stored("uploads/1"))
    if is_wrong:
        (run.stored("uploads/1") / "a" / "small.bin").write_bytes(bytes(70_000))
    answer = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(uploads.subprocess, "run", lambda *_, **__: answer)
    upload._verify()
    assert bool(run.breaches) is is_wrong
    assert run.outcome.uploads["complete"] == 1
    assert run.outcome.uploads["wrong"] == is_wrong


def test_a_mount_with_other_bytes_of_an_upload_is_seen(
    run: UploadedTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Upload(run, 1, random.Random(1))  # type: ignore[arg-type]
    upload._write()
    shutil.rmtree(run.stored("uploads/1"), ignore_errors=True)
    shutil.copytree(upload._top, run.stored("uploads/1"))
    answer = subprocess.CompletedProcess([], uploads.DIFFERS, "large.bin", "")
    monkeypatch.setattr(uploads.subprocess, "run", lambda *_, **__: answer)
    upload._verify()
    assert run.breaches == ["the mount has other bytes of uploads/1: large.bin"]


@pytest.mark.parametrize(
    ("status", "said", "has_fault", "is_breach"),
    [
        (0, "ckptfs: warning: a\n", False, False),
        (-signal.SIGKILL, "", False, False),
        (1, "ckptfs: error: the store is away\n", True, False),
        (1, "ckptfs: error: the store is away\n", False, True),
        (1, "Traceback\nValueError\n", True, True),
        (-signal.SIGSEGV, "", True, True),
    ],
)
def test_ends_of_uploads_are_judged(
    status: int, said: str, has_fault: bool, is_breach: bool, run: UploadedTo
) -> None:
    if has_fault:
        run.timeline.windows.append(Window("dark", 0))
    upload = Upload(run, 1, random.Random(1))  # type: ignore[arg-type]
    assert upload._judge(status, said, time.monotonic()) is (status == 0)
    assert bool(run.breaches) is is_breach


def test_uploads_that_are_left_at_the_store_are_seen(run: UploadedTo) -> None:
    Uploads(run).end()  # type: ignore[arg-type]
    assert run.breaches == ["an upload of uploads/9/x was left at the store"]
