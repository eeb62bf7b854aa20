"""Copies that the processes of a node share: made once, whole or not there, gone with the last."""

import contextlib
import os
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.fakes import FakeStore, pattern
from support.s3server import S3Server
from support.worlds import READ_ONLY_ROOT, in_world

import ckptfs
from ckptfs._client import shared_copies
from ckptfs._store import copy

UriOf = Callable[[Path], str]
MIB = 1 << 20
SIZE = 3 * copy.PART_BYTES + 5
CANNOT_MOUNT = ckptfs.CannotMount("cannot mount: /dev/fuse is missing")

# Holds a copy until it is told to leave. With "stuck" it gets a part of a file, and then waits.
HOLDER = """
import sys, threading, ckptfs
from ckptfs._store import copy

uri, how, timeout_s, *include = sys.argv[1:]
first = threading.Lock()

def write_at(path, offset, data, write=copy._write_at):
    write(path, offset, data)
    if path.name.endswith("-parts"):
        if first.acquire(blocking=False):
            print("part", flush=True)
        sys.stdin.readline()

copy.PART_BYTES = 1 << 20
if how == "stuck":
    copy._write_at = write_at
options = {"mode": "copy", "timeout_s": float(timeout_s) or None, "include": include}
try:
    with ckptfs.Checkpoint(uri).as_directory(**options) as path:
        print(path, flush=True)
        sys.stdin.readline()
except ckptfs.CkptfsError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(1)
"""


class Holder:
    """A process that enters a copy; its standard input tells it to leave."""

    def __init__(self, node: Node, uri: str, *include: str, how: str = "", timeout_s: float = 0):
        self.process = node.python(HOLDER, uri, how, str(timeout_s), *include)

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def leave(self) -> None:
        self.process.communicate("\n", timeout=120)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder(node: Node) -> Iterator[Callable[..., Holder]]:
    """Makes holders, and ends those that are left."""
    made: list[Holder] = []

    def make(*arguments: str, **options: object) -> Holder:
        made.append(Holder(node, *arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(ValueError):  # its pipes are closed
            each.kill()
    with ckptfs.Checkpoint(str(node.folder)).as_directory(mode="copy", include=["-"]):
        pass  # sweeps


def files_in(top: "str | Path") -> dict[str, bytes]:
    return {str(p.relative_to(top)): p.read_bytes() for p in Path(top).rglob("*") if p.is_file()}


def copies() -> list[str]:
    return sorted(str(p) for p in Path(tempfile.gettempdir()).glob("ckptfs-copy-*"))


@pytest.fixture
def top(bucket: Path) -> Path:
    """A checkpoint with a file of several parts and a small one."""
    (bucket / "ckpt" / "sub").mkdir(parents=True)
    (bucket / "ckpt" / "large.bin").write_bytes(pattern(SIZE))
    (bucket / "ckpt" / "sub" / "small.txt").write_text("small")
    return bucket / "ckpt"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """The store of every checkpoint that has no location: of "mock:///ckpt"."""
    store = FakeStore({"large": pattern(2 * copy.PART_BYTES), "small": b"1"})
    monkeypatch.setattr("ckptfs._local_directory.store_of", lambda *_: store)
    return store


# -- one copy for all


def test_eight_processes_have_one_copy_that_is_fetched_once(
    holder: Callable[..., Holder], s3: S3Server, top: Path, uri_of: UriOf
) -> None:
    s3.reset_traffic()
    ranks = [holder(uri_of(top)) for _ in range(8)]
    (path,) = {rank.line() for rank in ranks}
    assert files_in(path) == files_in(top)
    assert s3.traffic().bytes_to_client <= 1.02 * SIZE + 8 * 100_000
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    Path(path, "sub", "small.txt").write_text("changed by one, seen by all")
    for rank in ranks[:6]:
        rank.leave()
    ranks[6].kill()
    assert Path(path, "large.bin").read_bytes() == pattern(SIZE)
    late = holder(uri_of(top))
    assert late.line() == path
    ranks[7].leave()
    assert Path(path, "sub", "small.txt").read_text() == "changed by one, seen by all"
    late.leave()
    assert copies() == []


def test_what_all_have_left_by_a_kill_is_not_used_again(
    holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    """Its users may have changed it, and the next one cannot know."""
    ranks = [holder(uri_of(top)) for _ in range(3)]
    (path,) = {rank.line() for rank in ranks}
    os.truncate(f"{path}/large.bin", 5)
    Path(path, "new").touch()
    for rank in ranks:
        rank.kill()
    assert copies() == [os.path.dirname(path)]
    again = holder(uri_of(top))
    assert again.line() == path
    assert files_in(path) == files_in(top)
    again.leave()
    assert copies() == []


def test_the_next_copy_of_another_checkpoint_removes_what_was_left(
    holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    used, stuck = holder(uri_of(top)), holder(uri_of(top), "large*", how="stuck")
    path = used.line()
    os.mkdir(f"{path}/read-only")
    Path(path, "read-only", "file").touch()
    os.chmod(f"{path}/read-only", 0o500)
    assert stuck.line() == "part"
    held = holder(uri_of(top), "s*")
    kept = held.line()
    used.kill()
    stuck.kill()
    assert len(copies()) == 3
    other = holder(uri_of(top), "*.txt")
    shown = other.line()
    assert copies() == sorted(map(os.path.dirname, [kept, shown]))
    assert files_in(kept) == {"sub/small.txt": b"small"}
    held.leave()
    other.leave()


def test_a_copier_that_is_killed_in_the_middle_is_followed_by_one_that_waits(
    holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    stuck = holder(uri_of(top), how="stuck")
    assert stuck.line() == "part"
    (folder,) = copies()
    waiting = [holder(uri_of(top)) for _ in range(2)]
    wait_until(lambda: all(has_open(each.process.pid, folder) for each in waiting), 120)
    assert not os.path.exists(f"{folder}/checkpoint")  # half of it is shown to no process
    assert [name for name in os.listdir(f"{folder}/filling") if not name.startswith(".")] == ["sub"]
    stuck.kill()
    (path,) = {each.line() for each in waiting}
    assert path == f"{folder}/checkpoint"
    assert files_in(path) == files_in(top)
    for each in waiting:
        each.leave()
    assert copies() == []


def has_open(pid: int, path: str) -> bool:
    """Whether the process has the copy's directory open: it is waiting then."""
    found: list[str] = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return path in found


def test_what_a_killed_copier_has_fetched_is_not_fetched_again(store: FakeStore) -> None:
    folder = shared_copies.folder_of("resume")
    store.fail("read_into", ckptfs.AccessDenied("killed"), at=2, times=100)

    def killed(target: Path) -> None:
        with pytest.raises(ckptfs.AccessDenied):
            copy.copy_directory(store, target)

    folder.mkdir(mode=0o700)
    killed(folder / "filling")
    healed = FakeStore({"large": pattern(2 * copy.PART_BYTES), "small": b"1"})

    def fill(target: Path) -> None:
        copy.copy_directory(healed, target)

    with shared_copies.shared_copy(folder, fill, None, "the checkpoint") as path:
        assert files_in(path) == {"large": pattern(2 * copy.PART_BYTES), "small": b"1"}
        assert os.listdir(folder) == ["checkpoint"]
    assert [call.operation for call in healed.calls].count("read_into") < 3
    assert copies() == []


def test_waiting_for_a_copier_that_goes_on_no_more_has_an_end(
    holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    stuck = holder(uri_of(top), how="stuck")
    assert stuck.line() == "part"
    os.kill(stuck.process.pid, signal.SIGSTOP)
    waiting = holder(uri_of(top), timeout_s=0.2)
    said = waiting.line()
    assert "StoreTimeout" in said
    assert "another process has been copying it to " + copies()[0] in said
    stuck.kill()
    assert waiting.process.wait(120) == 1


def test_a_holder_that_is_stopped_holds(
    holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    first = holder(uri_of(top))
    path = first.line()
    os.kill(first.process.pid, signal.SIGSTOP)
    second, third = holder(uri_of(top)), holder(uri_of(top), "*.txt")  # which sweeps
    assert second.line() == path
    assert third.line() != path
    second.leave()
    third.leave()
    assert files_in(path) == files_in(top)
    os.kill(first.process.pid, signal.SIGCONT)
    first.leave()
    assert copies() == []


def test_a_failed_copy_leaves_nothing_and_the_next_one_tries_itself(store: FakeStore) -> None:
    checkpoint = ckptfs.Checkpoint("mock:///ckpt")
    store.fail("read_into", ckptfs.AccessDenied("expired"), at=2)
    with pytest.raises(ckptfs.AccessDenied), checkpoint.as_directory(mode="copy"):
        pass
    assert copies() == []
    with checkpoint.as_directory(mode="copy") as path:
        assert files_in(path) == {"large": pattern(2 * copy.PART_BYTES), "small": b"1"}


def test_an_exception_of_the_caller_removes_it(store: FakeStore) -> None:
    checkpoint = ckptfs.Checkpoint("mock:///ckpt")
    with pytest.raises(KeyError), checkpoint.as_directory(mode="copy"):
        raise KeyError
    assert copies() == []


# -- what is the same copy


def test_another_version_is_another_copy(top: Path, uri_of: UriOf, node: Node) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(top))
    before = files_in(top)
    with checkpoint.as_directory(mode="copy") as old:
        (top / "large.bin").write_bytes(pattern(SIZE, 7))
        with checkpoint.as_directory(mode="copy") as new:
            assert new != old
            assert files_in(new) == files_in(top)
            assert files_in(old) == before
            checkpoint.set_metadata({"step": 1})  # is in no version: both are still what they were
            with checkpoint.as_directory(mode="copy") as again:
                assert again == new
    assert copies() == []


def test_a_change_between_the_listing_and_the_copy_is_an_error(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ckptfs.Checkpoint("mock:///ckpt")
    real = copy.listed

    def listed(given: object) -> object:
        found = real(given)  # type: ignore[arg-type]
        store.overwrite("large", pattern(2 * copy.PART_BYTES, 3))
        return found

    monkeypatch.setattr("ckptfs._local_directory.listed", listed)
    with (
        pytest.raises(ckptfs.ObjectChanged, match="large"),
        checkpoint.as_directory(mode="copy"),
    ):
        pass
    assert copies() == []


def test_objects_of_the_same_place_share_a_copy(top: Path, uri_of: UriOf, s3: S3Server) -> None:
    uri, filesystem = ckptfs.Checkpoint(uri_of(top)), s3.filesystem()
    place = str(top.relative_to(s3.root))
    others = [
        ckptfs.Checkpoint(uri_of(top) + "&connect_timeout=9"),
        ckptfs.Checkpoint(place, filesystem),
    ]
    with uri.as_directory(mode="copy", include=["*.txt", "l*"]) as path:
        for other in others:
            with other.as_directory(mode="copy", include=["l*", "*.txt", "l*"]) as same:
                assert same == path
        with uri.as_directory(mode="copy", include=["l*"]) as part:
            assert files_in(part).keys() == {"large.bin"}
    assert copies() == []


def test_objects_on_filesystems_that_are_not_described_share_none(store: FakeStore) -> None:
    """Two of one kind may hold different things under one name, e.g. in memory."""
    first, second = ckptfs.Checkpoint("mock:///ckpt"), ckptfs.Checkpoint("mock:///ckpt")
    with first.as_directory(mode="copy") as path, second.as_directory(mode="copy") as other:
        assert path != other
        with first.as_directory(mode="copy") as again:
            assert again == path


# -- children


FORKED = """
import os, sys, ckptfs

how = sys.argv[2]
with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode="copy") as path:
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        os.close(theirs)
        if how == "child leaves":
            sys.exit()
        os.read(ours, 1)  # until the test ends the parent, and what has its pipe
        print(os.path.exists(path + "/large.bin"), flush=True)
        sys.stdin.readline()
        os._exit(0)
    if how == "child leaves":
        os.waitpid(child, 0)
    print(path, flush=True)
    if how == "parent leaves":
        sys.exit()
    sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["child leaves", "parent leaves", "parent is killed"])
def test_forked_children(
    how: str, node: Node, holder: Callable[..., Holder], top: Path, uri_of: UriOf
) -> None:
    parent = node.python(FORKED, uri_of(top), how)
    assert parent.stdout
    path = parent.stdout.readline().rstrip("\n")
    if how == "child leaves":
        assert files_in(path) == files_in(top)
        parent.communicate("\n", timeout=120)
    elif how == "parent leaves":
        parent.wait(120)
        assert parent.stdout.readline() == "False\n"  # in the child
        parent.communicate("\n", timeout=120)
    else:
        parent.kill()
        assert parent.stdout.readline() == "True\n"
        other = holder(uri_of(top), "*.txt")  # sweeps
        other.line()
        other.leave()
        assert files_in(path) == files_in(top)
        joining = holder(uri_of(top))
        assert joining.line() == path
        joining.leave()
        assert files_in(path) == files_in(top)
        parent.communicate("\n", timeout=120)
        other = holder(uri_of(top), "*.txt")
        other.line()
        other.leave()
    assert copies() == []


# -- the temporary folder


@pytest.fixture
def folder(store: FakeStore) -> Path:
    """Where the copy of "mock:///ckpt" would be."""
    with ckptfs.Checkpoint("mock:///ckpt").as_directory(mode="copy") as path:
        return Path(path).parent


@pytest.mark.parametrize("planted", ["another user's", "for all", "a link", "a file"])
def test_what_another_user_has_planted_is_not_used(
    planted: str, tmp_path: Path, store: FakeStore
) -> None:
    checkpoint = ckptfs.Checkpoint("mock:///ckpt")
    with checkpoint.as_directory(mode="copy") as path:
        folder = Path(path).parent
    aim = tmp_path / "aim"
    (aim / "checkpoint").mkdir(parents=True)
    (aim / "checkpoint" / "small").write_bytes(b"evil")
    aim.chmod(0o777)
    if planted == "a link":
        folder.symlink_to(aim)
    elif planted == "a file":
        folder.write_bytes(b"")
    else:
        aim.rename(folder)
        aim = folder
        if planted == "another user's":
            if os.geteuid():
                pytest.skip("only root can make a directory of another user")
            folder.chmod(0o755)
            os.chown(folder, 4242, 4242)
    try:
        with (
            pytest.raises(ckptfs.CannotCopy, match=f"cannot copy to {folder}: .*set TMPDIR to"),
            checkpoint.as_directory(mode="copy"),
        ):
            pass
        if planted != "a file":
            assert files_in(aim) == {"checkpoint/small": b"evil"}
        assert os.path.lexists(folder)
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


COPY = """
import os, sys, tempfile, warnings, ckptfs
from ckptfs._client import client

def start(*_):
    raise ckptfs.CannotMount("cannot mount: /dev/fuse is missing")

client.connect_or_start = start
warnings.simplefilter("ignore")
for mode in ("copy", "auto"):
    try:
        with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode=mode) as path:
            print(mode, sorted(os.listdir(path)))
    except ckptfs.CkptfsError as error:
        print(mode, type(error).__name__, error)
print(os.listdir(os.environ["TMPDIR"]))
"""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("size=16m", "a copy takes 24.0 MiB, and .* has only 16.0 MiB free"),
        ("size=64m,nr_inodes=4", "a copy takes 4 inodes, and .* has only 1 free"),
    ],
)
def test_a_copy_that_does_not_fit_fetches_nothing(
    options: str, reason: str, node: Node, s3: S3Server, top: Path, uri_of: UriOf
) -> None:
    room = node.folder / "room"
    room.mkdir()
    s3.reset_traffic()
    script = f"mount -t tmpfs -o {options} tmpfs {room}"
    said = in_world(script, COPY, uri_of(top), TMPDIR=str(room)).stdout.splitlines()
    assert [line.split(" ")[:2] for line in said[:2]] == [
        ["copy", "CannotCopy"],
        ["auto", "CannotMount"],
    ]
    for line in said[:2]:
        assert_matches(f"s3://.*/ckpt.*: {reason}; free space there, or .*TMPDIR", line)
    assert "cannot mount: /dev/fuse is missing; and there can be no copy: " in said[1]
    assert said[2] == "[]"
    assert all("list-type=2" in request.target for request in s3.traffic().requests)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_copy_that_fits_is_made(node: Node, top: Path, uri_of: UriOf) -> None:
    room = node.folder / "room"
    room.mkdir()
    script = f"mount -t tmpfs -o size=26m tmpfs {room}"
    said = in_world(script, COPY, uri_of(top), TMPDIR=str(room)).stdout.splitlines()
    assert said == [f"{mode} ['large.bin', 'sub']" for mode in ("copy", "auto")] + ["[]"]


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_leaves_nothing(
    node: Node, top: Path, uri_of: UriOf
) -> None:
    room = node.folder / "room"
    room.mkdir()
    blind = "from ckptfs._store import copy\ncopy._require_room = lambda *_: None\n"
    script = f"mount -t tmpfs -o size=16m tmpfs {room}"
    said = in_world(script, blind + COPY, uri_of(top), TMPDIR=str(room)).stdout.splitlines()
    assert_matches(f"CannotCopy cannot copy to {room}/.*: No space left on device; free", said[0])
    assert_matches("auto CannotMount cannot mount: .*No space left on device; free space", said[1])
    assert said[2] == "[]"


def test_no_temporary_folder_is_an_error_in_words(node: Node, top: Path, uri_of: UriOf) -> None:
    said = in_world(
        READ_ONLY_ROOT, COPY.replace("print(os.", "(os."), uri_of(top)
    ).stdout.splitlines()
    assert_matches("copy CannotCopy cannot copy: No usable temporary directory found", said[0])
    assert_matches("auto CannotMount cannot mount: .*; set TMPDIR to a directory that can", said[1])


def test_a_temporary_folder_that_has_become_read_only_is_an_error_in_words(
    node: Node, top: Path, uri_of: UriOf
) -> None:
    room = node.folder / "room"
    room.mkdir()
    script = f"mount -t tmpfs tmpfs {room}; mount -o remount,ro {room}"
    known = f"import tempfile\ntempfile.tempdir = {str(room)!r}\n"
    said = in_world(script, known + COPY, uri_of(top), TMPDIR=str(room)).stdout.splitlines()
    assert_matches(
        f"CannotCopy cannot copy to {room}/.*: Read-only file system; set TMPDIR", said[0]
    )
    assert_matches("CannotMount cannot mount: .*: Read-only file system; set TMPDIR", said[1])


def test_a_read_only_root_is_no_hindrance_where_there_is_a_tmpdir(
    node: Node, top: Path, uri_of: UriOf
) -> None:
    room = node.folder / "room"
    room.mkdir()
    script = f"{READ_ONLY_ROOT}mount -t tmpfs tmpfs {room}"
    done = in_world(script, COPY, uri_of(top), HOME="/nonexistent", TMPDIR=str(room))
    said = done.stdout.splitlines()
    assert said == [f"{mode} ['large.bin', 'sub']" for mode in ("copy", "auto")] + ["[]"]


def test_a_file_system_without_locks_is_an_error_in_words(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        if how & shared_copies.fcntl.LOCK_NB:
            raise OSError(38, "Function not implemented")  # ENOSYS: Lustre without -o flock

    checkpoint = ckptfs.Checkpoint("mock:///ckpt")
    monkeypatch.setattr(shared_copies.fcntl, "flock", flock)
    with (
        pytest.raises(ckptfs.CannotCopy, match=r"has no locks \(Function .*; set TMPDIR to"),
        checkpoint.as_directory(mode="copy"),
    ):
        pass
    monkeypatch.undo()
    for left in copies():
        os.rmdir(left)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_user_without_name_or_home_has_copies_of_its_own(
    node: Node, top: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    shared = node.folder / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    for around in (node.folder, *node.folder.parents):
        if around.name.startswith("ckptfs-"):
            around.chmod(0o755)
    checkpoint = ckptfs.Checkpoint(uri_of(top))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(shared))
        with checkpoint.as_directory(mode="copy") as mine:
            child = os.fork()
            if not child:
                status = 1
                try:
                    os.setgroups([])
                    os.setresgid(12345, 12345, 12345)
                    os.setresuid(12345, 12345, 12345)
                    os.environ.pop("HOME", None)
                    with checkpoint.as_directory(mode="copy") as theirs:
                        assert theirs != mine
                        assert files_in(theirs).keys() == {"large.bin", "sub/small.txt"}
                        assert not os.access(mine, os.R_OK)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert os.listdir(shared) == [Path(mine).parent.name]
        assert os.listdir(shared) == []
