"""The mount is read-only, and says so to programs that ask: access(2), errors, modes."""

import contextlib
import ctypes
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Node
from mount.test_users import ALICE, BOB, as_user, let_others_in, shared_node
from support.errnos import code_of

import ckptfs
from ckptfs._client import client
from ckptfs._model.location import Location

__all__ = ["shared_node"]  # a fixture

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

_libc = ctypes.CDLL(None, use_errno=True)
UriOf = Callable[[Path], str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint on the local disk, with files of several programs."""
    top = tmp_path / "checkpoint"
    (top / "sub").mkdir(parents=True)
    (top / "config.json").write_text("{}")
    (top / "sub" / "a.bin").write_bytes(b"data")
    np.save(top / "n.npy", np.arange(1000))
    for name, journal in (("plain.db", "delete"), ("wal.db", "wal")):
        with contextlib.closing(sqlite3.connect(top / name)) as database:
            database.execute(f"pragma journal_mode={journal}")
            database.execute("create table t(a)")
            database.execute("insert into t values (1)")
            database.commit()
    return top


@pytest.fixture
def mounted(node: Node, source: Path) -> Iterator[str]:
    """Its path in a mount that only its user can enter."""
    with client.leased(Location("local", str(source))) as path:
        yield path


def writes(path: str) -> "dict[str, Callable[[], object]]":
    """Each call that would change something in the checkpoint."""
    file, folder, new = f"{path}/config.json", f"{path}/layers", f"{path}/new"
    return {
        "r+": lambda: os.open(file, os.O_RDWR),
        "append": lambda: os.open(file, os.O_WRONLY | os.O_APPEND),
        "truncating open": lambda: os.open(file, os.O_WRONLY | os.O_TRUNC),
        "create": lambda: os.open(new, os.O_CREAT | os.O_WRONLY, 0o600),
        "exclusive": lambda: os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o600),
        "tmpfile": lambda: os.open(path, os.O_TMPFILE | os.O_RDWR),
        "truncate": lambda: os.truncate(file, 0),
        "unlink": lambda: os.unlink(file),
        "mkdir": lambda: os.mkdir(new),
        "rmdir": lambda: os.rmdir(folder),
        "rename": lambda: os.rename(file, new),
        "link": lambda: os.link(file, new),
        "symlink": lambda: os.symlink("x", new),
        "mkfifo": lambda: os.mkfifo(new),
        "chmod": lambda: os.chmod(file, 0o644),
        "chown": lambda: os.chown(file, os.getuid(), os.getgid()),
        "utime": lambda: os.utime(file),
    }


def test_access_says_that_nothing_can_be_written(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        for place in (path, f"{path}/layers", f"{path}/config.json", str(module_node.mount)):
            assert os.access(place, os.F_OK)
            assert os.access(place, os.R_OK)
            for mask in (os.W_OK, os.R_OK | os.W_OK, os.W_OK | os.X_OK):
                assert not os.access(place, mask)
                assert not os.access(place, mask, effective_ids=True)
            assert os.access(place, os.X_OK) is os.path.isdir(place)
            assert module_node.run("test", "-w", place, check=False).returncode == 1
            assert module_node.run("test", "-r", place).returncode == 0
        for place in (path, f"{path}/config.json"):
            assert _libc.access(place.encode(), os.W_OK) == -1
            # As of a disk that is mounted read-only.
            assert ctypes.get_errno() == errno.EROFS
        os.chdir(f"{path}/layers")
        os.chdir("/")
        assert not os.access(f"{path}/nothing", os.F_OK)


def test_access_of_the_metadata_file(module_node: Node, small: Path, uri_of: UriOf) -> None:
    """The one file that changes, and by attributes only."""
    (small / ".metadata.json").write_text('{"a": 1}')
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        file = f"{path}/.metadata.json"
        assert os.access(file, os.R_OK)
        assert not os.access(file, os.W_OK)
        os.setxattr(path, "user.ckptfs.meta.a", b"2")
        assert Path(file).read_text() == '{"a": 2}'
        assert not os.access(file, os.W_OK)


def test_each_write_is_erofs(module_node: Node, small: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        found = {name: code_of(action) for name, action in writes(path).items()}
        unsupported = {"tmpfile": "ENOTSUP"}  # the kernel does not ask a daemon that lacks it
        assert found == dict.fromkeys(found, "EROFS") | unsupported
        assert sorted(os.listdir(path)) == sorted(os.listdir(small))


def test_attributes_can_be_set_where_nothing_can_be_written(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        set_each_attribute(path)


def set_each_attribute(path: str) -> None:
    for place in (path, f"{path}/layers", f"{path}/config.json"):
        os.setxattr(place, "user.ckptfs.prefetch", b"")
        # A prefetch may have the file open still.
        assert code_of(lambda p=place: os.setxattr(p, "user.ckptfs.evict", b"")) in ("", "EBUSY")
    os.setxattr(path, "user.ckptfs.meta.n", b"1")
    os.removexattr(path, "user.ckptfs.meta.n")


def test_numpy_and_sqlite_are_told(mounted: str) -> None:
    for mode in ("r", "c"):
        assert np.load(f"{mounted}/n.npy", mmap_mode=mode)[7] == 7
    assert code_of(lambda: np.load(f"{mounted}/n.npy", mmap_mode="r+")) == "EROFS"
    assert code_of(lambda: np.memmap(f"{mounted}/n.npy", mode="r+")) == "EROFS"
    for options in ("mode=rw", "mode=ro", "immutable=1"):
        assert rows(f"{mounted}/plain.db", options) == [(1,)]
    assert rows(f"{mounted}/wal.db", "immutable=1") == [(1,)]
    for options in ("mode=rw", "mode=ro"):  # it would have to make files beside it
        with pytest.raises(sqlite3.OperationalError, match="unable to open database file"):
            rows(f"{mounted}/wal.db", options)
    with (
        pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"),
        contextlib.closing(sqlite3.connect(f"{mounted}/plain.db")) as database,
    ):
        database.execute("insert into t values (2)")


def rows(path: str, options: str) -> "list[tuple[int]]":
    with contextlib.closing(sqlite3.connect(f"file:{path}?{options}", uri=True)) as database:
        return database.execute("select a from t").fetchall()


@contextlib.contextmanager
def bound_read_only(path: str, place: Path) -> Iterator[str]:
    """The checkpoint at another place, mounted there as ``ro``."""
    place.mkdir()
    for arguments in (("--bind", path, place), ("-o", "remount,bind,ro", place)):
        subprocess.run(["mount", *map(str, arguments)], check=True, timeout=60)
    try:
        yield str(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=60)


def check_read_only_bind(place: str) -> None:
    assert os.statvfs(place).f_flag & os.ST_RDONLY
    for below in (place, f"{place}/layers", f"{place}/config.json"):
        assert os.access(below, os.R_OK)
        assert not os.access(below, os.W_OK)
    assert code_of(lambda: os.setxattr(place, "user.ckptfs.meta.n", b"1")) == "EROFS"
    assert os.getxattr(place, "user.ckptfs.state")


def test_a_read_only_bind_mount_says_all_of_it(
    module_node: Node, small: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        # The kernel ties "read-only" of statvfs(3) and "attributes cannot be set" together.
        assert not os.statvfs(path).f_flag & os.ST_RDONLY
        with bound_read_only(path, module_node.folder / "bound") as place:
            check_read_only_bind(place)


def test_others_are_kept_out_of_a_mount_that_is_not_for_them(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    let_others_in(node.folder)
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        fd = os.open(path, os.O_RDONLY)

        def alice_is_kept_out() -> None:
            file = f"{path}/config.json"
            for action in (
                lambda: os.stat(node.mount),
                lambda: os.stat(path),
                lambda: os.stat(file),
                lambda: os.listdir(path),
                lambda: os.listdir(fd),
                lambda: os.open(file, os.O_RDONLY),
                lambda: os.open("config.json", os.O_RDONLY, dir_fd=fd),
                lambda: os.getxattr(path, "user.ckptfs.uri"),
                lambda: os.getxattr(fd, "user.ckptfs.uri"),
                lambda: os.setxattr(fd, "user.ckptfs.prefetch", b""),
                lambda: os.chdir(path),
            ):
                assert code_of(action) == "EACCES"
            for mask in (os.F_OK, os.R_OK, os.W_OK, os.X_OK):
                assert not os.access(path, mask)

        Path(path, "config.json").read_bytes()  # the kernel has its name and attributes
        as_user(ALICE, alice_is_kept_out)
        os.close(fd)


def test_a_shared_mount_goes_by_modes(shared_node: Node, small: Path, uri_of: UriOf) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))

    def alice_writes_nothing() -> None:
        with checkpoint.as_directory() as path:
            for place in (path, f"{path}/layers", f"{path}/config.json"):
                # As the kernel lets her set attributes: it asks the same question for both.
                assert os.access(place, os.R_OK | os.W_OK)
            refused = {name: code_of(action) for name, action in writes(path).items()}
            refused.pop("tmpfile")
            assert refused == dict.fromkeys(refused, "EROFS")
            set_each_attribute(path)

    as_user(ALICE, alice_writes_nothing)
    (attachment,) = shared_node.status()["attachments"]
    set_each_attribute(attachment["path"])  # root may, too
    with bound_read_only(attachment["path"], shared_node.folder / "bound") as place:
        as_user(ALICE, lambda: check_read_only_bind(place))
        check_read_only_bind(place)
        as_user(BOB, lambda: _is_refused(place))


def _is_refused(place: str) -> None:
    assert code_of(lambda: os.listdir(place)) == "EACCES"
    assert not os.access(f"{place}/config.json", os.R_OK)


def test_the_owner_of_a_copy_can_change_and_delete_it(
    shared_node: Node, small: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    checkpoint = ckptfs.Checkpoint(uri_of(small))
    let_others_in(tmp_path)
    home = shared_node.folder / "home"
    home.mkdir()
    os.chown(home, ALICE, ALICE)

    def alice_copies() -> None:
        with checkpoint.as_directory() as path:
            for command in (["cp", "-r"], ["cp", "-a"], ["cp", "-r", "--preserve=all"]):
                subprocess.run([*command, path, f"{home}/copy"], check=True, timeout=60)
                change_and_delete(home / "copy")
            shutil.copytree(path, home / "copy")
            change_and_delete(home / "copy")
            for _ in range(2):  # the second one overwrites the first
                shutil.copy2(f"{path}/config.json", home / "config.json")

    def change_and_delete(copy: Path) -> None:
        for place in (copy, *copy.rglob("*")):
            mode = stat.S_IMODE(place.stat().st_mode)
            assert mode == (0o700 if place.is_dir() else 0o600)
        (copy / "config.json").write_text("changed")
        (copy / "new").touch()
        subprocess.run(["rm", "-r", str(copy)], check=True, timeout=60)

    as_user(ALICE, alice_copies)
