"""HTTP proxies on the way to a store."""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
import trustme
from support.faultserver import FaultServer, Object
from support.proxyserver import ProxyServer

from ckptfs._store.s3.client import Asked, S3Client
from ckptfs._store.s3.keys import fixed_keys
from ckptfs._store.s3.options import S3Options
from ckptfs._store.s3.sigv4 import Keys
from ckptfs._store.transport.answers import read_all
from ckptfs._store.transport.dialing import resolve
from ckptfs._store.transport.errors import BrokenConnection, S3Error
from ckptfs._store.transport.proxies import parse_proxy
from ckptfs.errors import LocationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER = "us er:p@ss/w#rd"
USER_IN_URL = "us%20er:p%40ss%2Fw%23rd"
HOST = "s3.corp.test"
TIMEOUT_S = 5.0


class TlsFaultServer(FaultServer):
    """A store that speaks TLS."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__()
        self._tls = tls

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            super()._serve(self._tls.wrap_socket(connection, server_side=True))


def _server_tls(ca: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def client_of(opened: ExitStack, scheme: str, proxy: str, ca_file: str = "") -> S3Client:
    options = S3Options(
        endpoint_override=f"{scheme}://{HOST}",
        region="us-east-1",
        proxy=proxy,
        tls_ca_file_path=ca_file,
    )
    client = S3Client("bucket", options, fixed_keys(Keys("key", "S3CR3T")), TIMEOUT_S)
    opened.callback(client.close)
    return client


def read(client: S3Client) -> bytes:
    with client.request(Asked("GET", "run/a")) as answer:
        return read_all(answer, 1 << 20)


@pytest.mark.parametrize("user", ["", USER])
@pytest.mark.parametrize("proxy_scheme", ["http", "https"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_store_behind_a_proxy(
    opened: ExitStack, ca: trustme.CA, ca_file: str, scheme: str, proxy_scheme: str, user: str
) -> None:
    made = FaultServer() if scheme == "http" else TlsFaultServer(_server_tls(ca, HOST))
    store = opened.enter_context(made)
    store.objects["bucket/run/a"] = Object(b"content" * 9999, 1_600_000_000)
    tls = _server_tls(ca, "127.0.0.1") if proxy_scheme == "https" else None
    place = HOST if scheme == "http" else f"{HOST}:443"
    proxy = opened.enter_context(ProxyServer({place: store.endpoint}, user, tls))
    given = f"{USER_IN_URL}@" if user else ""
    client = client_of(opened, scheme, f"{proxy_scheme}://{given}{proxy.endpoint}", ca_file)
    for _ in range(2):
        assert read(client) == b"content" * 9999
    if scheme == "http":
        assert proxy.lines == [f"GET http://{HOST}/bucket/run/a HTTP/1.1"] * 2
    else:
        assert proxy.lines == [f"CONNECT {HOST}:443 HTTP/1.1"]  # the tunnel is kept


def test_the_name_is_not_resolved_here() -> None:
    with pytest.raises(OSError, match="cannot resolve"):
        resolve(HOST, 80, TIMEOUT_S)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("given", "said"), [("", "wants a user"), ("u:wrong@", "does not accept")])
def test_a_proxy_that_wants_another_user(
    opened: ExitStack, ca_file: str, scheme: str, given: str, said: str
) -> None:
    proxy = opened.enter_context(ProxyServer({}, USER))
    client = client_of(opened, scheme, f"http://{given}{proxy.endpoint}", ca_file)
    with pytest.raises(S3Error) as failed:
        read(client)
    assert failed.value.status == 407
    assert f"the proxy http://{proxy.endpoint} {said}" in str(failed.value)
    assert "wrong" not in str(failed.value)


@pytest.mark.parametrize(
    ("refusal", "error"),
    [("403 Forbidden", S3Error), ("503 Busy", BrokenConnection), ("404 No", BrokenConnection)],
)
def test_a_proxy_that_makes_no_tunnel(
    opened: ExitStack, ca_file: str, refusal: str, error: type[Exception]
) -> None:
    proxy = opened.enter_context(ProxyServer({}))
    proxy.refusal = refusal
    client = client_of(opened, "https", f"http://u:secret@{proxy.endpoint}", ca_file)
    with pytest.raises(error) as failed:
        read(client)
    text = f"the proxy http://{proxy.endpoint} makes no tunnel to {HOST}:443: {refusal}"
    assert text in str(failed.value)
    assert "secret" not in str(failed.value)


def test_an_answer_that_may_be_of_the_proxy_names_it(opened: ExitStack) -> None:
    proxy = opened.enter_context(ProxyServer({}))
    proxy.refusal = "403 Forbidden"
    with pytest.raises(S3Error, match=f"through the proxy http://{proxy.endpoint}"):
        read(client_of(opened, "http", f"http://{proxy.endpoint}"))


def test_a_proxy_that_is_not_there(opened: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        place = f"127.0.0.1:{gone.getsockname()[1]}"
    with pytest.raises(
        BrokenConnection, match=f"the proxy http://{place}: Connection ref"
    ) as failed:
        read(client_of(opened, "http", f"http://u:secret@{place}"))
    assert failed.value.advice == "check the proxy"


@pytest.mark.parametrize(
    ("url", "text", "authorization"),
    [
        ("http://proxy:3128", "http://proxy:3128", ""),
        ("proxy:3128", "http://proxy:3128", ""),
        ("HTTPS://Proxy/", "https://proxy", ""),
        ("http://u:p@[::1]:8", "http://[::1]:8", "Basic dTpw"),
        ("http://u@proxy", "http://proxy", "Basic dTo="),
        ("u%3A:p%40@proxy", "http://proxy", "Basic dTo6cEA="),
    ],
)
def test_urls_of_proxies(url: str, text: str, authorization: str) -> None:
    proxy = parse_proxy(url)
    assert (proxy.endpoint.text, proxy.authorization) == (text, authorization)


@pytest.mark.parametrize(
    "url", ["socks5://u:S3CR3T@h:1", "http://u:S3CR3T@h:x", "http://u:S3CR3T@"]
)
def test_a_proxy_that_cannot_be_used(url: str) -> None:
    with pytest.raises(LocationError, match="proxy") as refused:
        parse_proxy(url)
    assert "S3CR3T" not in str(refused.value)


def test_a_proxy_is_shown_without_its_password() -> None:
    assert "S3CR3T" not in repr(parse_proxy("http://u:S3CR3T@h"))
    assert "dTpT" not in repr(parse_proxy("http://u:S3CR3T@h"))
    assert parse_proxy("http://u:S3CR3T@h:1").endpoint.text == "http://h:1"
