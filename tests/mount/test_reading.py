"""Byte equality through the kernel: every way to read, every size that could be special."""

import hashlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.s3server import S3Server

import ckptfs

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZES = [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1]
LARGE = 100 * MIB
"""More than the readahead's largest window."""
SMALL_FILES = 490


def make_tree(top: Path) -> None:
    """At least 500 files: all special sizes, one of 100 MiB, many small ones in folders."""
    chance = random.Random(2)
    (top / "sizes").mkdir(parents=True)
    for size in SIZES:
        (top / "sizes" / str(size)).write_bytes(chance.randbytes(size))
    with (top / "large.bin").open("wb") as file:
        for _ in range(LARGE // MIB):
            file.write(chance.randbytes(MIB))
    for index in range(SMALL_FILES):
        folder = top / "layers" / str(index % 17) / "größe"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"part {index}.bin").write_bytes(chance.randbytes(chance.randrange(20_000)))


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Iterator[Path]:
    top = s3.bucket_dir("reading") / "checkpoint"
    make_tree(top)
    yield top
    shutil.rmtree(top.parent)


@pytest.fixture
def mounted(node: Node, s3: S3Server, source: Path) -> Iterator[Path]:
    with ckptfs.Checkpoint(s3.uri("reading/checkpoint")).as_directory() as path:
        yield Path(path)


def files_of(top: Path) -> list[Path]:
    return sorted(path.relative_to(top) for path in top.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    with path.open("rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def test_read_every_file(mounted: Path, source: Path) -> None:
    names = files_of(source)
    assert len(names) >= 500
    assert files_of(mounted) == names
    differing = [name for name in names if digest(mounted / name) != digest(source / name)]
    assert differing == []


@pytest.mark.long
def test_every_file_with_parallel_threads(mounted: Path, source: Path) -> None:
    names = files_of(source)
    with ThreadPoolExecutor(16) as pool:
        equal = pool.map(
            lambda name: (mounted / name).read_bytes() == (source / name).read_bytes(), names
        )
    assert all(equal)


def test_random_pread(mounted: Path, source: Path) -> None:
    ours = {
        name: os.open(mounted / name, os.O_RDONLY) for name in ("large.bin", f"sizes/{8 * MIB + 1}")
    }
    theirs = {name: os.open(source / name, os.O_RDONLY) for name in ours}

    @settings(
        max_examples=150,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.sampled_from(sorted(ours)), st.integers(0, LARGE + MIB), st.integers(0, 5 * MIB))
    def check(name: str, offset: int, length: int) -> None:
        assert os.pread(ours[name], length, offset) == os.pread(theirs[name], length, offset)

    try:
        check()
    finally:
        for fd in [*ours.values(), *theirs.values()]:
            os.close(fd)


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_mmap(mounted: Path, source: Path, flags: int) -> None:
    for name in ["large.bin", *(f"sizes/{size}" for size in SIZES if size)]:
        with (mounted / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        with mapped:  # the file is closed: only the mapping holds it
            expected = (source / name).read_bytes()
            middle = len(expected) // 2
            assert mapped[middle : middle + 5000] == expected[middle : middle + 5000]
            assert mapped[-1:] == expected[-1:]
            assert hashlib.sha256(mapped).digest() == hashlib.sha256(expected).digest()


def test_sendfile(mounted: Path, source: Path) -> None:
    for name in ["large.bin", *(f"sizes/{size}" for size in SIZES)]:
        size = (source / name).stat().st_size
        with (mounted / name).open("rb") as file, tempfile.TemporaryFile() as copy:
            sent = 0
            while sent < size:
                count = os.sendfile(copy.fileno(), file.fileno(), sent, size - sent)
                assert count, f"{name} ended at {sent} of {size}"
                sent += count
            assert os.sendfile(copy.fileno(), file.fileno(), size, 1) == 0
            copy.seek(0)
            assert copy.read() == (source / name).read_bytes()


def test_o_direct(mounted: Path, source: Path) -> None:
    buffer = mmap.mmap(-1, MIB)  # O_DIRECT wants aligned memory
    for name in ["large.bin", *(f"sizes/{size}" for size in SIZES)]:
        fd = os.open(mounted / name, os.O_RDONLY | os.O_DIRECT)
        try:
            got = hashlib.sha256()
            offset = 0
            while count := os.preadv(fd, [buffer], offset):
                got.update(memoryview(buffer)[:count])
                offset += count
        finally:
            os.close(fd)
        assert got.digest() == hashlib.sha256((source / name).read_bytes()).digest(), name


@pytest.mark.long
def test_cp_and_tar(node: Node, mounted: Path, source: Path) -> None:
    copy = node.folder / "copy"
    node.run("cp", "-a", str(mounted), str(copy))
    node.run("diff", "-r", str(copy), str(source))
    for name in files_of(source):
        assert (copy / name).stat().st_mtime_ns == (mounted / name).stat().st_mtime_ns
    shutil.rmtree(copy)
    copy.mkdir()
    with subprocess.Popen(
        ["tar", "-C", str(mounted), "-cf", "-", "."], stdout=subprocess.PIPE
    ) as tar:
        node.run("tar", "-C", str(copy), "-xf", "-", stdin=tar.stdout)
        assert tar.wait(COMMAND_TIMEOUT_S) == 0
    node.run("diff", "-r", str(copy), str(source))


READER = """
import hashlib, os, sys
path, start = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
print("ready", flush=True)
sys.stdin.readline()
blocks = {}
for i in range(0, size, 1 << 20):
    offset = (start + i) % size
    blocks[offset] = hashlib.sha256(os.pread(fd, 1 << 20, offset)).digest()
whole = hashlib.sha256()
for offset in sorted(blocks):
    whole.update(blocks[offset])
print(whole.hexdigest(), flush=True)
"""


def test_eight_processes_fetch_each_byte_once(
    node: Node, s3: S3Server, mounted: Path, source: Path
) -> None:
    expected = hashlib.sha256()
    with (source / "large.bin").open("rb") as file:
        while block := file.read(MIB):
            expected.update(hashlib.sha256(block).digest())
    readers = [
        node.python(READER, str(mounted / "large.bin"), str(index * LARGE // 8 // MIB * MIB))
        for index in range(8)
    ]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    s3.reset_traffic()
    for reader in readers:
        reader.stdin.write("go\n")  # type: ignore[union-attr]
        reader.stdin.flush()  # type: ignore[union-attr]
    results = {reader.communicate(timeout=COMMAND_TIMEOUT_S)[0].strip() for reader in readers}
    assert results == {expected.hexdigest()}
    # On a machine that is busy one of the requests may have been made a second time.
    assert s3.traffic().bytes_to_client <= 1.02 * LARGE + 8 * MIB
