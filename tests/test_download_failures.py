"""Failures of the checkpoints that ckptfs replaces, which must not happen here."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node, wait_until
from pyarrow.fs import AwsStandardS3RetryStrategy
from support.fakes import FakeStore, pattern
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs import Checkpoint
from ckptfs._model.backoff import Backoff
from ckptfs._store import copy, retrying
from ckptfs._store.copy import PART_BYTES

UriOf = Callable[[Path], str]

COPIER = """
import sys, ckptfs
print("ready", flush=True)
ckptfs.Checkpoint(sys.argv[1]).to_directory(sys.argv[2])
"""

READER = """
import os, sys, threading, time

stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set())).start()
rounds = 0
while not stop.is_set() or rounds < 3:
    for name in ("large.bin", "sub/small.bin"):
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(1 << 16)
            rest = file.read()
            assert len(first) + len(rest) == size, (name, size, len(first) + len(rest))
            whole = first + rest
            assert size in (whole.count(b"a"), whole.count(b"b")), name  # one version
    rounds += 1
    time.sleep(0.01)  # a process that never waits would slow everything else down
    if rounds == 1:
        print("reading", flush=True)
print("never short", flush=True)
"""

# Copies in small parts. With "stuck" it gets a few of them and then goes on no more.
SMALL_PARTS = """
import sys, threading, ckptfs
from ckptfs._store import copy

first = threading.Lock()

def write_at(path, offset, data, write=copy._write_at):
    write(path, offset, data)
    if path.name == ".large.bin.ckptfs-parts":
        if first.acquire(blocking=False):
            print("part", flush=True)
        sys.stdin.readline()

copy.PART_BYTES = 1 << 16
_, uri, how, target = sys.argv
if how == "stuck":
    copy._write_at = write_at
checkpoint = ckptfs.Checkpoint(uri)
if target:
    checkpoint.to_directory(target)
else:
    checkpoint.as_directory(mode="copy").__enter__()
"""

ENTERED = """
import sys, ckptfs
with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode=sys.argv[2]) as path:
    print(path, flush=True)
    sys.stdin.readline()
"""


def files_in(top: "str | Path") -> dict[str, bytes]:
    return {str(p.relative_to(top)): p.read_bytes() for p in Path(top).rglob("*") if p.is_file()}


def shown_in(top: "str | Path") -> dict[str, bytes]:
    """The files under their names: not what a copy keeps to go on with."""
    found = files_in(top)
    return {name: data for name, data in found.items() if not name.split("/")[-1].startswith(".")}


def in_temporary_folder() -> list[str]:
    """The names that a test could leave there."""
    names = os.listdir(tempfile.gettempdir())
    return [name for name in names if "checkpoint" in name or "ckptfs-copy" in name]


def write(top: Path, data: bytes, time_s: int) -> None:
    """A version of the checkpoint: large and small file of `data`, of that time."""
    (top / "sub").mkdir(parents=True, exist_ok=True)
    for name, count in (("large.bin", 3 * PART_BYTES + 5), ("sub/small.bin", 5)):
        (top / name).write_bytes(data * count)
        os.utime(top / name, (time_s, time_s))


@pytest.fixture
def top(bucket: Path) -> Path:
    """A checkpoint whose files hold nothing but the letter a."""
    write(bucket / "ckpt", b"a", 1_700_000_000)
    return bucket / "ckpt"


# -- 1: a second download truncates the files that others read


def test_another_copy_to_the_same_directory_harms_no_reader(
    node: Node, top: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    checkpoint = Checkpoint(uri_of(top))
    checkpoint.to_directory(target)

    def identity() -> list[tuple[int, int]]:
        infos = [(target / name).stat() for name in ("large.bin", "sub/small.bin")]
        return [(info.st_ino, info.st_mtime_ns) for info in infos]

    before = identity()
    with node.python(READER, str(target)) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == "reading\n"
        for _ in range(3):
            with node.python(COPIER, uri_of(top), str(target)) as copier:
                checkpoint.to_directory(target)
                copier.communicate()
            assert copier.returncode == 0
            assert identity() == before
        write(top, b"b", 1_800_000_000)
        checkpoint.to_directory(target)
        assert reader.communicate("\n")[0] == "never short\n"
    assert reader.returncode == 0
    assert files_in(target) == files_in(top)


# -- 2: a waiter takes the part that a killed downloader left for the whole


def test_a_waiter_whose_downloader_was_killed_completes_the_copy(
    node: Node, top: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    with node.python(SMALL_PARTS, uri_of(top), "stuck", str(target)) as downloader:
        assert downloader.stdout
        assert downloader.stdout.readline() == "part\n"
        with node.python(SMALL_PARTS, uri_of(top), "", str(target)) as waiter:
            wait_until(lambda: is_waiting(waiter.pid, target))
            assert "large.bin" not in shown_in(target)
            downloader.kill()
            waiter.communicate()
    assert downloader.returncode == -signal.SIGKILL
    assert waiter.returncode == 0
    assert files_in(target) == files_in(top)
    assert os.listdir(tmp_path) == ["copy"]


def is_waiting(pid: int, target: Path) -> bool:
    """Whether the process tries to get the lock of `target`."""
    found: list[str] = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    return f"{target.parent}/.{target.name}.ckptfs-lock" in found


def test_a_copy_that_was_begun_in_parts_of_another_size_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(4 * PART_BYTES)
    store = FakeStore({"large": data})
    store.fail("read_into", ckptfs.AccessDenied("no longer"), at=9, times=100)
    monkeypatch.setattr(copy, "PART_BYTES", PART_BYTES // 4)
    with pytest.raises(ckptfs.AccessDenied):
        copy.copy_directory(store, tmp_path / "copy")
    monkeypatch.setattr(copy, "PART_BYTES", PART_BYTES)
    copy.copy_directory(FakeStore({"large": data}), tmp_path / "copy")
    assert files_in(tmp_path / "copy") == {"large": data}


# -- 3: a server that dies in the middle leaves truncated files


def test_a_server_that_dies_leaves_an_error_and_no_truncated_file(
    node: Node, s3: S3Server, top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "_BACKOFF", Backoff(0.001, 0.001))
    monkeypatch.setattr(copy, "PART_BYTES", 1 << 16)
    target = tmp_path / "copy"
    errors: list[ckptfs.CkptfsError] = []
    real = copy._write_at

    def write_at(path: Path, offset: int, data: memoryview) -> None:
        real(path, offset, data)
        with lock:
            parts.append(path.name)
            if parts.count(".large.bin.ckptfs-parts") == 40:  # of 385
                forwarder.cut()

    parts: list[str] = []
    lock = threading.Lock()
    monkeypatch.setattr(copy, "_write_at", write_at)

    def download() -> None:
        try:
            checkpoint.to_directory(target)
        except ckptfs.CkptfsError as error:
            errors.append(error)

    with Forwarder(s3.endpoint) as forwarder:
        filesystem = s3.filesystem(
            endpoint_override=forwarder.endpoint,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        )
        checkpoint = Checkpoint(f"{top.parent.name}/ckpt", filesystem)
        downloads = [threading.Thread(target=download) for _ in range(2)]  # the second one waits
        for thread in downloads:
            thread.start()
        for thread in downloads:
            thread.join(60)
        assert [type(error) for error in errors] == [ckptfs.StoreUnavailable] * 2
        expected = files_in(top)
        assert shown_in(target).items() <= expected.items()
        assert "large.bin" not in shown_in(target)
        assert os.listdir(tmp_path) == ["copy"]
        monkeypatch.setattr(copy, "_write_at", real)
        forwarder.restore()
        assert checkpoint.to_directory(target) == str(target)
    assert files_in(target) == expected


# -- 4: what a killed process has downloaded stays for ever


@pytest.mark.mount
def test_nothing_is_left_of_a_process_that_was_killed_inside_a_mount(
    node: Node, top: Path, uri_of: UriOf
) -> None:
    node.configure(idle_exit_s=0.5)
    with node.python(ENTERED, uri_of(top), "mount") as process:
        assert process.stdout
        path = process.stdout.readline().strip()
        assert Path(path, "sub/small.bin").read_bytes() == b"aaaaa"
        process.kill()
    wait_until(lambda: sorted(os.listdir(node.folder)) == ["cache", "ckptfs.toml"])
    assert in_temporary_folder() == []


def test_nothing_is_left_of_a_process_that_was_killed_inside_a_copy(
    node: Node, top: Path, uri_of: UriOf
) -> None:
    with node.python(ENTERED, uri_of(top), "copy") as process:
        assert process.stdout
        path = process.stdout.readline().strip()
        assert files_in(path) == files_in(top)
        process.kill()
    with node.python(SMALL_PARTS, uri_of(top), "stuck", "") as process:
        assert process.stdout
        assert process.stdout.readline() == "part\n"
        process.kill()
    assert not os.path.exists(path)
    assert len(copies()) == 1
    with Checkpoint(uri_of(top)).as_directory(mode="copy") as path:
        assert copies() == [path]
    assert in_temporary_folder() == []


def copies() -> list[str]:
    """Directories that ``as_directory(mode="copy")`` has made, complete or not."""
    return [str(p) for p in Path(tempfile.gettempdir()).glob("ckptfs-copy-*/*") if p.is_dir()]


# -- 5: of two threads with one object, the first to leave takes the directory


@pytest.mark.mount
@pytest.mark.parametrize("mode", ["mount", "copy"])
def test_the_first_thread_to_leave_takes_nothing_from_the_second(
    node: Node, top: Path, uri_of: UriOf, mode: str
) -> None:
    checkpoint = Checkpoint(uri_of(top))
    both_in = threading.Barrier(2, timeout=60)

    def first() -> None:
        with checkpoint.as_directory(mode=mode) as path:  # type: ignore[arg-type]
            assert os.path.isdir(path)
            both_in.wait()

    thread = threading.Thread(target=first)
    thread.start()
    with checkpoint.as_directory(mode=mode) as path:  # type: ignore[arg-type]
        both_in.wait()
        thread.join(60)
        if mode == "mount":
            node.wait_quiet()
        assert files_in(path) == files_in(top)
    assert in_temporary_folder() == []


# -- 6: a failed download leaves a lock, and a directory that looks complete


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """The store of every checkpoint; access ends after some requests."""
    store = FakeStore({"a": b"1", "large": pattern(4 * PART_BYTES), "z": b"2"})
    store.fail("read_into", ckptfs.AccessDenied("the token has expired"), at=4, times=100)
    monkeypatch.setattr("ckptfs._local_directory.store_of", lambda *_: store)
    return store


def test_a_failed_copy_leaves_no_lock_and_nothing_that_looks_complete(
    failing: FakeStore, tmp_path: Path
) -> None:
    checkpoint = Checkpoint("mock:///ckpt")
    target = tmp_path / "copy"
    with pytest.raises(ckptfs.AccessDenied, match="expired"):
        checkpoint.to_directory(target)
    assert os.listdir(tmp_path) == ["copy"]
    assert "large" not in shown_in(target)
    assert "large" in "".join(files_in(target))  # for another try
    failing.fail("list", ckptfs.AccessDenied("the token has expired"))
    with pytest.raises(ckptfs.AccessDenied):
        checkpoint.to_directory(tmp_path / "other")
    assert os.listdir(tmp_path) == ["copy"]


def test_a_failed_copy_leaves_nothing_in_the_temporary_folder(failing: FakeStore) -> None:
    checkpoint = Checkpoint("mock:///ckpt")
    with (
        pytest.raises(ckptfs.AccessDenied, match="expired"),
        checkpoint.as_directory(mode="copy"),
    ):
        pass
    assert in_temporary_folder() == []
    failing.fail("list", ckptfs.AccessDenied("the token has expired"), times=2)
    with pytest.raises(ckptfs.AccessDenied):
        checkpoint.to_directory()
    assert in_temporary_folder() == []
