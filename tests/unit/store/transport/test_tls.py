"""Certificates of S3 servers: which count, and what a failure says."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from support.serverbase import accepted

from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.keys import fixed_keys
from ckptfs._store.s3.options import S3Options
from ckptfs._store.transport.answers import read_all
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs._store.transport.tls import Network
from ckptfs.errors import LocationError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

TIMEOUT_S = 5.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers each connection with `answer`. `tls` may change; None: the connection is plain."""

    def __init__(self, tls: ssl.SSLContext | None, answer: bytes) -> None:
        self.tls = tls
        self.answer = answer
        self.handshakes = 0

    @contextmanager
    def running(self) -> Generator[Server]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _serve(self, listener: socket.socket) -> None:
        for sock in accepted(listener):
            with sock, suppress(OSError):
                if self.tls is None:
                    sock.recv(1 << 16)
                    sock.sendall(self.answer)
                    continue
                with self.tls.wrap_socket(sock, server_side=True) as secured:
                    self.handshakes += 1
                    while secured.recv(1 << 16):
                        secured.sendall(self.answer)


def tls_of(ca: trustme.CA, *names: str, **more: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*names, **more).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


@contextmanager
def client_of(server: Server, scheme: str = "https", **options: Any) -> Generator[S3Client]:
    known = S3Options(endpoint_override=server.endpoint, scheme=scheme, anonymous=True, **options)  # type: ignore[arg-type]
    client = S3Client("bucket", known, fixed_keys(None), TIMEOUT_S)
    try:
        yield client
    finally:
        client.close()


def read(client: S3Client) -> bytes:
    with client.request(Asked("GET", "a")) as answer:
        return read_all(answer, 1 << 20)


def refused(server: Server, scheme: str = "https", **options: Any) -> BrokenConnection:
    with client_of(server, scheme, **options) as client, pytest.raises(BrokenConnection) as failed:
        read(client)
    assert "\n" not in str(failed.value)
    return failed.value


def test_certificates_of_a_file_and_of_a_directory(
    ca: trustme.CA, ca_file: Path, tmp_path: Path
) -> None:
    hashed = (
        subprocess.run(
            ["openssl", "x509", "-hash", "-noout", "-in", ca_file],
            stdout=subprocess.PIPE,
            check=True,
        )
        .stdout.decode()
        .strip()
    )
    folder = tmp_path / "certificates"
    folder.mkdir()
    shutil.copy(ca_file, folder / f"{hashed}.0")
    with Server(tls_of(ca, "127.0.0.1"), OK).running() as server:
        ways: list[dict[str, Any]] = [
            {"tls_ca_file_path": str(ca_file)},
            {"tls_ca_dir_path": str(folder)},
            {"tls_ca_pem": ca.cert_pem.bytes().decode()},
            {"tls_verify_certificates": False},
        ]
        for options in ways:
            with client_of(server, **options) as client:
                assert read(client) == b"ok"


def test_a_file_of_certificates_that_is_replaced(ca: trustme.CA, ca_file: Path) -> None:
    with (
        Server(tls_of(ca, "127.0.0.1"), OK).running() as server,
        client_of(server, tls_ca_file_path=str(ca_file)) as client,
    ):
        assert read(client) == b"ok"
        other = trustme.CA()
        server.tls = tls_of(other, "127.0.0.1")
        client.close()  # the next connection is a new one
        with pytest.raises(BrokenConnection, match="is not trusted"):
            read(client)
        fresh = ca_file.with_suffix(".new")
        other.cert_pem.write_to_path(str(fresh))
        os.replace(fresh, ca_file)
        assert read(client) == b"ok"
        ca_file.write_text("no certificate")
        client.close()
        with pytest.raises(BrokenConnection, match=r"ca\.pem: it has no certificates"):
            read(client)


def test_clients_share_contexts(ca_file: Path) -> None:
    trust = Network(tls_ca_file_path=str(ca_file))
    assert trust.context() is Network(tls_ca_file_path=str(ca_file)).context()
    os.utime(ca_file, ns=(1, 1))
    assert trust.context() is not Network().context()


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    for options in ({"tls_ca_file_path": "/no/such/file"}, {"tls_ca_dir_path": "/no/such/file"}):
        with pytest.raises(OSError, match="/no/such/file"):
            S3Client("bucket", S3Options(**options), fixed_keys(None), TIMEOUT_S)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the text of the caller's file: it has no certificates"):
        S3Client("bucket", S3Options(tls_ca_pem="none"), fixed_keys(None), TIMEOUT_S)


def test_an_authority_that_is_not_known(ca: trustme.CA) -> None:
    with Server(tls_of(ca, "127.0.0.1"), OK).running() as server:
        error = refused(server)
    assert "'127.0.0.1'" in str(error)
    assert "AWS_CA_BUNDLE" in error.advice
    assert "tls_ca_file_path" in error.advice


def test_a_certificate_of_another_name(ca: trustme.CA, ca_file: Path) -> None:
    with Server(tls_of(ca, "other.test"), OK).running() as server:
        error = refused(server, tls_ca_file_path=str(ca_file))
        assert "a name that the server's certificate has" in error.advice
        server.endpoint = server.endpoint.replace("127.0.0.1", "localhost")
        error = refused(server, tls_ca_file_path=str(ca_file))
        assert "localhost" in str(error)
        assert "a name that the server's certificate has" in error.advice


def test_a_certificate_that_has_expired(ca: trustme.CA, ca_file: Path) -> None:
    then = datetime.datetime(2020, 1, 1)
    with Server(tls_of(ca, "127.0.0.1", not_after=then), OK).running() as server:
        error = refused(server, tls_ca_file_path=str(ca_file))
    assert "expired" in str(error)
    assert error.advice == "renew the server's certificate, or set this machine's clock"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b""])
def test_a_server_without_tls(answer: bytes) -> None:
    with Server(None, answer).running() as server:
        assert "scheme=http" in refused(server).advice


@pytest.mark.parametrize(
    "text",
    [
        "<center>The plain HTTP request was sent to HTTPS port</center>",
        "Client sent an HTTP request to an HTTPS server.\n",
        "You're speaking plain HTTP to an SSL-enabled server port.",
        "This combination of host and port requires TLS.",
    ],
)
def test_a_server_that_wants_tls(text: str) -> None:
    head = f"HTTP/1.0 400 Bad Request\r\nContent-Length: {len(text)}\r\n\r\n"
    with Server(None, (head + text).encode()).running() as server:
        assert "https://" in refused(server, "http").advice


@pytest.mark.parametrize("answer", [b"", b"\x15\x03\x01\x00\x02\x02\x46"])
def test_tls_server_that_closes_plain_connections_is_named(answer: bytes) -> None:
    """It may send an alert of TLS before."""
    with Server(None, answer).running() as server:
        assert "https://" in refused(server, "http").advice


def test_a_redirect_to_https_is_named() -> None:
    head = b"HTTP/1.1 301 Moved\r\nLocation: https://u:p@h.test/x?sig=1\r\n"
    with (
        Server(None, head + b"Content-Length: 0\r\n\r\n").running() as server,
        client_of(server, "http") as client,
        pytest.raises(S3Error) as failed,
    ):
        read(client)
    assert str(failed.value) == "HTTP status 301: the store is elsewhere (it names https://h.test)"


def test_a_dot_at_the_end_of_a_name(
    ca: trustme.CA, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    here = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **more: Any) -> Any:
        names.append(host)
        return here("127.0.0.1", *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Server(tls_of(ca, "store.test"), OK).running() as server:
        server.endpoint = server.endpoint.replace("127.0.0.1", "store.test.")
        with client_of(server, tls_ca_file_path=str(ca_file)) as client:
            assert read(client) == b"ok"
    assert names == ["store.test."]


def test_options_that_cannot_be(ca_file: Path) -> None:
    with pytest.raises(LocationError, match="endpoint"):
        S3Client("b", S3Options(endpoint_override="a b"), fixed_keys(None), TIMEOUT_S)
