"""Prefetch through the mount: what was asked for comes, in that order, and nothing else."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server
from support.servers import Forwarder

import ckptfs
from ckptfs._client import client

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]
MIB = 1 << 20
LONG_AGO = (1_600_000_000, 1_600_000_000)
ONE_BY_ONE = {"connections_max": 1, "span_bytes_max": MIB}


def make(top: Path, files: dict[str, int]) -> None:
    """Files of these sizes, so old that their version needs no check."""
    for path, size in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(os.urandom(size))
        os.utime(top / path, LONG_AGO)


def cached(path: "str | Path") -> int:
    """Bytes of a file or checkpoint that are in the node's cache."""
    return int(os.getxattr(path, "user.ckptfs.cached"))


def state(path: str) -> str:
    return os.getxattr(path, "user.ckptfs.state").decode()


def gets(s3: S3Server) -> list[str]:
    """Names of the files in the order in which their bytes were asked for."""
    return [
        request.target.partition("?")[0].rpartition("/")[2]
        for request in s3.traffic().requests
        if request.method == "GET" and request.range
    ]


def test_prefetch_fetches_what_the_globs_name(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(**ONE_BY_ONE)
    named = [f"b{number:02}" for number in range(12)]
    named += [f"a{number:02}.json" for number in range(12)]
    make(bucket / "ckpt", dict.fromkeys(named, 1000) | {"sub/x.json": 1000, "a.bin": 5, "c": 7})
    named.append("x.json")
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(bucket / "ckpt")).as_directory(prefetch=["b*", "*.json"]) as path:
        wait_until(lambda: cached(path) == 25_000)
        node.wait_quiet()
        assert [name for name in ("a.bin", "c") if cached(f"{path}/{name}")] == []
        order = gets(s3)
        assert sorted(order) == sorted(named)
        # Eight files are under way at the same time.
        assert all(abs(order.index(name) - place) < 8 for place, name in enumerate(named))
        assert state(path) == "lazy"


def test_prefetch_of_all_files_caches_them_without_a_read(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    files = {"config.json": 100, "empty": 0, "a/large": 20 * MIB + 5, "a/b/small": 3}
    make(bucket / "ckpt", files)
    checkpoint = ckptfs.Checkpoint(uri_of(bucket / "ckpt"))
    with checkpoint.as_directory(prefetch=["*.json"]) as path:
        wait_until(lambda: cached(path) == 100)
        with checkpoint.as_directory(prefetch="all") as again:
            assert again == path
            wait_until(lambda: state(path) == "cached")
        assert cached(path) == sum(files.values())
        s3.reset_traffic()
        for name in files:
            assert Path(path, name).read_bytes() == (bucket / "ckpt" / name).read_bytes()
        assert gets(s3) == []


def test_prefetch_ends_with_its_context(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(**ONE_BY_ONE)
    make(bucket / "ckpt", {"large": 30 * MIB})
    make(bucket / "next", {"after": MIB})
    with Forwarder(s3.endpoint) as forwarder:

        def checkpoint(name: str) -> ckptfs.Checkpoint:
            uri = uri_of(bucket / name)
            return ckptfs.Checkpoint(uri.replace(quoted(s3.endpoint), quoted(forwarder.endpoint)))

        with checkpoint("ckpt").as_directory(prefetch="all") as path:
            wait_until(lambda: cached(path) >= 2 * MIB)
            forwarder.hold()
        wait_until(lambda: not os.path.exists(path))
        begun = gets(s3).count("large")
        forwarder.release()
        # This one queues behind whatever is left of the first.
        with checkpoint("next").as_directory(prefetch="all") as path:
            wait_until(lambda: state(path) == "cached")
        assert gets(s3).count("large") <= begun + 1  # one was on its way


def quoted(endpoint: str) -> str:
    return quote(endpoint, safe="")


def test_a_changed_file_does_not_stop_the_others(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.expected_in_log.append("b in s3://")
    make(bucket / "ckpt", {"a": 1000, "b": 1000, "c": 1000})
    checkpoint = ckptfs.Checkpoint(uri_of(bucket / "ckpt"))
    with checkpoint.as_directory() as path:
        (bucket / "ckpt" / "b").write_bytes(b"of another size")
        with checkpoint.as_directory(prefetch="all"):
            wait_until(lambda: cached(path) == 2000)
            wait_until(lambda: state(path) == "changed")
        assert os.getxattr(f"{path}/b", "user.ckptfs.state") == b"changed"
        assert b"b in s3://" in os.getxattr(path, "user.ckptfs.error")
        assert [cached(f"{path}/{name}") for name in "abc"] == [1000, 0, 1000]


def test_prefetch_beyond_the_cache_capacity_ends_early(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    node.configure(cache_bytes_max=4 * MIB)
    make(bucket / "ckpt", {f"{number:02}": MIB for number in range(12)})
    with ckptfs.Checkpoint(uri_of(bucket / "ckpt")).as_directory(prefetch="all") as path:
        wait_until(lambda: "ends early: the cache can hold" in node.log())
        node.wait_quiet()
        wait_until(lambda: cached(path) == 3 * MIB)
        assert sorted(gets(s3)) == ["00", "01", "02"]
        assert [name for name in sorted(os.listdir(path)) if cached(f"{path}/{name}")] == [
            "00",
            "01",
            "02",
        ]
        Path(path, "11").read_bytes()  # a reader gets room all the same
        node.wait_quiet()
    with client.connect() as connection:
        assert connection.status().cache_bytes <= 4 * MIB


def test_prefetch_without_a_mount_is_ignored(
    node: Node, bucket: Path, uri_of: UriOf, tmp_path: Path
) -> None:
    make(tmp_path, {"file": 5})
    with ckptfs.Checkpoint.from_directory(tmp_path).as_directory(prefetch="all") as path:
        assert path == str(tmp_path)
    make(bucket / "ckpt", {"a": 5, "b": 5})
    checkpoint = ckptfs.Checkpoint(uri_of(bucket / "ckpt"))
    with checkpoint.as_directory(mode="copy", prefetch=["a"]) as path:
        assert sorted(os.listdir(path)) == ["a", "b"]
    for prefetch in ("*.json", "", "ALL"):
        with (
            pytest.raises(TypeError, match="prefetch must be a list of globs, not the string"),
            checkpoint.as_directory(prefetch=prefetch),  # type: ignore[arg-type]
        ):
            pass
    assert not node.socket.exists()
