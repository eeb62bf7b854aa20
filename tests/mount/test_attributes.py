"""Extended attributes, and what they say while bytes arrive."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Node, wait_until
from s3server import S3Server
from servers import Forwarder

import ckptfs
from ckptfs import xattrs

pytestmark = pytest.mark.mount

UriOf = Callable[[Path], str]

MIB = 1 << 20
WHOLE_S = 1_700_000_000
"""The AWS SDK takes rclone's "12:34:56.78Z" for no time at all; S3 itself has ".000Z" always."""
HTTP_BYTES_MAX = 64 << 10
"""Heads of a few requests and answers, and a listing."""


def attribute(path: str, name: str) -> str:
    return os.getxattr(path, f"user.ckptfs.{name}").decode()


def pread(path: str, length: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def test_which_attributes_there_are(node: Node, small: Path, uri_of: UriOf) -> None:
    full = {f"user.ckptfs.{name}" for name in ("uri", "version", "size", "cached", "state")}
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        assert set(os.listxattr(path)) == full
        assert set(os.listxattr(f"{path}/layers")) == {"user.ckptfs.uri"}
        assert set(os.listxattr(f"{path}/layers/0/weights.bin")) == full
        assert os.listxattr(node.mount) == []
        for place in (path, f"{path}/layers", f"{path}/config.json", str(node.mount)):
            for name in ("user.ckptfs.nothing", "user.other", "security.x", "trusted.x"):
                with pytest.raises(OSError, check=lambda error: error.errno == errno.ENODATA):
                    os.getxattr(place, name)
            for name in ("error", "skipped"):
                assert xattrs.get(place, f"user.ckptfs.{name}") is None
        with pytest.raises(FileNotFoundError):
            os.getxattr(f"{path}/nothing", "user.ckptfs.uri")


def test_what_they_say(node: Node, small: Path, uri_of: UriOf) -> None:
    os.utime(small / "config.json", (WHOLE_S, WHOLE_S))
    with ckptfs.Checkpoint(uri_of(small)).as_directory() as path:
        size = sum(file.stat().st_size for file in small.rglob("*") if file.is_file())
        version = attribute(path, "version")
        assert len(version) == 32
        assert set(version) <= set("0123456789abcdef")
        assert attribute(path, "size") == str(size)
        assert attribute(path, "cached") == "0"
        assert attribute(path, "state") == "lazy"
        file = f"{path}/config.json"
        stat = os.stat(file)
        assert attribute(file, "size") == str(stat.st_size)
        assert attribute(file, "version") == f"{stat.st_size}-{stat.st_mtime_ns}"
        assert (attribute(file, "cached"), attribute(file, "state")) == ("0", "lazy")
        assert (attribute(f"{path}/empty", "size"), attribute(f"{path}/empty", "state")) == (
            "0",
            "cached",
        )
        Path(file).read_bytes()
        etag = attribute(file, "version")
        assert "-" not in etag
        assert '"' not in etag
        assert attribute(file, "cached") == str(stat.st_size)
        wait_until(lambda: attribute(file, "state") == "cached")  # not fetching any more
        assert attribute(path, "version") == version
        assert attribute(path, "state") == "lazy"
        Path(path, "layers/0/weights.bin").read_bytes()
        wait_until(lambda: attribute(path, "state") == "cached")
        assert attribute(path, "cached") == str(size)
        dump = node.run("getfattr", "-d", "-m", "user.ckptfs", file).stdout
        assert 'user.ckptfs.state="cached"' in dump
        assert dump.count("user.ckptfs.") == 5


def test_uris_hold_no_secret_and_can_be_attached(
    node: Node,
    s3: S3Server,
    bucket: Path,
    monkeypatch: pytest.MonkeyPatch,
    uri_of: UriOf,
) -> None:
    odd = bucket / "run 1" / "50%25+50 % ?#é&=x" / "inner"
    odd.mkdir(parents=True)
    (odd / "f?i#l%e").write_bytes(b"data")
    with ckptfs.Checkpoint(uri_of(bucket / "run 1")).as_directory() as path:
        below = f"{path}/{odd.relative_to(bucket / 'run 1')}"
        uris = {place: attribute(place, "uri") for place in (path, below, f"{below}/f?i#l%e")}
        for uri in uris.values():
            assert uri.startswith(f"s3://{bucket.name}/run")
            assert s3.secret_key not in uri
            assert s3.access_key not in uri
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
        with ckptfs.Checkpoint(uris[path]).as_directory() as again:
            assert again == path
        with ckptfs.Checkpoint(uris[below]).as_directory() as inner:
            assert Path(inner, "f?i#l%e").read_bytes() == b"data"
            assert attribute(inner, "uri") == uris[below]
            assert attribute(f"{inner}/f?i#l%e", "uri") == uris[f"{below}/f?i#l%e"]
        with (
            pytest.raises(ckptfs.CheckpointIsFile),
            ckptfs.Checkpoint(uris[f"{below}/f?i#l%e"]).as_directory(),
        ):
            pass


def test_only_what_is_read_is_fetched(
    node: Node, s3: S3Server, bucket: Path, uri_of: UriOf
) -> None:
    data = os.urandom(4 * MIB)
    (bucket / "large.bin").write_bytes(data)
    os.truncate(bucket / "large.bin", 100 * MIB + 5)
    s3.reset_traffic()
    with ckptfs.Checkpoint(uri_of(bucket)).as_directory() as path:
        assert [request.method for request in s3.traffic().requests] == ["GET"]
        assert "list-type=2" in s3.traffic().requests[0].target
        assert s3.traffic().bytes_to_client < HTTP_BYTES_MAX
        file = f"{path}/large.bin"
        held = os.open(file, os.O_RDONLY)  # `cached` of a closed file counts whole pages
        # In the middle of blocks, because the kernel reads a little on.
        for block, offset in ((2, 300_000), (2, 700_000), (2, 500_000), (40, 300_000)):
            place = block * MIB + offset
            assert pread(file, 1, place) == (data[place : place + 1] or b"\0")
            fetched = MIB if block == 2 else 2 * MIB
            assert attribute(file, "cached") == attribute(path, "cached") == str(fetched)
            assert s3.traffic().bytes_to_client < fetched + HTTP_BYTES_MAX
        assert pread(file, 100, 100 * MIB + 2) == bytes(3)  # the last block is short
        assert attribute(file, "cached") == str(2 * MIB + 5)
        wait_until(lambda: attribute(file, "state") == "lazy")
        os.close(held)


def test_states_while_bytes_arrive(node: Node, s3: S3Server, bucket: Path) -> None:
    data = os.urandom(3 * MIB + 1)
    (bucket / "model.bin").write_bytes(data)
    with Forwarder(s3.endpoint) as forwarder:
        ends = (quote(endpoint, safe="") for endpoint in (s3.endpoint, forwarder.endpoint))
        uri = s3.uri(bucket.name).replace(*ends)
        with ckptfs.Checkpoint(uri).as_directory() as path:
            file = f"{path}/model.bin"
            assert attribute(file, "state") == "lazy"
            forwarder.hold()
            got: list[bytes] = []
            reader = threading.Thread(target=lambda: got.append(Path(file).read_bytes()))
            reader.start()
            wait_until(lambda: attribute(file, "state") == "fetching")
            assert attribute(path, "state") == "fetching"
            assert node.status()["attachments"][0]["state"] == "fetching"
            forwarder.release()
            reader.join()
            assert got == [data]
            wait_until(lambda: attribute(file, "state") == attribute(path, "state") == "cached")
            assert attribute(file, "cached") == str(len(data))
