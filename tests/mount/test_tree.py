"""Names and attributes: the whole tree is answered from the snapshot, as a local one would be."""

import ctypes
import os
import random
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

MS_REMOUNT = 1 << 5
"""Value: include/uapi/linux/mount.h."""
MANY_FILES = 3_000
OBJECTS = 10_000


@pytest.fixture
def source(bucket: Path) -> Path:
    """Files of special sizes in nested directories, with times of their own."""
    top = bucket / "run" / "checkpoint"
    for number, size in enumerate([0, 1, 511, 512, 513, 4096, 1 << 20, (1 << 20) + 1]):
        folder = top / "layers" / str(number % 3) / "deep" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{size}.bin"
        file.write_bytes(bytes(size))
        os.utime(file, ns=(0, (1_600_000_000 + number * 86_400) * 10**9))
    (top / "config.json").write_text("{}")
    # Whole seconds: the AWS SDK takes rclone's "12:34:56.78Z" for no time at all.
    os.utime(top / "config.json", (1_650_000_000, 1_650_000_000))
    return top


def walk(top: Path) -> dict[str, os.stat_result]:
    """Attributes of everything, by relative path ("." is the top)."""
    paths = [top, *top.rglob("*")]
    return {str(path.relative_to(top)): path.lstat() for path in paths}


def test_stat(module_node: Node, source: Path, uri_of: UriOf) -> None:
    expected = walk(source)
    with ckptfs.Checkpoint(uri_of(source)).as_directory() as path:
        found = walk(Path(path))
        assert found.keys() == expected.keys()
        for name, info in found.items():
            theirs = expected[name]
            assert stat.S_IFMT(info.st_mode) == stat.S_IFMT(theirs.st_mode)
            assert (info.st_uid, info.st_gid) == (os.geteuid(), os.getegid())
            if stat.S_ISDIR(info.st_mode):
                assert stat.S_IMODE(info.st_mode) == 0o700
                subfolders = [d for d in (source / name).iterdir() if d.is_dir()]
                assert info.st_nlink == 2 + len(subfolders)
                below = [i.st_mtime_ns for n, i in found.items() if is_file_in(name, n, i)]
                assert info.st_mtime_ns == max(below)
            else:
                assert stat.S_IMODE(info.st_mode) == 0o600
                assert info.st_nlink == 1
                assert info.st_size == theirs.st_size
                assert info.st_blocks == -(-info.st_size // 512)
                assert info.st_mtime_ns // 10**9 == theirs.st_mtime_ns // 10**9


def is_file_in(folder: str, name: str, info: os.stat_result) -> bool:
    return stat.S_ISREG(info.st_mode) and (folder == "." or name.startswith(f"{folder}/"))


def forget_unused_inodes(mount: Path) -> None:
    """Have the kernel ask for the inodes of this mount again that no process has open.

    A remount with unchanged flags does that (`reconfigure_super` in fs/super.c). The file
    `drop_caches` would do it for every mount, and so disturb the tests that run beside this one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_REMOUNT | os.statvfs(mount).f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV)
    assert libc.mount(None, os.fsencode(mount), None, flags, None) == 0, ctypes.get_errno()


def test_inodes_are_unique_and_stay(module_node: Node, source: Path, uri_of: UriOf) -> None:
    with (
        ckptfs.Checkpoint(uri_of(source)).as_directory() as path,
        ckptfs.Checkpoint(uri_of(source / "layers")).as_directory() as other,
    ):
        first = {name: info.st_ino for name, info in walk(Path(path)).items()}
        forget_unused_inodes(module_node.mount)
        assert {name: info.st_ino for name, info in walk(Path(path)).items()} == first
        others = [info.st_ino for info in walk(Path(other)).values()]
        numbers = [*first.values(), *others, os.stat(module_node.mount).st_ino]
        assert len(set(numbers)) == len(numbers)
        for folder, _, _ in os.walk(path):
            with os.scandir(folder) as entries:
                for entry in entries:
                    assert entry.inode() == os.stat(entry.path).st_ino


def test_the_mounts_root_shows_what_is_attached_now(
    module_node: Node, source: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(source)).as_directory():
        top = os.stat(module_node.mount)
        assert (stat.S_ISDIR(top.st_mode), stat.S_IMODE(top.st_mode)) == (True, 0o711)
        assert (top.st_uid, top.st_gid) == (os.geteuid(), os.getegid())
        assert (top.st_ino, top.st_nlink, top.st_size, top.st_blocks) == (1, 3, 0, 0)
        assert top.st_blksize == 1 << 20
        assert abs(time.time() - top.st_mtime) < 60
        assert top.st_atime_ns == top.st_ctime_ns == top.st_mtime_ns
        with ckptfs.Checkpoint(uri_of(source / "layers")).as_directory():
            both = os.stat(module_node.mount)
            assert both.st_nlink == 4
            assert both.st_mtime_ns > top.st_mtime_ns
        wait_until(lambda: os.stat(module_node.mount) == top)


def test_statvfs(module_node: Node, source: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(source)).as_directory() as path:
        space = os.statvfs(path)
        assert not space.f_flag & os.ST_RDONLY  # or the kernel would refuse to set attributes
        assert space.f_flag & os.ST_NOSUID
        assert space.f_namemax == 255
        size = sum(info.st_size for info in walk(source).values() if stat.S_ISREG(info.st_mode))
        assert space.f_blocks == -(-size // space.f_frsize)
        assert space.f_files == 9
        assert space.f_bfree == space.f_bavail == space.f_ffree == 0
        with ckptfs.Checkpoint(uri_of(source / "layers")).as_directory() as part:
            assert os.statvfs(path) == space
            assert 0 < os.statvfs(part).f_files < 9
            assert os.statvfs(module_node.mount).f_files == 9 + os.statvfs(part).f_files


def test_directory_entries_carry_their_type(module_node: Node, source: Path, uri_of: UriOf) -> None:
    with ckptfs.Checkpoint(uri_of(source)).as_directory() as path, os.scandir(path) as entries:
        # With DT_UNKNOWN, is_dir would call stat, which this path no longer allows.
        kinds = {entry.name: entry for entry in entries}
    assert kinds["layers"].is_dir(follow_symlinks=False)
    assert kinds["config.json"].is_file(follow_symlinks=False)


def test_names_that_are_not_there(
    module_node: Node, s3: S3Server, source: Path, uri_of: UriOf
) -> None:
    with ckptfs.Checkpoint(uri_of(source)).as_directory() as path:
        s3.reset_traffic()
        for _ in range(3):
            for name in ("nothing", "layers/nothing", "no/such/path", "x" * 255):
                with pytest.raises(FileNotFoundError):
                    os.stat(f"{path}/{name}")
        with pytest.raises(NotADirectoryError):
            os.stat(f"{path}/config.json/x")
        with pytest.raises(NotADirectoryError):
            os.listdir(f"{path}/config.json")
        with pytest.raises(IsADirectoryError):
            Path(path, "layers").read_bytes()
        with pytest.raises(FileNotFoundError):
            os.stat(module_node.mount / "nothing")
        assert os.path.samefile(f"{path}/..", module_node.mount)
        assert os.path.samefile(f"{path}/layers/..", path)
        assert s3.traffic().requests == []


def test_find_and_ls_agree_with_the_source(module_node: Node, source: Path, uri_of: UriOf) -> None:
    commands = [
        ("find", ".", "-type", "f", "-size", "+1k", "-newermt", "2020-09-14"),
        ("find", ".", "-type", "d", "-name", "deep*"),
        ("du", "-b", "config.json", "layers/0/deep/deeper/512.bin"),
        ("ls", "-R"),
    ]
    with ckptfs.Checkpoint(uri_of(source)).as_directory() as path:
        for command in commands:
            ours, theirs = (module_node.run(*command, cwd=top).stdout for top in (path, source))
            assert sorted(ours.splitlines()) == sorted(theirs.splitlines())
        files = ("find", ".", "-type", "f", "-printf", "%P %y %s %T@\n")
        found = [
            line.partition(".")[0] for line in module_node.run(*files, cwd=path).stdout.splitlines()
        ]
        assert len(found) == 9
        long = module_node.run("ls", "-lR", cwd=path).stdout
        assert long.count("-rw------- 1 root root") == 9


# -- many


@pytest.fixture(scope="module")
def large(s3: S3Server) -> Iterator[Path]:
    """10,000 small objects, 3,000 of them in one directory."""
    top = s3.bucket_dir("large")
    for index in range(OBJECTS):
        folder = top / ("flat" if index < MANY_FILES else f"{index % 70}/{index % 7}")
        if index % 1000 == 0 or index >= MANY_FILES:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05}-with-a-name-of-usual-length.bin").touch()
    yield top
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


SEEKER = """
import ctypes, os, random, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.telldir.argtypes = libc.readdir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
libc.rewinddir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]

def name_of(entry):  # struct dirent of x86-64 and arm64: 19 bytes before d_name
    return ctypes.string_at(entry + 19)

directory = libc.opendir(os.fsencode(sys.argv[1]))
seen = []
while True:
    position = libc.telldir(directory)
    entry = libc.readdir(directory)
    if not entry:
        break
    seen.append((position, name_of(entry)))
for position, name in random.Random(1).sample(seen, 300):
    libc.seekdir(directory, position)
    assert name_of(libc.readdir(directory)) == name, (position, name)
libc.rewinddir(directory)
assert name_of(libc.readdir(directory)) == seen[0][1]
libc.closedir(directory)
print(len({name for _, name in seen} - {b".", b".."}))
"""


@pytest.mark.long
def test_ten_thousand_objects(node: Node, s3: S3Server, large: Path, uri_of: UriOf) -> None:
    """Attaching lists and nothing else; afterwards names cost no request. One directory is large
    enough to be read in many pieces, in any order."""
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(large)).as_directory() as path:
        requests = s3.traffic().requests
        assert len(requests) >= OBJECTS // 1000
        assert all(r.method == "GET" and "list-type=2" in r.target for r in requests)
        s3.reset_traffic()
        found = node.run("find", ".", "-type", "f", "-printf", "%P %s\n", cwd=path).stdout
        assert len(found.splitlines()) == OBJECTS
        assert node.status()["attachments"][0]["files"] == OBJECTS

        flat = f"{path}/flat"
        expected = sorted(os.listdir(large / "flat"))
        assert len(expected) == MANY_FILES
        for _ in range(3):
            assert sorted(os.listdir(flat)) == expected
        with os.scandir(flat) as one, os.scandir(flat) as two:  # two positions at once
            names = [(a.name, b.name) for a, b in zip(one, two, strict=True)]
        assert sorted(name for name, _ in names) == expected
        assert all(a == b for a, b in names)
        chance = random.Random(3)
        for name in chance.sample(expected, 200):
            assert os.stat(f"{flat}/{name}").st_size == 0
        assert node.run(sys.executable, "-c", SEEKER, flat).stdout == f"{MANY_FILES}\n"
        assert s3.traffic().requests == []
