"""A directory that is taken over on XFS or btrfs: the two files share their blocks until one of
them changes."""

import fcntl
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Node, wait_until
from mount.test_background_upload import contents, hold, slowly, spooled

from ckptfs._model.protocol.uploads import STAGED_BYTES_MAX

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
DISK_BYTES = 400 << 20
"""mkfs.xfs wants 300 MiB."""
BLOCK = 4096
EXTENTS_MAX = 64
_FIEMAP = 0xC020660B  # FS_IOC_FIEMAP, linux/fs.h
_FLAG_SYNC = 1
_EXTENT_LAST, _EXTENT_SHARED = 0x1, 0x2000  # linux/fiemap.h
_HEAD = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")


@pytest.fixture(params=["xfs", pytest.param("btrfs", marks=pytest.mark.long)])
def disk(request: pytest.FixtureRequest, node: Node) -> Iterator[Path]:
    """A directory on such a file system, which the cache's directory is on, too."""
    kind = request.param
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a disk of its own")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind}")
    if kind not in Path("/proc/filesystems").read_text().split():
        node.run("modprobe", kind, check=False)
    with mounted(node, kind) as at:
        yield at
        node.end()
        node.check_log(node.log())


@contextmanager
def mounted(node: Node, kind: str) -> Iterator[Path]:
    image = node.folder / "image"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    node.run(f"mkfs.{kind}", "-q", str(image))
    at = node.cache_dir
    at.mkdir()
    done = node.run("mount", "-t", kind, "-o", "loop", str(image), str(at), check=False)
    if done.returncode:
        pytest.skip(f"this machine cannot mount {kind} on a loop device: {done.stderr.strip()}")
    try:
        at.chmod(0o700)
        source = at / "source"
        source.mkdir()
        yield source
    finally:
        node.end()
        # A process that ends lets go of its files a moment after it has lost its command line.
        wait_until(lambda: node.run("umount", str(at), check=False).returncode == 0)


def is_shared(path: Path) -> bool:
    """Whether the file has all its blocks in common with another one, as the kernel says."""
    request = bytearray(_HEAD.size + EXTENTS_MAX * _EXTENT.size)
    _HEAD.pack_into(request, 0, 0, (1 << 64) - 1, _FLAG_SYNC, 0, EXTENTS_MAX, 0)
    with path.open("rb") as file:
        fcntl.ioctl(file, _FIEMAP, request)
    count = _HEAD.unpack_from(request)[3]
    found = [_EXTENT.unpack_from(request, _HEAD.size + i * _EXTENT.size) for i in range(count)]
    assert found
    assert found[-1][5] & _EXTENT_LAST
    return all(extent[5] & _EXTENT_SHARED for extent in found)


def used_bytes(top: Path) -> int:
    os.sync()
    space = os.statvfs(top)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


@pytest.fixture
def sources(disk: Path) -> Path:
    """Files of several pieces and of less than a block, with holes and unaligned ends."""
    chance = random.Random(3)
    sizes = {
        "pieces.bin": STAGED_BYTES_MAX + 5 * BLOCK + 123,
        "piece.bin": STAGED_BYTES_MAX,
        "byte.bin": STAGED_BYTES_MAX + 1,
        "a/blocks.bin": 16 * BLOCK,
        "a/less.bin": BLOCK - 1,
        "a/empty.bin": 0,
    }
    for name, size in sizes.items():
        path = disk / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(min(size, 64 * BLOCK)))
        os.truncate(path, size)  # the rest is a hole
        if size:
            with path.open("r+b") as file:
                file.seek(size - 1)
                file.write(b"x")
    (disk / "dense.bin").write_bytes(chance.randbytes(24 << 20))
    return disk


def test_the_daemon_shares_blocks_with_the_directory_until_one_changes(
    node: Node, sources: Path, bucket: Path, uri_of: UriOf
) -> None:
    place = bucket / "run" / "checkpoint"
    before = contents(sources)
    used = used_bytes(sources)
    upload = slowly(sources, uri_of(place))
    sender = hold(node)
    try:
        taken = node.cache_dir / "uploads" / upload.id / "files"
        assert used_bytes(sources) - used < 4 << 20  # 24 MiB are in dense.bin alone
        assert contents(taken) == before
        for name in ("pieces.bin", "piece.bin", "byte.bin", "dense.bin", "a/blocks.bin"):
            assert is_shared(taken / name), name
        assert (taken / "piece.bin").stat().st_blocks * 512 < 1 << 20  # its hole is one here, too
        with (sources / "dense.bin").open("r+b") as file:  # in place, as a program that saves again
            file.seek(5 * BLOCK + 7)
            file.write(bytes(3 * BLOCK))
            os.fsync(file.fileno())
        (sources / "piece.bin").unlink()
        os.truncate(sources / "a/blocks.bin", 1)
        assert contents(taken) == before
    finally:
        with suppress(ProcessLookupError):
            os.kill(sender, signal.SIGCONT)
    upload.wait(60)
    assert contents(place) == before
    wait_until(lambda: f"{upload.id}/upload.json" in spooled(node))
    wait_until(lambda: spooled(node) == [f"{upload.id}/upload.json"])
