"""The tests' own instruments: what they say about the network has to be true."""

from __future__ import annotations

import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pyarrow.fs import FileInfo, FileSelector, FileSystem
from support.s3server import CountingProxy, Request, S3Server

CONTENT = bytes(range(256)) * (8 << 12)  # 8 MiB


def in_chunks(data: bytes, chunk_bytes: int) -> list[bytes]:
    edges = [*range(0, len(data), chunk_bytes), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def read(server: S3Server, path: str) -> bytes:
    with server.filesystem().open_input_file(path) as file:
        return file.read()


def test_counts_the_bytes_of_a_get() -> None:
    with S3Server(counted=True) as server:
        (server.bucket_dir("bucket") / "object").write_bytes(CONTENT)
        filesystem = server.filesystem()
        with filesystem.open_input_file("bucket/object") as file:
            server.reset_traffic()
            assert file.read_at(1 << 20, 4096) == CONTENT[4096:][: 1 << 20]
            assert file.read() == CONTENT
        traffic = server.traffic()
        sent = (1 << 20) + len(CONTENT)
        assert sent <= traffic.bytes_to_client <= sent * 1.01
        assert 0 < traffic.bytes_to_server < 10_000
        server.reset_traffic()
        assert server.traffic().bytes_to_client == 0


def test_lists_the_requests() -> None:
    with S3Server(counted=True) as server:
        (server.bucket_dir("bucket") / "an object").write_bytes(CONTENT)
        with server.filesystem().open_input_file("bucket/an object") as file:
            file.read_at(10, 100)
        assert server.traffic().requests == [
            Request("HEAD", "/bucket/an%20object", None),
            Request("GET", "/bucket/an%20object", "bytes=100-109"),
        ]


def test_sees_changes_of_the_folder_at_once(tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        path = server.bucket_dir("bucket") / "object"
        etags: set[bytes] = set()
        for content in (b"one", b"two", b"longer"):
            path.write_bytes(content)
            with server.filesystem().open_input_file("bucket/object") as file:
                assert file.read() == content
                etags.add(file.metadata()["ETag"])
        assert len(etags) == 3

        def listing() -> list[FileInfo]:
            return server.filesystem().get_file_info(FileSelector("bucket"))

        (path.parent / "another").write_bytes(b"")
        assert [info.base_name for info in listing()] == ["another", "object"]
        path.unlink()
        assert [info.base_name for info in listing()] == ["another"]


def bytes_read_by(server: S3Server) -> int:
    """The bytes that the server's process has read so far, also those from the page cache."""
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_etag_of_an_object_is_computed_once(tmp_path: Path) -> None:
    size = 64 << 20
    with S3Server(tmp_path) as server:
        with (server.bucket_dir("bucket") / "object").open("wb") as file:
            file.truncate(size)
        filesystem = server.filesystem()
        filesystem.open_input_file("bucket/object").close()
        before = bytes_read_by(server)
        assert before >= size
        for _ in range(10):
            filesystem.open_input_file("bucket/object").close()
        assert bytes_read_by(server) - before < size


def test_uri_is_what_pyarrow_reads() -> None:
    with S3Server() as server:
        (server.bucket_dir("bucket") / "a +%1 ü").write_bytes(b"content")
        filesystem, path = FileSystem.from_uri(server.uri("bucket/a +%1 ü"))
        with filesystem.open_input_file(path) as file:
            assert file.read() == b"content"


def test_is_gone_afterwards() -> None:
    with S3Server(counted=True) as server:
        root = server.root
        port = int(server.endpoint.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
    assert not root.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_shows_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rclone").write_text("#!/bin/sh\necho no licence to serve\nexit 1\n")
    (tmp_path / "rclone").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="no licence to serve"):
        S3Server().__enter__()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_proxy_parses_pipelined_and_split_requests(chunk_bytes: int) -> None:
    sent = (
        b"GET /a HTTP/1.1\r\nrange: bytes=0-1\r\n\r\n"
        b"PUT /b?x=1 HTTP/1.1\r\nContent-Length: 32\r\n\r\nGET /not/a HTTP/1.1\r\nrequest\r\n\r\n"
        b"HEAD /c HTTP/1.1\r\n\r\n"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        CountingProxy(f"127.0.0.1:{upstream.getsockname()[1]}") as proxy,
        socket.create_connection(("127.0.0.1", int(proxy.endpoint.rpartition(":")[2]))) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for chunk in in_chunks(sent, chunk_bytes):
            client.sendall(chunk)
        client.shutdown(socket.SHUT_WR)
        with upstream.accept()[0] as server:
            with server.makefile("rb") as received:
                assert received.read() == sent
            server.sendall(b"answer")
        with client.makefile("rb") as received:
            assert received.read() == b"answer"
        traffic = proxy.snapshot()
    assert traffic.requests == [
        Request("GET", "/a", "bytes=0-1"),
        Request("PUT", "/b?x=1", None),
        Request("HEAD", "/c", None),
    ]
    assert traffic.bytes_to_server == len(sent)
    assert traffic.bytes_to_client == len(b"answer")
