"""The files of a directory that is uploaded: a change is an error that names the file."""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

import ckptfs
from ckptfs._store import source, timestamps
from ckptfs._store.source import SourceFile, files_in
from ckptfs.errors import AccessDenied, CannotUpload

DATA = bytes(range(256)) * 10


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "x").write_bytes(DATA)
    return tmp_path


def of(top: Path) -> SourceFile:
    (file,) = files_in(str(top), (), lambda _: None)
    return file


def replace(path: Path) -> None:
    status = path.stat()
    path.rename(path.with_name("old"))
    path.write_bytes(DATA)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda path: path.write_bytes(DATA),
    "longer": lambda path: path.write_bytes(DATA + b"x"),
    "replaced": replace,
    "removed": lambda path: path.unlink(),
    "a directory": make_directory,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_is_an_error_of_each_method(change: str, top: Path) -> None:
    file = of(top)
    buffer = memoryview(bytearray(100))
    file.read_into(50, buffer)
    assert bytes(buffer) == DATA[50:150]
    CHANGES[change](top / "x")
    for call in (lambda: file.read_into(0, buffer), lambda: file.md5s(1000), file.check):
        with pytest.raises(CannotUpload, match="x: the file changed while it was uploaded"):
            call()


def test_file_that_changes_during_a_read_is_an_error(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = of(top), os.preadv

    def read_and_change(*arguments: object) -> int:
        os.utime(top / "x", (1, 1))
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source.os, "preadv", read_and_change)
    with pytest.raises(CannotUpload, match="changed"):
        file.read_into(0, memoryview(bytearray(100)))


def test_md5s_are_those_of_the_parts(top: Path) -> None:
    expected = [hashlib.md5(DATA[i : i + 1000]).digest() for i in range(0, len(DATA), 1000)]
    assert of(top).md5s(1000) == expected
    (top / "x").write_bytes(b"")
    assert of(top).md5s(1000) == [hashlib.md5(b"").digest()]


def test_md5s_end_at_once_when_they_are_to(top: Path) -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(top).md5s(1000, end)


def test_file_that_may_not_be_read_is_denied(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = of(top)

    def deny(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(source.os, "open", deny)
    with pytest.raises(AccessDenied, match="x: access denied"):
        file.md5s(1000)


@pytest.fixture
def outside(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file, a link to itself, and a link to the directory above it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").touch()
    (folder / "self").symlink_to(".")
    (folder / "loop").symlink_to("loop")
    (folder / "twin").symlink_to("deep")
    (folder / "deep" / "up").symlink_to("..")
    return folder


def included(top: Path, *include: str) -> list[str]:
    return [file.path for file in files_in(str(top), include, lambda _: None)]


@pytest.mark.parametrize(
    "include", ["model/*", "*.json", "mod*config*", "model", "model/deep/c*", "*/twin/*"]
)
def test_link_out_of_the_directory_is_refused_for_the_files_below_it(
    include: str, top: Path, outside: Path
) -> None:
    (top / "model").symlink_to(outside)
    with pytest.raises(CannotUpload, match="model: the link leads out of the directory"):
        included(top, include, "x")


@pytest.mark.parametrize("include", ["x", "*.bin", "other/*", "modelx/*"])
def test_link_out_of_the_directory_is_left_out_if_nothing_matches(
    include: str, top: Path, outside: Path
) -> None:
    (top / "model").symlink_to(outside)
    assert included(top, include, "x") == ["x"]


@pytest.mark.parametrize("to", ["missing", "model"])
@pytest.mark.parametrize("include", ["model/*", "*.json", "mod*", "model", "model/a/x", "[m]odel"])
def test_link_that_leads_nowhere_is_refused_if_a_file_below_it_could_match(
    include: str, to: str, top: Path
) -> None:
    (top / "model").symlink_to(to)
    with pytest.raises(CannotUpload, match="model: the link leads nowhere"):
        included(top, include, "x")
    assert included(top, "x", "other/*", "modelx/*") == ["x"]


def test_link_to_more_directories_than_can_be_searched_is_refused(
    top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "model").symlink_to(outside)
    monkeypatch.setattr(source, "_DIRECTORIES_OUTSIDE_MAX", 2)
    with pytest.raises(CannotUpload, match="model: the link leads out of the directory"):
        included(top, "*.bin")


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_fifo, make_directory])
def test_metadata_that_is_not_a_file_is_refused(
    make: Callable[[Path], None], top: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (top / ".metadata.json").touch()
    make(top / ".metadata.json")
    target = tmp_path_factory.mktemp("target") / "copy"
    with pytest.raises(CannotUpload, match=r"\.metadata\.json is not a file; remove it"):
        ckptfs.upload(top, target, metadata={"step": 1}, include=["x"])
    assert not target.exists()


def test_metadata_that_may_not_be_read_is_denied(
    top: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / ".metadata.json").write_text("{}")
    opened = os.open

    def deny(path: str, *more: int, **options: int) -> int:
        if str(path).endswith("/.metadata.json"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *more, **options)

    monkeypatch.setattr(source.os, "open", deny)
    target = tmp_path_factory.mktemp("target") / "copy"
    with pytest.raises(AccessDenied, match=r"\.metadata\.json: access denied"):
        ckptfs.upload(top, target, metadata={"step": 1}, include=["x"])
    assert not target.exists()


def test_only_a_missing_file_is_none(top: Path) -> None:
    file = source.file_in(str(top), "x")
    assert file is not None
    assert file.read() == DATA
    assert source.file_in(str(top), "missing") is None
    assert source.file_in(str(top), "x/missing") is None


@contextlib.contextmanager
def deep(top: Path, levels: int, name: str) -> Generator[None]:
    """A directory `name` that many levels below `top`, with a file."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(top)
    try:
        for _ in range(levels):
            os.mkdir(name)
            os.chdir(name)
        Path("last.bin").touch()
        yield
        os.unlink("last.bin")
        for _ in range(levels):
            os.chdir("..")
            os.rmdir(name)
    finally:
        os.fchdir(here)
        os.close(here)


def test_deep_directory_is_walked(top: Path) -> None:
    with deep(top, 1200, "d"):
        assert included(top) == ["d/" * 1200 + "last.bin", "x"]


@pytest.mark.parametrize("include", [(), ("*.bin", "x")])
def test_path_that_the_system_does_not_allow_is_refused(include: list[str], top: Path) -> None:
    with deep(top, 30, "d" * 200):
        with pytest.raises(CannotUpload, match="the path is longer than the system allows"):
            included(top, *include)
        assert included(top, "x") == ["x"]


def test_files_with_times_in_the_future_are_waited_for_once(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(timestamps.time, "sleep", waits.append)
    for number, ahead_s in enumerate([0.5, 0, 10, 10**8, -100]):
        (top / f"{number}").touch()
        for name, rest_ns in (("whole", 0), ("fraction", 5 * 10**8)):
            (top / f"{name}-{number}").touch()
            stamp_ns = (int(time.time() + ahead_s) * 10**9) + rest_ns
            os.utime(top / f"{name}-{number}", ns=(stamp_ns, stamp_ns))
    assert len(included(top)) == 16
    assert len(waits) == 1
    assert 1 < waits[0] <= 2
    waits.clear()
    for file in top.iterdir():
        os.utime(file, (1, 1))
    assert len(included(top)) == 16
    assert waits == []
