"""Uploads by streams of pyarrow: a library that hangs or fails leaves no half file."""

import errno
import fcntl
import io
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem as LocalFileSystemOfFsspec
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

import ckptfs
from ckptfs._store import arrow_uploads
from ckptfs._store.arrow_uploads import ArrowUploads
from ckptfs.errors import AccessDenied, StoreError, StoreTimeout


class Stream:
    """A stream of a store that shows an object when it is closed."""

    def __init__(self, filesystem: "ObjectStore", path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._data = b""

    def write(self, data: memoryview) -> None:
        self._filesystem.before_write()
        self._data += bytes(data)

    def close(self) -> None:
        self._filesystem.objects[self._path] = self._data


class ObjectStore:
    type_name = "py::custom"

    def __init__(self, type_name: str = "py::custom") -> None:
        self.type_name = type_name
        self.objects: dict[str, bytes] = {}
        self.before_write: Any = lambda: None

    def open_output_stream(self, path: str, compression: None) -> Stream:
        return Stream(self, path)

    def delete_file(self, path: str) -> None:
        del self.objects[path]

    def move(self, path: str, to: str) -> None:
        assert to not in self.objects  # as HDFS
        self.objects[to] = self.objects.pop(path)

    def get_file_info(self, path: str) -> Any:
        kind = FileType.File if path in self.objects else FileType.NotFound
        size = len(self.objects.get(path, b""))
        return type("Info", (), {"type": kind, "path": path, "size": size})


def raised(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (OSError(errno.ENOSPC, "No space"), StoreError, "the target has no space left; free some"),
        (PermissionError("no"), AccessDenied, "x in uri: access denied"),
        (NotImplementedError(), AccessDenied, "this filesystem cannot write"),
    ],
)
@pytest.mark.parametrize("type_name", ["py::custom", "hdfs"])
def test_failed_stream_leaves_no_object(
    type_name: str, failure: Exception, error: type[Exception], match: str
) -> None:
    store = ObjectStore(type_name)
    upload = ArrowUploads(store, "top", "uri").begin("x", 4)  # type: ignore[arg-type]
    upload.send(1, memoryview(b"da"))
    store.before_write = raised(failure)
    with pytest.raises(error, match=match):
        upload.send(2, memoryview(b"ta"))
    upload.abort()
    assert store.objects == {}


@pytest.mark.parametrize("type_name", ["py::custom", "hdfs", "py::fsspec+sftp"])
def test_finished_stream_replaces_an_object(type_name: str) -> None:
    store = ObjectStore(type_name)
    store.objects["top/x"] = b"old"
    upload = ArrowUploads(store, "top", "uri").begin("x", 4)  # type: ignore[arg-type]
    upload.send(1, memoryview(b"data"))
    assert (store.objects == {"top/x": b"old"}) or type_name == "py::custom"
    upload.finish()
    assert store.objects == {"top/x": b"data"}


def test_library_that_hangs_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_uploads, "ANSWER_S", 0.05)
    store, released = ObjectStore(), threading.Event()
    store.before_write = released.wait
    upload = ArrowUploads(store, "top", "uri").begin("x", 4)  # type: ignore[arg-type]
    with pytest.raises(StoreTimeout, match="no answer within"):
        upload.send(1, memoryview(b"data"))
    released.set()


def test_temporary_files_of_killed_uploads_go(tmp_path: Path) -> None:
    uploads = ArrowUploads(LocalFileSystem(), str(tmp_path), "uri")
    begun = [uploads.begin(name, 4) for name in ("a", "b")]
    for each in begun:
        each.send(1, memoryview(b"da"))
    left = sorted(file.name for file in tmp_path.iterdir())
    assert len(left) == 2
    assert all(uploads.is_own(name) for name in left)
    uploads.prepare({"a", "b"})
    assert sorted(file.name for file in tmp_path.iterdir()) == left  # they are being written
    for each in begun:
        each._stream.close()  # as the kernel does for a killed program
    uploads.prepare({"a"}, merge=True)
    assert len(list(tmp_path.iterdir())) == 1
    for each in begun:
        each.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_same_name", [True, False])
def test_temporary_file_that_is_uploaded_itself_stays(is_same_name: bool, tmp_path: Path) -> None:
    uploads = ArrowUploads(LocalFileSystem(), str(tmp_path), "uri")
    upload = uploads.begin("a", 4)
    upload.send(1, memoryview(b"data"))
    upload._stream.close()
    (left,) = (file.name for file in tmp_path.iterdir())
    uploads.prepare({"a", left} if is_same_name else {"a"})
    assert (tmp_path / left).exists() == is_same_name
    upload.abort()


def filesystem_of(kind: str) -> Any:
    if kind == "local":
        return LocalFileSystem()
    return PyFileSystem(FSSpecHandler(LocalFileSystemOfFsspec()))


@pytest.mark.parametrize("kind", ["local", "fsspec"])
def test_two_uploads_to_one_place_share_no_file(kind: str, tmp_path: Path) -> None:
    begun: list[Any] = []
    for text in (b"one", b"two"):
        uploads = ArrowUploads(filesystem_of(kind), str(tmp_path), "uri")
        begun.append(uploads.begin("x", 6))
        begun[-1].send(1, memoryview(text))
    for each, text in zip(begun, (b"ONE", b"TWO"), strict=True):
        each.send(2, memoryview(text))
    for each, text in zip(begun, (b"oneONE", b"twoTWO"), strict=True):
        each.finish()
        assert (tmp_path / "x").read_bytes() == text
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["local", "fsspec"])
def test_merge_leaves_the_files_of_other_uploads(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / f".metadata.json.{uuid.uuid4().hex}").touch()
    first = ArrowUploads(filesystem_of(kind), str(tmp_path), "uri").begin("x", 4)
    first.send(1, memoryview(b"data"))
    ArrowUploads(filesystem_of(kind), str(tmp_path), "uri").prepare({"x"}, merge=True)
    first.finish()
    assert (tmp_path / "x").read_bytes() == b"data"
    assert len(list(tmp_path.iterdir())) == 2


def test_file_that_is_removed_before_it_has_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may look for temporary files just then."""
    flock, removed = fcntl.flock, list[Path]()

    def lock(file: Any, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    upload = ArrowUploads(LocalFileSystem(), str(tmp_path), "uri").begin("x", 4)
    upload.send(1, memoryview(b"data"))
    upload.finish()
    assert removed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"data"}


def test_upload_whose_temporary_file_another_one_removes_is_an_error(tmp_path: Path) -> None:
    kind = "fsspec"
    (tmp_path / "x").write_bytes(b"old")
    first = ArrowUploads(filesystem_of(kind), str(tmp_path), "uri").begin("x", 4)
    first.send(1, memoryview(b"data"))
    uploads = ArrowUploads(filesystem_of(kind), str(tmp_path), "uri")
    uploads.prepare({"x"})
    second = uploads.begin("x", 5)
    second.send(1, memoryview(b"oth"))
    with pytest.raises(StoreError, match="x in uri: another program has removed the temporary"):
        first.finish()
    first.abort()
    assert (tmp_path / "x").read_bytes() == b"old"
    second.send(2, memoryview(b"er"))
    second.finish()
    assert (tmp_path / "x").read_bytes() == b"other"


@pytest.mark.parametrize("type_name", ["hdfs", "py::fsspec+sftp"])
def test_temporary_file_that_lacks_bytes_replaces_nothing(type_name: str) -> None:
    store = ObjectStore(type_name)
    store.objects["top/x"] = b"old"
    upload = ArrowUploads(store, "top", "uri").begin("x", 5)  # type: ignore[arg-type]
    upload.send(1, memoryview(b"data"))
    with pytest.raises(StoreError, match="x in uri: the store has other bytes"):
        upload.finish()
    assert store.objects["top/x"] == b"old"


def test_removal_that_hangs_is_an_error_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = ArrowUploads(filesystem_of("fsspec"), str(tmp_path), "uri")
    upload = uploads.begin("x", 4)
    upload.send(1, memoryview(b"data"))
    released = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystemOfFsspec, "rm_file", lambda *_: released.wait())
        patched.setattr(LocalFileSystemOfFsspec, "rm", lambda *_, **__: released.wait())
        patched.setattr(arrow_uploads, "ANSWER_S", 0.5)
        with pytest.raises(StoreTimeout, match="no answer within"):
            uploads.prepare({"x"})
        released.set()
    upload.abort()


@pytest.mark.parametrize("kind", ["local", "fsspec", "memory"])
def test_metadata_of_killed_uploads_goes(kind: str, tmp_path: Path) -> None:
    if kind == "memory":
        filesystem = PyFileSystem(FSSpecHandler(MemoryFileSystem()))
        root = f"/{uuid.uuid4().hex}"
    else:
        filesystem, root = filesystem_of(kind), str(tmp_path / "target")
    uploads = ArrowUploads(filesystem, root, "uri")
    uploads.prepare({"x"})
    left, foreign = f".metadata.json.{uuid.uuid4().hex}", ".metadata.json.backup"
    kept = f".metadata.json.{uuid.uuid4().hex}"
    filesystem.create_dir(f"{root}/below")
    names = (left, kept, foreign, f"below/{left}")
    for name in names:
        filesystem.open_output_stream(f"{root}/{name}").close()
    assert [name for name in names if uploads.is_own(name)] == [left, kept]
    uploads.prepare({"x", kept})
    found = filesystem.get_file_info([f"{root}/{name}" for name in names])
    assert [info.type == FileType.File for info in found] == [False, True, True, True]


def test_target_with_metadata_of_a_killed_upload_is_completed(tmp_path: Path) -> None:
    top, target = tmp_path / "top", tmp_path / "target"
    top.mkdir()
    (top / "x").write_bytes(b"data")
    code = "import os, sys, ckptfs\nos.replace = lambda *_: os._exit(9)\n"
    code += "ckptfs.upload(*sys.argv[1:], metadata={'step': 1}, cache=False)"
    done = subprocess.run([sys.executable, "-c", code, str(top), str(target)], check=False)
    assert done.returncode == 9
    assert len(list(target.glob(".metadata.json.*"))) == 1
    ckptfs.upload(top, target, metadata={"step": 1}, cache=False)
    assert {file.name for file in target.iterdir()} == {"x", ".metadata.json"}


class ShortWrites(io.FileIO):
    """A file that takes some bytes of each write, as one on a disk that becomes full."""

    def write(self, data: Any) -> int:
        return super().write(data[:3])


def test_short_writes_to_a_local_file_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        arrow_uploads, "open", lambda path, mode, buffering: ShortWrites(path, mode), raising=False
    )
    upload = ArrowUploads(LocalFileSystem(), str(tmp_path), "uri").begin("x", 10)
    upload.send(1, memoryview(b"0123456789"))
    upload.finish()
    assert (tmp_path / "x").read_bytes() == b"0123456789"
