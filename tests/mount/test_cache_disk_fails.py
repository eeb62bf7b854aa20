"""A cache on a real disk that fails under a running daemon: reads go on, and each byte is right."""

import fcntl
import os
import random
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import chaostest.disk
import pytest
from conftest import Node, wait_until
from mount.test_cache_on_disk import MIB, sampled, write_files
from mount.test_lifecycle import daemons
from unit.daemon.cache.test_disk_faults import ALL

import ckptfs
from ckptfs._daemon.cache.disk_ops import persist

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk of its own"),
]

UriOf = Callable[[Path], str]
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, linux/ext4.h
_NO_FLUSH = 2


class Disk:
    """An ext4 file system in a file, mounted as the cache's directory."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.at = node.cache_dir
        self.serial = 0

    def mount(self) -> None:
        """Make it, and put it there."""
        self.serial += 1
        image = self.node.folder / f"disk-{self.serial}"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        self.node.run("mkfs.ext4", "-q", "-F", str(image))
        self.at.mkdir(exist_ok=True)
        self.node.run("mount", "-o", "loop,errors=remount-ro", str(image), str(self.at))
        self.at.chmod(0o700)

    def replace(self) -> None:
        """Put a new file system in its place, even while processes use the old one."""
        self.node.run("umount", "-l", str(self.at))
        self.mount()

    def fill(self) -> None:
        """Leave no block free, in the file ``x``."""
        with (self.at / "x").open("wb", 0) as file:
            for _ in range(3):  # what is reserved comes free when it is written
                with suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                with suppress(OSError):
                    os.fsync(file.fileno())

    def become_read_only(self) -> None:
        """As after an error that the file system found in itself."""
        source = self.node.run("findmnt", "-n", "-o", "SOURCE", str(self.at)).stdout.strip()
        Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error").write_text("1")
        with pytest.raises(OSError, match="Read-only"):
            (self.at / "x").touch()

    def break_down(self) -> None:
        """From now on everything fails with EIO, also what was read before."""
        fd = os.open(self.at, os.O_RDONLY)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
        os.close(fd)
        with pytest.raises(OSError, match="Input/output"):
            (self.at / "x").touch()


@contextmanager
def disk_of(node: Node) -> Iterator[Disk]:
    """A disk of the cache's own; the daemon ends before it goes."""
    disk = Disk(node)
    disk.mount()
    try:
        yield disk
    finally:
        node.end()
        # A process that ends lets go of its files a moment after it has lost its command line.
        wait_until(lambda: node.run("umount", str(disk.at), check=False).returncode == 0)


def read_everywhere(top: str, contents: dict[str, bytes], seed: int) -> None:
    """Read at random places, through new pages, and then all."""
    chance = random.Random(seed)
    for name, data in contents.items():
        fd = os.open(f"{top}/{name}", os.O_RDONLY)
        try:
            for _ in range(8):
                offset = chance.randrange(len(data))
                assert os.pread(fd, 100_000, offset) == data[offset : offset + 100_000]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        assert Path(top, name).read_bytes() == data


@pytest.mark.parametrize("passthrough", [True, False], ids=["passthrough", "ordinary"])
def test_a_disk_that_becomes_read_only(
    node: Node, bucket: Path, uri_of: UriOf, passthrough: bool
) -> None:
    node.configure(cache_bytes_max=20 * MIB, passthrough=passthrough)
    _read_on_after(lambda disk: disk.become_read_only(), node, bucket, uri_of)


@pytest.mark.parametrize("passthrough", [True, False], ids=["passthrough", "ordinary"])
def test_a_disk_that_breaks_down(
    node: Node, bucket: Path, uri_of: UriOf, passthrough: bool
) -> None:
    node.configure(cache_bytes_max=20 * MIB, passthrough=passthrough)
    _read_on_after(lambda disk: disk.break_down(), node, bucket, uri_of)


@contextmanager
def _begun(
    node: Node, bucket: Path, uri_of: UriOf
) -> Iterator[tuple[Disk, str, dict[str, bytes], BinaryIO]]:
    """A disk of its own, a mounted checkpoint and its content, and a file of it that is open, of
    which 3 MiB were read."""
    contents = write_files(bucket, {"a": 9 * MIB + 1, "b": 14 * MIB, "small": 100})
    with (
        disk_of(node) as disk,
        ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path,
        Path(path, "b").open("rb") as held,
    ):
        assert held.read(3 * MIB) == contents["b"][: 3 * MIB]
        yield disk, path, contents, held


def _read_on_after(
    fault: Callable[[Disk], object], node: Node, bucket: Path, uri_of: UriOf
) -> None:
    with _begun(node, bucket, uri_of) as (disk, path, contents, held):
        assert Path(path, "a").read_bytes() == contents["a"]
        node.wait_quiet()
        fault(disk)
        for seed in range(2):
            read_everywhere(path, contents, seed)
        assert held.read() == contents["b"][3 * MIB :]


@pytest.mark.parametrize("fault", [Disk.become_read_only, Disk.break_down])
def test_a_daemon_follows_another_without_a_disk(
    node: Node, bucket: Path, uri_of: UriOf, fault: Callable[[Disk], None]
) -> None:
    """And uses the one that is put in its place."""
    node.configure(passthrough=False)
    with _begun(node, bucket, uri_of) as (disk, path, contents, held):
        node.wait_quiet()
        fault(disk)
        for seed in range(2):
            victims = daemons(node)
            os.kill(victims[0], signal.SIGKILL)
            read_everywhere(path, contents, seed)
            assert daemons(node) not in ([], victims)
        assert node.status()["cache_bytes"] == 0
        disk.replace()
        assert held.read() == contents["b"][3 * MIB :]
        read_everywhere(path, contents, 2)
        node.wait_quiet()
        assert any(disk.at.glob("objects/*/*/about.json"))
        os.kill(daemons(node)[0], signal.SIGKILL)
        read_everywhere(path, contents, 3)


@pytest.fixture
def device(node: Node) -> Iterator[chaostest.disk.Disk]:
    """A disk of the cache's whose sectors fail. The daemon's log is elsewhere."""
    node.cache_dir.mkdir(mode=0o700)
    log = node.folder / "daemon.log"
    with chaostest.disk.Disk(node.folder, node.cache_dir, log) as disk:
        yield disk
        node.end()


def test_what_the_disk_refuses_later_is_not_read_without_a_check(
    node: Node, device: chaostest.disk.Disk, bucket: Path, uri_of: UriOf
) -> None:
    """The end of a file is written through the page cache, which takes it in any case."""
    contents = write_files(bucket, {"a": 600_000, "b": 5000})
    node.expected_in_log.append("cache: cannot write; reading without storing")
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        with device.failing(["write"]):
            for name in contents:
                os.setxattr(f"{path}/{name}", "user.ckptfs.prefetch", b"")
            node.wait_quiet()
            for data in node.cache_dir.glob("objects/*/*/data"):
                with data.open("rb") as file:
                    with suppress(OSError):
                        persist(file.fileno(), 0, MIB)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, content in contents.items():
            assert Path(path, name).read_bytes() == content
        assert node.expected_in_log[0] in node.log()


def test_a_disk_that_does_not_answer_holds_up_who_needs_it(
    node: Node, device: chaostest.disk.Disk, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(passthrough=False)
    contents = write_files(bucket, {"old": 3 * MIB, "new": 5 * MIB + 1})
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert Path(path, "old").read_bytes() == contents["old"]
        node.wait_quiet()
        with device.hanging():
            assert Path(path, "new").read_bytes() == contents["new"]
            assert node.status()["attachments"][0]["path"] == path
        read_everywhere(path, contents, 1)


def test_a_first_daemon_does_not_begin_on_a_disk_that_fails(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    write_files(bucket, {"small": 100})
    with disk_of(node) as disk:
        disk.become_read_only()
        with (
            pytest.raises(ckptfs.CkptfsError, match=f"^cache directory {disk.at}.*: Read-only"),
            ckptfs.Checkpoint(uri_of(bucket)).as_directory(mode="mount"),
        ):
            pass


def test_a_full_disk_ends_neither_daemon_nor_mount(node: Node, bucket: Path, uri_of: UriOf) -> None:
    """Their log is on it, too."""
    node.configure(passthrough=False)
    node.expected_in_log.append("lines of this log were lost: No space left on device")
    contents = write_files(bucket, {"a": 9 * MIB + 1, "small": 100})
    with disk_of(node) as disk, ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert Path(path, "small").read_bytes() == contents["small"]
        node.wait_quiet()
        with (disk.at / "daemon.log").open("ab", 0) as log:  # to the end of its last block
            log.write(b" INFO\n".rjust(-log.tell() % 4096))
        disk.fill()
        victims = daemons(node)
        os.kill(victims[0], signal.SIGKILL)
        read_everywhere(path, contents, 1)
        assert daemons(node) not in ([], victims)
        (disk.at / "x").unlink()
        node.here("detach", "--force", path)
        wait_until(lambda: "detached" in node.log())
        assert "Logging error" not in node.log()


def test_a_cache_that_is_removed_while_it_is_used(node: Node, bucket: Path, uri_of: UriOf) -> None:
    contents = write_files(bucket, {"a": 9 * MIB + 1, "b": 14 * MIB, "small": 100})
    with (
        ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path,
        Path(path, "b").open("rb") as held,
    ):
        assert held.read(3 * MIB) == contents["b"][: 3 * MIB]
        assert Path(path, "a").read_bytes() == contents["a"]
        node.wait_quiet()
        shutil.rmtree(node.cache_dir)
        for seed in range(2):
            read_everywhere(path, contents, seed)
        assert held.read() == contents["b"][3 * MIB :]
        node.wait_quiet()
        # It was made again, and is used.
        assert any(node.cache_dir.glob("objects/*/*/about.json"))


def test_the_limit_holds_under_several_readers(node: Node, bucket: Path, uri_of: UriOf) -> None:
    """With CKPTFS_FAULTS=all: 100 MB under 2 GB that 4 readers read."""
    limit, size = (100_000_000, 250_000_000) if ALL else (10 * MIB, 20 * MIB)
    node.configure(cache_bytes_max=limit)
    contents = write_files(bucket, dict.fromkeys("abcdefgh", size))
    wrong: list[str] = []

    def read(path: str, names: str) -> None:
        for name in names:
            with open(f"{path}/{name}", "rb", buffering=0) as file:
                for offset in range(0, size, MIB):
                    if file.read(MIB) != contents[name][offset : offset + MIB]:
                        wrong.append(f"{name} at {offset}")

    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        pairs = ("ae", "bf", "cg", "dh")
        readers = [threading.Thread(target=read, args=(path, names)) for names in pairs]
        with sampled(node.cache_dir) as samples:
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
    assert wrong == []
    besides = 64 << 10  # the daemon's log and the directories themselves
    assert limit // 2 < max(samples) <= limit + besides
    print(f"{len(samples)} samples, at most {max(samples)} bytes; the limit is {limit}")
