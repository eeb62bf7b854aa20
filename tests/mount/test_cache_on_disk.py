"""The cache outlives its daemon, distrusts its disk, and keeps to its limit."""

import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Node, wait_until
from support.s3server import Request, S3Server

import ckptfs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

MIB = 1 << 20
LONG_AGO_S = 86400.0


def write_files(folder: Path, sizes: dict[str, int], age_s: float = LONG_AGO_S) -> dict[str, bytes]:
    """Make the objects, `age_s` old; returns their bytes."""
    chance = random.Random(len(sizes))
    contents = {name: chance.randbytes(size) for name, size in sizes.items()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        mtime_s = int(time.time() - age_s)  # as on S3
        os.utime(folder / name, (mtime_s, mtime_s))
    return contents


def read_all(uri: str) -> dict[str, bytes]:
    with ckptfs.Checkpoint(uri).as_directory() as path:
        return {name: Path(path, name).read_bytes() for name in os.listdir(path)}


def requests_of_reads(s3: S3Server) -> list[Request]:
    """The requests that the server got, without listings."""
    return [request for request in s3.traffic().requests if "list-type=2" not in request.target]


def object_folders(node: Node) -> dict[str, Path]:
    """Folder in the cache of each object, by the object's name."""
    folders = {}
    for about in node.cache_dir.glob("objects/*/*/about.json"):
        folders[about.read_text().partition('"path":"')[2].partition('"')[0]] = about.parent
    return {path.rpartition("/")[2]: folder for path, folder in folders.items()}


# -- from one daemon to the next


def test_settled_objects_need_no_request_at_all(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    contents = write_files(bucket, {"empty": 0, "one": 1, "model": 20 * MIB + 7})
    assert read_all(uri_of(bucket)) == contents
    node.end()
    s3.reset_traffic()
    assert read_all(uri_of(bucket)) == contents
    assert requests_of_reads(s3) == []


def test_of_young_objects_the_listing_says_whether_the_cache_is_right(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    contents = write_files(bucket, {"empty": 0, "one": 1, "model": 20 * MIB + 7}, age_s=0)
    assert read_all(uri_of(bucket)) == contents
    node.end()
    s3.reset_traffic()
    assert read_all(uri_of(bucket)) == contents
    assert requests_of_reads(s3) == []


def test_an_object_written_again_under_the_same_size_and_time_is_not_served_from_the_cache(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("was written twice in one second")
    contents = write_files(bucket, {"model": 3 * MIB}, age_s=0)
    times = (bucket / "model").stat()
    assert read_all(uri_of(bucket)) == contents
    node.end()
    contents["model"] = contents["model"][::-1]
    (bucket / "model").write_bytes(contents["model"])
    os.utime(bucket / "model", ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    assert read_all(uri_of(bucket)) == contents


def test_an_object_written_again_in_the_same_second_is_not_served_from_the_cache(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("was written twice in one second")
    half_past_ns = int(time.time() - LONG_AGO_S) * 10**9 + 500_000_000
    contents = write_files(bucket, {"model": 3 * MIB})
    os.utime(bucket / "model", ns=(half_past_ns, half_past_ns))
    assert read_all(uri_of(bucket)) == contents
    node.end()
    contents["model"] = contents["model"][::-1]
    (bucket / "model").write_bytes(contents["model"])
    os.utime(bucket / "model", ns=(half_past_ns + 1000, half_past_ns + 1000))
    assert read_all(uri_of(bucket)) == contents


def test_a_killed_daemons_cache_is_used(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("was killed by signal 9: starting the next one")
    contents = write_files(bucket, {"model": 20 * MIB + 7})
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert Path(path, "model").read_bytes() == contents["model"]
        node.wait_quiet()
        os.kill(node.status()["pid"], 9)
    s3.reset_traffic()
    assert read_all(uri_of(bucket)) == contents
    assert [request for request in requests_of_reads(s3) if request.method == "GET"] == []


def test_a_flipped_bit_is_found(node: Node, s3: S3Server, bucket: Path, uri_of: UriOf) -> None:
    node.expected_in_log.append("block 1 of")
    contents = write_files(bucket, {"model": 4 * MIB + 7})
    assert read_all(uri_of(bucket)) == contents
    node.end()
    data = object_folders(node)["model"] / "data"
    with data.open("r+b") as file:
        file.seek(MIB + 12345)
        flipped = bytes([file.read(1)[0] ^ 4])
        file.seek(MIB + 12345)
        file.write(flipped)
    s3.reset_traffic()
    assert read_all(uri_of(bucket)) == contents
    gets = [request.range for request in requests_of_reads(s3) if request.method == "GET"]
    assert gets == [f"bytes={MIB}-{2 * MIB - 1}"]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def scribble(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def claim_absent_blocks(folder: Path) -> None:
    """The map names blocks whose bytes are a hole."""
    (folder / "map").write_bytes(struct.pack("<8sQQ3Q", b"ckptmap1", SIZE, MIB, 1, 2, 3))
    os.truncate(folder / "data", 0)
    os.truncate(folder / "data", SIZE)


def link_away(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/passwd")


SIZE = 2 * MIB + 5
DAMAGES: dict[str, Callable[[Path], object]] = {
    "untouched": lambda folder: None,
    "about cut": lambda folder: cut(folder / "about.json"),
    "about empty": lambda folder: os.truncate(folder / "about.json", 0),
    "about garbage": lambda folder: scribble(folder / "about.json"),
    "about gone": lambda folder: (folder / "about.json").unlink(),
    "about of an older format": lambda folder: (folder / "about.json").write_text('{"format":0}'),
    "map cut": lambda folder: cut(folder / "map"),
    "map empty": lambda folder: os.truncate(folder / "map", 0),
    "map garbage": lambda folder: scribble(folder / "map"),
    "map gone": lambda folder: (folder / "map").unlink(),
    "map lies": claim_absent_blocks,
    "data cut": lambda folder: cut(folder / "data"),
    "data empty": lambda folder: os.truncate(folder / "data", 0),
    "data garbage": lambda folder: scribble(folder / "data"),
    "data gone": lambda folder: (folder / "data").unlink(),
    "data is a link": lambda folder: link_away(folder / "data"),
}


def test_damage_of_every_kind(node: Node, bucket: Path, uri_of: UriOf) -> None:
    node.expected_in_log += ["cache: removing", "is damaged: dropped"]
    contents = write_files(bucket, dict.fromkeys(DAMAGES, SIZE))
    assert read_all(uri_of(bucket)) == contents
    node.end()
    folders = object_folders(node)
    for name, damage in DAMAGES.items():
        damage(folders[name])
    (node.cache_dir / "objects" / "stray").write_text("not ours")
    (node.cache_dir / "trash" / "left").mkdir()
    assert read_all(uri_of(bucket)) == contents
    for folder in object_folders(node).values():
        assert not (folder / "data").is_symlink()
    assert not (node.cache_dir / "trash" / "left").exists()


# -- the limit


def disk_bytes(top: Path) -> int:
    """The bytes that the files and folders of the cache take, also while they come and go.

    Sizes of different moments must not be added up: each is the lesser of two readings, the second
    in the reverse order, so that what left one file before it came to another counts once.
    """
    paths = [
        path
        for folder, _, names in os.walk(top, onerror=None)
        for path in (folder, *(os.path.join(folder, name) for name in names))
    ]
    first = [_blocks(path) for path in paths]
    second = [_blocks(path) for path in reversed(paths)]
    return 512 * sum(map(min, first, reversed(second)))


def _blocks(path: str) -> int:
    try:
        return os.lstat(path).st_blocks
    except FileNotFoundError:
        return 0


@contextmanager
def sampled(top: Path) -> Iterator[list[int]]:
    """Measures the cache again and again; the list fills while the context lasts."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.is_set():
            samples.append(disk_bytes(top))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def test_the_limit_holds_while_more_is_read(node: Node, bucket: Path, uri_of: UriOf) -> None:
    limit = 20 * MIB
    node.configure(cache_bytes_max=limit)
    contents = write_files(bucket, dict.fromkeys("abcd", 25 * MIB))
    for _ in range(2):  # the second daemon finds the cache full
        with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
            with sampled(node.cache_dir / "objects") as samples:
                for name, data in contents.items():
                    assert Path(path, name).read_bytes() == data
            node.wait_quiet()  # what is about to go is counted until it has gone
            status = node.status()
        assert max(samples) <= limit
        assert max(samples) > limit // 2  # it is used
        assert status["cache_bytes"] <= status["cache_bytes_max"] == limit
        node.end()


def test_several_files_open_at_once_share_a_small_cache(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    limit = 12 * MIB
    node.configure(cache_bytes_max=limit)
    contents = write_files(bucket, dict.fromkeys("abcd", 10 * MIB + 1))
    with (
        ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path,
        sampled(node.cache_dir / "objects") as samples,
    ):
        fds = {name: os.open(f"{path}/{name}", os.O_RDONLY) for name in contents}
        try:
            for offset in [*range(0, 11 * MIB, MIB // 2), 0, 5 * MIB]:
                for name, fd in fds.items():
                    data = contents[name][offset : offset + 100_000]
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(fd, 100_000, offset) == data
        finally:
            for fd in fds.values():
                os.close(fd)
    assert max(samples) <= limit


def test_the_least_recently_used_object_goes_first(node: Node, bucket: Path, uri_of: UriOf) -> None:
    node.configure(cache_bytes_max=20 * MIB)
    write_files(bucket, dict.fromkeys("abc", 8 * MIB))
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:

        def cached() -> dict[str, int]:
            return {
                name: int(os.getxattr(f"{path}/{name}", "user.ckptfs.cached")) // MIB
                for name in "abc"
            }

        for name in "ab":
            Path(path, name).read_bytes()
            node.wait_quiet()  # all of it is on the disk
        assert cached() == {"a": 8, "b": 8, "c": 0}
        Path(path, "a").read_bytes()
        Path(path, "c").read_bytes()
        node.wait_quiet()
        assert cached() == {"a": 8, "b": 0, "c": 8}


@contextmanager
def small_disk(node: Node, options: str) -> Iterator[None]:
    """A disk of its own for the cache."""
    node.cache_dir.mkdir()
    options = f"mode=700,{options}"
    node.run("mount", "-t", "tmpfs", "-o", options, "ckptfs-test", str(node.cache_dir))
    try:
        yield
    finally:
        node.end()
        # A process that ends has no command line any more before its files are closed.
        umount = ["umount", str(node.cache_dir)]
        wait_until(lambda: node.run(*umount, check=False).returncode == 0)


@pytest.mark.parametrize("options", ["size=3m", "size=64m,nr_inodes=9"], ids=["bytes", "inodes"])
def test_a_full_disk_means_reading_without_storing(
    node: Node, bucket: Path, uri_of: UriOf, options: str
) -> None:
    contents = write_files(bucket, {"large": 30 * MIB + 1, "other": 5 * MIB, "small": 100})
    with small_disk(node, options):
        assert read_all(uri_of(bucket)) == contents
        assert read_all(uri_of(bucket)) == contents
        assert disk_bytes(node.cache_dir) <= 64 * MIB
        # Where it is bytes that are missing, blocks may go in time for those that come.
        assert "No space left on device" in node.log() or "nr_inodes" not in options


def test_a_disk_that_is_full_before_the_start(node: Node, bucket: Path, uri_of: UriOf) -> None:
    contents = write_files(bucket, {"large": 30 * MIB + 1, "small": 100})
    with small_disk(node, "size=3m"):
        with pytest.raises(OSError, match="No space"):
            (node.cache_dir / "other").write_bytes(bytes(4 * MIB))
        assert read_all(uri_of(bucket)) == contents
