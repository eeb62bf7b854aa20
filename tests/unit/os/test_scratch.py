"""Scratch directories go with their process, however it ends, and only then."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptfs._os import scratch as _scratch
from ckptfs._os.scratch import scratch_directory

PREFIX = "ckptfs-scratch-test-"

HOLDER = """
import os, sys
from ckptfs._os.scratch import scratch_directory

how = sys.argv[1]
with scratch_directory("ckptfs-scratch-test-") as path:
    open(path + "/file", "w").close()
    if how == "orphan" and os.fork():
        os._exit(0)
    if how == "child leaves" and not os.fork():
        sys.exit()
    if how == "child leaves":
        os.wait()
    print(path, flush=True)
    sys.stdin.readline()
"""


def siblings() -> list[str]:
    return sorted(name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX))


@contextmanager
def holder(how: str) -> Iterator["tuple[subprocess.Popen[str], Path]"]:
    """A process that holds a directory until it is told to end; yields both."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, how], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout
        yield process, Path(process.stdout.readline().rstrip("\n"))


def test_scratch_directory_is_new_and_ends_with_its_context() -> None:
    with scratch_directory(PREFIX) as first, scratch_directory(PREFIX) as second:
        assert first != second
        assert siblings() == sorted([os.path.basename(first), os.path.basename(second)])
        assert os.stat(first).st_mode & 0o777 == 0o700
        os.makedirs(f"{first}/a/b")
    assert siblings() == []
    with pytest.raises(KeyError), scratch_directory(PREFIX):
        raise KeyError
    assert siblings() == []


def test_scratch_directory_of_a_killed_process_is_removed_by_the_next() -> None:
    told: list[Path] = []

    def before_removal(path: Path) -> None:
        assert (path / "file").exists()
        told.append(path)

    with holder("plain") as (live, kept):
        with holder("plain") as (killed, left):
            killed.kill()
        assert sorted([kept.name, left.name]) == siblings()
        with scratch_directory(PREFIX, before_removal) as mine:
            assert siblings() == sorted([kept.name, os.path.basename(mine)])
        assert told == [left]
        live.communicate("\n")
    assert siblings() == []


def test_scratch_directory_of_another_prefix_stays(tmp_path: Path) -> None:
    with holder("plain") as (killed, left):
        killed.kill()
    with scratch_directory("ckptfs-scratch-other-"):
        assert siblings() == [left.name]
    with scratch_directory(PREFIX):
        assert left.name not in siblings()


def test_scratch_directory_of_an_ended_parent_is_held_by_its_child() -> None:
    with holder("orphan") as (parent, path):
        assert parent.wait(30) == 0
        with scratch_directory(PREFIX):
            assert path.exists()
        parent.communicate("\n")  # the child has the same pipes
    with scratch_directory(PREFIX):
        assert not path.exists()


def test_scratch_directory_of_an_ended_child_is_held_by_its_parent() -> None:
    with holder("child leaves") as (parent, path):
        assert (path / "file").exists()
        parent.communicate("\n")
    assert siblings() == []


def test_scratch_sweep_leaves_links_files_and_directories_of_others(tmp_path: Path) -> None:
    scratch = Path(tempfile.gettempdir())
    (tmp_path / "file").touch()
    link, file, theirs = (scratch / f"{PREFIX}{name}" for name in ("link", "file", "theirs"))
    link.symlink_to(tmp_path)
    file.write_text("mine")
    theirs.mkdir()
    try:
        if os.geteuid() == 0:
            os.chown(theirs, 4242, 4242)
        with scratch_directory(PREFIX):
            assert link.is_symlink()
            assert (tmp_path / "file").exists()
            assert file.read_text() == "mine"
            assert theirs.exists() is (os.geteuid() == 0)
    finally:
        link.unlink()
        file.unlink()
        if theirs.exists():
            theirs.rmdir()


def test_scratch_directory_swept_before_its_lock_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def mkdtemp(prefix: str) -> str:
        made.append(real(prefix=prefix))
        if len(made) == 1:
            os.rmdir(made[0])  # somebody took it for an abandoned one
        return made[-1]

    real = tempfile.mkdtemp
    monkeypatch.setattr(_scratch.tempfile, "mkdtemp", mkdtemp)
    with scratch_directory(PREFIX) as path:
        assert path == made[1]
        assert os.path.isdir(path)


def test_scratch_directory_in_a_sweep_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper has the lock, and removes the directory a moment later."""
    locked: list[int | None] = []

    def mkdtemp(prefix: str) -> str:
        path = real(prefix=prefix)
        if not locked:
            locked.append(_scratch._try_lock(path))
        return path

    real = tempfile.mkdtemp
    monkeypatch.setattr(_scratch.tempfile, "mkdtemp", mkdtemp)
    with scratch_directory(PREFIX) as path:
        assert len(siblings()) == 2
    assert not os.path.exists(path)
    assert locked[0] is not None
    os.close(locked[0])
    with scratch_directory(PREFIX):
        assert len(siblings()) == 1


def test_scratch_directory_without_file_locks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_scratch.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Function not implemented"), scratch_directory(PREFIX):
        pass
    assert siblings() == []
