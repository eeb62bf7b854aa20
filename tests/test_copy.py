"""Copies: complete or not there, resumable, one at a time; also where nothing can be mounted."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem, _MockFileSystem
from support.fakes import FakeStore, pattern
from support.s3server import S3Server

import ckptfs
from ckptfs._model.manifest import NAME_BYTES_MAX
from ckptfs._store.copy import PART_BYTES, _aside, copy_directory

UriOf = Callable[[Path], str]
MIB = 1 << 20


def files_in(top: "str | Path") -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes()
        for path in Path(top).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def checkpoint_dir(bucket: Path) -> Path:
    """A checkpoint with a file of several parts, small and empty ones, in ``<bucket>/run/ckpt``."""
    top = bucket / "run" / "ckpt"
    (top / "a" / "b").mkdir(parents=True)
    (top / "large.bin").write_bytes(pattern(3 * PART_BYTES + 5))
    (top / "a" / "b" / "small.txt").write_text("small")
    (top / "a" / "empty").touch()
    for path in top.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return top


def test_to_directory(tmp_path: Path, checkpoint_dir: Path, uri_of: UriOf, s3: S3Server) -> None:
    target = tmp_path / "deep" / "copy"
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("stays")
    told: list[tuple[int, int]] = []
    checkpoint = ckptfs.Checkpoint(uri_of(checkpoint_dir))
    path = checkpoint.to_directory(f"{target}/", progress=lambda *done: told.append(done))
    assert path == str(target)
    assert files_in(target) == files_in(checkpoint_dir) | {"mine.txt": b"stays"}
    assert (target / "large.bin").stat().st_mtime == 1_700_000_000
    size = sum(len(data) for data in files_in(checkpoint_dir).values())
    assert told[-1] == (size, size)
    assert os.listdir(target.parent) == ["copy"]  # no lock is left
    s3.reset_traffic()
    assert checkpoint.to_directory(target) == path
    assert all("list-type=2" in request.target for request in s3.traffic().requests)


def test_default_directory_is_the_objects_own(checkpoint_dir: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(checkpoint_dir))
    first = checkpoint.to_directory(include=["a/*"])
    try:
        assert os.path.basename(first).startswith("checkpoint_tmp_")
        assert files_in(first).keys() == {"a/b/small.txt", "a/empty"}
        assert checkpoint.to_directory(include=["*.txt"]) == first
        other = ckptfs.Checkpoint(uri_of(checkpoint_dir)).to_directory(include=["a/empty"])
        assert other != first
        subprocess.run(["rm", "-r", other], check=True)
    finally:
        subprocess.run(["rm", "-r", first], check=True)


def test_a_failed_copy_shows_no_half_file_and_goes_on_later(tmp_path: Path) -> None:
    data = pattern(6 * PART_BYTES)
    store = FakeStore({"large": data})
    store.fail("read_into", ckptfs.AccessDenied("no longer"), at=4, times=100)
    with pytest.raises(ckptfs.AccessDenied):
        copy_directory(store, tmp_path / "copy")
    assert "large" not in os.listdir(tmp_path / "copy")
    parts = (tmp_path / "copy" / ".large.ckptfs-parts").read_bytes().count(b"+")
    assert 1 <= parts <= 3
    healed = FakeStore({"large": data})  # the same version: size, time and ETag
    copy_directory(healed, tmp_path / "copy")
    assert files_in(tmp_path / "copy") == {"large": data}
    assert [call.operation for call in healed.calls].count("read_into") == 6 - parts


def test_parts_file_of_a_copy_that_was_killed_at_its_end_goes(tmp_path: Path) -> None:
    store = FakeStore({"large": pattern(5)}, mtime_ns=1_700_000_000 * 10**9)
    copy_directory(store, tmp_path / "copy")
    assert os.listdir(tmp_path / "copy") == ["large"]
    (tmp_path / "copy" / ".large.ckptfs-parts").write_bytes(b"5 5 0 \n+")
    copy_directory(store, tmp_path / "copy")
    assert files_in(tmp_path / "copy") == {"large": pattern(5)}
    assert store.reads("large") == store.reads("large")[:1]


def test_parts_of_another_version_are_not_used(tmp_path: Path) -> None:
    store = FakeStore({"large": pattern(4 * PART_BYTES)})
    store.fail("read_into", ckptfs.AccessDenied("no longer"), at=3, times=100)
    with pytest.raises(ckptfs.AccessDenied):
        copy_directory(store, tmp_path / "copy")
    newer = FakeStore({})
    newer.overwrite("large", pattern(4 * PART_BYTES, 9), mtime_ns=1_800_000_000 * 10**9)
    copy_directory(newer, tmp_path / "copy")
    assert files_in(tmp_path / "copy") == {"large": pattern(4 * PART_BYTES, 9)}


def test_an_object_that_changes_in_the_middle_is_not_copied(tmp_path: Path) -> None:
    store = FakeStore({"large": pattern(2 * PART_BYTES), "small": b"1"})
    gates = [store.block("read_into", at=number) for number in (2, 3)]  # one may be that of "small"
    failure: list[BaseException] = []

    def copy() -> None:
        try:
            copy_directory(store, tmp_path / "copy")
        except ckptfs.ObjectChanged as error:
            failure.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    assert all(gate.entered.wait(10) for gate in gates)
    store.overwrite("large", pattern(2 * PART_BYTES, 3))
    store.release_all()
    thread.join(30)
    assert failure
    assert not [name for name in os.listdir(tmp_path / "copy") if "large" in name]


COPIER = """
import sys, ckptfs
ckptfs.Checkpoint(sys.argv[1]).to_directory(sys.argv[2])
"""


def test_two_processes_copy_once(
    tmp_path: Path, node: Node, s3: S3Server, checkpoint_dir: Path, uri_of: UriOf
) -> None:
    s3.reset_traffic()
    uri, target = uri_of(checkpoint_dir), str(tmp_path / "copy")
    copiers = [node.python(COPIER, uri, target) for _ in range(3)]
    assert [copier.wait(60) for copier in copiers] == [0, 0, 0]
    for copier in copiers:
        copier.communicate()
    assert files_in(target) == files_in(checkpoint_dir)
    assert s3.traffic().bytes_to_client <= 1.02 * 3 * PART_BYTES + 100_000


def test_a_killed_copier_leaves_nothing_that_looks_complete(
    tmp_path: Path, node: Node, checkpoint_dir: Path, uri_of: UriOf
) -> None:
    target = tmp_path / "copy"
    copier = node.python(COPIER, uri_of(checkpoint_dir), str(target))
    wait_until(lambda: target.exists() and os.listdir(target))
    copier.kill()
    copier.communicate()
    expected = files_in(checkpoint_dir)
    whole = {n: d for n, d in files_in(target).items() if not n.rpartition("/")[2].startswith(".")}
    assert all(expected[name] == data for name, data in whole.items())
    ckptfs.Checkpoint(uri_of(checkpoint_dir)).to_directory(target)
    assert files_in(target) == expected


def test_copy_mode_needs_no_daemon(node: Node, checkpoint_dir: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(checkpoint_dir))
    with checkpoint.as_directory(mode="copy", include=["*.txt"]) as path:
        assert files_in(path) == {"a/b/small.txt": b"small"}
    assert not os.path.exists(path)
    assert not node.socket.exists()


def test_a_machine_that_cannot_mount_copies_with_a_warning(
    node: Node, checkpoint_dir: Path, uri_of: UriOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise ckptfs.CannotMount("cannot mount: /dev/fuse is missing")

    monkeypatch.setattr("ckptfs._client.client._start", start)
    checkpoint = ckptfs.Checkpoint(uri_of(checkpoint_dir))
    with (
        pytest.warns(UserWarning, match="cannot mount: /dev/fuse is missing") as caught,
        checkpoint.as_directory() as path,
    ):
        assert files_in(path) == files_in(checkpoint_dir)
    said = f"ckptfs copies the checkpoint (24.0 MiB) to {path}: cannot mount: /dev/fuse is missing"
    assert str(caught[0].message) == said
    assert caught[0].filename == __file__  # the caller's line
    assert not os.path.exists(path)
    with (
        pytest.warns(UserWarning, match=r"copies the checkpoint \(5 B\)"),
        checkpoint.as_directory(include=["*.txt"]) as path,
    ):
        assert files_in(path) == {"a/b/small.txt": b"small"}
    with pytest.raises(ckptfs.CannotMount), checkpoint.as_directory(mode="mount"):
        pass


def test_a_filesystem_that_cannot_be_described_is_copied(node: Node) -> None:
    filesystem = _MockFileSystem()
    filesystem.create_dir("ckpt/sub")
    with filesystem.open_output_stream("ckpt/sub/file") as out:
        out.write(b"mock")
    checkpoint = ckptfs.Checkpoint("ckpt", filesystem)
    with (
        pytest.warns(UserWarning, match="MockFileSystem cannot be mounted"),
        checkpoint.as_directory() as path,
    ):
        assert files_in(path) == {"sub/file": b"mock"}
    with (
        pytest.raises(ckptfs.LocationError, match="cannot be mounted"),
        checkpoint.as_directory(mode="mount"),
    ):
        pass


def test_local_checkpoints_are_copied_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"local")
    subtree = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    for checkpoint in (
        ckptfs.Checkpoint.from_directory(source),
        ckptfs.Checkpoint("source", subtree),
    ):
        with checkpoint.as_directory() as path:
            assert path == str(source)
        target = checkpoint.to_directory(tmp_path / f"copy {id(checkpoint)}")
        assert files_in(target) == {"file": b"local"}


def test_names_that_copies_use_themselves_and_long_ones(tmp_path: Path) -> None:
    """An interrupted copy that was uploaded has files whose names are those of parts of others."""
    nasty = "n" * NAME_BYTES_MAX
    digest = hashlib.blake2b(f"0 {nasty}".encode(), digest_size=16).hexdigest()
    names = ["x", ".x.ckptfs-partial", ".x.ckptfs-parts", "..x.ckptfs-partial.ckptfs-partial"]
    names += [nasty, digest, f".{digest}.ckptfs-parts", "é" * 120, "sub/x"]
    names += ["sub/.x.ckptfs-partial/file", "n" * 240, "n" * 239]
    files = {name: pattern(PART_BYTES + 1, seed=n) for n, name in enumerate(names)}
    stems = {_aside(name, files.keys()) for name in names}
    assert len(stems) == len(names)
    for many in (names, names[::-1]):
        target = tmp_path / str(many[0] == "x")
        store = FakeStore({name: files[name] for name in many})
        store.fail("read_into", ckptfs.AccessDenied("no longer"), at=7, times=100)
        with pytest.raises(ckptfs.AccessDenied):
            copy_directory(store, target)
        copy_directory(FakeStore(files), target)
        assert files_in(target) == files
        copy_directory(FakeStore(files), target, include=["x"])
        assert files_in(target) == files


def test_a_disk_that_refuses_is_one_of_our_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ckptfs.StoreError, match="cannot copy to"):
        copy_directory(FakeStore({"a": b"1"}), tmp_path / "file" / "copy")


def test_waiting_for_another_copier_has_an_end(tmp_path: Path) -> None:
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom ckptfs._os.filelock import locked\n"
            "with locked(sys.argv[1], 5): print('held', flush=True); sys.stdin.read()",
            str(tmp_path / ".copy.ckptfs-lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with held:
        assert held.stdout
        assert held.stdout.readline() == b"held\n"
        with pytest.raises(ckptfs.StoreError, match="another process has been copying"):
            copy_directory(FakeStore({"a": b"1"}), tmp_path / "copy", timeout_s=0.1)
        held.communicate(b"")
